"""A client of the videos API for the command line. Whatever a server answers, its errors are ``ServerError``."""

import asyncio
import base64
import io
import json
import mimetypes
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, ValidationError

from deployments.cli.answers import DeletedVideo, Refusal, Video, VideoObject, VideoPage, parse_answer
from deployments.cli.downloads import is_cut_off, problem_of
from deployments.cli.variants import LONG
from deployments.http.hosts import is_this_machine
from pyramid_serve.outputs import written_aside
from pyramid_serve.terminal import printable

Result = TypeVar("Result", bound=BaseModel)

_CALL_S = 40.0
"""The time limit for a whole answer, however slowly it arrives."""
_SLOWEST_UPLOAD_BYTES_PER_S = 50_000
_IDLE_S = 30.0
_MIN_BYTES_PER_IDLE_S = 64 * 1024
"""A download that brings less than this in ``_IDLE_S`` is considered stuck."""
_PREVIEW_S = 120.0
"""The time limit until a file begins to arrive; a preview is made when it is first requested."""
_CONVERSION_S = 1200.0
"""How long a file of the variants in ``LONG`` is asked for again while the server makes it."""
_PATIENCE_S = 60.0
"""How long a request is repeated while the server is away or its queue is full."""
_RETRY_S = 1.0
"""The pause between two tries if the server does not name one."""
_MAX_REDIRECTS = 5
_MAX_ANSWER_BYTES = 32 * 1024**2
_MAX_FILE_BYTES = 4 * 1024**3
_MAX_MESSAGE_CHARACTERS = 1000
_OVER = ("completed", "failed")
_RETRIED_STATUSES = (429, 502, 503, 504)
_REFUSED_STATUSES = (400, 404, 409, 413, 422, 500)


class ServerError(ValueError):
    """The server refused, could not be reached, or sent an invalid answer. The message is one line for the user."""


class RefusedError(ServerError):
    """The server answered this one request with an error; others may fare better."""


class NothingAnswersError(ServerError):
    """No server listens at the URL."""


