"""Who may ask: host names, origins, CORS, and the headers that every answer has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.http.config import HttpConfig
from deployments.http.guard import CorsConfig
from tests.serve.http.http_at_hand import UNKNOWN_ID, check
from tests.serve.local_server import LocalServer, serve_locally

FRIEND = "https://studio.example"
SMALL = {"prompt": "a", "seconds": "0.04"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with no settings."""
    with serve_locally(str(tmp_path_factory.mktemp("storage"))) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """A server with names, a friend, and a key."""
    http = HttpConfig(
        allowed_hosts=("Video.example", "*.farm.example"), cors=CorsConfig(origins=(FRIEND,)), api_keys=("secret",)
    )
    with serve_locally(str(tmp_path_factory.mktemp("storage")), http=http) as server:
        server.client.headers["Authorization"] = "Bearer secret"
        yield server


def post(server: LocalServer, **headers: str) -> httpx.Response:
    """Ask for a video as a page would that sends a form: no preflight comes before it."""
    form = {name: (None, value) for name, value in SMALL.items()}
    return server.client.post(
        "/v1/videos", files=form, headers={name.replace("_", "-"): headers[name] for name in headers}
    )


# --- origins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "https://evil.example"),
        ("127.0.0.1:8000", "null"),
        ("127.0.0.1:8000", ""),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:3000"),
        ("127.0.0.1:8000", "http://127.0.0.1"),
        ("127.0.0.1:8000", "http://localhost:8000"),
        ("video.example", "https://video.example.evil.example"),
        ("video.example", "https://evil.example/video.example"),
        ("video.example", "https://evil.example@video.example"),
        ("video.example", "https://video.example:8443"),
        ("video.example:443", "http://video.example"),
        ("video.example", "file://video.example"),
        ("[::1]:8000", "http://[::2]:8000"),
    ],
)
def test_a_page_of_another_origin_changes_nothing(server: LocalServer, host: str, origin: str) -> None:
    answer = post(server, Host=host, Origin=origin)
    check(answer, 403, "Origin", "ingress.settings.cors.origins")
    assert answer.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("video.example", "https://video.example"),
        ("video.example:443", "https://video.example"),
        ("video.example", "https://video.example:443"),
        ("Video.Example", "https://video.example"),
        ("video.example:8443", "https://video.example:8443"),
        ("video.example", "http://video.example"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_page_of_this_server_may_ask(server: LocalServer, host: str, origin: str) -> None:
    assert post(server, Host=host, Origin=origin, Sec_Fetch_Site="same-origin").status_code == 200


def test_what_a_proxy_says_of_the_host_is_not_believed(server: LocalServer) -> None:
    forwarded = {"X_Forwarded_Host": "evil.example", "X_Forwarded_Proto": "https", "Forwarded": "host=evil.example"}
    check(post(server, Origin="https://evil.example", **forwarded), 403, "Origin")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_elsewhere_that_hides_its_origin_changes_nothing(server: LocalServer, site: str) -> None:
    check(post(server, Sec_Fetch_Site=site), 403, "Sec-Fetch-Site")


@pytest.mark.parametrize("headers", [{}, {"Sec_Fetch_Site": "none"}, {"Sec_Fetch_Site": "same-origin"}])
def test_what_is_no_page_may_ask(server: LocalServer, headers: dict[str, str]) -> None:
    assert post(server, **headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/videos"),
        ("POST", "/v1/videos/"),
        ("POST", "/v1/videos/sync"),
        ("POST", f"/v1/videos/{UNKNOWN_ID}/cancel"),
        ("DELETE", f"/v1/videos/{UNKNOWN_ID}"),
        ("PUT", "/v1/videos"),
        ("PATCH", f"/v1/videos/{UNKNOWN_ID}"),
    ],
)
def test_every_request_that_changes_something_is_guarded(server: LocalServer, method: str, path: str) -> None:
    check(server.client.request(method, path, headers={"Origin": "https://evil.example"}), 403, "Origin")


