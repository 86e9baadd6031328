"""The page at ``/``: for a browser a page that asks for videos and plays them, for others what the server is, as JSON.

The page is the files beside this module: ES modules and a stylesheet, served as they are. It loads no other site, and
has nothing inline, so its policy allows only scripts and styles of this server.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from deployments.http.door import DoorOf
from deployments.http.head import answer_head

_FOLDER = Path(__file__).parent / "files"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)

router = APIRouter()


class _Fresh(StaticFiles):
    """Files that a browser asks for each time whether they have changed: new modules never run beside old ones."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page and its files."""
    app.include_router(router)
    app.mount("/page", _Fresh(directory=_FOLDER), name="page")


@router.get("/", include_in_schema=False)
async def root(request: Request, door: DoorOf) -> Response:
    headers = {"Vary": "Accept", "Cache-Control": "no-cache"}
    if "text/html" in request.headers.get("accept", ""):
        page = (_FOLDER / "index.html").read_bytes()
        return Response(page, media_type="text/html", headers={**headers, "Content-Security-Policy": _POLICY})
    base = str(request.base_url).rstrip("/")
    return JSONResponse(
        {
            "name": "Pyramid Serve",
            "model": door.videos.models.names[0],
            "videos": f"{base}/v1/videos",
            "docs": f"{base}/docs",
            "openapi": f"{base}/openapi.json",
        },
        headers=headers,
    )


answer_head(router)
