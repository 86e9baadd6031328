"""Checkpoints: where they lie, what they can do, and how their weights get into a module.

A checkpoint is a folder in the published layout: ``causal_video_vae/``, one or more ``diffusion_transformer_*/``
(the *variants*), ``text_encoder*/`` and ``tokenizer*/``. Each of these sub-folders is a *part* and is fetched and
loaded alone. The user's mistakes are ``CheckpointError``, a ``ValueError`` of one line.
"""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from uuid import uuid4

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyramid_serve.checks import whole_number
from pyramid_serve.precision import DTypeName, Precision, choose_dtype
from pyramid_serve.pyramid_flow.shapes import PIXELS_PER_TOKEN, SIZE_MULTIPLE, seconds_of
from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)

Source = str | os.PathLike[str]
"""A local folder, an fsspec URL (``s3://bucket/model``), a Hub id (``owner/name`` or ``owner/name@revision``), or the
name of a model in the package (``shapes``)."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)

DEFAULT_PROMPT_SUFFIX = ", hyper quality, Ultra HD, 8K"
DEFAULT_NEGATIVE_PROMPT = (
    "cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, "
    "extra digits, misplaced objects, mutated anatomy, monochrome, horror"
)

CAPABILITIES_FILE = "pyramid_serve.json"
PACKAGED = Path(__file__).parents[1] / "models"
"""Checkpoints that come with the package, each a folder that is named here by its name alone."""
VARIANT_PREFIX = "diffusion_transformer_"
_PREFERRED_VARIANT = VARIANT_PREFIX + "768p"
_WEIGHTS = "diffusion_pytorch_model"
_NEEDED_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "updated", "md5Hash", "content_md5")
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_MAX_NAMED = 10


class CheckpointError(ValueError):
    """A checkpoint that is not there, is not one, is broken, or does not fit its module."""


# --- where they lie -------------------------------------------------------------------------------------------------


def resolve(source: Source, *, parts: Sequence[str] = (), cache: Path | None = None) -> Path:
    """The local folder of a checkpoint, with at least ``parts`` in it.

    ``parts`` are names of sub-folders or patterns of them (``text_encoder*``); each must match one. A local folder is
    returned as it stands, and ``shapes`` is the model in the package (a folder of that name is ``./shapes``). From a
    URL or the Hub only these sub-folders, the ``config.json`` of the others and the top-level ``*.json`` are copied;
    ``.bin`` weights are left where a part has safetensors. Copies of a URL go under ``cache`` (default
    ``~/.cache/pyramid_serve``), file by file, each aside first and then moved, and anew when the listing at the URL
    has changed.

    Raises ``CheckpointError`` for a source that is not there or lacks one of the parts.
    """
    if not str(source):
        raise CheckpointError("model: must name a folder, a URL, a Hub id or a model in the package")
    if isinstance(source, str) and source in {packaged.name for packaged in PACKAGED.glob("*")}:
        folder = PACKAGED / source
    elif isinstance(source, str) and "://" in source:
        folder = _copy_from_url(source, parts, cache or _default_cache())
    else:
        path = Path(source).expanduser()
        hub_id = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
        if path.is_dir():
            folder = path
        elif path.exists():
            raise CheckpointError(f"{source}: a file, but a checkpoint is a folder")
        elif hub_id:
            folder = _download_from_hub(hub_id["repo"], hub_id["revision"], parts)
        else:
            raise CheckpointError(f"{source}: no such folder")
    _check_parts(source, [entry.name for entry in folder.iterdir() if entry.is_dir()], parts)
    return folder


def variants(source: Source) -> list[str]:
    """Names of the checkpoint's ``diffusion_transformer_*`` folders, sorted. Fetches no weights."""
    folder = resolve(source)
    return sorted(config.parent.name for config in folder.glob(f"{VARIANT_PREFIX}*/config.json"))


def choose_variant(source: Source, variant: str | None = None) -> str:
    """The full name of a variant that is there. Fetches no weights.

    ``variant`` may leave the prefix out: ``384p`` for ``diffusion_transformer_384p``. Without one it is the 768p
    variant where there is one, else the only one. Raises ``CheckpointError`` listing those that are there.
    """
    names = variants(source)
    if not names:
        present = sorted(entry.name for entry in resolve(source).iterdir())
        raise CheckpointError(f"{source}: no checkpoint: looked for {VARIANT_PREFIX}*/config.json{_there(present)}")
    if variant is None:
        if _PREFERRED_VARIANT in names:
            return _PREFERRED_VARIANT
        if len(names) == 1:
            return names[0]
        raise CheckpointError(f"{source}: choose a variant: {', '.join(names)}")
    for name in names:
        if variant in (name, name.removeprefix(VARIANT_PREFIX)):
            return name
    raise CheckpointError(f"{source}: no variant {variant!r}; there are {', '.join(names)}")


