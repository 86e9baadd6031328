"""The app on its own Ray on this machine, for ``pyramid-serve up``, ``demo`` and ``bench``."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import psutil
import ray
import torch
from ray import serve
from ray.exceptions import RayError

from deployments.app import build
from deployments.config import IMPORT_PATH, AppConfig, ModelOptions, app_config, load_config
from deployments.http.guard import DOTLESS
from deployments.http.hosts import is_this_machine
from deployments.http.listener import ListenOptions, bound_socket
from deployments.local.log_tail import warnings_told
from deployments.local.sessions import mark_session, remove_old_sessions
from deployments.local.signals import undisturbed
from pyramid_serve.precision import device_name

logger = logging.getLogger(__name__)

APP_NAME = "pyramid-serve"
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

_FILE_KEYS = {"applications", "http_options", "proxy_location", "logging_config"}
_RUN_KEYS = {"name", "route_prefix", "import_path", "args"}
_MIN_CPUS = 2
_LOOK_S = 0.5
_NUM_STARTS = 3
_END_S = 3.0

Result = TypeVar("Result")
Show = Callable[[Mapping[str, str]], None]
"""Called with the status of each deployment by name whenever one changes."""


class LocalApp(NamedTuple):
    """An app on this machine, and where it listens."""

    config: AppConfig
    host: str
    port: int
    name: str = APP_NAME
    route_prefix: str = "/"
    proxy_location: str = "HeadOnly"
    logging_config: dict[str, Any] | None = None
    http_options: Mapping[str, Any] = MappingProxyType({})
    """Options of Serve's proxy, without the host and port."""

    @property
    def has_proxy(self) -> bool:
        """Whether clients go through Serve's proxy, as they must where it has options of its own, TLS for example."""
        return bool(self.http_options)

    @property
    def url(self) -> str:
        host = DEFAULT_HOST if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def read_app(config: Path | None, *, host: str | None = None, port: int | None = None) -> LocalApp:
    """The app of a configuration file, or the default one. Raises ``ValueError`` for an app that cannot run here."""
    content: dict[str, Any] = {} if config is None else load_config(config)
    options = dict(content.get("http_options", {}))
    own_host, own_port = options.pop("host", DEFAULT_HOST), options.pop("port", DEFAULT_PORT)
    host, port = host or own_host, own_port if port is None else port
    if config is None:
        return LocalApp(AppConfig(), host, port)
    applications = content.get("applications", [])
    if [application["import_path"] for application in applications] != [IMPORT_PATH]:
        raise ValueError(f"{config}: must have one application, {IMPORT_PATH}; for others there is 'serve run'")
    (application,) = applications
    others = sorted(content.keys() - _FILE_KEYS) + [
        f"applications.0.{key}" for key in sorted(application.keys() - _RUN_KEYS)
    ]
    if others:
        raise ValueError(f"{config}: {others[0]}: is for a cluster, with 'serve deploy'")
    return LocalApp(
        app_config(content),
        host,
        port,
        name=application.get("name", APP_NAME),
        route_prefix=application.get("route_prefix", "/"),
        proxy_location=content.get("proxy_location", "HeadOnly"),
        logging_config=content.get("logging_config"),
        http_options=options,
    )


