from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import huggingface_hub
import pytest

from pyramid_serve.checkpoints.sources import CheckpointError, resolve
from pyramid_serve.pyramid_flow.variants import variants
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

    monkeypatch.setattr(fsspec.filesystem("memory"), "get_file", get_half)
    with pytest.raises(CheckpointError, match="connection lost"):
        resolve(url, parts=["causal_video_vae"], cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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

    def snapshot_download(self, repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo, revision, allow_patterns))
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


def test_from_the_hub_a_pickle_is_asked_for_only_where_there_are_no_safetensors(hub: Hub) -> None:
    (hub.folder / "diffusion_transformer_768p/diffusion_pytorch_model.safetensors").touch()
    resolve("owner/name", parts=["diffusion_transformer_*"])
    assert hub.asked[-1] == ("owner/name", None, ["*.json", "diffusion_transformer_384p/*.bin"])


def test_variants_of_a_hub_checkpoint_are_listed_without_weights(hub: Hub) -> None:
    assert variants("owner/name") == ["diffusion_transformer_384p", "diffusion_transformer_768p"]
    assert [patterns for _, _, patterns in hub.asked] == [["*.json"]]


def test_a_hub_checkpoint_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such folder, .*: offline$"):
        resolve("owner/name")
