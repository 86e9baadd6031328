"""Ids of videos, which tell when they were drawn."""

import re
import secrets
import time

from pyramid_serve.api.errors import RequestError

_VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")


def new_video_id(created_at: float | None = None) -> str:
    """``video_`` and 32 hexadecimal digits: 12 of the time in milliseconds, 20 drawn. Ids sort by time."""
    milliseconds = int((time.time() if created_at is None else created_at) * 1000)
    return f"video_{milliseconds:012x}{secrets.token_hex(10)}"


def is_video_id(text: str) -> bool:
    """Whether a text has the form of an id; to be asked before it goes near the storage."""
    return _VIDEO_ID.fullmatch(text) is not None


def created_at_of(video_id: str) -> float:
    """Unix seconds at which an id was drawn."""
    if not is_video_id(video_id):
        raise RequestError(f"id={video_id[:60]!r}: must be video_ and 32 hexadecimal digits", param="id")
    return int(video_id[6:18], 16) / 1000
