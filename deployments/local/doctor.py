"""``pyramid-serve doctor``: what a bug report should say about a machine, without secrets.

Each line is made on its own, so that something missing or broken shows in its own line and hides no other. Environment
variables are not printed, credentials in URLs are masked, and the home folder is written as ``~``.
"""

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pyramid_serve.cores import usable_cores
from pyramid_serve.storage import check_root, mask_credentials, shown_root
from pyramid_serve.terminal import printable

PACKAGES = (
    "pyramid-serve",
    "torch",
    "ray",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pillow",
    "einops",
    "av",
    "pydantic",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "fsspec",
    "s3fs",
    "gcsfs",
    "adlfs",
)
FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip
"""The processor flags that the speed of a model depends on."""

_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 11), (3, 13)
_GIB = 2**30
_PROGRAM_S = 20.0
_NAME_CHARACTERS = 10


class Line(NamedTuple):
    """One thing that was examined. ``is_needed``: ``generate`` does not work unless it ``is_ok``."""

    name: str
    text: str
    is_ok: bool = True
    is_needed: bool = False

    def __str__(self) -> str:
        return f"{self.name:{_NAME_CHARACTERS}}  {self.text}"


class ProblemError(Exception):
    """What is wrong with the thing that a line examines; a text for the user."""


def examine(*, storage: str | None = None, config: Path | None = None, with_ray: bool = False) -> Iterator[Line]:
    """All lines, each as soon as it is known.

    storage: a storage root to try; config: a configuration file that names one. with_ray: start Ray and stop it.
    """
    yield _line("versions", _versions)
    yield _line("python", _python, is_needed=True)
    yield _line("processor", _processor)
    yield _line("flags", _flags)
    yield _line("memory", _memory)
    yield _line("disk", _disk)
    yield _line("ffmpeg", _ffmpeg, is_needed=True)
    yield _line("storage", lambda: _storage(storage, config))
    # From here on libraries are imported, and a broken one may crash the process.
    yield _line("torch", _torch, is_needed=True)
    yield _line("library", _library, is_needed=True)
    yield _line("dtype", _precision_line)
    yield _line("gpu", _gpu)
    yield _line("ray", lambda: _ray(with_ray))


def to_json(lines: list[Line]) -> str:
    return json.dumps([line._asdict() for line in lines], indent=2)


def _line(name: str, find: Callable[[], str], *, is_needed: bool = False) -> Line:
    try:
        text, is_ok = find(), True
    except ProblemError as problem:
        text, is_ok = str(problem), False
    except Exception as error:  # whatever it is, this line reports it and the others follow
        text, is_ok = f"cannot be looked at: {type(error).__name__}: {error}", False
    return Line(name, _public(text), is_ok, is_needed)


def _public(text: str) -> str:
    """The text on one line, without credentials in URLs and the path of the home folder."""
    home = str(Path.home())
    if home not in ("/", ""):
        text = re.sub(rf"{re.escape(home)}(?=/|\W|$)", "~", text)
    return printable(mask_credentials(text.strip()))[:2000]


# --- software -------------------------------------------------------------------------------------------------------


def _versions() -> str:
    return ", ".join(f"{name} {_version(name)}" for name in PACKAGES)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _python() -> str:
    text = f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}, {sys.executable}"
    if not _OLDEST_PYTHON <= sys.version_info[:2] <= _NEWEST_PYTHON:
        raise ProblemError(
            f"{text}: must be {'.'.join(map(str, _OLDEST_PYTHON))} to {'.'.join(map(str, _NEWEST_PYTHON))}"
        )
    return text


def _torch() -> str:
    torch = _imported("torch")
    built = torch.version.cuda
    for_what = f"built for CUDA {built}" if built else "built for CPUs"
    return f"{torch.__version__}, {for_what}, {torch.get_num_threads()} threads"


def _library() -> str:
    for module in ("pyramid_serve.pyramid_flow.pipeline", "pyramid_serve.media.writers"):
        _imported(module)
    return "the pipeline can be loaded"


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        raise ProblemError(f"cannot be imported: {type(error).__name__}: {error}") from None


