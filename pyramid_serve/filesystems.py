"""Which filesystem serves a URL, and how it is set up for many small files that other processes write too."""

import os
import re
from typing import Any

import fsspec

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*:\S*@")
EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("abfs", "abfss", "adl", "az"), "azure"),
}
"""The extra of this package that installs the filesystem of a protocol."""
_S3 = ("s3", "s3a")
_S3_CONNECTIONS = 50
"""At once. With the usual 10, some slow answers would keep every other request waiting."""


def mask_credentials(text: str) -> str:
    """A text in which the credentials of URLs, such as ``s3://key:secret@bucket``, are ``***``."""
    return _CREDENTIALS.sub("***@", text)


def shown_root(root: str) -> str:
    """A storage root for people to read: credentials and query parameters of a URL are masked."""
    return root if "://" not in root else re.sub(r"\?.*", "?***", mask_credentials(root))


def filesystem_of(root: str) -> tuple[Any, str]:
    """The fsspec filesystem of a storage root, a local path or a URL, and the path of the root in it.

    The filesystem keeps no listings. One of S3 tries nothing again by itself, so that the caller decides what is tried
    again and for how long. Settings of fsspec's own configuration for S3 (``config_kwargs``) are kept.

    Raises ``ValueError`` for a URL that no installed filesystem serves.
    """
    url = os.path.abspath(root) if "://" not in root else root
    protocol = root.partition("://")[0].lower() if "://" in root else ""
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **_options_of(protocol))
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        remedy = str(error) if extra is None else f'pip install "pyramid-serve[{extra}]"'
        raise ValueError(f"storage {shown_root(root)}: its filesystem is not installed: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"storage {shown_root(root)}: {error}") from None
    if protocol in _S3:
        filesystem.retries = 1
    return filesystem, str(path).rstrip("/")


def _options_of(protocol: str) -> dict[str, Any]:
    if protocol not in _S3:
        return {}
    options = {"max_pool_connections": _S3_CONNECTIONS, "retries": {"total_max_attempts": 1}}
    for name in _S3:
        options |= fsspec.config.conf.get(name, {}).get("config_kwargs", {})
    # Files up to some 50 MB are read and written in one request. More at once for one file would cost each read of a
    # small one a request more, for its size.
    return {"max_concurrency": 1, "config_kwargs": options}