def transformer_folder(source: Source, variant: str | None = None) -> Path:
    """The local folder of one transformer, fetched alone; its ``name`` is the variant. See ``choose_variant``."""
    name = choose_variant(source, variant)
    return resolve(source, parts=[name]) / name


def _check_parts(source: Source, present: Sequence[str], parts: Sequence[str]) -> None:
    missing = [part for part in parts if not any(fnmatch(name, part) for name in present)]
    if missing:
        looked_for = ", ".join(f"{part}/" for part in missing)
        raise CheckpointError(f"{source}: no whole checkpoint: looked for {looked_for}{_there(present)}")


def _there(present: Sequence[str]) -> str:
    return f"; there are {_some(sorted(present))}" if present else "; it is empty"


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return separator.join(names[:_MAX_NAMED]) + more


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyramid_serve"


def _download_from_hub(repo: str, revision: str | None, parts: Sequence[str]) -> Path:
    import huggingface_hub  # here, for the other sources need none of it

    def download(patterns: list[str]) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise CheckpointError(
                f"{repo}: no such folder, and not to be had from the Hub: {type(error).__name__}: {first_line(error)}"
            ) from error

    # The Hub's patterns take "*.json" in every folder, so that the variants' configs come along.
    folder = download(["*.json", *(f"{part}/*{suffix}" for part in parts for suffix in _NEEDED_SUFFIXES)])
    without_safetensors = [
        config.parent.name
        for config in sorted(folder.glob("*/config.json"))
        if any(fnmatch(config.parent.name, part) for part in parts) and not any(config.parent.glob("*.safetensors"))
    ]
    if without_safetensors:
        folder = download(["*.json", *(f"{name}/*.bin" for name in without_safetensors)])
    return folder


