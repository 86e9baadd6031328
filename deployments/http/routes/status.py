"""What the server does now: its queue, and the pools of each model."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from deployments.http.answer_schema import QueueStatus, ServerStatus, error_answers
from deployments.http.door import DoorOf, only_query
from deployments.http.errors import reachable
from deployments.http.head import answer_head

router = APIRouter(prefix="/v1/status", tags=["status"])


@router.get(
    "",
    summary="The queue, and the pools of each model",
    response_model=ServerStatus,
    responses=error_answers(400, 401, 503),
    dependencies=[only_query()],
)
async def get_status(door: DoorOf) -> Response:
    with reachable():
        state = await door.videos.queue()
    queue = QueueStatus(num_queued=state.num_queued, num_in_progress=state.num_in_progress)
    status = ServerStatus(object="status", queue=queue, models=await door.pools.status())
    return JSONResponse(status.model_dump(), headers={"Cache-Control": "no-store"})


answer_head(router)
