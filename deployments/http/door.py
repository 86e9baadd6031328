"""What the routes share: the objects they work with, and the checks that come before them."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Path, Request

from deployments.http.answer_schema import VIDEO_EXAMPLE
from deployments.http.config import HttpConfig
from deployments.http.errors import ApiError, not_found
from deployments.http.keys import Keys
from deployments.http.places import Places, Uploads
from deployments.http.pools import Pools
from deployments.http.previews import Previews
from deployments.http.readiness import Readiness
from deployments.videos.videos import Videos
from deployments.videos.views import Views
from pyramid_serve.api import is_video_id

ID_PATTERN = "^video_[0-9a-f]{32}$"


@dataclass(frozen=True)
class Door:
    """The objects that the routes work with."""

    videos: Videos
    views: Views
    config: HttpConfig
    readiness: Readiness
    uploads: Uploads
    streams: Places
    waits: Places
    downloads: Places
    keys: Keys
    previews: Previews
    pools: Pools
    started_at: float = field(default_factory=time.time)


async def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


DoorOf = Annotated[Door, Depends(_door)]


async def _stream_place(door: DoorOf) -> AsyncIterator[None]:
    with door.streams.take():
        yield


async def _wait_place(door: DoorOf) -> AsyncIterator[None]:
    with door.waits.take():
        yield


async def _download_place(door: DoorOf) -> AsyncIterator[None]:
    with door.downloads.take():
        yield


# FastAPI leaves a dependency when the answer has been sent or the client has left, also where nothing was sent.
STREAM_PLACE = Depends(_stream_place)
"""A dependency: the request has a place among the streams until its answer is sent. ``ApiError`` 429 if there is none
left."""
WAIT_PLACE = Depends(_wait_place)
"""The same among the requests that wait for a video."""
DOWNLOAD_PLACE = Depends(_download_place)
"""The same among the downloads."""


async def check_key(request: Request, door: DoorOf) -> None:
    """Raise ``ApiError`` 401 for a request without one of the server's keys, if it has any."""
    address = request.client.host if request.client else "an unknown address"
    await door.keys.check(request.headers.get("authorization", ""), address=address)


def only_query(*names: str) -> Any:
    """A dependency that refuses query parameters with other names, and any that is given twice."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                known = f"known are {', '.join(names)}" if names else "there is none here"
                raise ApiError(400, f"{name[:60]}: unknown parameter; {known}", param=name[:60])
            if len(request.query_params.getlist(name)) > 1:
                raise ApiError(400, f"{name}: given more than once", param=name)

    return Depends(check)


async def _known_id(video_id: Annotated[str, Path(json_schema_extra={"example": VIDEO_EXAMPLE["id"]})]) -> str:
    if not is_video_id(video_id):
        raise not_found(video_id)
    return video_id


VideoId = Annotated[str, Depends(_known_id)]
"""The ``video_id`` of the path. ``ApiError`` 404 if it does not have the form of an id."""
