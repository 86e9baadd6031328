"""The files of a finished video."""

import asyncio

from fastapi import APIRouter, Request, Response

from deployments.http.answer_schema import error_answers, file_answer
from deployments.http.content import Variant, open_content, respond
from deployments.http.door import DOWNLOAD_PLACE, DoorOf, VideoId, only_query
from deployments.http.head import answer_head

router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.get(
    "/{video_id}/content",
    summary="The file of a finished video, or a preview",
    response_class=Response,
    responses={
        200: file_answer("video/mp4", "image/webp"),
        206: file_answer("video/mp4", "image/webp"),
        **error_answers(400, 401, 404, 409, 416, 429, 503),
    },
    dependencies=[DOWNLOAD_PLACE, only_query("variant")],
)
async def get_content(request: Request, video_id: VideoId, door: DoorOf, variant: Variant = "video") -> Response:
    record = await asyncio.to_thread(door.videos.store.read, video_id)
    return respond(request, await open_content(door.videos.store, door.previews, record, variant))


answer_head(router)
