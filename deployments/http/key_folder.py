"""API keys in a folder, one in each file, as Kubernetes mounts a Secret."""

import hashlib
import logging
import time
from collections.abc import Collection, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

_REREAD_S = 10.0


def digest_of(key: str) -> bytes:
    """What is kept of a key in memory."""
    return hashlib.sha256(key.encode()).digest()


def check_key(key: str) -> str:
    """The key. Raises ``ValueError`` for a key that no request could carry."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        # The message leaves out the key itself, because it may be right except for a space.
        raise ValueError("must be printable ASCII characters, without spaces around them, and not empty")
    return key


class KeyFolder:
    """The keys in the files of a folder. Each file has the name of its key's owner.

    The folder is read again at most every 10 s, so a key can be added or removed without a restart. Only digests are
    kept.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``ValueError`` for a folder that cannot be read or has no key, and for a file that is not a key."""
        self._folder = folder
        try:
            self._digests, problems = _read(folder)
        except OSError as error:
            raise ValueError(f"api_keys_folder: {folder}: cannot be read: {error.strerror}") from None
        if problems:
            raise ValueError(f"api_keys_folder: {'; '.join(problems)}")
        if not self._digests:
            raise ValueError(f"api_keys_folder: {folder}: has no files; put each key into a file named after its owner")
        self._read_at = time.monotonic()
        logger.info("API keys: %s", ", ".join(sorted(self._digests)))

    def digests(self) -> Collection[bytes]:
        """The digests of the keys. Empty if every key was removed: then no request has a key of this server.

        This may read the folder, which holds a few small files in memory or on a local disk.
        """
        if time.monotonic() - self._read_at >= _REREAD_S:
            self._read_at = time.monotonic()
            self._read_again()
        return self._digests.values()

    def _read_again(self) -> None:
        try:
            digests, problems = _read(self._folder)
        except OSError as error:
            logger.error("the API keys stay as they are: %s: cannot be read: %s", self._folder, error.strerror)
            return
        for problem in problems:
            logger.error("an API key is left out: %s", problem)
        if digests != self._digests:
            logger.info("API keys: %s", ", ".join(sorted(digests)) or "none")
        self._digests = digests


def _read(folder: Path) -> tuple[Mapping[str, bytes], list[str]]:
    """The digests by name, and what is wrong with the other files. Hidden ones are skipped: Kubernetes' own are."""
    digests, problems = {}, []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        try:
            digests[file.name] = digest_of(check_key(file.read_text(encoding="utf-8").removesuffix("\n")))
        except ValueError:
            problems.append(f"{file}: must be printable ASCII characters, without spaces around them, and not empty")
    return digests, problems
