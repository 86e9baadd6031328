import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import huggingface_hub
import pytest
from s3fs import S3FileSystem

from pyramid_serve.checkpoints.sources import WHOLE, CheckpointError, resolve
from pyramid_serve.pyramid_flow.variants import variants
from pyramid_serve.whole_files import ASIDE_PATTERN
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.object_storage import bucket_at, client, environment_for, reached_at
from tests.unit.checkpoints.checkpoints_at_hand import write_checkpoint


def test_a_local_folder_is_returned_as_it_stands(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "causal_video_vae")
    assert resolve(str(tmp_path), parts=["causal_video_vae"]) == tmp_path


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no such folder"):
        resolve(tmp_path / "nothing")


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match="a checkpoint is a folder"):
        resolve(tmp_path / "model.bin")


def test_a_folder_that_is_no_checkpoint_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "photos")
    with pytest.raises(CheckpointError, match=r"looked for causal_video_vae/, text_encoder\*/; there are photos"):
        resolve(tmp_path, parts=["causal_video_vae", "text_encoder*", "photos"])


@pytest.fixture
def url() -> str:
    filesystem = fsspec.filesystem("memory")
    root = f"/{uuid4().hex}/model"
    files = {
        "pyramid_serve.json": b"{}",
        "README.md": b"#",
        "causal_video_vae/config.json": b"{}",
        "causal_video_vae/diffusion_pytorch_model.bin": b"vae",
        "diffusion_transformer_384p/config.json": b"{}",
        "diffusion_transformer_384p/diffusion_pytorch_model.bin": b"old",
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors": b"new",
        "tokenizer/merges.txt": b"",
    }
    for name, content in files.items():
        filesystem.pipe(f"{root}/{name}", content)
    return f"memory:/{root}"


