"""Where checkpoints are, and how one becomes a local folder.

A checkpoint is a folder. Each of its sub-folders is a *part* and is fetched and loaded alone. Mistakes of the user are
reported as ``CheckpointError``, a ``ValueError`` of one line.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from pyramid_serve.checkpoints.naming import there
from pyramid_serve.patience import Patience
from pyramid_serve.reasons import first_line
from pyramid_serve.whole_files import ASIDE_PATTERN, make_folder, replaced_whole

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
"""A local folder, an fsspec URL (``s3://bucket/model``), a Hub id (``owner/name`` or ``owner/name@revision``), or the
name of a model in the package (``shapes``)."""

PACKAGED = Path(__file__).parents[1] / "models"
"""Checkpoints that come with the package, each a folder that is named here by its name alone."""
WHOLE = "."
"""The part of a checkpoint that is all of its folder, with its weights at the top, as a motion adapter alone is."""
_PATIENCE_S = 60.0
"""For how long errors of the filesystem of a URL are waited out."""
_NEEDED_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
_HALVED = "*.fp16*.safetensors"
"""Weights saved in half precision, which lie beside the others or in their place."""
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated", "md5Hash", "content_md5")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, not a checkpoint at all, or does not fit its module."""


# --- where they are -------------------------------------------------------------------------------------------------


def resolve(source: Source, *, parts: Sequence[str] = (), cache: Path | None = None) -> Path:
    """The local folder of a checkpoint, with at least ``parts`` in it.

    ``parts`` are names of sub-folders or patterns of them (``text_encoder*``), each of which must match one; ``WHOLE``
    is the folder itself, with the weights at its top. A local folder is returned as it stands, and ``shapes`` is the
    model in the package (a folder of that name is ``./shapes``). From a URL or the Hub only these sub-folders, the
    ``config.json`` of the others and the top-level ``*.json`` are copied. Of a part's weights those are copied that are
    safetensors; ``*.fp16.safetensors`` only where there are no others, ``.bin`` only where there are none. Copies of a
    URL go under ``cache`` (default ``~/.cache/pyramid_serve``), file by file, each written aside and then moved, and
    again when the listing at the URL has changed. Of several processes on a machine one copies, while the others wait.

    Raises ``CheckpointError`` for a source that is not there or lacks one of the parts.
    """
    if not str(source):
        raise CheckpointError("model: must name a folder, a URL, a Hub id or a model in the package")
    if isinstance(source, str) and source in {packaged.name for packaged in PACKAGED.glob("*")}:
        folder = PACKAGED / source
    elif isinstance(source, str) and "://" in source:
        folder = _copy_from_url(source, parts, cache or _default_cache())
    else:
        path = Path(source).expanduser()
        hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
        if path.is_dir():
            folder = path
        elif path.exists():
            raise CheckpointError(f"{source}: a file, but a checkpoint is a folder")
        elif hub_id:
            folder = _download_from_hub(hub_id["repo"], hub_id["revision"], parts)
        else:
            raise CheckpointError(f"{source}: no such folder")
    _check_parts(source, [entry.name for entry in folder.iterdir() if entry.is_dir()], parts)
    return folder


def _check_parts(source: Source, present: Sequence[str], parts: Sequence[str]) -> None:
    missing = [part for part in parts if part != WHOLE and not any(fnmatch(name, part) for name in present)]
    if missing:
        looked_for = ", ".join(f"{part}/" for part in missing)
        raise CheckpointError(f"{source}: no whole checkpoint: looked for {looked_for}{there(present)}")


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyramid_serve"


def _download_from_hub(repo: str, revision: str | None, parts: Sequence[str]) -> Path:
    import huggingface_hub  # here, since the other sources do not need it

    def download(patterns: list[str], *, halved: bool = False) -> Path:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    repo, revision=revision, allow_patterns=patterns, ignore_patterns=None if halved else [_HALVED]
                )
            )
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise CheckpointError(
                f"{repo}: no such folder, and not to be had from the Hub: {type(error).__name__}: {first_line(error)}"
            ) from error

    # The Hub's patterns take "*.json" in every folder, so that the variants' configs come along.
    folders = ["" if part == WHOLE else f"{part}/" for part in parts]
    folder = download(["*.json", *(f"{each}*{suffix}" for each in folders for suffix in _NEEDED_SUFFIXES)])
    for suffix in (_HALVED, "*.bin"):
        configs = [*sorted(folder.glob("*/config.json")), *([folder / "config.json"] if WHOLE in parts else [])]
        names = [str(config.parent.relative_to(folder)) for config in configs if config.is_file()]
        lacking = [
            "" if name == WHOLE else f"{name}/"
            for name in names
            if any(fnmatch(name, part) for part in parts) and not any((folder / name).glob("*.safetensors"))
        ]
        if lacking:
            folder = download(["*.json", *(each + suffix for each in lacking)], halved=suffix == _HALVED)
    return folder


