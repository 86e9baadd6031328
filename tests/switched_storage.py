"""A filesystem ``switched://`` over the local one that refuses to work when it is told to, with a real errno."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
from fsspec.implementations.local import LocalFileSystem

WRITES = ("pipe_file", "rm_file", "rm")
READS = ("cat_file", "info", "ls")
FULL = [errno.ENOSPC, errno.EDQUOT]
READ_ONLY = [errno.EROFS, errno.EACCES, errno.EPERM]


class SwitchedFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Does what the local filesystem does, unless ``refuses`` gives an error for an operation and its path.

    ``calls`` has every operation with its path.
    """

    protocol = "switched"
    cachable = False
    refuses: ClassVar[Callable[[str, str], Exception | None]] = staticmethod(lambda operation, path: None)
    calls: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("switched://").strip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return self._do("ls", path, lambda: self._local.ls(path, detail=detail))

    def info(self, path: str, **_: Any) -> Any:
        return self._do("info", path, lambda: self._local.info(path))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> Any:
        return self._do("cat_file", path, lambda: self._local.cat_file(path, start=start, end=end))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> Any:
        def put() -> None:
            self._local.makedirs(os.path.dirname(path), exist_ok=True)
            aside = Path(f"{path}.{uuid4().hex}.aside")
            aside.write_bytes(value)
            aside.rename(path)  # object stores put a file whole, too

        return self._do("pipe_file", path, put)

    def rm_file(self, path: str) -> Any:
        return self._do("rm_file", path, lambda: self._local.rm_file(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> Any:
        return self._do("rm", path, lambda: self._local.rm(path, recursive=recursive, maxdepth=maxdepth))

    def _do(self, operation: str, path: str, work: Callable[[], Any]) -> Any:
        type(self).calls.append((operation, path))
        error = type(self).refuses(operation, path)
        if error is not None:
            raise error
        return work()


fsspec.register_implementation("switched", SwitchedFileSystem, clobber=True)


@contextmanager
def refusing(
    number: int | Exception = errno.ENOSPC, *, operations: tuple[str, ...] = WRITES, containing: str = ""
) -> Iterator[None]:
    """Refuse these operations on paths that contain a text, with an errno or an error, while the block runs."""

    def refuse(operation: str, path: str) -> Exception | None:
        if operation not in operations or containing not in path:
            return None
        return number if isinstance(number, Exception) else OSError(number, os.strerror(number), path)

    SwitchedFileSystem.refuses = staticmethod(refuse)
    try:
        yield
    finally:
        SwitchedFileSystem.refuses = staticmethod(lambda operation, path: None)