def listing(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_from_a_url_only_the_needed_parts_are_copied(url: str, tmp_path: Path) -> None:
    folder = resolve(url, parts=["diffusion_transformer_384p"], cache=tmp_path)
    assert listing(folder) == [
        "causal_video_vae/config.json",
        "diffusion_transformer_384p/config.json",
        "diffusion_transformer_384p/diffusion_pytorch_model.safetensors",
        "pyramid_serve.json",
    ]


def test_from_a_url_the_whole_of_a_folder_may_be_a_part(url: str, tmp_path: Path) -> None:
    folder = resolve(f"{url}/diffusion_transformer_384p", parts=[WHOLE], cache=tmp_path)
    assert listing(folder) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_from_a_url_a_part_that_has_only_a_pickle_is_copied_with_it(url: str, tmp_path: Path) -> None:
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert (folder / "causal_video_vae/diffusion_pytorch_model.bin").read_bytes() == b"vae"


def test_from_a_url_nothing_is_copied_twice(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", None)
    assert resolve(url, parts=["causal_video_vae"], cache=tmp_path) == folder


def test_a_checkpoint_changed_at_its_url_is_copied_anew(url: str, tmp_path: Path) -> None:
    resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    fsspec.filesystem("memory").pipe(
        f"{url.removeprefix('memory:/')}/causal_video_vae/diffusion_pytorch_model.bin", b"2nd"
    )
    folder = resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert (folder / "causal_video_vae/diffusion_pytorch_model.bin").read_bytes() == b"2nd"


def test_a_copy_that_fails_leaves_no_half_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_half(remote: str, local: str) -> None:
        Path(local).write_bytes(b"v")
        raise OSError("connection lost")

    monkeypatch.setattr("pyramid_serve.checkpoints.sources._PATIENCE_S", 0.0)
    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", get_half)
    with pytest.raises(CheckpointError, match="connection lost"):
        resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


@pytest.mark.parametrize("source", ["memory://nowhere/at/all", "nosuchprotocol://bucket/model"])
def test_a_url_with_nothing_there_says_so(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=source):
        resolve(source, cache=tmp_path)


def test_a_file_url_is_used_in_place(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "causal_video_vae")
    assert resolve(tmp_path.as_uri(), parts=["causal_video_vae"]) == tmp_path


class Hub:
    """Stands in for the Hub: notes what was asked for and hands out a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[str, str | None, list[str]]] = []
        self.ignored: list[list[str] | None] = []

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None
    ) -> str:
        self.asked.append((repo, revision, allow_patterns))
        self.ignored.append(ignore_patterns)
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(write_checkpoint(tmp_path, "diffusion_transformer_384p", "diffusion_transformer_768p"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_from_the_hub_only_the_needed_parts_are_asked_for(hub: Hub) -> None:
    (hub.folder / "diffusion_transformer_384p/diffusion_pytorch_model.safetensors").touch()
    assert resolve("owner/name@v1", parts=["diffusion_transformer_384p"]) == hub.folder
    (repo, revision, patterns), *others = hub.asked
    assert (repo, revision, others) == ("owner/name", "v1", [])
    assert "diffusion_transformer_384p/*.safetensors" in patterns
    assert not any("768p" in pattern or pattern.endswith(".bin") for pattern in patterns)


def test_from_the_hub_the_whole_of_a_folder_may_be_a_part(hub: Hub) -> None:
    resolve("owner/name", parts=[WHOLE])
    assert {"*.json", "*.safetensors"} <= set(hub.asked[0][2])


def test_from_the_hub_a_pickle_is_asked_for_only_where_there_are_no_safetensors(hub: Hub) -> None:
    (hub.folder / "diffusion_transformer_768p/diffusion_pytorch_model.safetensors").touch()
    resolve("owner/name", parts=["diffusion_transformer_*"])
    assert hub.asked[-1] == ("owner/name", None, ["*.json", "diffusion_transformer_384p/*.bin"])


def test_from_the_hub_weights_in_half_precision_are_asked_for_only_where_there_are_no_others(hub: Hub) -> None:
    (hub.folder / "config.json").write_text("{}")
    (hub.folder / "diffusion_transformer_768p/diffusion_pytorch_model.safetensors").touch()
    resolve("owner/name", parts=["diffusion_transformer_768p"])
    assert hub.ignored == [["*.fp16*.safetensors"]]
    resolve("owner/name", parts=["diffusion_transformer_384p", WHOLE])
    assert hub.asked[2][2] == ["*.json", "diffusion_transformer_384p/*.fp16*.safetensors", "*.fp16*.safetensors"]
    assert hub.ignored[1:] == [["*.fp16*.safetensors"], None, ["*.fp16*.safetensors"]]


def test_from_a_url_weights_in_half_precision_are_copied_only_where_there_are_no_others(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}-halved"
    for name in ("vae/a.safetensors", "vae/a.fp16.safetensors", "unet/a.fp16.safetensors", "unet/a.bin"):
        memory.pipe_file(f"{root}/{name}", b"")
    folder = resolve(f"memory:/{root}", parts=["vae", "unet"], cache=tmp_path)
    copied = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert copied == {"vae/a.safetensors", "unet/a.fp16.safetensors"}


def test_variants_of_a_hub_checkpoint_are_listed_without_weights(hub: Hub) -> None:
    assert variants("owner/name") == ["diffusion_transformer_384p", "diffusion_transformer_768p"]
    assert [patterns for _, _, patterns in hub.asked] == [["*.json"]]


def test_a_hub_checkpoint_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such folder, .*: offline$"):
        resolve("owner/name")


# --- from an object storage, by several processes ---------------------------------------------------------------------

CONFIG, WEIGHTS = "causal_video_vae/config.json", "causal_video_vae/diffusion_pytorch_model.safetensors"
RESOLVE = """
import sys
from pathlib import Path
from pyramid_serve.checkpoints.sources import resolve
print(resolve(sys.argv[1], parts=["causal_video_vae"], cache=Path(sys.argv[2])))
"""


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def s3_url(s3_endpoint: str, proxy: FaultyProxy) -> Iterator[str]:
    """A checkpoint on S3, which is reached through the proxy."""
    with bucket_at(s3_endpoint) as root:
        for name, content in ((CONFIG, b"{}"), (WEIGHTS, bytes(100_000)), ("pyramid_serve.json", b"{}")):
            client(s3_endpoint).put_object(Bucket=root.removeprefix("s3://"), Key=f"model/{name}", Body=content)
        with reached_at(proxy.url):
            yield f"{root}/model"


def resolving(url: str, cache: Path, proxy: FaultyProxy) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RESOLVE, url, str(cache)]
    return subprocess.Popen(command, env=os.environ | environment_for(proxy.url), stdout=subprocess.PIPE, text=True)


def num_downloads(proxy: FaultyProxy) -> int:
    return sum(request.startswith("GET ") and request.endswith(WEIGHTS) for request in proxy.requests)


def check_copied(folder: Path, cache: Path) -> None:
    assert listing(folder) == [CONFIG, WEIGHTS, "pyramid_serve.json"]
    assert (folder / WEIGHTS).read_bytes() == bytes(100_000)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [folder]


def test_of_several_processes_one_copies_and_all_have_the_copy(s3_url: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.share, proxy.faults, proxy.wait_s = 1.0, (Fault.WAIT,), 0.3  # so that they meet
    processes = [resolving(s3_url, tmp_path, proxy) for _ in range(2)]
    folders = {Path(process.communicate(timeout=60)[0].strip()) for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (folder,) = folders
    check_copied(folder, tmp_path)
    assert num_downloads(proxy) == 1


def test_a_copy_whose_process_is_killed_leaves_nothing_half_and_is_made_by_the_next(
    s3_url: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.share, proxy.faults, proxy.wait_s = 1.0, (Fault.WAIT,), 0.1
    killed = resolving(s3_url, tmp_path, proxy)
    deadline = time.monotonic() + 60
    while not num_downloads(proxy) and time.monotonic() < deadline:
        time.sleep(0.01)
    proxy.wait_s = 0.0
    killed.kill()
    killed.communicate()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not (folder / WEIGHTS).exists()
    (folder / "causal_video_vae" / f"{ASIDE_PATTERN[:-1]}of-a-killed-process").write_bytes(b"half")
    assert resolve(s3_url, parts=["causal_video_vae"], cache=tmp_path) == folder
    check_copied(folder, tmp_path)


def test_a_copy_outlasts_errors_of_the_storage_that_pass(s3_url: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.share, proxy.wait_s = 0.4, 0.02
    check_copied(resolve(s3_url, parts=["causal_video_vae"], cache=tmp_path), tmp_path)
    assert proxy.num_faults


def test_a_folder_that_cannot_be_listed_is_not_left_out(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lsdir = S3FileSystem._lsdir

    async def deny(filesystem: S3FileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith("causal_video_vae"):
            raise PermissionError("Access Denied")
        return await lsdir(filesystem, path, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_lsdir", deny)
    with pytest.raises(CheckpointError, match="cannot be read: PermissionError: Access Denied"):
        resolve(s3_url, cache=tmp_path)
