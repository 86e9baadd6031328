"""Linear layers and norms, of which some are computed together; all keep their names in the checkpoint.

L tokens of a stream, N heads, d head size.

What is computed together gives the same before and after :func:`fuse_layers`, which lays the weights together in
memory, so that one product or norm does for all of them.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Rows (L, in), weight (out, in) and bias (out,) of a linear layer -> (L, out)."""


class Linear(nn.Linear):
    """A linear layer whose product another function may compute: (L, in) -> (L, out)."""

    product: Product = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)


class PatchProjection(nn.Conv2d):
    """A convolution over whole patches, which is such a product: (L, C p p) -> (L, D)."""

    product: Product = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight.flatten(1), self.bias)


class SharedInput(nn.Module):
    """Linear layers that take the same input, as one product: (L, in) -> (L, the sum of their outs)."""

    product: Product = staticmethod(F.linear)

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.layers = tuple(layers)  # not children of this module, since they have another place in the checkpoint
        self.weight: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def fuse(self) -> None:
        """Replace the weights of the layers, which have no gradients from here on, by views of joint ones."""
        sizes = [layer.out_features for layer in self.layers]
        self.weight = torch.cat([layer.weight.detach() for layer in self.layers])
        self.bias = torch.cat([layer.bias.detach() for layer in self.layers])
        for layer, weight, bias in zip(self.layers, self.weight.split(sizes), self.bias.split(sizes), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return self.product(x, self.weight, self.bias)


class HeadNorms(nn.Module):
    """The norms of queries and of keys as one: (L, 2, N, d) -> the same."""

    def __init__(self, norm_q: nn.RMSNorm, norm_k: nn.RMSNorm) -> None:
        super().__init__()
        self._norms = (norm_q, norm_k)
        self.weight: Tensor | None
        self.register_buffer("weight", None, persistent=False)

    def fuse(self) -> None:
        """Replace the weights of both norms, which have no gradients from here on, by views of a joint one."""
        self.weight = torch.stack([norm.weight.detach() for norm in self._norms])[:, None]
        for norm, (weight,) in zip(self._norms, self.weight, strict=True):
            norm.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, heads: Tensor) -> Tensor:
        if self.weight is None:
            return torch.stack([norm(x) for norm, x in zip(self._norms, heads.unbind(1), strict=True)], dim=1)
        return F.rms_norm(heads, heads.shape[-1:], eps=self._norms[0].eps) * self.weight


def set_product(model: nn.Module, product: Product) -> None:
    """Let a function compute all linear layers of a transformer."""
    for module in model.modules():
        if isinstance(module, Linear | PatchProjection | SharedInput):
            module.product = product


def fuse_layers(model: nn.Module) -> None:
    """Fuse all such layers of a model whose weights are loaded, one after the other."""
    for module in model.modules():
        if isinstance(module, SharedInput | HeadNorms):
            module.fuse()