class AwayError(ServerError):
    """The server cannot answer now, but may soon: the same request may succeed after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = _RETRY_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _BusyError(AwayError):
    """The server answered that it cannot do this now."""


class Server:
    """The server at a URL. Every method raises ``ServerError``."""

    def __init__(self, url: str, *, api_key: str | None = None, pause: Callable[[float], object] | None = None) -> None:
        """pause: waits for so many seconds, instead of ``time.sleep``; what it raises ends the call."""
        self._pause = pause
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
        # A proxy named by the environment cannot reach a loopback address of this machine.
        self._uses_proxies = not is_this_machine(host)
        self._tls = httpx.create_ssl_context() if parts.scheme == "https" else False

    def submit(self, fields: Mapping[str, Any], *, picture: Path | None = None, key: str | None = None) -> Video:
        """Ask for a video. The request is sent again if the answer is lost; its key prevents a second video.

        key: one that was used before gives the video of that time. Raises ``RefusedError`` for what cannot be made.
        """
        body = dict(fields)
        if picture is not None:
            body["input_reference"] = {"image_url": _data_url(picture)}
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or uuid.uuid4().hex}
        return self._patiently(lambda: self._video("POST", "/v1/videos", content=content, headers=headers))

    def get(self, video_id: str) -> Video:
        """A video as it stands now."""
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
        """Cancel a video, unless it is over; the video afterwards."""
        return self._video("POST", f"{_path(video_id)}/cancel")

    def delete(self, video_id: str) -> None:
        """Delete a video with its files."""
        self._read(DeletedVideo, self._call("DELETE", _path(video_id)))

    def wait(self, video_id: str, show: Callable[[Video], None], *, interval_s: float = 0.5) -> Video:
        """Wait until a video is over; the video then. ``show`` is called with the video each time it is read."""
        while True:
            video = self.get(video_id)
            show(video)
            if video["status"] in _OVER:
                return video
            self._wait(interval_s)

    def content(self, video_id: str, *, variant: str = "video") -> bytes:
        """A file of a finished video."""
        content = io.BytesIO()
        self._download(video_id, content, variant)
        return content.getvalue()

    def download(self, video_id: str, output: Path, *, variant: str = "video", at: str | None = None) -> None:
        """Write a file of a finished video to ``output``, which appears only when it is complete.

        at: of the variant ``frame``, ``first``, ``last`` or a time in seconds. Where the server has to make the file
        first, this waits for it. Also raises ``ValueError`` if it cannot be written.
        """
        with written_aside(output) as opened:

            def download() -> None:
                opened.seek(0)
                opened.truncate()
                self._download(video_id, opened, variant, at)

            deadline = time.monotonic() + (_CONVERSION_S if variant in LONG else 0.0)
            while True:
                try:
                    return download()
                except _BusyError as error:
                    if time.monotonic() >= deadline:
                        raise
                    self._wait(error.retry_after_s)

    def _wait(self, seconds: float) -> None:
        (self._pause or time.sleep)(seconds)

    def _patiently(self, call: Callable[[], Video]) -> Video:
        """The result of a call, which is repeated while the server cannot answer: when it says, or every second."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return call()
            except AwayError as error:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise
                self._wait(min(error.retry_after_s, left_s))

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
        """Send a request; the JSON object that answers it."""
        total_s = _CALL_S + len(content) / _SLOWEST_UPLOAD_BYTES_PER_S

        async def ask() -> bytes:
            async with asyncio.timeout(total_s), self._open(method, path, content=content, headers=headers) as answer:
                return await _read_whole(answer, _MAX_ANSWER_BYTES)

        text = self._run(ask, f"no whole answer within {total_s:.0f} s")
        parsed = parse_answer(text)
        if parsed is None:
            raise ServerError(f"{self.url}: no Pyramid Serve answers there")
        return parsed

    def _download(self, video_id: str, out: BinaryIO, variant: str, at: str | None = None) -> None:
        async def receive() -> None:
            query = {"variant": variant} if at is None else {"variant": variant, "at": at}
            path = f"{_path(video_id)}/content?{urlencode(query)}"
            async with asyncio.timeout(_PREVIEW_S) as limit, self._open("GET", path) as answer:
                problem = problem_of(answer.headers, max_bytes=_MAX_FILE_BYTES)
                if problem is not None:
                    raise ServerError(f"{self.url}: {problem}")
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
            if not num_bytes or is_cut_off(out, num_bytes):
                raise ServerError(f"{self.url}: sends a file that is not whole, of {num_bytes} bytes")

        self._run(receive, f"nothing or hardly anything came for {_IDLE_S:.0f} s")

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A successful answer whose body has not been read yet. Redirects are followed within the server."""
        # A new client for each request, because an idle connection would belong to an event loop that has ended.
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
                            raise _refusal(answer, await _read_whole(answer, _MAX_ANSWER_BYTES))
                        yield answer
                        return
                    url = self._redirected(url, answer.headers["location"])
                    if answer.status_code == 303:
                        method, content = "GET", b""
        raise ServerError(f"{self.url}: redirects more than {_MAX_REDIRECTS} times")

    def _redirected(self, url: str, location: str) -> str:
        """The target of a redirect. ``ServerError`` for another server, which must not get the key or the prompt."""
        try:
            target = httpx.URL(urljoin(url, location))
        except (ValueError, httpx.InvalidURL):
            raise ServerError(f"{self.url}: redirects to nowhere") from None
        if _origin(target) != _origin(httpx.URL(url)):
            to = printable(f"{target.scheme}://{target.host}" + (f":{target.port}" if target.port else ""))
            raise ServerError(f"{self.url}: redirects to {to[:200]}; if that is the server, say so with --url")
        return str(target)

    def _run(self, work: Callable[[], Any], late: str) -> Any:
        """The result of a coroutine function, its errors as ``ServerError``. ``late``: the message of a timeout."""
        try:
            return asyncio.run(work())
        except TimeoutError:
            raise AwayError(f"{self.url}: {late}") from None
        except httpx.ConnectError as error:
            if any(isinstance(cause, ConnectionRefusedError) for cause in _causes(error)):
                raise NothingAnswersError(
                    f"{self.url}: nothing answers there; start a server with 'pyramid-serve up', "
                    "or say where one is with --url"
                ) from None
            raise AwayError(f"{self.url}: cannot be reached: {_reason(error)}") from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.DecodingError, httpx.ProxyError) as error:
            raise ServerError(f"{self.url}: {_reason(error)}") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise AwayError(f"{self.url}: broke off: {_reason(error)}") from None
        except (ImportError, UnicodeError) as error:  # from a proxy of the environment, or an invalid host name
            raise ServerError(f"{self.url}: cannot be asked: {_reason(error)}") from None


async def _read_whole(answer: httpx.Response, max_bytes: int) -> bytes:
    """The body, or nothing if it has more than ``max_bytes``: the result is then no JSON."""
    content = bytearray()
    async for chunk in answer.aiter_bytes():
        content += chunk
        if len(content) > max_bytes:
            return b""
    return bytes(content)


def _refusal(answer: httpx.Response, body: bytes) -> ServerError:
    """The error for an answer that is not a success, with the message of the server."""
    try:
        message = printable(Refusal.model_validate(parse_answer(body)).error.message)[:_MAX_MESSAGE_CHARACTERS]
    except ValidationError:
        status = answer.status_code
        message = f"HTTP {status} {httpx.codes.get_reason_phrase(status)}".strip()
    if answer.status_code in _RETRIED_STATUSES:
        return _BusyError(message, retry_after_s=_retry_after_s(answer.headers.get("retry-after", "")))
    return RefusedError(message) if answer.status_code in _REFUSED_STATUSES else ServerError(message)


def _retry_after_s(header: str) -> float:
    """Seconds to wait by a ``Retry-After`` header, a number of seconds or a date; at least ``_RETRY_S``."""
    if header.isascii() and header.isdecimal():
        return max(float(header[:20]), _RETRY_S)
    try:
        at = parsedate_to_datetime(header).astimezone(UTC)
    except (ValueError, OverflowError):
        return _RETRY_S
    return max((at - datetime.now(UTC)).total_seconds(), _RETRY_S)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all of its causes."""
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