def _precision_line() -> str:
    """The dtype that a model would use on the first device of this machine, and why."""
    torch = _imported("torch")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = importlib.import_module(
        "pyramid_serve.precision"
    )  # here, because it imports torch, which may be broken
    choice = precision.suitable_dtype(device)
    return f"{choice.name} on {device}: {choice.reason}"


def _ffmpeg() -> str:
    try:
        path = _imported("imageio_ffmpeg").get_ffmpeg_exe()
    except RuntimeError as error:
        raise ProblemError(f"not found: {error}") from None
    version = _output_of(path, "-version").partition("\n")[0]
    if not re.search(r"^\s*V\S*\s+libx264\s", _output_of(path, "-hide_banner", "-encoders"), re.MULTILINE):
        raise ProblemError(f"{version}, {path}: has no libx264, which videos are encoded with")
    return f"{version.partition(' Copyright')[0]}, with libx264, {path}"


def _output_of(*command: str) -> str:
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROGRAM_S, check=True
        )
    except subprocess.CalledProcessError as error:
        raise ProblemError(f"{command[0]}: ended with {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise ProblemError(f"{command[0]}: did not end within {_PROGRAM_S:.0f} s") from None
    except OSError as error:
        raise ProblemError(f"{command[0]}: cannot be run: {error.strerror}") from None
    return finished.stdout


def _ray(is_tried: bool) -> str:
    if not is_tried:
        return f"{_version('ray')}, not started; --ray tries it"
    _imported("ray")
    try:
        _imported("deployments.local.cluster").try_ray()
    except RuntimeError as error:
        raise ProblemError(f"does not start: {error}") from None
    return f"{_version('ray')}, starts and stops"


# --- hardware -------------------------------------------------------------------------------------------------------


def _processor() -> str:
    names = _cpuinfo("model name") or [platform.processor() or platform.machine()]
    return f"{names[0]}, {platform.machine()}, {os.cpu_count()} cores, {usable_cores()} of them usable"


def _flags() -> str:
    lists = _cpuinfo("flags") or _cpuinfo("Features")
    if not lists:
        raise ProblemError("not known: this system does not list them")
    there = set(lists[0].split())
    return " ".join(flag for flag in FLAGS if flag in there) or "none of " + " ".join(FLAGS)


def _cpuinfo(key: str) -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return []
    return re.findall(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)


def _memory() -> str:
    memory = _imported("psutil").virtual_memory()
    text = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB available"
    limit = _memory_limit()
    return text if limit is None or limit >= memory.total else f"{text}, limited to {limit / _GIB:.1f} GiB"


def _memory_limit() -> int | None:
    """The memory limit of this process's control group, such as that of a container, in bytes; None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            return int(text)
    return None


def _gpu() -> str:
    torch = _imported("torch")
    if not torch.cuda.is_available():
        raise ProblemError("none that torch can use")
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(f"{gpu.name}, {gpu.total_memory / _GIB:.1f} GiB, compute capability {gpu.major}.{gpu.minor}")
    return f"{'; '.join(gpus)}; driver {_driver()}"


def _driver() -> str:
    try:
        text = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    except ProblemError:
        return "not known"
    return text.strip().partition("\n")[0] or "not known"


def _disk() -> str:
    places = {"working folder": ".", "temporary files": tempfile.gettempdir(), "/dev/shm": "/dev/shm"}
    return ", ".join(f"{name} {_free(path)}" for name, path in places.items())


def _free(path: str) -> str:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"not there ({error.strerror})"
    return f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"


# --- storage --------------------------------------------------------------------------------------------------------


def _storage(root: str | None, config: Path | None) -> str:
    if root is None and config is not None:
        try:
            root = _imported("deployments.local.cluster").read_app(config).config.storage_root
        except ValueError as error:
            raise ProblemError(str(error)) from None
    if root is None:
        return "not tried; --storage or --config says which"
    try:
        check_root(root)
    except ValueError as error:
        raise ProblemError(str(error)) from None
    return f"{shown_root(root)}: can be written, read and deleted from"
