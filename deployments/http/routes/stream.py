"""A video as a stream of fragments, while it is made and afterwards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from deployments.http.answer_schema import error_answers, file_answer
from deployments.http.content import open_stream, padding, respond
from deployments.http.door import STREAM_PLACE, Door, DoorOf, VideoId, only_query
from deployments.http.errors import ApiError
from deployments.http.head import answer_head, empty_body
from pyramid_serve.api import Status
from pyramid_serve.storage import VideoNotFoundError

router = APIRouter(prefix="/v1/videos", tags=["videos"])


class StreamBrokenError(RuntimeError):
    """The video failed or was deleted during the stream. Raising it breaks the connection off, so that viewers know."""


@router.get(
    "/{video_id}/stream",
    summary="The video while it is made",
    description="Fragmented MP4, a fragment for each unit as it is decoded; at any time, also after the end, when "
    "ranges can be had too.",
    response_class=Response,
    responses={
        200: file_answer("video/mp4"),
        206: file_answer("video/mp4"),
        **error_answers(400, 401, 404, 409, 416, 429),
    },
    dependencies=[STREAM_PLACE, only_query()],
)
async def stream_video(request: Request, video_id: VideoId, door: DoorOf) -> Response:
    record = (await door.views.get(video_id)).record
    if record.status is Status.FAILED:
        reason = record.error.message if record.error else "it failed"
        raise ApiError(409, f"{video_id}: is {record.status}: {reason}", param="video_id")
    if record.status is Status.COMPLETED:
        return respond(request, await open_stream(door.videos.store, record))
    return StreamingResponse(
        empty_body() if request.method == "HEAD" else _fragments(door, video_id),
        media_type="video/mp4",
        headers={"Cache-Control": "no-store", "Accept-Ranges": "none", "X-Accel-Buffering": "no"},
    )


async def _fragments(door: Door, video_id: str) -> AsyncIterator[bytes]:
    """The stream: each fragment as it is saved, padded to whole blocks, which browsers need."""
    num_fragments = 0
    try:
        async with aclosing(door.videos.fragments(video_id)) as fragments:
            async for fragment in fragments:
                num_fragments += 1
                yield fragment + padding(len(fragment))
        record = await asyncio.to_thread(door.videos.store.read, video_id)
    except VideoNotFoundError:
        raise StreamBrokenError(f"{video_id}: deleted while it was watched") from None
    if num_fragments < record.plan.num_units:
        raise StreamBrokenError(f"{video_id}: failed while it was watched")


answer_head(router)
