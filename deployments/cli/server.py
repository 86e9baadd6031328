"""A client of the videos API for the command line. Whatever a server answers, its errors are ``ServerError``."""

import asyncio
import base64
import io
import json
import math
import mimetypes
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.http.hosts import is_this_machine
from pyramid_serve.api import Stage
from pyramid_serve.outputs import written_aside
from pyramid_serve.terminal import printable

Video = dict[str, Any]
"""A video object as the server sent it, with the keys and types of ``VideoObject``."""

Result = TypeVar("Result", bound=BaseModel)

_CALL_S = 40.0
"""For a whole answer, however slowly it trickles in."""
_SLOWEST_UPLOAD_BYTES_PER_S = 50_000
_IDLE_S = 30.0
_MIN_BYTES_PER_IDLE_S = 64 * 1024
"""A download that brings less in the time of ``_IDLE_S`` counts as stuck."""
_PREVIEW_S = 120.0
"""Until a file begins to come; previews are made when they are first asked for."""
_PATIENCE_S = 30.0
_MAX_REDIRECTS = 5
_MAX_ANSWER_BYTES = 32 * 1024**2
_MAX_FILE_BYTES = 4 * 1024**3
_MAX_DEPTH = 50
_MAX_BOXES = 1_000_000
_MAX_MESSAGE_CHARACTERS = 1000
_OVER = ("completed", "failed")
_LAST_SECOND = 253_402_214_400
"""The last day of the year 9999: what ``datetime`` can tell."""


class ServerError(ValueError):
    """The server refused, could not be reached, or answered nonsense. The message is for the user, on one line."""


class _AwayError(ServerError):
    """It may be back soon."""


# --- what the command line reads of an answer -----------------------------------------------------------------------

_READ = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

