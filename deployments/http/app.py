"""The HTTP server: the videos API in front of ``Videos``, as an ASGI application for any server."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, PositiveFloat

from deployments.claims.asking import UNREACHABLE
from deployments.errors import QueueFullError
from deployments.http import docs as http_docs
from deployments.http import schema as http_schema
from deployments.http.body import BodyLimits, parse_body, read_body
from deployments.http.content import Variant, open_content, open_stream, padding, respond, respond_whole
from deployments.http.errors import ApiError, add_error_handlers, not_found, storage_unavailable
from deployments.http.guard import POLL_HEADER, VIDEO_ID_HEADER, CorsConfig, HostPattern, add_guards
from deployments.http.readiness import Readiness
from deployments.http.schema import error_answers, file_answer
from deployments.rpc.tasks import begin_apart
from deployments.videos.videos import Accepted, Videos, VideoView
from deployments.videos.views import Views
from pyramid_serve.api import (
    Status,
    VideoRecord,
    VideoRequest,
    default_length_of,
    is_video_id,
    longest_of,
    parse_request,
    resolve,
    steps_within,
    unknown_model,
)
from pyramid_serve.media.pictures import read_picture
from pyramid_serve.pyramid_flow.shapes import num_frames_of, seconds_of
from pyramid_serve.storage import StorageError, VideoFile, VideoNotFoundError

logger = logging.getLogger(__name__)

OWNER = "pyramid-serve"
ID_PATTERN = "^video_[0-9a-f]{32}$"
CLIENT_LEFT = 499

_FAILED_STATUSES = {"cancelled": 422, "invalid_input": 422}
"""Of the answer that a failed video gets where its file was asked for, by the code of its error. All others are 500."""


class HttpConfig(BaseModel):
    """What the HTTP server takes, beside the limits on what a video may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body: BodyLimits = BodyLimits()
    api_keys: tuple[str, ...] = ()
    """Any of these must come as ``Authorization: Bearer KEY``. None: everyone may."""
    allowed_hosts: tuple[HostPattern, ...] | None = None
    """Names that this server goes by, beside IP addresses and ``localhost``. None, or none: every name. ``pyramid-serve
    up`` takes ``<local>``, names without a dot, where it listens on this machine only and none are set."""
    cors: CorsConfig = CorsConfig()
    events_keep_alive_s: PositiveFloat = 15.0
    """A comment is sent into a stream of events that is silent for so long."""
    ready_timeout_s: PositiveFloat = 5.0
    storage_check_interval_s: PositiveFloat = 10.0
    """How often at most ``/readyz`` writes something small to see whether the storage takes videos."""


@dataclass(frozen=True)
class Door:
    """What the routes work with."""

    videos: Videos
    views: Views
    config: HttpConfig
    readiness: Readiness
    started_at: float = field(default_factory=time.time)


def create_app(videos: Videos, config: HttpConfig | None = None) -> FastAPI:
    """The ASGI application."""
    config = config or HttpConfig()
    app = http_docs.new_app()
    readiness = Readiness(videos.store, interval_s=config.storage_check_interval_s)
    app.state.door = Door(videos, Views(videos), config, readiness)
    app.include_router(_probes)
    app.include_router(_models, dependencies=[Depends(_check_key)])
    app.include_router(_videos, dependencies=[Depends(_check_key)])
    add_error_handlers(app)
    add_guards(app, allowed_hosts=config.allowed_hosts, cors=config.cors)
    http_docs.complete(app, videos.model)
    return app