@pytest.mark.parametrize("path", ["/", "/v1/videos", "/v1/models", "/healthz", "/docs"])
def test_reading_needs_no_origin_for_browsers_keep_the_answer(server: LocalServer, path: str) -> None:
    answer = server.client.get(path, headers={"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


# --- CORS -----------------------------------------------------------------------------------------------------------


def preflight(server: LocalServer, origin: str, method: str, *headers: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    return server.client.options(
        "/v1/videos", headers=asked | ({"Access-Control-Request-Headers": ", ".join(headers)} if headers else {})
    )


def test_a_page_that_cors_allows_may_ask_and_read(guarded: LocalServer) -> None:
    names = ["Authorization", "Idempotency-Key", "Content-Type", "Range", "Last-Event-ID", "x-stainless-os"]
    for method in ("POST", "DELETE", "GET", "HEAD"):
        allowed = preflight(guarded, FRIEND, method, *names)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == FRIEND
        assert method in allowed.headers["access-control-allow-methods"]
    answer = post(guarded, Origin=FRIEND, Sec_Fetch_Site="cross-site")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == FRIEND
    exposed = answer.headers["access-control-expose-headers"].lower()
    for name in ("openai-poll-after-ms", "x-video-id", "content-range", "etag", "retry-after", "content-disposition"):
        assert name in exposed
    assert "Origin" in answer.headers["vary"]


def test_a_page_that_cors_does_not_allow_may_not(guarded: LocalServer) -> None:
    for origin in ("https://evil.example", "http://studio.example", "https://studio.example:8443", "null"):
        refused = preflight(guarded, origin, "POST")
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        check(post(guarded, Origin=origin), 403, "Origin")


def test_without_settings_no_page_elsewhere_is_allowed(server: LocalServer) -> None:
    answer = preflight(server, FRIEND, "POST")
    check(answer, 405, None)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_errors_can_be_read_by_a_page_that_is_allowed(guarded: LocalServer) -> None:
    headers = {"Origin": FRIEND}
    answers = {
        401: guarded.client.get("/v1/videos", headers={**headers, "Authorization": "Bearer wrong"}),
        404: guarded.client.get(f"/v1/videos/{UNKNOWN_ID}", headers=headers),
        405: guarded.client.put("/v1/videos", headers=headers),
        400: guarded.client.post("/v1/videos", json={}, headers=headers),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == FRIEND


def test_a_fault_of_ours_can_be_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    with serve_locally(str(tmp_path), http=HttpConfig(cors=CorsConfig(origins=(FRIEND,)))) as server:
        monkeypatch.setattr(server.store, "page", broken)
        answer = server.client.get("/v1/videos", headers={"Origin": FRIEND})
    check(answer, 500, None, "in the server's log")
    assert answer.headers["access-control-allow-origin"] == FRIEND
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "fault of ours" not in answer.text


def test_every_page_may_be_allowed(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(cors=CorsConfig(origins=("*",)))) as server:
        for origin in (FRIEND, "null"):
            answer = post(server, Origin=origin)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_a_list_of_origins_is_a_setting_of_cors() -> None:
    assert HttpConfig.model_validate({"cors": [FRIEND]}) == HttpConfig(cors=CorsConfig(origins=(FRIEND,)))
    assert HttpConfig.model_validate({"cors": {"origins": ["HTTPS://Studio.Example"]}}).cors.origins == (FRIEND,)


@pytest.mark.parametrize("origin", ["studio.example", "https://studio.example/", "https://studio.example/a", "", "//a"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match=r"must be like https://example\.com"):
        CorsConfig(origins=(origin,))


# --- host names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "video.example.evil.example", "farm.example", "xfarm.example", "x"),
        *("notlocalhost", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a b", "video.example/a"),
        *("user@video.example", "video.example:port"),
    ],
)
def test_a_name_that_the_server_does_not_have_is_refused(guarded: LocalServer, host: str) -> None:
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/"), ("GET", "/docs")):
        answer = guarded.client.request(method, path, headers={"Host": host})
        check(answer, 400, "Host", "ingress.settings.allowed_hosts")
        assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host",
    [
        *("video.example", "VIDEO.example:443", "video.example.", "a.farm.example", "a.b.farm.example:8000"),
        *("localhost", "localhost:8000", "me.localhost:8000", "127.0.0.1", "10.1.2.3:8000", "[::1]:8000", "[fd00::1]"),
    ],
)
def test_names_of_the_server_and_ip_addresses_pass(guarded: LocalServer, host: str) -> None:
    assert guarded.client.get("/v1/videos", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthz/"])
def test_probes_pass_under_any_name(guarded: LocalServer, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert guarded.client.request(method, path, headers={"Host": "evil.example"}).status_code == 200


@pytest.mark.parametrize("allowed_hosts", [None, (), ("*",)])
def test_without_names_every_name_passes(tmp_path: Path, allowed_hosts: tuple[str, ...] | None) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(allowed_hosts=allowed_hosts)) as server:
        assert server.client.get("/v1/videos", headers={"Host": "any.example"}).status_code == 200


def test_names_without_a_dot_can_be_let_in(tmp_path: Path) -> None:
    with serve_locally(str(tmp_path), http=HttpConfig(allowed_hosts=("<local>",))) as server:
        for host in ("gpu-box:8000", "pyramid-serve", "localhost", "10.0.0.1"):
            assert server.client.get("/v1/videos", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.", ""):
            check(server.client.get("/v1/videos", headers={"Host": host}), 400, "Host")


@pytest.mark.parametrize("pattern", ["*evil", "a.*.b", "https://a.example", "a.example:80", "", "a b", "*."])
def test_what_is_no_host_name_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="must be a host name"):
        HttpConfig(allowed_hosts=(pattern,))


# --- headers of every answer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in ("/", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json", "/healthz")),
        *(("GET", path) for path in ("/v1/videos", "/v1/videos/nobody", "/nowhere")),
        *(("POST", path) for path in ("/v1/videos", "/v1/videos/sync", "/healthz")),
        ("OPTIONS", "/v1/videos"),
    ],
)
def test_every_answer_keeps_browsers_from_guessing_and_framing(server: LocalServer, method: str, path: str) -> None:
    answer = server.client.request(method, path, json=SMALL if method == "POST" else None)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy


def test_a_second_origin_hides_behind_no_first(server: LocalServer) -> None:
    own = server.url
    answer = server.client.post("/v1/videos", json=SMALL, headers=[("Origin", own), ("Origin", "https://evil.example")])
    check(answer, 403, "Origin")
