"""Videos: ask for one, list them, get, delete and cancel one."""

import asyncio
from contextlib import nullcontext
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from deployments.http.answer_schema import (
    DeletedVideo,
    Video,
    VideoList,
    error_answers,
    synchronous_answer,
    video_answer,
)
from deployments.http.asking import check_same, idempotency_key, read_request, refusals
from deployments.http.content import open_content, respond_whole
from deployments.http.door import ID_PATTERN, WAIT_PLACE, Door, DoorOf, VideoId, only_query
from deployments.http.errors import CLIENT_LEFT, ApiError, not_found, reachable
from deployments.http.guard import POLL_HEADER, VIDEO_ID_HEADER
from deployments.http.head import answer_head
from deployments.http.request_schema import IDEMPOTENCY_KEY
from deployments.rpc.tasks import begin_apart
from deployments.videos.videos import Accepted
from deployments.videos.view import VideoView
from pyramid_serve.api import Status, VideoRecord, is_video_id
from pyramid_serve.storage import VideoNotFoundError

_FAILED_STATUSES = {"cancelled": 422, "invalid_input": 422}
"""The status of ``POST /v1/videos/sync`` for a video that failed, by the code of its error; 500 for other codes."""

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post(
    "",
    summary="Ask for a video",
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
    response_model=Video,
    responses={200: video_answer(), **error_answers(400, 401, 403, 404, 408, 413, 415, 429, 503)},
    dependencies=[only_query("wait")],
)
async def create_video(
    request: Request,
    door: DoorOf,
    wait: Annotated[
        bool,
        Query(
            description="Answer when the video is over. It is cancelled when the client leaves before, unless the "
            "request has an Idempotency-Key."
        ),
    ] = False,
) -> Response:
    with door.waits.take() if wait else nullcontext():
        accepted = await _accept(request, door, while_wanted=wait)
        record = accepted.record
        if wait and not record.is_over:
            finished = await _until_over(request, door, accepted)
            return Response(status_code=CLIENT_LEFT) if finished is None else video_response(VideoView(finished))
    return video_response(VideoView(record, accepted.place))


@router.post(
    "/sync",
    summary="Ask for a video and get its file",
    description="Answers with the MP4 when it is there. The video is cancelled when the client leaves before, unless "
    "the request has an Idempotency-Key.",
    response_class=Response,
    openapi_extra={"parameters": [IDEMPOTENCY_KEY]},
    responses={
        200: synchronous_answer(),
        **error_answers(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503),
    },
    dependencies=[WAIT_PLACE, only_query()],
)
async def create_video_file(request: Request, door: DoorOf) -> Response:
    accepted = await _accept(request, door, while_wanted=True)
    finished = accepted.record if accepted.record.is_over else await _until_over(request, door, accepted)
    if finished is None:
        return Response(status_code=CLIENT_LEFT)
    headers = {VIDEO_ID_HEADER: finished.id}
    if finished.error is not None:
        raise ApiError(
            _FAILED_STATUSES.get(finished.error.code, 500),
            f"{finished.id}: {finished.error.message}",
            code=finished.error.code,
            # Otherwise the openai SDK would send the request again, which would make another video.
            headers={**headers, "X-Should-Retry": "false"},
        )
    try:
        content = await open_content(door.videos.store, door.previews, finished, "video")
    except VideoNotFoundError:
        raise not_found(finished.id) from None
    return respond_whole(content, headers=headers)


async def _accept(request: Request, door: Door, *, while_wanted: bool) -> Accepted:
    """Accept the video that a request asks for.

    while_wanted: the client waits until the video is over, and the video is cancelled if it leaves before. A client
    with an idempotency key may send its request again after a broken connection, so its video is made in any case.
    """
    with door.uploads.begin() as upload:
        video_request = await read_request(request, door, upload)
        key = idempotency_key(request)
        with refusals():
            accept = door.videos.accept_while_wanted if while_wanted and key is None else door.videos.accept
            accepted = await accept(video_request, idempotency_key=key)
        if not accepted.is_new:
            await check_same(door, video_request, accepted.record)
        return accepted