Seconds = Annotated[int | float, Field(ge=0, le=_LAST_SECOND)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Name = Annotated[str, Field(max_length=1000)]


class ErrorObject(BaseModel):
    model_config = _READ

    code: Name
    message: str


class Entry(BaseModel):
    """An entry of the timeline."""

    model_config = _READ

    stage: Annotated[Stage, Field(strict=False)]
    unit: Count | None
    start: Seconds
    end: Seconds
    replica: Name


class VideoObject(BaseModel):
    """What the commands use of a video object."""

    model_config = _READ

    id: Annotated[Name, Field(min_length=1)]
    model: Name
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: Seconds
    expires_at: Seconds | None
    prompt: str
    size: Name
    error: ErrorObject | None
    num_frames: Count
    fps: int | float
    seed: int
    num_units: Annotated[int, Field(ge=1, le=10**6)]
    num_units_done: Count
    queue_position: Count | None
    eta_seconds: Seconds | None
    prompt_suffix: str = ""
    prompt_truncated_at: Count | None = None
    timeline: Annotated[list[Entry], Field(max_length=5000)]


class VideoPage(BaseModel):
    model_config = _READ

    data: list[VideoObject]
    has_more: bool


class DeletedVideo(BaseModel):
    model_config = _READ

    deleted: Literal[True]


class _Refusal(BaseModel):
    model_config = _READ

    class Error(BaseModel):
        model_config = _READ

        message: str

    error: Error


# --- the client -----------------------------------------------------------------------------------------------------


class Server:
    """A server by its URL. Every method raises ``ServerError``."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        address = f"--url {printable(url)}: must be like http://127.0.0.1:8000"
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
            httpx.URL(urlunsplit(parts))
        except (ValueError, httpx.InvalidURL):
            raise ServerError(address) from None
        is_address = parts.scheme in ("http", "https") and parts.username is None and port != 0
        if not is_address or not host or not host.isprintable() or " " in host:
            raise ServerError(address)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ServerError("--api-key: must be printable ASCII characters")
        self.url = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        self._headers = {"Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # A proxy that the environment names does not know this machine.
        self._uses_proxies = not is_this_machine(host)
        self._tls = httpx.create_ssl_context() if parts.scheme == "https" else False

    def submit(self, fields: Mapping[str, Any], *, picture: Path | None = None) -> Video:
        """Ask for a video. Sent again when the answer is lost, which makes no second video."""
        body = dict(fields)
        if picture is not None:
            body["input_reference"] = {"image_url": _data_url(picture)}
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        return self._patiently(lambda: self._video("POST", "/v1/videos", content=content, headers=headers))

    def get(self, video_id: str) -> Video:
        return self._patiently(lambda: self._video("GET", _path(video_id)))

    def list(self, *, limit: int) -> Iterator[Video]:
        """The newest videos, at most ``limit``."""
        after: dict[str, str] = {}
        while limit > 0:
            query = urlencode({"limit": min(limit, 100), **after})
            answer = self._call("GET", f"/v1/videos?{query}")
            page = self._read(VideoPage, answer)
            yield from answer["data"][:limit]
            limit -= len(page.data)
            if not page.has_more or not page.data:
                return
            after = {"after": page.data[-1].id}

    def cancel(self, video_id: str) -> Video:
        return self._video("POST", f"{_path(video_id)}/cancel")

    def delete(self, video_id: str) -> None:
        self._read(DeletedVideo, self._call("DELETE", _path(video_id)))

    def wait(self, video_id: str, show: Callable[[Video], None], *, interval_s: float = 0.5) -> Video:
        """The video once it is over; ``show`` is called with how it stands meanwhile."""
        while True:
            video = self.get(video_id)
            show(video)
            if video["status"] in _OVER:
                return video
            time.sleep(interval_s)

    def content(self, video_id: str, *, variant: str = "video") -> bytes:
        """A file of a finished video."""
        content = io.BytesIO()
        self._download(video_id, content, variant)
        return content.getvalue()

    def download(self, video_id: str, output: Path, *, variant: str = "video") -> None:
        """Write a file of a finished video to ``output``, which appears once it is whole.

        Raises ``ValueError`` where it cannot be written.
        """
        with written_aside(output) as opened:
            self._download(video_id, opened, variant)

    def is_ready(self) -> bool:
        try:
            self._call("GET", "/readyz")
        except ServerError:
            return False
        return True

    def _patiently(self, call: Callable[[], Video]) -> Video:
        """The answer, asked for again while the server is away for a moment."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return call()
            except _AwayError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def _video(
        self, method: str, path: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Video:
        answer = self._call(method, path, content=content, headers=headers)
        self._read(VideoObject, answer)
        return answer

    def _read(self, model: type[Result], answer: dict[str, Any]) -> Result:
        try:
            return model.model_validate(answer)
        except ValidationError as error:
            problem = error.errors(include_input=False, include_url=False)[0]
            where = printable(".".join(map(str, problem["loc"])))[:_MAX_MESSAGE_CHARACTERS]
            raise ServerError(f"{self.url}: no answer of Pyramid Serve: {where}: {problem['msg']}") from None

    def _call(
        self, method: str, path: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """The JSON object that a request is answered with."""
        total_s = _CALL_S + len(content) / _SLOWEST_UPLOAD_BYTES_PER_S

        async def ask() -> bytes:
            async with asyncio.timeout(total_s), self._open(method, path, content=content, headers=headers) as answer:
                return await _read_whole(answer, _MAX_ANSWER_BYTES)

        text = self._run(ask, f"no whole answer within {total_s:.0f} s")
        parsed = _parse(text)
        if parsed is None:
            raise ServerError(f"{self.url}: no Pyramid Serve answers there")
        return parsed

    def _download(self, video_id: str, out: BinaryIO, variant: str) -> None:
        async def receive() -> None:
            path = f"{_path(video_id)}/content?{urlencode({'variant': variant})}"
            async with asyncio.timeout(_PREVIEW_S) as limit, self._open("GET", path) as answer:
                self._check_file(answer)
                num_bytes = 0
                limit.reschedule(asyncio.get_running_loop().time() + _IDLE_S)
                num_at_last_look = 0
                async for chunk in answer.aiter_raw():
                    out.write(chunk)
                    num_bytes += len(chunk)
                    if num_bytes > _MAX_FILE_BYTES:
                        raise ServerError(f"{self.url}: sends a file of more than {_MAX_FILE_BYTES} bytes")
                    if num_bytes - num_at_last_look >= _MIN_BYTES_PER_IDLE_S:
                        num_at_last_look = num_bytes
                        limit.reschedule(asyncio.get_running_loop().time() + _IDLE_S)
            if not num_bytes or _is_cut_off(out, num_bytes):
                raise ServerError(f"{self.url}: sends a file that is not whole, of {num_bytes} bytes")

        self._run(receive, f"nothing or hardly anything came for {_IDLE_S:.0f} s")

    def _check_file(self, answer: httpx.Response) -> None:
        """``ServerError`` for an answer that is no file of a video, or is too large."""
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind and not kind.startswith(("video/", "image/")) and kind != "application/octet-stream":
            raise ServerError(f"{self.url}: sends {printable(kind)[:100]} instead of a video or picture")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise ServerError(f"{self.url}: sends a file in an encoding that was not asked for")
        length = answer.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > _MAX_FILE_BYTES:
            raise ServerError(f"{self.url}: sends a file of more than {_MAX_FILE_BYTES} bytes")

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A successful answer whose body is still to be read. Redirects are followed within the server."""
        # One client for each request: an idle connection would belong to an event loop that has ended.
        client = httpx.AsyncClient(
            headers={**self._headers, **(headers or {})},
            timeout=httpx.Timeout(_CALL_S, read=_PREVIEW_S),
            trust_env=self._uses_proxies,
            verify=self._tls,
        )
        url = self.url + path
        async with client:
            for _ in range(_MAX_REDIRECTS + 1):
                async with client.stream(method, url, content=content or None) as answer:
                    if not answer.has_redirect_location:
                        if not answer.is_success:
                            raise _refusal(answer.status_code, await _read_whole(answer, _MAX_ANSWER_BYTES))
                        yield answer
                        return
                    url = self._redirected(url, answer.headers["location"])
                    if answer.status_code == 303:
                        method, content = "GET", b""
        raise ServerError(f"{self.url}: redirects more than {_MAX_REDIRECTS} times")

    def _redirected(self, url: str, location: str) -> str:
        """Where a redirect leads. ``ServerError`` for another server, which must not get the key or the prompt."""
        try:
            target = httpx.URL(urljoin(url, location))
        except (ValueError, httpx.InvalidURL):
            raise ServerError(f"{self.url}: redirects to nowhere") from None
        if _origin(target) != _origin(httpx.URL(url)):
            to = printable(f"{target.scheme}://{target.host}" + (f":{target.port}" if target.port else ""))
            raise ServerError(f"{self.url}: redirects to {to[:200]}; if that is the server, say so with --url")
        return str(target)

    def _run(self, work: Callable[[], Any], late: str) -> Any:
        """The result of a coroutine function, its errors as ``ServerError``; ``late`` says what took too long."""
        try:
            return asyncio.run(work())
        except TimeoutError:
            raise _AwayError(f"{self.url}: {late}") from None
        except httpx.ConnectError as error:
            if any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error)):
                raise ServerError(
                    f"{self.url}: nothing answers there; start a server with 'pyramid-serve up', "
                    "or say where one is with --url"
                ) from None
            raise _AwayError(f"{self.url}: cannot be reached: {_reason(error)}") from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.DecodingError, httpx.ProxyError) as error:
            raise ServerError(f"{self.url}: {_reason(error)}") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise _AwayError(f"{self.url}: broke off: {_reason(error)}") from None
        except (ImportError, UnicodeError) as error:  # a proxy of the environment, or a host that has no name
            raise ServerError(f"{self.url}: cannot be asked: {_reason(error)}") from None


async def _read_whole(answer: httpx.Response, max_bytes: int) -> bytes:
    """A body of at most so many bytes; more of it is cut off, which leaves no JSON."""
    content = bytearray()
    async for chunk in answer.aiter_bytes():
        content += chunk
        if len(content) > max_bytes:
            return b""
    return bytes(content)


def _parse(text: bytes) -> dict[str, Any] | None:
    """A JSON object of finite numbers and bounded depth; None for anything else."""
    try:
        parsed = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    level = [parsed]
    for _ in range(_MAX_DEPTH):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return parsed if isinstance(parsed, dict) else None
    return None


def _is_cut_off(file: BinaryIO, num_bytes: int) -> bool:
    """Whether a file that begins as an MP4 or a WebP ends elsewhere than its own parts say.

    A server that says a length too small, or none and breaks off, is found out by that alone.
    """
    file.seek(0)
    head = file.read(8)
    if head[:4] == b"RIFF":
        return int.from_bytes(head[4:8], "little") + 8 != num_bytes
    if head[4:8] != b"ftyp":
        return False
    position, num_boxes = 0, 0
    while position < num_bytes and num_boxes < _MAX_BOXES:
        file.seek(position)
        box = file.read(16)
        size = int.from_bytes(box[8:16]) if box[:4] == b"\0\0\0\1" else int.from_bytes(box[:4])
        if size == 0:
            return False  # up to the end, wherever that is
        if size < 8:
            return True
        position += size
        num_boxes += 1
    return position != num_bytes


def _refuse_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond all bounds")
    return number


def _refusal(status: int, body: bytes) -> ServerError:
    """What the server says of a request that it refused."""
    try:
        message = printable(_Refusal.model_validate(_parse(body)).error.message)[:_MAX_MESSAGE_CHARACTERS]
    except ValidationError:
        message = f"HTTP {status} {httpx.codes.get_reason_phrase(status)}".strip()
    return _AwayError(message) if status in (502, 503, 504) else ServerError(message)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that led to it."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _causes(each)
        error = error.__cause__ or error.__context__


def _reason(error: Exception) -> str:
    return printable(str(error))[:_MAX_MESSAGE_CHARACTERS] or type(error).__name__


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port  # None for the scheme's own port


def _path(video_id: str) -> str:
    return f"/v1/videos/{quote(video_id, safe='')}"


def _data_url(picture: Path) -> str:
    try:
        content = picture.read_bytes()
    except OSError as error:
        raise ServerError(f"{picture}: cannot be read: {error.strerror}") from None
    kind = mimetypes.guess_type(picture.name)[0] or ""
    kind = kind if kind.startswith("image/") else "image/png"  # the server looks for itself
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