def _answer_head(router: APIRouter) -> None:
    """Answer HEAD wherever a router answers GET, as Starlette's own routes do and FastAPI's do not."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path.removeprefix(router.prefix),
                route.endpoint,
                methods=["HEAD"],
                dependencies=route.dependencies,
                include_in_schema=False,
            )


# --- what routes need -----------------------------------------------------------------------------------------------


async def _door(request: Request) -> Door:
    door: Door = request.app.state.door
    return door


async def _check_key(request: Request) -> None:
    keys = (await _door(request)).config.api_keys
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if keys and not (
        scheme.lower() == "bearer" and any(hmac.compare_digest(key.encode(), given.strip().encode()) for key in keys)
    ):
        raise ApiError(
            401,
            "Authorization: must be 'Bearer KEY' with a key of this server",
            param="Authorization",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _only_query(*names: str) -> Any:
    """A dependency that refuses other query parameters than these, and any given twice."""

    async def check(request: Request) -> None:
        for name in request.query_params:
            if name not in names:
                known = f"known are {', '.join(names)}" if names else "there is none here"
                raise ApiError(400, f"{name[:60]}: unknown parameter; {known}", param=name[:60])
            if len(request.query_params.getlist(name)) > 1:
                raise ApiError(400, f"{name}: given more than once", param=name)

    return Depends(check)


async def _known_id(
    video_id: Annotated[str, Path(json_schema_extra={"example": http_schema.VIDEO_EXAMPLE["id"]})],
) -> str:
    if not is_video_id(video_id):
        raise not_found(video_id)
    return video_id


VideoId = Annotated[str, Depends(_known_id)]
DoorOf = Annotated[Door, Depends(_door)]


def _video_response(view: VideoView, *, status: int = 200) -> JSONResponse:
    headers = {} if view.record.is_over else {POLL_HEADER: str(_poll_after_ms(view))}
    return JSONResponse(view.public(), status_code=status, headers=headers)


def _poll_after_ms(view: VideoView) -> int:
    """Often enough to be a tenth late at most, between twice a second and every five seconds."""
    if view.place.eta_seconds is None:
        return 1000
    return round(1000 * min(max(view.place.eta_seconds / 10, 0.5), 5.0))


# --- videos ---------------------------------------------------------------------------------------------------------

_videos = APIRouter(prefix="/v1/videos", tags=["videos"])


@_videos.post(
    "",
    summary="Ask for a video",
    openapi_extra={"parameters": [http_schema.IDEMPOTENCY_KEY]},
    response_model=http_schema.Video,
    responses={200: http_schema.video_answer(), **error_answers(400, 401, 403, 404, 408, 413, 415, 429, 503)},
    dependencies=[_only_query("wait")],
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
    accepted = await _accept(request, door, while_wanted=wait)
    record = accepted.record
    if wait and not record.is_over:
        finished = await _until_over(request, door, accepted)
        return Response(status_code=CLIENT_LEFT) if finished is None else _video_response(VideoView(finished))
    return _video_response(VideoView(record) if record.is_over else await _view(door, record))


@_videos.post(
    "/sync",
    summary="Ask for a video and get its file",
    description="Answers with the MP4 when it is there. The video is cancelled when the client leaves before, unless "
    "the request has an Idempotency-Key.",
    response_class=Response,
    openapi_extra={"parameters": [http_schema.IDEMPOTENCY_KEY]},
    responses={
        200: http_schema.synchronous_answer(),
        **error_answers(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503),
    },
    dependencies=[_only_query()],
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
            # The SDK of openai would send the request again, and so make the video once more.
            headers={**headers, "X-Should-Retry": "false"},
        )
    try:
        content = await open_content(door.videos.store, finished, "video")
    except VideoNotFoundError:
        raise not_found(finished.id) from None
    return respond_whole(content, headers=headers)


async def _accept(request: Request, door: Door, *, while_wanted: bool) -> Accepted:
    """Accept the video that a request asks for; ``while_wanted``: for a client that waits until it is over.

    One with a key may send its request again after a broken connection, so its video is made whether it waits or not.
    """
    video_request = await _read_request(request, door)
    key = _idempotency_key(request)
    try:
        accept = door.videos.accept_while_wanted if while_wanted and key is None else door.videos.accept
        accepted = await accept(video_request, idempotency_key=key)
    except QueueFullError as error:
        raise ApiError(429, str(error), headers={"Retry-After": str(error.retry_after_s)}) from None
    except UNREACHABLE:
        raise _not_now() from None
    if not accepted.is_new:
        await _check_same(door, video_request, accepted.record)
    return accepted


async def _read_request(request: Request, door: Door) -> VideoRequest:
    body = await read_body(request, door.config.body)
    fields = await asyncio.to_thread(
        parse_body,
        body,
        content_type=request.headers.get("content-type", ""),
        content_encoding=request.headers.get("content-encoding", ""),
        limits=door.config.body,
    )
    parsed = parse_request(fields)
    max_picture_bytes = door.videos.model.limits.max_picture_bytes
    if parsed.input_reference is not None and len(parsed.input_reference) > max_picture_bytes:
        came = len(parsed.input_reference)
        raise ApiError(413, f"input_reference: {came} bytes, at most {max_picture_bytes}", param="input_reference")
    return parsed


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= http_schema.MAX_KEY_CHARACTERS:
        raise ApiError(
            400,
            f"Idempotency-Key: {len(key)} characters, must be 1 to {http_schema.MAX_KEY_CHARACTERS}",
            param="Idempotency-Key",
        )
    return key


async def _check_same(door: Door, request: VideoRequest, record: VideoRecord) -> None:
    """400 where a key that was used for one request comes with another. Not 409: clients would send that again."""
    model = door.videos.model
    spec = resolve(request, model.capabilities, model.name, limits=model.limits)
    if request.seed is None:
        spec = spec.model_copy(update={"seed": record.spec.seed})
    # `seconds` is only how the length was asked for: `num_frames` may ask for the same.
    is_same = spec.model_copy(update={"seconds": record.spec.seconds}) == record.spec
    is_same = is_same and (request.user, request.metadata) == (record.user, record.metadata)
    if is_same and request.input_reference is not None:
        is_same = await asyncio.to_thread(_is_same_picture, door, request.input_reference, record.id)
    if not is_same:
        raise ApiError(
            400,
            f"Idempotency-Key: was used for {record.id}, which another request asked for; take a new key",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )


def _is_same_picture(door: Door, picture: bytes, video_id: str) -> bool:
    try:
        stored = door.videos.store.fetch(video_id, VideoFile.PICTURE)
    except VideoNotFoundError:
        return False
    given = read_picture(picture, max_pixels=door.videos.model.limits.max_picture_pixels)
    return given == read_picture(stored, max_pixels=None)


async def _view(door: Door, record: VideoRecord) -> VideoView:
    """A new video with its place in the queue; or without, should it be gone already."""
    try:
        return await door.videos.get(record.id)
    except VideoNotFoundError:
        return VideoView(record)


async def _until_over(request: Request, door: Door, accepted: Accepted) -> VideoRecord | None:
    """The record when the video is over, or None when the client has left.

    Then its video is cancelled if this request made it and has no key, by which it could be sent again.
    """
    record = accepted.record
    finished = asyncio.ensure_future(door.videos.wait(record.id))
    left = asyncio.ensure_future(_until_disconnect(request))
    has_left = True
    try:
        await asyncio.wait([finished, left], return_when=asyncio.FIRST_COMPLETED)
        # When a client leaves, Serve may cancel the calls that it waits for before it tells of it.
        has_left = not finished.done() or finished.cancelled()
        return None if has_left else finished.result()
    except VideoNotFoundError:
        raise not_found(record.id) from None  # deleted meanwhile
    finally:
        finished.cancel()
        left.cancel()
        if has_left and accepted.is_new and record.idempotency_key is None:
            begin_apart(door.videos.cancel_unwanted(record.id))


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@_videos.get(
    "",
    summary="List videos",
    response_model=http_schema.VideoList,
    responses=error_answers(400, 401),
    dependencies=[_only_query("limit", "after", "order")],
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


@_videos.get(
    "/{video_id}",
    summary="A video as it stands now",
    response_model=http_schema.Video,
    responses={200: http_schema.video_answer(), **error_answers(400, 401, 404)},
    dependencies=[_only_query()],
)
async def get_video(video_id: VideoId, door: DoorOf) -> Response:
    return _video_response(await door.views.get(video_id))


@_videos.delete(
    "/{video_id}",
    summary="Delete a video; one that is being made is cancelled first",
    response_model=http_schema.DeletedVideo,
    responses=error_answers(400, 401, 403, 404, 503),
    dependencies=[_only_query()],
)
async def delete_video(video_id: VideoId, door: DoorOf) -> Response:
    try:
        await door.videos.delete(video_id)
    except UNREACHABLE:
        raise _not_now() from None
    finally:
        door.views.forget(video_id)
    return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})


@_videos.post(
    "/{video_id}/cancel",
    summary="Cancel a video; one that is over stays as it is",
    response_model=http_schema.Video,
    responses=error_answers(400, 401, 403, 404, 503),
    dependencies=[_only_query()],
)
async def cancel_video(video_id: VideoId, door: DoorOf) -> Response:
    try:
        return _video_response(VideoView(await door.videos.cancel(video_id)))
    except UNREACHABLE:
        raise _not_now() from None
    finally:
        door.views.forget(video_id)


@_videos.get(
    "/{video_id}/content",
    summary="The file of a finished video, or a preview",
    response_class=Response,
    responses={
        200: file_answer("video/mp4", "image/webp"),
        206: file_answer("video/mp4", "image/webp"),
        **error_answers(400, 401, 404, 409, 416),
    },
    dependencies=[_only_query("variant")],
)
async def get_content(request: Request, video_id: VideoId, door: DoorOf, variant: Variant = "video") -> Response:
    record = await asyncio.to_thread(door.videos.store.read, video_id)
    return respond(request, await open_content(door.videos.store, record, variant))


@_videos.get(
    "/{video_id}/stream",
    summary="The video while it is made",
    description="Fragmented MP4, a fragment for each unit as it is decoded; at any time, also after the end, when "
    "ranges can be had too.",
    response_class=Response,
    responses={200: file_answer("video/mp4"), 206: file_answer("video/mp4"), **error_answers(400, 401, 404, 409, 416)},
    dependencies=[_only_query()],
)
async def stream_video(request: Request, video_id: VideoId, door: DoorOf) -> Response:
    record = (await door.views.get(video_id)).record
    if record.status is Status.FAILED:
        reason = record.error.message if record.error else "it failed"
        raise ApiError(409, f"{video_id}: is {record.status}: {reason}", param="video_id")
    if record.status is Status.COMPLETED:
        return respond(request, await open_stream(door.videos.store, record))
    return StreamingResponse(
        _nothing() if request.method == "HEAD" else _fragments(door, video_id),
        media_type="video/mp4",
        headers={"Cache-Control": "no-store", "Accept-Ranges": "none", "X-Accel-Buffering": "no"},
    )


async def _nothing() -> AsyncIterator[bytes]:
    """The body of an answer to HEAD where that to GET is of unknown length, so that none is told."""
    return
    yield b""


class StreamBrokenError(RuntimeError):
    """The video failed or was deleted while it was watched: the connection is broken off, so that viewers know."""


async def _fragments(door: Door, video_id: str) -> AsyncIterator[bytes]:
    """The stream, each fragment filled up to what a browser reads at once."""
    num_fragments = 0
    try:
        async with aclosing(door.videos.fragments(video_id)) as fragments:
            async for fragment in fragments:
                num_fragments += 1
                yield fragment + padding(len(fragment))
        record = await asyncio.to_thread(door.videos.store.read, video_id)
    except VideoNotFoundError:
        raise StreamBrokenError(f"{video_id}: deleted while it was watched") from None
    if num_fragments < record.spec.num_latent_frames:
        raise StreamBrokenError(f"{video_id}: failed while it was watched")


@_videos.get(
    "/{video_id}/events",
    summary="The video object again with each change, as server-sent events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {}}},
        204: {"description": "The video is over and the client, by its Last-Event-ID, knows it."},
        **error_answers(400, 401, 404),
    },
    dependencies=[_only_query()],
)
async def get_events(request: Request, video_id: VideoId, door: DoorOf) -> Response:
    record = (await door.views.get(video_id)).record
    if record.is_over and request.headers.get("last-event-id") == str(record.revision):
        return Response(status_code=204)  # which keeps browsers from asking again
    return StreamingResponse(
        _nothing() if request.method == "HEAD" else _events(door, video_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _events(door: Door, video_id: str) -> AsyncIterator[bytes]:
    """Each change of the record at once; a change of the place in the queue with the next sign of life."""
    told: VideoView | None = None
    try:
        async with aclosing(door.videos.events(video_id)) as views:
            async for changed in _with_pauses(views, door.config.events_keep_alive_s):
                view = changed or await door.views.get(video_id)
                if changed is None and (told is None or view.place.position == told.place.position):
                    yield b": still here\n\n"
                else:
                    told = view
                    yield f"event: video\nid: {view.record.revision}\ndata: {json.dumps(view.public())}\n\n".encode()
    except VideoNotFoundError:
        yield f"event: deleted\ndata: {json.dumps({'id': video_id})}\n\n".encode()


async def _with_pauses(views: AsyncGenerator[VideoView, None], pause_s: float) -> AsyncIterator[VideoView | None]:
    """The views, and None whenever none came for so long."""
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


def _not_now() -> ApiError:
    return ApiError(503, "a part of the server is being replaced; try again", headers={"Retry-After": "2"})


# --- models ---------------------------------------------------------------------------------------------------------

_models = APIRouter(prefix="/v1/models", tags=["models"])


@_models.get(
    "",
    summary="The models served",
    response_model=http_schema.ModelList,
    responses=error_answers(400, 401),
    dependencies=[_only_query()],
)
async def list_models(door: DoorOf) -> Response:
    return JSONResponse({"object": "list", "data": [_model_object(door)]})


@_models.get(
    "/{model:path}",
    summary="One model",
    response_model=http_schema.ServedModelObject,
    responses=error_answers(400, 401, 404),
    dependencies=[_only_query()],
)
async def get_model(model: str, door: DoorOf) -> Response:
    if model != door.videos.model.name:
        raise unknown_model(model, door.videos.model.name)
    return JSONResponse(_model_object(door))


def _model_object(door: Door) -> dict[str, Any]:
    model = door.videos.model
    able = model.capabilities
    longest = longest_of(able, model.limits)
    return {
        "id": model.name,
        "object": "model",
        "created": int(door.started_at),
        "owned_by": OWNER,
        "sizes": None if able.sizes is None else [f"{width}x{height}" for width, height in able.sizes],
        "default_size": f"{able.default_size[0]}x{able.default_size[1]}",
        "max_seconds": round(seconds_of(longest), 3),
        "max_num_frames": num_frames_of(longest),
        "default_seconds": round(seconds_of(default_length_of(able, model.limits)), 3),
        "num_inference_steps": list(steps_within(able.num_inference_steps, model.limits)),
        "video_num_inference_steps": list(steps_within(able.video_num_inference_steps, model.limits)),
        "guidance_scale": able.guidance_scale,
        "video_guidance_scale": able.video_guidance_scale,
    }


# --- probes ---------------------------------------------------------------------------------------------------------

_probes = APIRouter(tags=["probes"])


@_probes.get("/", include_in_schema=False)
async def root(request: Request, door: DoorOf) -> Response:
    base = str(request.base_url).rstrip("/")
    return JSONResponse(
        {
            "name": "Pyramid Serve",
            "model": door.videos.model.name,
            "videos": f"{base}/v1/videos",
            "docs": f"{base}/docs",
            "openapi": f"{base}/openapi.json",
        }
    )


@_probes.get("/healthz", summary="Whether this process answers", response_model=http_schema.Health)
async def healthz() -> Response:
    return JSONResponse({"status": "ok"})


@_probes.get(
    "/readyz",
    summary="Whether videos are taken: the queue can be asked, and the storage be read and written",
    response_model=http_schema.Health,
    responses=error_answers(503),
)
async def readyz(door: DoorOf) -> Response:
    try:
        async with asyncio.timeout(door.config.ready_timeout_s):
            await door.videos.queue()
            await door.readiness.check()
    except StorageError as error:
        logger.warning("not ready: %s", error)
        raise storage_unavailable() from None
    except (*UNREACHABLE, TimeoutError) as error:
        logger.warning("not ready: %s", error)
        raise ApiError(503, f"not ready: {type(error).__name__}", headers={"Retry-After": "2"}) from None
    return JSONResponse({"status": "ok"})


for _router in (_videos, _models, _probes):
    _answer_head(_router)
