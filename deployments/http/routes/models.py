"""The models served."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from deployments.http.answer_schema import ModelList, ServedModelObject, error_answers
from deployments.http.door import Door, DoorOf, only_query
from deployments.http.head import answer_head
from pyramid_serve.api import default_length_of, longest_of, steps_within, unknown_model
from pyramid_serve.pyramid_flow.shapes import num_frames_of, seconds_of

OWNER = "pyramid-serve"

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get(
    "",
    summary="The models served",
    response_model=ModelList,
    responses=error_answers(400, 401),
    dependencies=[only_query()],
)
async def list_models(door: DoorOf) -> Response:
    return JSONResponse({"object": "list", "data": [_model_object(door)]})


@router.get(
    "/{model:path}",
    summary="One model",
    response_model=ServedModelObject,
    responses=error_answers(400, 401, 404),
    dependencies=[only_query()],
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


answer_head(router)
