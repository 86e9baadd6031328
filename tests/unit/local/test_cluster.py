"""What ``pyramid-serve up`` reads of a configuration file."""

import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import IMPORT_PATH, AppConfig, ConfigError
from deployments.http.listener import ListenOptions, bound_socket
from deployments.local.cluster import LocalApp, check_port, free_port, held_port, local_config, read_app, start_ray


def file_of(folder: Path, **content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"import_path": IMPORT_PATH}], **content}))
    return path


def test_serves_own_settings_are_passed_on(tmp_path: Path) -> None:
    options = {"host": "0.0.0.0", "port": 8123, "request_timeout_s": 30.0}
    logging = {"encoding": "JSON"}
    path = file_of(tmp_path, http_options=options, logging_config=logging, proxy_location="EveryNode")
    app = read_app(path)
    assert (app.host, app.port, app.http_options) == ("0.0.0.0", 8123, {"request_timeout_s": 30.0})
    assert (app.proxy_location, app.logging_config) == ("EveryNode", logging)
    assert read_app(path, port=9000).port == 9000


def test_what_would_not_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grpc_options: is for a cluster"):
        read_app(file_of(tmp_path, grpc_options={"port": 9000}))
    application = {"import_path": IMPORT_PATH, "runtime_env": {}}
    with pytest.raises(ValueError, match=r"applications\.0\.runtime_env: is for a cluster"):
        read_app(file_of(tmp_path, applications=[application]))
    with pytest.raises(ConfigError, match=r"http_options\.prot: unknown key"):
        read_app(file_of(tmp_path, http_options={"prot": 1}))


@pytest.mark.parametrize("paths", [[], ["other:app"], [IMPORT_PATH] * 2])
def test_a_file_has_one_application_and_that_is_ours(tmp_path: Path, paths: list[str]) -> None:
    applications = [
        {"import_path": path, "name": f"app-{index}", "route_prefix": f"/{index}"} for index, path in enumerate(paths)
    ]
    with pytest.raises(ValueError, match="must have one application"):
        read_app(file_of(tmp_path, applications=applications))


HANGS = [RuntimeError("The node timed out during startup"), RuntimeError("Timed out waiting for file port")]


@pytest.mark.parametrize("num_hangs", [0, 1, 2])
def test_ray_is_started_anew_where_its_start_hangs(num_hangs: int) -> None:
    errors = HANGS[:num_hangs]

    def start() -> str:
        if errors:
            raise errors.pop()
        return "started"

    assert start_ray(start) == "started"


@pytest.mark.parametrize(("message", "num_tries"), [("The node timed out during startup", 3), ("no such address", 1)])
def test_a_start_that_fails_otherwise_or_again_and_again_is_an_error(message: str, num_tries: int) -> None:
    tries = []

    def start() -> None:
        tries.append(None)
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        start_ray(start)
    assert len(tries) == num_tries


@pytest.mark.parametrize(
    ("host", "allowed_hosts", "expected"),
    [
        ("127.0.0.1", None, ("<local>",)),
        ("localhost", None, ("<local>",)),
        ("::1", None, ("<local>",)),
        ("0.0.0.0", None, None),
        ("10.1.2.3", None, None),
        ("127.0.0.1", ["video.example"], ("video.example",)),
        ("127.0.0.1", [], ()),
    ],
)
def test_a_server_for_this_machine_alone_has_names_of_this_machine_alone(
    host: str, allowed_hosts: list[str] | None, expected: tuple[str, ...] | None
) -> None:
    ingress = {"settings": {"allowed_hosts": allowed_hosts}}
    config = local_config(LocalApp(AppConfig.model_validate({"ingress": ingress}), host, 8000))
    assert config.ingress.settings.allowed_hosts == expected


def test_the_ingress_listens_itself_where_the_proxy_has_no_options_of_its_own() -> None:
    app = LocalApp(AppConfig(), "127.0.0.1", 8123, route_prefix="/video")
    assert local_config(app).ingress.settings.listen == ListenOptions(port=8123, route_prefix="/video")
    with_options = app._replace(http_options={"ssl_certfile": "cert.pem"})
    assert (app.has_proxy, with_options.has_proxy) == (False, True)
    assert local_config(with_options).ingress.settings.listen is None


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="ports are not shared here")
def test_an_app_that_starts_keeps_its_port_for_its_own_replicas() -> None:
    port = free_port()
    with held_port("127.0.0.1", port):
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1: address already in use"):
            check_port("127.0.0.1", port)
        with bound_socket("127.0.0.1", port) as listening:
            listening.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                connection, _ = listening.accept()
                connection.close()
    check_port("127.0.0.1", port)


@pytest.mark.parametrize("port", [0, -1, 65536, 99999])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match=f"port {port}: must be from 1 to 65535"):
        check_port("127.0.0.1", port)
