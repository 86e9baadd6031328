"""What makes the UNet quicker on a GPU: compiled blocks, and convolutions in the order that tensor cores read."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from pyramid_serve.pia.settings import CompiledName

_MAX_COMPILATIONS = 64
"""Of one kind of block in this process: by its width, and for one row and more. torch allows 8."""


def set_up(unet: Any, device: torch.device, *, compiled: CompiledName | None, channels_last: bool | None) -> bool:
    """Prepare a UNet for a device; whether its blocks are compiled.

    None: what suits the device, which is both on CUDA and neither elsewhere.
    """
    is_cuda = device.type == "cuda"
    if is_cuda if channels_last is None else channels_last:
        unet.to(memory_format=torch.channels_last)
    is_compiled = (compiled or ("blocks" if is_cuda else "none")) == "blocks"
    if is_compiled:
        compile_blocks(unet)
    return is_compiled


def compile_blocks(unet: Any, *, backend: str = "inductor") -> None:
    """Compile the residual blocks, the spatial transformers and the temporal ones, each whole.

    Norms, activations and residuals become a few kernels around products, convolutions and attention. Blocks of a kind
    and width share what is compiled, and so do all sizes, numbers of frames and packs; only single rows are compiled
    once more. Compiled kernels are cached on disk by torch (``TORCHINDUCTOR_CACHE_DIR``). backend: as
    ``torch.compile`` takes it.
    """
    from diffusers.models.resnet import ResnetBlock2D  # here, since it takes seconds to import
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
    from torch._dynamo import config  # takes seconds to import, and most processes compile nothing

    dynamo: Any = config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_COMPILATIONS)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D | Transformer2DModel | AnimateDiffTransformer3D):
            compiled = torch.compile(block.forward, dynamic=True, fullgraph=True, backend=backend)
            setattr(block, "forward", compiled)  # noqa: B010  # mypy knows forward as a method


def as_compiled() -> AbstractContextManager[object]:
    """Where nothing more is compiled: blocks that would have to be run as they are, which takes less than compiling."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("eager_on_recompile")
    return stance
