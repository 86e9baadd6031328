"""Compiling what a block does around attention, for devices where launching many small kernels takes the time."""

from typing import Any

import torch
import torch._dynamo
from torch import nn

from pyramid_serve.pyramid_flow.flux import SingleBlock
from pyramid_serve.pyramid_flow.layers import JointBlock

AROUND_ATTENTION = ("before_attention", "after_attention")
_MAX_COMPILATIONS = 64
"""Of one method in this process: by kind of block, model, dtype, and for packs of one sequence. torch allows 8."""


def compiles_on(device: torch.device) -> bool:
    """Whether blocks are compiled on a device unless something else is asked for."""
    return device.type == "cuda"


def compile_blocks(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the blocks of a transformer: norms, rotations, gates and residuals become a few kernels.

    All blocks of a kind share what is compiled, and so do packs of all lengths; only packs of a single sequence are
    compiled once more. Compiled kernels are cached on disk by torch (``TORCHINDUCTOR_CACHE_DIR``). Attention is
    compiled by itself, see :mod:`attention`. backend: as ``torch.compile`` takes it.
    """
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_COMPILATIONS)
    for block in model.modules():
        if isinstance(block, JointBlock | SingleBlock):
            for name in AROUND_ATTENTION:
                compiled = torch.compile(getattr(block, name), dynamic=True, fullgraph=True, backend=backend)
                setattr(block, name, compiled)
