"""Answers to HEAD."""

from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.routing import APIRoute


def answer_head(router: APIRouter) -> None:
    """Answer HEAD on each route of a router that answers GET, as Starlette's routes do and FastAPI's do not."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(
                route.path.removeprefix(router.prefix),
                route.endpoint,
                methods=["HEAD"],
                dependencies=route.dependencies,
                include_in_schema=False,
            )


async def empty_body() -> AsyncIterator[bytes]:
    """A streamed body without bytes, for HEAD where GET streams a body of unknown length: no ``Content-Length``."""
    return
    yield b""