async def _until_over(request: Request, door: Door, accepted: Accepted) -> VideoRecord | None:
    """Wait for the end of a video: its record, or None if the client has left.

    If it has left, the video is cancelled, provided that this request made it and has no idempotency key, with which it
    could be sent again.
    """
    record = accepted.record
    finished = asyncio.ensure_future(door.videos.wait(record.id))
    left = asyncio.ensure_future(_until_disconnect(request))
    has_left = True
    try:
        await asyncio.wait([finished, left], return_when=asyncio.FIRST_COMPLETED)
        # When a client leaves, Serve may cancel pending calls before it sends the disconnect.
        has_left = not finished.done() or finished.cancelled()
        return None if has_left else finished.result()
    except VideoNotFoundError:
        raise not_found(record.id) from None  # it was deleted while we waited
    finally:
        finished.cancel()
        left.cancel()
        if has_left and accepted.is_new and record.idempotency_key is None:
            begin_apart(door.videos.cancel_unwanted(record.id))


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.get(
    "",
    summary="List videos",
    response_model=VideoList,
    responses=error_answers(400, 401),
    dependencies=[only_query("limit", "after", "order", "status")],
)
async def list_videos(
    door: DoorOf,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    after: Annotated[
        str | None,
        Query(description="The id that the page before ended with.", json_schema_extra={"pattern": ID_PATTERN}),
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    status: Annotated[Status | None, Query(description="Only videos with this status.")] = None,
) -> Response:
    if after is not None and not is_video_id(after):
        raise ApiError(400, f"after={after[:60]!r}: must be the id of a video", param="after")
    views, has_more = await door.videos.list(limit=limit, after=after, newest_first=order == "desc", status=status)
    ids = [view.record.id for view in views]
    return JSONResponse(
        {
            "object": "list",
            "data": [view.public() for view in views],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": has_more,
        }
    )


@router.get(
    "/{video_id}",
    summary="A video as it stands now",
    response_model=Video,
    responses={200: video_answer(), **error_answers(400, 401, 404)},
    dependencies=[only_query()],
)
async def get_video(video_id: VideoId, door: DoorOf) -> Response:
    return video_response(await door.views.get(video_id))


@router.delete(
    "/{video_id}",
    summary="Delete a video; one that is being made is cancelled first",
    response_model=DeletedVideo,
    responses=error_answers(400, 401, 403, 404, 503),
    dependencies=[only_query()],
)
async def delete_video(video_id: VideoId, door: DoorOf) -> Response:
    try:
        with reachable():
            await door.videos.delete(video_id)
    finally:
        door.views.forget(video_id)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


@router.post(
    "/{video_id}/cancel",
    summary="Cancel a video; one that is over stays as it is",
    response_model=Video,
    responses=error_answers(400, 401, 403, 404, 503),
    dependencies=[only_query()],
)
async def cancel_video(video_id: VideoId, door: DoorOf) -> Response:
    try:
        with reachable():
            return video_response(VideoView(await door.videos.cancel(video_id)))
    finally:
        door.views.forget(video_id)


def video_response(view: VideoView, *, status: int = 200) -> JSONResponse:
    """The video object, with when to look again where the video is not over."""
    headers = {} if view.record.is_over else {POLL_HEADER: str(_poll_after_ms(view))}
    return JSONResponse(view.public(), status_code=status, headers=headers)


def _poll_after_ms(view: VideoView) -> int:
    """A tenth of the time that is left, at least 0.5 s and at most 5 s."""
    if view.place.eta_seconds is None:
        return 1000
    return round(1000 * min(max(view.place.eta_seconds / 10, 0.5), 5.0))


answer_head(router)
