"""What went wrong, in the form of the API: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayTaskError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from deployments.claims.asking import UNREACHABLE
from pyramid_serve.api import MODEL_NOT_FOUND, RequestError, is_video_id
from pyramid_serve.storage import StorageError, VideoNotFoundError

logger = logging.getLogger(__name__)

VIDEOS_PATH = "/v1/videos/"
CLIENT_LEFT = 499
"""Logged as the status of an answer that no client waits for any more, as nginx does."""

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_FILE_METHODS = ("GET", "HEAD")

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    409: "not_ready",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "unprocessable",
    429: "queue_full",
    500: "internal_error",
    501: "not_implemented",
    503: "unavailable",
}
_STATUSES = {MODEL_NOT_FOUND: 404}
"""The status of a ``RequestError`` by its code; 400 for other codes."""
_STORAGE_RETRY_AFTER_S = 10
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


class ApiError(Exception):
    """An error that is sent as it is. ``param`` names the field; ``code`` is that of the status unless given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or _CODES[status]
        self.headers = dict(headers or {})


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    fields = {"message": message, "type": kind, "param": param, "code": code or _CODES.get(status, kind)}
    return {"error": {name: None if text is None else _printable(text) for name, text in fields.items()}}


def _printable(text: str) -> str:
    """A text with control characters and lone surrogates escaped: a message may repeat what the client sent."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(
        error_body(error.status, str(error), param=error.param, code=error.code),
        status_code=error.status,
        headers=error.headers,
    )


def not_found(video_id: str) -> ApiError:
    """404 for the id of a video, or for a text in its place that is not an id."""
    return ApiError(404, f"video_id={video_id[:60]!r}: no such video", param="video_id")


def storage_unavailable() -> ApiError:
    """503 while the storage cannot be read or written. The reason is only logged, as it may name paths and hosts."""
    return ApiError(
        503,
        "the storage of this server cannot be used now; try again later",
        code="storage_unavailable",
        headers={"Retry-After": str(_STORAGE_RETRY_AFTER_S)},
    )


@contextmanager
def reachable() -> Iterator[None]:
    """Raises ``ApiError`` 503 where the block asks for something of claims and cannot reach it."""
    try:
        yield
    except UNREACHABLE:
        raise being_replaced() from None


def being_replaced() -> ApiError:
    """503 while a deployment that the answer depends on cannot be reached."""
    return ApiError(503, "a part of the server is being replaced; try again", headers={"Retry-After": "2"})


def repeated_field(name: str, said: str | None = None) -> ApiError:
    """400 for a field that is given twice. ``said``: how the message names the field, ``name`` unless given."""
    return ApiError(400, f"{(said or name)[:60]}: given more than once", param=name[:60])


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of the API, except unexpected ones, which ``on_unexpected`` answers."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(VideoNotFoundError, _on_video_not_found)
    app.add_exception_handler(OSError, _on_os_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(error)


def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    status = _STATUSES.get(error.code or "", 400)
    # The message of what came over a handle would be a traceback, with paths and addresses.
    message = str(error.cause if isinstance(error, RayTaskError) else error)
    return error_response(ApiError(status, message, param=error.param, code=error.code))


def _on_video_not_found(request: Request, _: Exception) -> JSONResponse:
    return error_response(not_found(str(request.path_params.get("video_id", ""))))


def _on_os_error(request: Request, error: Exception) -> JSONResponse:
    """503 for an error of the storage. Others, such as a program that is missing, are unexpected."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, StorageError) or (isinstance(cause, OSError) and cause.errno in _STORAGE_ERRNOS):
        logger.warning("%s %s: %s", request.method, request.url.path, cause)
        return error_response(storage_unavailable())
    return on_unexpected(request, error)


def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """400 for a wrong parameter in the path or query; FastAPI's own status is 422."""
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = str(problem["loc"][-1])
    came = f"={repr(problem['input'])[:60]}" if isinstance(problem.get("input"), str) else ""
    message = str(problem["msg"])
    return error_response(ApiError(400, f"{param}{came}: {message[0].lower()}{message[1:]}", param=param))


def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Errors that the router raises: an unknown path, or a method that the path does not have."""
    assert isinstance(error, HTTPException)
    method, path = request.method[:20], request.url.path[:100]
    if error.status_code == 404:
        rest = request.url.path.removeprefix(VIDEOS_PATH)
        if rest != request.url.path and not is_video_id(rest.partition("/")[0]):
            return error_response(not_found(rest))  # an id with slashes in it matches no route
        return error_response(ApiError(404, f"{method} {path!r}: no such path; /docs lists those there are"))
    if error.status_code == 405:
        # For static files none is found: by the time they refuse a method, the path is relative to their mount.
        allowed = ", ".join(_allowed_methods(request) or _FILE_METHODS)
        message = f"{method} {path!r}: this method is not allowed; allowed are {allowed}"
        return error_response(ApiError(405, message, headers={"Allow": allowed}))
    body = error_body(error.status_code, str(error.detail))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _allowed_methods(request: Request) -> list[str]:
    """The methods of all routes that match the path; the router only names those of the first."""
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


def on_unexpected(request: Request, error: Exception) -> JSONResponse:
    """Log an unexpected error and answer 500. A handler for ``ServerErrorMiddleware``."""
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(ApiError(500, "something went wrong here; it is in the server's log"))
