"""A client of the videos API for the command line, with the standard library alone."""

import base64
import http.client
import ipaddress
import json
import mimetypes
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Video = dict[str, Any]

_TIMEOUT_S = 60.0
_PATIENCE_S = 30.0
_CHUNK_BYTES = 1 << 18
_OVER = ("completed", "failed")


class ServerError(ValueError):
    """The server refused or could not be reached. The message is for the user."""


class Server:
    """A server by its URL. Every method raises ``ServerError``."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--url {url}: must be like http://127.0.0.1:8000")
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy that the environment names does not know this machine.
        proxies = [urllib.request.ProxyHandler({})] if _is_this_machine(parts.hostname) else []
        self._opener = urllib.request.build_opener(*proxies)

    def submit(self, fields: Mapping[str, Any], *, picture: Path | None = None) -> Video:
        """Ask for a video. Sent again when the answer is lost, which makes no second video."""
        body = dict(fields)
        if picture is not None:
            body["input_reference"] = {"image_url": _data_url(picture)}
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        return self._patiently(lambda: self._call("POST", "/v1/videos", body=body, headers=headers))

    def get(self, video_id: str) -> Video:
        return self._patiently(lambda: self._call("GET", _path(video_id)))

    def list(self, *, limit: int) -> Iterator[Video]:
        """The newest videos, at most ``limit``."""
        after: dict[str, str] = {}
        while limit > 0:
            query = urllib.parse.urlencode({"limit": min(limit, 100), **after})
            page = self._call("GET", f"/v1/videos?{query}")
            yield from page["data"]
            limit -= len(page["data"])
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def cancel(self, video_id: str) -> Video:
        return self._call("POST", f"{_path(video_id)}/cancel")

    def delete(self, video_id: str) -> None:
        self._call("DELETE", _path(video_id))

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
        query = urllib.parse.urlencode({"variant": variant})
        with self._open("GET", f"{_path(video_id)}/content?{query}") as answer:
            content: bytes = answer.read()
        return content

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

    def _call(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        with self._open(method, path, body=body, headers=headers) as answer:
            try:
                content = json.load(answer)
            except ValueError:
                content = None
        if not isinstance(content, dict):
            raise ServerError(f"{self.url}: no Pyramid Serve answers there")
        return content

    def _open(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None
    ) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self._headers, **(headers or {})},
        )
        try:
            answer: http.client.HTTPResponse = self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise _refusal(error) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                raise ServerError(
                    f"{self.url}: nothing answers there; start a server with 'pyramid-serve up', "
                    "or say where one is with --url"
                ) from None
            raise _AwayError(f"{self.url}: cannot be reached: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _AwayError(f"{self.url}: broke off: {error or type(error).__name__}") from None
        return answer


class _AwayError(ServerError):
    """It may be back soon."""


def _refusal(error: urllib.error.HTTPError) -> ServerError:
    """What the server says of a request that it refused."""
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        message = f"HTTP {error.code} {error.reason}"
    return _AwayError(message) if error.code in (502, 503, 504) else ServerError(message)


def _path(video_id: str) -> str:
    return f"/v1/videos/{urllib.parse.quote(video_id, safe='')}"


def _data_url(picture: Path) -> str:
    try:
        content = picture.read_bytes()
    except OSError as error:
        raise ServerError(f"{picture}: cannot be read: {error.strerror}") from None
    kind = mimetypes.guess_type(picture.name)[0] or ""
    kind = kind if kind.startswith("image/") else "image/png"  # the server looks for itself
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
