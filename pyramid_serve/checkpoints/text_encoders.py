"""How one text encoder and its tokenizer are loaded from files that may come from anyone.

Nothing that the files say is run or fetched: no code of theirs, no kernel from a hub, no quantised weights.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import nn

from pyramid_serve.checkpoints.configs import Count, Features, Layers, parse_config
from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import CheckpointError, read_config
from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)

_Epsilon = Annotated[float, Field(gt=0, le=1)]


class _ClipSizes(BaseModel):
    """The sizes of a CLIP, with the defaults that transformers has."""

    vocab_size: Features = 49408
    hidden_size: Features = 512
    intermediate_size: Features = 2048
    projection_dim: Features = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Features = 77
    layer_norm_eps: _Epsilon = 1e-5
    hidden_act: str = "quick_gelu"


class _T5Sizes(BaseModel):
    """The sizes of a T5, with the defaults that transformers has."""

    vocab_size: Features = 32128
    d_model: Features = 512
    d_kv: Features = 64
    d_ff: Features = 2048
    num_layers: Layers = 6
    num_heads: Count = 8
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Features = 128
    layer_norm_epsilon: _Epsilon = 1e-6
    feed_forward_proj: str = "relu"


_ARCHITECTURES: dict[str, type[_ClipSizes | _T5Sizes]] = {
    "CLIPTextModelWithProjection": _ClipSizes,
    "CLIPTextModel": _ClipSizes,
    "T5EncoderModel": _T5Sizes,
}
_WEIGHTS = ("*.safetensors", "*.bin")


class LoadedEncoder(NamedTuple):
    """One text encoder, on its device, and its tokenizer."""

    part: Path
    architecture: str
    model: nn.Module
    tokenizer: Any


def load_encoder(part: Path, dtype: torch.dtype, device: torch.device) -> LoadedEncoder:
    """Load one ``text_encoder*`` folder with its ``tokenizer*``.

    Raises ``CheckpointError`` naming the file, and the key where one is wrong.
    """
    config = read_config(part)
    architecture = _architecture_of(part, config)
    tokenizer_folder = part.with_name(part.name.replace("text_encoder", "tokenizer"))
    if not tokenizer_folder.is_dir():
        raise CheckpointError(f"{tokenizer_folder}: no such folder, the tokenizer of {part.name}")
    try:
        sizes = parse_config(_ARCHITECTURES[architecture], config)
    except ValueError as error:
        raise CheckpointError(f"{part}/config.json: {error}") from error
    tokenizer = _load_tokenizer(tokenizer_folder)
    if len(tokenizer) > sizes.vocab_size:
        raise CheckpointError(
            f"{tokenizer_folder}: has {len(tokenizer)} tokens, "
            f"but {part.name}/config.json: vocab_size={sizes.vocab_size}"
        )
    model = _load_model(part, architecture, config, dtype)
    return LoadedEncoder(part, architecture, model.to(device).eval().requires_grad_(False), tokenizer)


def _architecture_of(part: Path, config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or ["none"]
    architecture = named[0] if isinstance(named, list) else named
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise CheckpointError(f"{part}: architecture {architecture}; known are {', '.join(_ARCHITECTURES)}")
    return architecture


def _load_tokenizer(folder: Path) -> Any:
    import transformers  # here, since it takes seconds to import and other processes do not need it

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise any class for files that are broken
        raise CheckpointError(f"{folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json: model_max_length={length!r:.60}: must be a number of at least 1"
        )
    return tokenizer


def _load_model(part: Path, architecture: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    import transformers  # here, since it takes seconds to import and other processes do not need it

    model_class = getattr(transformers, architecture)
    try:
        built = model_class.config_class.from_dict(_without_choices(config))
        _check_number(part, model_class, built)
        model, report = model_class.from_pretrained(
            part,
            config=built,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            variant=None if _has_plain_weights(part) else "fp16",
        )
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises any class for files that are broken
        raise CheckpointError(f"{part}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    _check_report(part, model, report)
    loaded: nn.Module = model
    return loaded


def _has_plain_weights(part: Path) -> bool:
    """False where the only weights are those that were saved in half precision, beside which others may lie."""
    is_halved = [".fp16." in file.name or ".fp16-" in file.name for each in _WEIGHTS for file in part.glob(each)]
    return not is_halved or not all(is_halved)


def _without_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without what says how to compute, such as ``_attn_implementation``: transformers would load a
    kernel from a hub by such a name. It chooses by itself then.
    """
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and not key.endswith("_implementation") and key != "auto_map"
    }


def _check_number(part: Path, model_class: Any, config: Any) -> None:
    """Raise ``CheckpointError`` for a config that describes more parameters than the files can hold.

    Whatever the files lack would be allocated before it is found missing.
    """
    with torch.device("meta"):
        num_described = sum(parameter.numel() for parameter in model_class(config).parameters())
    num_stored = sum(file.stat().st_size for pattern in _WEIGHTS for file in part.glob(pattern))
    if num_described > num_stored > 0:
        raise CheckpointError(
            f"{part}: cannot be loaded: config.json describes {num_described} parameters, "
            f"but the weights are {num_stored} bytes"
        )


def _check_report(part: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
    children = {name for name, _ in model.named_children()} | {"text_model"}
    unexpected = sorted(report["unexpected_keys"])
    # Old files of CLIP hold the numbers of the positions, which are no weights.
    surplus = [
        key for key in unexpected if key.partition(".")[0] in children and not key.endswith("embeddings.position_ids")
    ]
    found: Sequence[tuple[str, Any]] = (
        ("missing", report["missing_keys"]),
        ("misshapen", report["mismatched_keys"]),
        ("left over", surplus),
    )
    problems = [f"{len(keys)} {what}: {name_some(sorted(map(str, keys)))}" for what, keys in found if keys]
    if problems:
        raise CheckpointError(f"{part}: weights do not fit the config: {'; '.join(problems)}")
    if unexpected:
        logger.warning("%s: %d unexpected keys are left out: %s", part, len(unexpected), name_some(unexpected))