def _copy_from_url(url: str, parts: Sequence[str], cache: Path) -> Path:
    import fsspec  # here, since the other sources do not need it
    from fsspec.implementations.local import LocalFileSystem

    patience = Patience(_PATIENCE_S)
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        filesystem.invalidate_cache()  # of listings: the checkpoint may have changed
        found = patience.wait_out(lambda: _listing(filesystem, root))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
    if not found:
        raise CheckpointError(f"{url}: no such folder")
    if isinstance(filesystem, LocalFileSystem):
        if not Path(root).is_dir():
            raise CheckpointError(f"{url}: a file, but a checkpoint is a folder")
        return Path(root)
    files = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
    folder = cache / hashlib.sha256(f"{url} {_stamp(files)}".encode()).hexdigest()[:24]
    needed = _needed_files(files, parts)
    if all((folder / name).exists() for name in needed) and folder.is_dir():
        return folder
    with _locked(folder):
        for name in needed:
            target, remote = folder / name, f"{root.rstrip('/')}/{name}"
            if target.exists():
                continue
            try:
                make_folder(target.parent)
                with replaced_whole(target) as aside:
                    patience.wait_out(partial(filesystem.get_file, remote, str(aside)))
            except Exception as error:  # each object store raises classes of its own
                raise CheckpointError(f"{url}/{name}: cannot be copied: {type(error).__name__}: {error}") from error
    return folder


def _listing(filesystem: Any, root: str) -> dict[str, dict[str, Any]]:
    """What is known of each file of a checkpoint, by its path; nothing where the folder is not there."""
    # Not by `find` or `walk`, which leave out a folder that cannot be listed just now.
    try:
        entries: list[dict[str, Any]] = [*filesystem.ls(root, detail=True)]
    except FileNotFoundError:
        return {}
    for part in [entry for entry in entries if entry["type"] == "directory"]:
        entries += filesystem.ls(part["name"], detail=True)
    return {str(entry["name"]): entry for entry in entries if entry["type"] != "directory"}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder of a copy, and hold its lock, which one process of a machine can have.

    The lock is free when the process that held it is gone; what that has left half written is removed. Raises
    ``CheckpointError``.
    """
    from filelock import FileLock, Timeout  # here, since the other sources do not need it

    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        make_folder(folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s: waiting for another process that copies it", folder)
            lock.acquire()
        for left in folder.rglob(ASIDE_PATTERN):
            left.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {type(error).__name__}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _stamp(files: Mapping[str, Mapping[str, Any]]) -> str:
    """A text that changes when a file at the URL does, as far as its filesystem tells."""
    return repr([(name, info.get("size"), [info.get(key) for key in _STAMPS]) for name, info in sorted(files.items())])


def _needed_files(files: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Of paths relative to a checkpoint: top-level json, every part's config, and all that ``parts`` need."""
    has_safetensors = {name.partition("/")[0] for name in files if name.endswith(".safetensors")}
    has_plain = {
        name.rpartition("/")[0] for name in files if name.endswith(".safetensors") and not fnmatch(name, _HALVED)
    }
    needed = []
    for name in sorted(files):
        part, slash, file = name.partition("/")
        if fnmatch(name, _HALVED) and name.rpartition("/")[0] in has_plain:
            continue
        suffixes = _NEEDED_SUFFIXES if part in has_safetensors else (*_NEEDED_SUFFIXES, ".bin")
        is_wanted = any(fnmatch(part, pattern) for pattern in parts) and name.endswith(suffixes)
        is_wanted_at_top = not slash and name.endswith(_NEEDED_SUFFIXES if WHOLE in parts else ".json")
        if (slash and (file == "config.json" or is_wanted)) or is_wanted_at_top:
            needed.append(name)
    return needed


def read_config(folder: Source) -> dict[str, Any]:
    """The ``config.json`` of a part. Raises ``CheckpointError`` if it is missing or not a JSON object."""
    return read_json(Path(folder) / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ``CheckpointError`` if it is missing or not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content
