"""How the weights of a part of a checkpoint are loaded into a module."""

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pyramid_serve.checkpoints.naming import name_some
from pyramid_serve.checkpoints.sources import CheckpointError, Source, read_config, read_json
from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)

AnyModule = TypeVar("AnyModule", bound=nn.Module)

_WEIGHTS = "diffusion_pytorch_model"


def load_state(folder: Source) -> dict[str, Tensor]:
    """Every tensor of a part by name, on the CPU and memory-mapped: nothing is read before it is used.

    Reads ``diffusion_pytorch_model`` as ``.safetensors`` or ``.bin``, whole or in shards with an index. Where there are
    several, safetensors are preferred to ``.bin``, and a whole file to shards. Pickles are only ever read with
    ``weights_only=True``. The tensors are views of the file: replace a checkpoint in use by moving a new one in place,
    not by writing into it.

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
    that no second copy of the weights exists. On the CPU, weights that keep the dtype of the file stay mapped from it.
    Returns the module in eval mode, without gradients.

    Raises ``CheckpointError`` naming the keys that are missing or misshapen, or left over although they belong to a
    child of the module: then the config describes another model. Others that are left over are logged as a warning.
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
        raise RuntimeError(f"{type(module).__name__}: buffers that no checkpoint fills: {name_some(unfilled)}")
    return module.eval().requires_grad_(False)


def _check_keys(folder: Source, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing = [name for name in expected if name not in stored]
    misshapen = [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    children = {name.partition(".")[0] for name in expected}
    unexpected = [name for name in stored if name not in expected]
    surplus = [name for name in unexpected if name.partition(".")[0] in children]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {name_some(missing)}")
    if misshapen:
        problems.append(f"{len(misshapen)} misshapen: {name_some(misshapen)}")
    if surplus:
        problems.append(f"{len(surplus)} left over: {name_some(surplus)}")
    if problems:
        raise CheckpointError(f"{folder}: weights do not fit the config: {'; '.join(problems)}")
    if unexpected:
        logger.warning("%s: %d unexpected keys are left out: %s", folder, len(unexpected), name_some(unexpected))


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
    weight_map = read_json(index).get("weight_map")
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
        raise CheckpointError(f"{index}: keys that its files do not hold: {name_some(absent)}")
    return state
