"""Another video with the settings of one that there is, and what other video servers have and this one does not."""

import asyncio

from fastapi import APIRouter, Request, Response

from deployments.http.answer_schema import Video, error_answers, video_answer
from deployments.http.asking import idempotency_key, key_reused, read_request, refusals
from deployments.http.door import DoorOf, VideoId, only_query
from deployments.http.errors import ApiError
from deployments.http.request_schema import IDEMPOTENCY_KEY, remix_body
from deployments.http.routes.videos import video_response
from deployments.videos.view import VideoView
from pyramid_serve.api import VideoRecord, VideoRequest

_FIELDS = frozenset(("prompt", "seed", "user", "metadata"))

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post(
    "/{video_id}/remix",
    summary="Ask for a video with the settings of another one",
    description="The prompt is new; the seed, the size, the length, the picture and all else are those of the video, "
    "unless another seed is given.",
    openapi_extra={"parameters": [IDEMPOTENCY_KEY], "requestBody": remix_body()},
    response_model=Video,
    responses={200: video_answer(), **error_answers(400, 401, 403, 404, 408, 413, 415, 429, 503)},
    dependencies=[only_query()],
)
async def remix_video(request: Request, video_id: VideoId, door: DoorOf) -> Response:
    with door.uploads.begin() as upload:
        asked = await read_request(request, door, upload)
        given = asked.model_fields_set | asked.family_fields.keys()
        for name in sorted(given - _FIELDS):
            raise ApiError(400, f"{name}: cannot be changed; a remix takes {', '.join(sorted(_FIELDS))}", param=name)
        with refusals():
            accepted = await door.videos.remix(video_id, asked, idempotency_key=idempotency_key(request))
        if not accepted.is_new:
            source = await asyncio.to_thread(door.videos.store.read, video_id)
            if not _is_same(source, asked, accepted.record):
                raise key_reused(accepted.record)
    return video_response(VideoView(accepted.record, accepted.place))


def _is_same(source: VideoRecord, asked: VideoRequest, record: VideoRecord) -> bool:
    """Whether a video that an idempotency key was used for is this remix. A seed that was to be drawn may be any."""
    plan = record.plan
    seed = asked.seed if "seed" in asked.model_fields_set else source.plan.seed
    return (
        (record.remixed_from, plan.prompt) == (source.id, asked.prompt)
        and seed in (None, plan.seed)
        and (asked.user, asked.metadata) == (record.user, record.metadata)
    )


@router.post("/edits", include_in_schema=False)
async def edit_video() -> Response:
    raise ApiError(501, "edits: the models of this server make videos, and cannot change one")


@router.post("/characters", include_in_schema=False)
async def create_character() -> Response:
    raise ApiError(501, "characters: the models of this server know none")
