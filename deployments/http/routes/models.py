"""The models served."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from deployments.http.answer_schema import ModelList, ServedModelObject, error_answers
from deployments.http.door import Door, DoorOf, only_query
from deployments.http.head import answer_head
from pyramid_serve.served_model import ServedModel

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
    return JSONResponse({"object": "list", "data": [_model_object(model, door) for model in door.videos.models.models]})


@router.get(
    "/{model:path}",
    summary="One model",
    response_model=ServedModelObject,
    responses=error_answers(400, 401, 404),
    dependencies=[only_query()],
)
async def get_model(model: str, door: DoorOf) -> Response:
    return JSONResponse(_model_object(door.videos.models.choose(model), door))


def _model_object(model: ServedModel, door: Door) -> dict[str, Any]:
    offer = model.offer
    return {
        "id": model.name,
        "object": "model",
        "created": int(door.started_at),
        "owned_by": OWNER,
        "family": model.family.name,
        "sizes": None if offer.sizes is None else [f"{width}x{height}" for width, height in offer.sizes],
        "size_multiple": offer.side_multiple,
        "default_size": f"{offer.default_size[0]}x{offer.default_size[1]}",
        "fps": offer.fps,
        "max_seconds": round(offer.max_seconds, 3),
        "max_num_frames": offer.max_num_frames,
        "default_seconds": round(offer.default_seconds, 3),
        "needs_input_reference": offer.needs_picture,
        "example_prompts": list(offer.example_prompts),
        **offer.defaults,
        "request_fields": offer.field_schemas,
    }


answer_head(router)
