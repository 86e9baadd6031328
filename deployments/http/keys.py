"""The keys that let requests to ``/v1`` in."""

import asyncio
import hmac
import logging
from collections.abc import Iterable

from deployments.http.errors import ApiError
from deployments.http.key_folder import KeyFolder, digest_of

logger = logging.getLogger(__name__)

WRONG_KEY_PAUSE_S = 0.5
_MAX_PAUSES = 100


class Keys:
    """Compares the keys of requests with those of the server. All calls must come from one event loop."""

    def __init__(self, keys: Iterable[str], *, folder: KeyFolder | None = None) -> None:
        """keys: not empty each. folder: further keys. With no keys and no folder every request passes."""
        self._digests = tuple(digest_of(key) for key in keys)
        self._folder = folder
        self._num_pauses = 0

    async def check(self, authorization: str, *, address: str) -> None:
        """Raise ``ApiError`` 401 unless a header ``Authorization`` has one of the keys.

        A wrong key is answered after a pause and logged with the client's address. At most 100 requests pause at once,
        so that they cannot fill the memory; any beyond that are answered at once and not logged.
        """
        if not self._digests and self._folder is None:
            return
        scheme, _, given = authorization.partition(" ")
        key = given.strip()
        if scheme.lower() == "bearer" and key and self._is_known(digest_of(key)):
            return
        if authorization and self._num_pauses < _MAX_PAUSES:
            self._num_pauses += 1
            try:
                logger.warning("a wrong API key from %s", address)
                await asyncio.sleep(WRONG_KEY_PAUSE_S)
            finally:
                self._num_pauses -= 1
        raise ApiError(
            401,
            "Authorization: must be 'Bearer KEY' with a key of this server",
            param="Authorization",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _is_known(self, digest: bytes) -> bool:
        in_folder = () if self._folder is None else self._folder.digests()
        return any(hmac.compare_digest(digest, known) for known in (*self._digests, *in_folder))
