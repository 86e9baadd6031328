"""Which dtype a model is computed in, and checks for NaN and infinity; the same for library, command line and server.

A processor computes fast in few dtypes. bfloat16 is 1.5 to 4 times as fast as float32 on a CPU that has instructions
for it, and up to 75 times as slow on one that has none; so the rule looks at the processor, never at its name.
"""

import logging
import math
import platform
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from pyramid_serve.dtypes import DTypeName
from pyramid_serve.errors import NonFiniteError
from pyramid_serve.reasons import first_line

logger = logging.getLogger(__name__)


class Precision(NamedTuple):
    """A dtype, and why it was chosen, as a phrase for people."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """For example ``bfloat16``."""
        return dtype_name(self.dtype)


def choose_dtype(
    device: torch.device, *, asked: DTypeName | torch.dtype | None = None, preferred: DTypeName | None = None
) -> Precision:
    """What a model is computed in on ``device``.

    asked: the user's choice, which is always followed; where the device is slow at it, one warning says so. preferred:
    the checkpoint's own, see :func:`suitable_dtype`. Raises ``ValueError`` for a dtype that is not a ``DTypeName``.
    """
    suitable = suitable_dtype(device, preferred)
    if asked is None:
        return suitable
    name = asked if isinstance(asked, str) else dtype_name(asked)
    if name not in get_args(DTypeName):
        raise ValueError(f"dtype={name}: must be float32, bfloat16 or float16")
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu" and (slow := _why_slow_on_cpu(dtype)):
        logger.warning("dtype=%s is slow here: %s; float32 would be faster", name, slow)
    return Precision(dtype, "it was asked for")


def suitable_dtype(device: torch.device, preferred: DTypeName | None = None) -> Precision:
    """The dtype where none is asked for.

    A GPU gets ``preferred``, else bfloat16. A CPU gets bfloat16 where it has instructions for it, else float32, which
    every CPU computes fast; a checkpoint that prefers float32 gets that.
    """
    if device.type != "cpu":
        if preferred is not None:
            return Precision(getattr(torch, preferred), "it is the checkpoint's own")
        return Precision(torch.bfloat16, "it is the one for a GPU")
    if preferred == "float32":
        return Precision(torch.float32, "it is the checkpoint's own")
    slow = _why_slow_on_cpu(torch.bfloat16)
    if slow is None:
        return Precision(torch.bfloat16, "this processor has instructions for it")
    return Precision(torch.float32, slow)


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the VAE is computed in beside a transformer of ``dtype``: float32 for float16, whose range is too small.

    Activations within the decoder go beyond 65504, the largest number of float16.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """For example ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def available_device(device: torch.device | str) -> torch.device:
    """The device, with its index where it has one. Raises ``ValueError`` for one that is not on this machine."""
    try:
        found = torch.empty(1, device=device)
        if found.is_meta:
            raise RuntimeError("it holds no values")
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device={str(device)!r:.60}: not here: {first_line(error)}") from None


def device_name(device: torch.device) -> str:
    """A device for people: ``cpu``, or for example ``cuda (NVIDIA H200)``."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def check_finite(values: Tensor, where: str) -> None:
    """``NonFiniteError`` if any of the values is NaN or infinite. It takes one pass over them and no further memory."""
    if values.numel() == 0:
        return
    lowest, highest = torch.stack(torch.aminmax(values.detach())).tolist()  # which are NaN if any value is
    if math.isfinite(lowest) and math.isfinite(highest):
        return
    kind = "NaN" if math.isnan(lowest) else "infinity"
    hint = "; float16 ends at 65504, bfloat16 and float32 do not" if values.dtype == torch.float16 else ""
    raise NonFiniteError(f"{where}: {kind} among the values{hint}")


def first_non_finite_layer(module: nn.Module, run: Callable[[], object]) -> str | None:
    """The first layer of ``module`` whose result holds NaN or infinity while ``run`` runs; None if there is none.

    Only to explain a failure: it looks at the result of every layer.
    """
    names: list[str] = []

    def look(name: str, result: object) -> None:
        if isinstance(result, Tensor) and not names and not bool(torch.isfinite(result).all()):
            names.append(name)

    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, result, name=name: look(name, result))
        for name, layer in module.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return names[0] if names else None


def _why_slow_on_cpu(dtype: torch.dtype) -> str | None:
    """Why this CPU is slow at a dtype; None where it is not."""
    if dtype == torch.float32:
        return None
    name = dtype_name(dtype)
    if not torch.backends.mkldnn.is_available() or not _library_has(dtype):
        return f"torch has no fast {name} kernels for this processor"
    if platform.machine().lower() in ("aarch64", "arm64"):
        # The library answers by the processor's own flag there too, but its kernels for Arm are for convolutions in
        # two dimensions: those of the VAE would run on reference code, some hundred times as slow.
        return f"torch has no fast {name} convolutions in three dimensions for Arm processors"
    if dtype == torch.bfloat16 and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        # With AVX-512 alone the library converts to float32 and back, which takes 2.5 times as long as float32 itself.
        return f"this processor has no instructions that multiply in {name}"
    return None


def _library_has(dtype: torch.dtype) -> bool:
    """What oneDNN, the library of torch's convolutions and matrix products on a CPU, says of this processor."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
