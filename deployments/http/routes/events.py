"""The changes of a video as server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event

from deployments.http.answer_schema import error_answers
from deployments.http.door import STREAM_PLACE, Door, DoorOf, VideoId, only_query
from deployments.http.head import answer_head, empty_body
from deployments.videos.view import VideoView
from pyramid_serve.storage import VideoNotFoundError

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.get(
    "/{video_id}/events",
    summary="The video object again with each change, as server-sent events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}},
        204: {"description": "The video is over and the client, by its Last-Event-ID, knows it."},
        **error_answers(400, 401, 404, 429),
    },
    dependencies=[STREAM_PLACE, only_query()],
)
async def get_events(request: Request, video_id: VideoId, door: DoorOf) -> Response:
    record = (await door.views.get(video_id)).record
    if record.is_over and request.headers.get("last-event-id") == str(record.revision):
        return Response(status_code=204)  # an EventSource does not reconnect after this status
    return EventSourceResponse(
        empty_body() if request.method == "HEAD" else _events(door, video_id),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(door: Door, video_id: str) -> AsyncIterator[bytes]:
    """Each change of the record at once; a change of the place in the queue instead of the next keep-alive comment."""
    told: VideoView | None = None
    try:
        async with aclosing(door.videos.events(video_id)) as views:
            async for changed in _with_pauses(views, door.config.events_keep_alive_s):
                view = changed or await door.views.get(video_id)
                if changed is None and (told is None or view.place.position == told.place.position):
                    yield format_sse_event(comment="still here")
                else:
                    told = view
                    yield format_sse_event(
                        event="video", id=str(view.record.revision), data_str=json.dumps(view.public())
                    )
    except VideoNotFoundError:
        yield format_sse_event(event="deleted", data_str=json.dumps({"id": video_id}))


async def _with_pauses(views: AsyncGenerator[VideoView, None], pause_s: float) -> AsyncIterator[VideoView | None]:
    """The views, and None whenever there was none for ``pause_s``."""
    upcoming: asyncio.Future[VideoView] = asyncio.ensure_future(anext(views))
    try:
        while True:
            await asyncio.wait([upcoming], timeout=pause_s)
            if not upcoming.done():
                yield None
                continue
            try:
                view = upcoming.result()
            except StopAsyncIteration:
                return
            yield view
            upcoming = asyncio.ensure_future(anext(views))
    finally:
        upcoming.cancel()
        await asyncio.wait([upcoming])


answer_head(router)