def _copy_from_url(url: str, parts: Sequence[str], cache: Path) -> Path:
    import fsspec  # here, for the other sources need none of it
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        found = filesystem.find(root, maxdepth=2, detail=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{url}: cannot be read: {type(error).__name__}: {error}") from error
    if not found:
        raise CheckpointError(f"{url}: no such folder")
    if isinstance(filesystem, LocalFileSystem):
        if not Path(root).is_dir():
            raise CheckpointError(f"{url}: a file, but a checkpoint is a folder")
        return Path(root)
    files = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
    folder = cache / hashlib.sha256(f"{url} {_stamp(files)}".encode()).hexdigest()[:24]
    for name in _needed_files(files, parts):
        target = folder / name
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid4().hex}")
        try:
            filesystem.get_file(f"{root.rstrip('/')}/{name}", str(aside))
            os.replace(aside, target)
        except OSError as error:
            raise CheckpointError(f"{url}/{name}: cannot be copied: {type(error).__name__}: {error}") from error
        finally:
            aside.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stamp(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Changes when a file at the URL does, as far as its file system says so."""
    return repr([(name, info.get("size"), [info.get(key) for key in _STAMPS]) for name, info in sorted(files.items())])


def _needed_files(files: Iterable[str], parts: Sequence[str]) -> list[str]:
    """Of paths relative to a checkpoint: top-level json, every part's config, and all that ``parts`` need."""
    has_safetensors = {name.partition("/")[0] for name in files if name.endswith(".safetensors")}
    needed = []
    for name in sorted(files):
        part, slash, file = name.partition("/")
        suffixes = _NEEDED_SUFFIXES if part in has_safetensors else (*_NEEDED_SUFFIXES, ".bin")
        is_wanted = any(fnmatch(part, pattern) for pattern in parts) and name.endswith(suffixes)
        if (slash and (file == "config.json" or is_wanted)) or (not slash and name.endswith(".json")):
            needed.append(name)
    return needed


# --- what is in them ------------------------------------------------------------------------------------------------


def read_config(folder: Source) -> dict[str, Any]:
    """The ``config.json`` of a part. ``CheckpointError`` when it is missing or no JSON object."""
    return _read_json(Path(folder) / "config.json")


def load_state(folder: Source) -> dict[str, Tensor]:
    """Every tensor of a part by name, on the CPU and memory-mapped: nothing is read before it is used.

    Reads ``diffusion_pytorch_model`` as ``.safetensors`` or ``.bin``, whole or in shards with an index; where several
    lie, safetensors before ``.bin`` and whole before shards. Pickles are only ever read with ``weights_only=True``.
    The tensors are views of the file: replace a checkpoint in use by moving a new one in place, not by writing into it.

    Raises ``CheckpointError`` naming the file that is missing, truncated or of another format.
    """
    folder = Path(folder)
    for suffix, read in ((".safetensors", _read_safetensors), (".bin", _read_pickle)):
        if (whole := folder / f"{_WEIGHTS}{suffix}").is_file():
            return read(whole)
        if (index := folder / f"{_WEIGHTS}{suffix}.index.json").is_file():
            return _read_shards(index, read)
    raise CheckpointError(f"{folder}: no weights: looked for {_WEIGHTS}.safetensors and .bin, whole or with an index")


def load_module(
    build: Callable[[dict[str, Any]], AnyModule],
    folder: Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> AnyModule:
    """Build a module from a part's ``config.json`` and fill it with the part's weights, once.

    ``build`` runs on the meta device; then each tensor is cast to ``dtype`` and brought to ``device`` by itself, so
    that no second copy of the weights exists. On the CPU in the dtype of the file the weights stay the mapped file.
    Returns the module in eval mode, without gradients.

    Raises ``CheckpointError`` naming the keys that are missing or misshapen; those left over are logged as a warning.
    """
    config = read_config(folder)
    try:
        with torch.device("meta"):
            module = build(config)
    except KeyError as error:
        raise CheckpointError(f"{folder}/config.json: {error.args[0]} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    expected = module.state_dict()
    stored = load_state(folder)
    _check_keys(folder, expected, stored)
    filled = {}
    for name, tensor in expected.items():
        target_dtype = dtype if tensor.is_floating_point() else tensor.dtype
        filled[name] = stored.pop(name).to(device=device, dtype=target_dtype)
    module.load_state_dict(filled, assign=True)
    unfilled = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if unfilled:
        raise RuntimeError(f"{type(module).__name__}: buffers that no checkpoint fills: {_some(unfilled)}")
    return module.eval().requires_grad_(False)


def _check_keys(folder: Source, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in stored]
    misshapen = [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {_some(misshapen)}")
    if problems:
        raise CheckpointError(f"{folder}: weights do not fit the config: {'; '.join(problems)}")
    unexpected = [name for name in stored if name not in expected]
    if unexpected:
        logger.warning("%s: %d unexpected keys are left out: %s", folder, len(unexpected), _some(unexpected))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, not {type(content).__name__}")
    return content


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or no safetensors file: {error}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as opened:
        if opened.read(1) == b"\x80":
            raise CheckpointError(f"{file}: in the format of PyTorch before 1.6, which cannot be mapped; save it again")
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: holds more than tensors and is not loaded: {first_line(error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: truncated or no PyTorch file: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file}: must hold tensors by name and nothing else")
    return state


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must give a file name for every key")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise CheckpointError(f"{file}: no such file, named by {index.name}")
        state.update(read(file))
    absent = sorted(weight_map.keys() - state.keys())
    if absent:
        raise CheckpointError(f"{index}: keys that its files do not hold: {_some(absent)}")
    return state


# --- what they can do -----------------------------------------------------------------------------------------------

_Pixels = Annotated[int, Field(gt=0, multiple_of=SIZE_MULTIPLE)]
_Count = Annotated[int, Field(ge=1)]
_Guidance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Steps = tuple[_Count, _Count, _Count]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Capabilities:
    """What one transformer can make, and the settings that it makes it best with.

    ``pyramid_serve.json`` at the top of a checkpoint holds these fields, any of them left out; under ``variants``
    those of one variant by its full name, which go before the others.
    """

    sizes: Annotated[tuple[tuple[_Pixels, _Pixels], ...], Field(min_length=1)] | None = None
    """(width, height) in pixels, the default first. None: every legal size."""
    max_side: _Pixels | None = None
    """The largest width or height in pixels, which a sine table of positions sets. None: any."""
    max_num_latent_frames: _Count | None = None
    """The longest video. None: any."""
    default_num_latent_frames: _Count = 16
    num_inference_steps: _Steps = (20, 20, 20)
    """Steps of unit 0 at each stage."""
    video_num_inference_steps: _Steps = (10, 10, 10)
    """Steps of the other units at each stage."""
    guidance_scale: _Guidance = 7.0
    """Of unit 0."""
    video_guidance_scale: _Guidance = 5.0
    """Of the other units."""
    image_video_guidance_scale: _Guidance = 4.0
    """Of the other units where unit 0 is a given picture."""
    dtype: DTypeName | None = None
    """What it is best computed in on a GPU. A CPU computes in what it is fast at, see ``precision.suitable_dtype``."""
    prompt_suffix: str = DEFAULT_PROMPT_SUFFIX
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Self:
        self.check_num_latent_frames(self.default_num_latent_frames)
        return self

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        if self.sizes:
            return self.sizes[0]
        width, height = _PUBLISHED_CAPABILITIES[VARIANT_PREFIX + "384p"]["sizes"][0]
        return (width, height) if self.max_side is None else (min(width, self.max_side), min(height, self.max_side))

    def precision_on(self, device: torch.device, asked: DTypeName | torch.dtype | None = None) -> Precision:
        """What it is computed in on a device: what the user asked for, else what suits the device and the model."""
        return choose_dtype(device, asked=asked, preferred=self.dtype)

    def check_size(self, width: int, height: int) -> None:
        """``ValueError`` unless the model makes this size (pixels)."""
        width, height = whole_number("width", width, least=1), whole_number("height", height, least=1)
        if self.sizes is not None:
            if (width, height) not in self.sizes:
                allowed = ", ".join(f"{w}x{h}" for w, h in self.sizes)
                raise ValueError(f"size={width}x{height}: this model makes {allowed}")
        elif width % SIZE_MULTIPLE or height % SIZE_MULTIPLE:
            raise ValueError(f"size={width}x{height}: width and height must be positive multiples of {SIZE_MULTIPLE}")
        elif self.max_side is not None and max(width, height) > self.max_side:
            raise ValueError(f"size={width}x{height}: this model's positions reach to {self.max_side} pixels a side")

    def check_num_latent_frames(self, num_latent_frames: int) -> None:
        """``ValueError`` unless the model makes videos of this length."""
        num_latent_frames = whole_number("num_latent_frames", num_latent_frames, least=1)
        longest = self.max_num_latent_frames
        if longest is not None and num_latent_frames > longest:
            length = "a single picture" if longest == 1 else f"{seconds_of(longest):.2g} s at 24 fps"
            raise ValueError(f"num_latent_frames={num_latent_frames}: at most {longest} ({length})")


_PUBLISHED_TRANSFORMERS: tuple[dict[str, Any], ...] = (
    {
        "_class_name": "PyramidDiffusionMMDiT",
        "num_layers": 24,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
    },
    {
        "_class_name": "PyramidFluxTransformer",
        "num_layers": 8,
        "num_single_layers": 16,
        "num_attention_heads": 30,
        "joint_attention_dim": 4096,
    },
)
_PUBLISHED_CAPABILITIES: dict[str, dict[str, Any]] = {
    VARIANT_PREFIX + "384p": {"sizes": [[640, 384]], "max_num_latent_frames": 16},
    VARIANT_PREFIX + "768p": {"sizes": [[1280, 768]], "max_num_latent_frames": 31},
    VARIANT_PREFIX + "image": {
        "sizes": [[1024, 1024], [1280, 768], [768, 1280]],
        "max_num_latent_frames": 1,
        "default_num_latent_frames": 1,
    },
}


def capabilities(source: Source, variant: str | None = None) -> Capabilities:
    """What a variant can do (see ``choose_variant``). Fetches no weights.

    Known for the published transformers, by their configuration and variant; ``pyramid_serve.json`` goes before that;
    with neither, every legal size and length with the published steps and guidances.
    Raises ``CheckpointError`` for a ``pyramid_serve.json`` with a field that is unknown or not allowed.
    """
    folder, name = resolve(source), choose_variant(source, variant)
    config = read_config(folder / name)
    is_published = any(known.items() <= _scalars(config).items() for known in _PUBLISHED_TRANSFORMERS)
    fields = dict(_PUBLISHED_CAPABILITIES.get(name, {})) if is_published else {}
    if isinstance(table_size := config.get("pos_embed_max_size"), int):
        fields["max_side"] = table_size * PIXELS_PER_TOKEN // SIZE_MULTIPLE * SIZE_MULTIPLE
    file = folder / CAPABILITIES_FILE
    if not file.exists():
        return _parse_capabilities(file, fields)
    given = _read_json(file)
    by_variant = given.pop("variants", {})
    if not isinstance(by_variant, dict) or not all(isinstance(own, dict) for own in by_variant.values()):
        raise CheckpointError(f"{file}: variants must be an object of objects by variant")
    unknown = sorted(by_variant.keys() - set(variants(folder)))
    if unknown:
        raise CheckpointError(f"{file}: variants that are not there: {_some(unknown)}")
    return _parse_capabilities(file, {**fields, **given, **by_variant.get(name, {})})


def _scalars(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if isinstance(value, (str, int))}


def _parse_capabilities(file: Path, fields: Mapping[str, Any]) -> Capabilities:
    try:
        # As JSON, for there a list is a tuple even to the strict.
        return TypeAdapter(Capabilities).validate_json(json.dumps(fields))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, problem['loc'])) or 'fields'}: {problem['msg']}" for problem in error.errors()]
        raise CheckpointError(f"{file}: {_some(problems, '; ')}") from error
