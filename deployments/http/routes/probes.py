"""Whether the server is alive, and whether it is ready."""

import asyncio
import logging

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from deployments.claims.asking import UNREACHABLE
from deployments.http.answer_schema import Health, error_answers
from deployments.http.door import DoorOf
from deployments.http.errors import ApiError, storage_unavailable
from deployments.http.head import answer_head
from pyramid_serve.storage import StorageError

logger = logging.getLogger(__name__)

router = APIRouter(tags=["probes"])


@router.get("/healthz", summary="Whether this process answers", response_model=Health)
async def healthz() -> Response:
    return JSONResponse({"status": "ok"})


@router.get(
    "/readyz",
    summary="Whether videos are taken: the queue can be asked, and the storage be read and written",
    response_model=Health,
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


answer_head(router)
