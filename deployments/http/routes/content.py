"""The files of a finished video."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from deployments.http.answer_schema import error_answers, file_answer
from deployments.http.content import MEDIA_TYPES, Variant, open_content, respond
from deployments.http.door import DOWNLOAD_PLACE, DoorOf, VideoId, only_query
from deployments.http.head import answer_head

_AT = "Which frame, for `variant=frame`: `first` (the default), `last`, or a time in seconds."

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.get(
    "/{video_id}/content",
    summary="The file of a finished video, a preview, or the video in another form",
    response_class=Response,
    responses={
        200: file_answer(*MEDIA_TYPES),
        206: file_answer(*MEDIA_TYPES),
        **error_answers(400, 401, 404, 409, 416, 429, 503),
    },
    dependencies=[DOWNLOAD_PLACE, only_query("variant", "at")],
)
async def get_content(
    request: Request,
    video_id: VideoId,
    door: DoorOf,
    variant: Variant = "video",
    at: Annotated[str | None, Query(description=_AT)] = None,
) -> Response:
    record = await asyncio.to_thread(door.videos.store.read, video_id)
    return respond(request, await open_content(door.videos.store, door.previews, record, variant, at))


answer_head(router)
