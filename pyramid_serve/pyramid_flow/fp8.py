"""Products of the blocks in 8-bit floating point (e4m3), with a scale for each row of the input and of the weight.

H100 and later multiply these at twice the rate of bfloat16, and the result is a little off, see docs/performance.md.
What makes the modulations, the embeddings and the last layer stay as they are: they are little of the work.
L rows of a layer's input.
"""

import torch
from torch import Tensor, nn

from pyramid_serve.pyramid_flow.flux import SingleBlock
from pyramid_serve.pyramid_flow.fused import Linear, SharedInput
from pyramid_serve.pyramid_flow.layers import JointBlock, Modulation

DTYPE = torch.float8_e4m3fn
CAPABILITY = (8, 9)
"""Of the first cards that multiply it."""
_LARGEST = torch.finfo(DTYPE).max
_LEAST_SCALE = 1e-12
"""Of a row of zeros."""
_MULTIPLE = 16
"""Of both sizes of a weight, which the product asks for."""


class Fp8Product:
    """``fused.Product`` of one layer, whose weight (out, in) is kept in fp8 beside the given one."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.scale = in_fp8(weight.detach())

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, scale = in_fp8(x)
        out: Tensor = torch._scaled_mm(rows, self.weight.T, scale_a=scale, scale_b=self.scale.T, out_dtype=x.dtype)
        return out if bias is None else out + bias


def in_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (L, in) in fp8, and the scale (L, 1), float32, by which each is to be multiplied."""
    scale = (x.abs().amax(dim=1, keepdim=True).float() / _LARGEST).clamp(min=_LEAST_SCALE)
    return (x.float() / scale).to(DTYPE), scale


def use_fp8(model: nn.Module) -> None:
    """Compute the products of a transformer's blocks in fp8. Its weights are loaded and fused, and on their device."""
    for block in model.modules():
        if not isinstance(block, JointBlock | SingleBlock):
            continue
        shared = [module for module in block.modules() if isinstance(module, SharedInput)]
        elsewhere: set[nn.Module] = {layer for module in shared for layer in module.layers}
        elsewhere |= {module.linear for module in block.modules() if isinstance(module, Modulation)}
        for module in block.modules():
            if isinstance(module, SharedInput | Linear) and module not in elsewhere:
                weight = module.weight
                if weight is None:
                    raise ValueError("fp8: the layers of this model are not fused")
                if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
                    raise ValueError(f"fp8: weights of {tuple(weight.shape)}, must be multiples of {_MULTIPLE}")
                module.product = Fp8Product(weight)