@contextmanager
def running(app: LocalApp, *, show: Show, warn: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Run the app on its own Ray for the duration of the block; the folder of its logs.

    At the end of the block, also after an error, every process is gone. No video is lost: unfinished ones go on when an
    app with the same storage is started. warn: called from a thread, with a line for each warning or error of the
    replicas. Raises ``ValueError`` for a port that is taken or an app that does not start.
    """
    check_port(app.host, app.port)
    held = nullcontext() if app.has_proxy else held_port(app.host, app.port)
    with held, _running(app, show=show, warn=warn) as logs:
        yield logs


@contextmanager
def _running(app: LocalApp, *, show: Show, warn: Callable[[str], None] | None) -> Iterator[Path]:
    application = build(local_config(app))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    others = set(psutil.Process().children(recursive=True))
    try:
        session = start_ray(_start_local_ray)
        http_options = {**app.http_options, "host": app.host, "port": app.port}
        proxy_location = app.proxy_location if app.has_proxy else "Disabled"
        serve.start(proxy_location=proxy_location, http_options=http_options, logging_config=app.logging_config)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        folder = Path(session.address_info["session_dir"])
        num_removed = remove_old_sessions(folder.parent)
        if num_removed and warn is not None:
            warn(f"Removed {num_removed} folders of earlier runs from {folder.parent}.")
        logs = folder / "logs"
        with nullcontext() if warn is None else warnings_told(logs, warn):
            with _watching(app.name, show):
                try:
                    serve.run(application, name=app.name, route_prefix=app.route_prefix)
                except (RayError, RuntimeError) as error:
                    reason = _reason(app.name) or error
                    raise ValueError(f"the app did not start: {reason}; logs: {logs / 'serve'}") from None
            yield logs
    finally:
        with undisturbed(), _nothing_left(others):
            ray.shutdown()


@contextmanager
def _nothing_left(others: set[psutil.Process]) -> Iterator[None]:
    """Kill the processes that Ray has started and not ended by the end of the block, such as after a failed start."""
    started = set(psutil.Process().children(recursive=True)) - others
    try:
        yield
    finally:
        _, left = psutil.wait_procs(started, timeout=_END_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_END_S)


def try_ray() -> None:
    """Start Ray on this machine and stop it. Raises whatever Ray raises if it does not start."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    others = set(psutil.Process().children(recursive=True))
    try:
        start_ray(_start_local_ray)
    finally:
        with undisturbed(), _nothing_left(others):
            ray.shutdown()


def local_config(app: LocalApp) -> AppConfig:
    """The configuration of an app on this machine.

    Its ingress listens at the app's port itself, unless the app ``has_proxy``. If it listens on this machine only, it
    answers only to names of this machine, for a web page could reach it under the page's own host name otherwise; see
    ``guard.HostCheck``. ``allowed_hosts`` in the configuration file takes precedence.
    """
    ingress, changes = app.config.ingress, dict[str, Any]()
    if ingress.settings.allowed_hosts is None and is_this_machine(app.host):
        changes["allowed_hosts"] = (DOTLESS,)
    if not app.has_proxy:
        changes["listen"] = ListenOptions(host=app.host, port=app.port, route_prefix=app.route_prefix)
    settings = ingress.settings.model_copy(update=changes)
    return app.config.model_copy(update={"ingress": ingress.model_copy(update={"settings": settings})})


def models_text(config: AppConfig) -> str:
    """A line for people about each model of an app on this machine: what it is computed in, and why."""
    return "\n".join(f"Model {model.public_name} in {_precision_text(model)}." for model in config.models)


def _precision_text(model: ModelOptions) -> str:
    settings = model.denoiser_config
    has_gpu = bool(model.denoiser.ray_actor_options.num_gpus) and torch.cuda.is_available()
    device = torch.device(settings.device or ("cuda" if has_gpu else "cpu"))
    precision = settings.precision_on(device)
    return f"{precision.name} on {device_name(device)}: {precision.reason}"


def start_ray(start: Callable[[], Result]) -> Result:
    """The result of ``start``, which is repeated if it times out: starting Ray sometimes hangs until its 30 s limit.

    Processes of a start that hung remain until this process ends, as Ray offers no way to end them.
    """
    for tries_left in reversed(range(_NUM_STARTS)):
        try:
            return start()
        except Exception as error:  # Ray raises no narrower one
            if not tries_left or "timed out" not in str(error).lower():
                raise
            logger.warning("Ray did not start in time, starting it anew")
    raise AssertionError("unreachable")


def _start_local_ray() -> Any:
    session: Any = ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, _MIN_CPUS),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    mark_session(Path(session.address_info["session_dir"]))
    return session


def free_port(host: str = DEFAULT_HOST) -> int:
    """A port that nothing is listening on at the moment."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def check_port(host: str, port: int) -> None:
    """Raise ``ValueError`` for a port that is taken or may not be used."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port}: must be from 1 to 65535")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno and error.errno > 0 else error
        option = "--host" if isinstance(error, socket.gaierror) else "--port"
        raise ValueError(f"port {port} of {host}: {reason}; take another with {option}") from None


@contextmanager
def held_port(host: str, port: int) -> Iterator[None]:
    """Keep the port for the replicas of this app, which share it, from before they listen.

    Nobody else can listen there: not an app that starts at the same time, whose replicas would share it too.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        yield
        return
    with bound_socket(host, port) as held:  # it does not listen, so no connection comes to it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)  # with it, others could listen until a replica does
        yield


@contextmanager
def _watching(name: str, show: Show) -> Iterator[None]:
    """Show the status of the deployments while the block waits for them."""
    is_over = threading.Event()

    def look() -> None:
        shown: dict[str, str] = {}
        while not is_over.wait(_LOOK_S):
            try:
                app = serve.status().applications.get(name)
            except Exception:
                # This is only a display; the block itself raises if something is wrong.
                continue
            statuses = {} if app is None else {key: str(each.status.value) for key, each in app.deployments.items()}
            if statuses != shown:
                shown = statuses
                show(statuses)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(2.0)


def _reason(name: str) -> str:
    """Why an app does not start: the last line with an error in the messages of Serve."""
    app = serve.status().applications.get(name)
    if app is None:
        return ""
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or [""])[-1]
