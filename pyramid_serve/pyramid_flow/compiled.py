"""Compiling what lies between products and convolutions, for devices where small kernels and memory take the time."""

from typing import Any, cast

import torch
from torch import nn

from pyramid_serve.pyramid_flow.flux import SingleBlock
from pyramid_serve.pyramid_flow.layers import JointBlock
from pyramid_serve.pyramid_flow.vae_blocks import FrameGroupNorm, SpatialUpsample, TemporalUpsample

AROUND_ATTENTION = ("before_attention", "after_attention")
_MAX_COMPILATIONS = 64
"""Of one method in this process: by kind of block, model, dtype, and for packs of one sequence. torch allows 8."""


def compiles_on(device: torch.device) -> bool:
    """Whether models are compiled on a device unless something else is asked for."""
    return device.type == "cuda"


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the blocks of a transformer: norms, rotations, gates and residuals become a few kernels.

    All blocks of a kind share what is compiled, and so do packs of all lengths; only packs of a single sequence are
    compiled once more. Compiled kernels are cached on disk by torch (``TORCHINDUCTOR_CACHE_DIR``). Attention is
    compiled by itself, see :mod:`attention`. backend: as ``torch.compile`` takes it.
    """
    for block in model.modules():
        if isinstance(block, JointBlock | SingleBlock):
            for name in AROUND_ATTENTION:
                _compile_method(block, name, backend)


def compile_vae(vae: nn.Module, *, backend: str = "inductor") -> None:
    """Compile what a VAE does between its convolutions, and keep its numbers in the order that tensor cores read.

    Norm, SiLU and the frames before become one kernel that writes the next convolution's input, and unfolding another.
    Layers of as many channels share what is compiled, whatever their size; single frames are compiled once more. For
    inference: the convolutions' gradients do not bear that order on a CPU.
    backend: as ``torch.compile`` takes it.
    """
    cast(Any, vae).to(memory_format=torch.channels_last_3d)
    for module in vae.modules():
        if isinstance(module, FrameGroupNorm):
            _compile_method(module, "activated_after", backend)
        elif isinstance(module, SpatialUpsample | TemporalUpsample):
            _compile_method(module, "unfold", backend)


def _compile_method(module: nn.Module, name: str, backend: str) -> None:
    """Compile a method whole and for all lengths. Modules of a kind share what is compiled."""
    from torch._dynamo import config  # takes seconds to import, and most processes compile nothing

    dynamo: Any = config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_COMPILATIONS)
    setattr(module, name, torch.compile(getattr(module, name), dynamic=True, fullgraph=True, backend=backend))
