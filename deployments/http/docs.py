"""The page ``/docs`` and its OpenAPI document, with the limits of the model served. The page loads no other site."""

import base64
import hashlib
import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline

from deployments.http.request_schema import create_body
from pyramid_serve.api.offers import field_schemas_of
from pyramid_serve.served_model import ServedModels

DOCS_PATH = "/docs"
ASSETS_PATH = "/docs/assets"

_POLICY = (
    "default-src 'none'; script-src 'self' {script}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def new_app() -> FastAPI:
    """An application that has only the page and its assets."""
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        static_url=ASSETS_PATH,
        title="Pyramid Serve",
        summary="Text and pictures in, video out.",
        version="1",
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.add_route(DOCS_PATH, _docs, include_in_schema=False)
    return app


async def _docs(request: Request) -> Response:
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="Pyramid Serve",
        swagger_js_url=f"{root}{ASSETS_PATH}/swagger-ui-bundle.js",
        swagger_css_url=f"{root}{ASSETS_PATH}/swagger-ui.css",
        swagger_favicon_url=f"{root}{ASSETS_PATH}/favicon.png",
        swagger_ui_parameters={"validatorUrl": None},  # the validator would get the document, and is another site
    )
    page.headers["Content-Security-Policy"] = _POLICY.format(script=_hashes(bytes(page.body).decode()))
    return page


def _hashes(page: str) -> str:
    """The sources of a Content-Security-Policy that allow the inline scripts of a page."""
    digests = [hashlib.sha256(script.encode()).digest() for script in _INLINE_SCRIPT.findall(page)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def complete(app: FastAPI, models: ServedModels, *, needs_key: bool) -> None:
    """Put what these models take and tell into the OpenAPI document. The app must have all its routes already.

    needs_key: requests to ``/v1`` need a key, for which the page then has a button, "Authorize".
    """
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            # FastAPI documents a 422 for every route with parameters; here a wrong parameter is a 400.
            if operation["responses"].get("422", {}).get("description") == "Validation Error":
                del operation["responses"]["422"]
    if needs_key:
        _add_key(document)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    _add_family_fields(document["components"]["schemas"]["Video"]["properties"], models)
    for path in ("/v1/videos", "/v1/videos/sync"):
        document["paths"][path]["post"]["requestBody"] = create_body(models)


def _add_key(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if path.startswith("/v1/"):
            for operation in operations.values():
                operation["security"] = [{"key": []}]


def _add_family_fields(fields: dict[str, Any], models: ServedModels) -> None:
    """Put what the models' families show into the fields of the video object, where it has them."""
    in_order = dict(fields)
    fields.clear()
    for name, schema in in_order.items():
        fields[name] = schema
        if name == "prompt_suffix":
            for model in models.models:
                fields |= field_schemas_of(model.family.shown_fields)
