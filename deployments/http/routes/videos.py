"""Videos: ask for one, list them, get, delete and cancel one."""

import asyncio
from contextlib import nullcontext
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from deployments.claims.asking import UNREACHABLE
from deployments.errors import QueueFullError
from deployments.http.answer_schema import (
    DeletedVideo,
    Video,
    VideoList,
    error_answers,
    synchronous_answer,
    video_answer,
)
from deployments.http.body import parse_body, read_body
from deployments.http.content import open_content, respond_whole
from deployments.http.door import ID_PATTERN, WAIT_PLACE, Door, DoorOf, VideoId, only_query
from deployments.http.errors import CLIENT_LEFT, ApiError, being_replaced, not_found
from deployments.http.guard import POLL_HEADER, VIDEO_ID_HEADER
from deployments.http.head import answer_head
from deployments.http.places import Upload
from deployments.http.request_schema import IDEMPOTENCY_KEY, MAX_KEY_CHARACTERS
from deployments.rpc.tasks import begin_apart
from deployments.videos.videos import Accepted, picture_of
from deployments.videos.view import VideoView
from pyramid_serve.api import VideoRecord, VideoRequest, is_video_id, parse_request
from pyramid_serve.storage import VideoFile, VideoNotFoundError

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
            return Response(status_code=CLIENT_LEFT) if finished is None else _video_response(VideoView(finished))
    return _video_response(VideoView(record, accepted.place))


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
        video_request = await _read_request(request, door, upload)
        key = _idempotency_key(request)
        try:
            accept = door.videos.accept_while_wanted if while_wanted and key is None else door.videos.accept
            accepted = await accept(video_request, idempotency_key=key)
        except QueueFullError as error:
            raise ApiError(429, str(error), headers={"Retry-After": str(error.retry_after_s)}) from None
        except UNREACHABLE:
            raise being_replaced() from None
        if not accepted.is_new:
            await _check_same(door, video_request, accepted.record)
        return accepted


async def _read_request(request: Request, door: Door, upload: Upload) -> VideoRequest:
    body = await read_body(request, door.config.body, upload)
    fields = await asyncio.to_thread(
        parse_body,
        body,
        content_type=request.headers.get("content-type", ""),
        content_encoding=request.headers.get("content-encoding", ""),
        limits=door.config.body,
        fields_with_several_values=door.videos.models.fields_with_several_values,
    )
    parsed = parse_request(fields)
    max_picture_bytes = door.videos.models.choose(parsed.model).limits.max_picture_bytes
    if parsed.input_reference is not None and len(parsed.input_reference) > max_picture_bytes:
        came = len(parsed.input_reference)
        raise ApiError(413, f"input_reference: {came} bytes, at most {max_picture_bytes}", param="input_reference")
    return parsed


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise ApiError(
            400,
            f"Idempotency-Key: {len(key)} characters, must be 1 to {MAX_KEY_CHARACTERS}",
            param="Idempotency-Key",
        )
    return key


async def _check_same(door: Door, request: VideoRequest, record: VideoRecord) -> None:
    """Raise ``ApiError`` 400 if the key was first used with another request.

    The status is not 409, because clients repeat a request after that.
    """
    model = door.videos.models.choose(request.model)
    plan = model.plan(request)
    if request.seed is None:
        plan = plan.model_copy(update={"seed": record.plan.seed})
    # `seconds` only repeats how the length was given; `num_frames` may give the same length.
    is_same = plan.model_copy(update={"seconds": record.plan.seconds}) == record.plan
    is_same = is_same and (request.user, request.metadata) == (record.user, record.metadata)
    if is_same and request.input_reference is not None:
        max_pixels = model.limits.max_picture_pixels
        is_same = await asyncio.to_thread(_is_same_picture, door, request.input_reference, record, max_pixels)
    if not is_same:
        raise ApiError(
            400,
            f"Idempotency-Key: was used for {record.id}, which another request asked for; take a new key",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )


def _is_same_picture(door: Door, picture: bytes, record: VideoRecord, max_pixels: int) -> bool:
    """Whether the same video would be made of both pictures."""
    try:
        stored = door.videos.store.files.fetch(record.id, VideoFile.PICTURE)
    except VideoNotFoundError:
        return False
    given = picture_of(picture, record.plan, max_pixels=max_pixels)
    return given == picture_of(stored, record.plan, max_pixels=None)


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
    dependencies=[only_query("limit", "after", "order")],
)
async def list_videos(
    door: DoorOf,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    after: Annotated[
        str | None,
        Query(description="The id that the page before ended with.", json_schema_extra={"pattern": ID_PATTERN}),
    ] = None,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
) -> Response:
    if after is not None and not is_video_id(after):
        raise ApiError(400, f"after={after[:60]!r}: must be the id of a video", param="after")
    views, has_more = await door.videos.list(limit=limit, after=after, newest_first=order == "desc")
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
    return _video_response(await door.views.get(video_id))


@router.delete(
    "/{video_id}",
    summary="Delete a video; one that is being made is cancelled first",
    response_model=DeletedVideo,
    responses=error_answers(400, 401, 403, 404, 503),
    dependencies=[only_query()],
)
async def delete_video(video_id: VideoId, door: DoorOf) -> Response:
    try:
        await door.videos.delete(video_id)
    except UNREACHABLE:
        raise being_replaced() from None
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
        return _video_response(VideoView(await door.videos.cancel(video_id)))
    except UNREACHABLE:
        raise being_replaced() from None
    finally:
        door.views.forget(video_id)


def _video_response(view: VideoView, *, status: int = 200) -> JSONResponse:
    headers = {} if view.record.is_over else {POLL_HEADER: str(_poll_after_ms(view))}
    return JSONResponse(view.public(), status_code=status, headers=headers)


def _poll_after_ms(view: VideoView) -> int:
    """A tenth of the time that is left, at least 0.5 s and at most 5 s."""
    if view.place.eta_seconds is None:
        return 1000
    return round(1000 * min(max(view.place.eta_seconds / 10, 0.5), 5.0))


answer_head(router)
