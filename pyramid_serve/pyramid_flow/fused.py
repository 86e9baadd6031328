"""Layers that are computed together, and keep their names in the checkpoint.

L tokens of a stream, N heads, d head size.

They compute the same before and after :func:`fuse_layers`, which lays their weights together in memory, so that one
product or norm does for all of them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedInput(nn.Module):
    """Linear layers that take the same input, as one product: (L, in) -> (L, the sum of their outs)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self._layers = tuple(layers)  # not children of this module, since they have another place in the checkpoint
        self.weight: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)

    def fuse(self) -> None:
        """Replace the weights of the layers, which have no gradients from here on, by views of joint ones."""
        sizes = [layer.out_features for layer in self._layers]
        self.weight = torch.cat([layer.weight.detach() for layer in self._layers])
        self.bias = torch.cat([layer.bias.detach() for layer in self._layers])
        for layer, weight, bias in zip(self._layers, self.weight.split(sizes), self.bias.split(sizes), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return torch.cat([layer(x) for layer in self._layers], dim=-1)
        return F.linear(x, self.weight, self.bias)


class HeadNorms(nn.Module):
    """The norms of queries and of keys as one: (L, 2, N, d) -> the same."""

    def __init__(self, norm_q: nn.RMSNorm, norm_k: nn.RMSNorm) -> None:
        super().__init__()
        self._norms = (norm_q, norm_k)
        self.weight: Tensor | None
        self.register_buffer("weight", None, persistent=False)

    def fuse(self) -> None:
        self.weight = torch.stack([norm.weight.detach() for norm in self._norms])[:, None]

    def forward(self, heads: Tensor) -> Tensor:
        if self.weight is None:
            return torch.stack([norm(x) for norm, x in zip(self._norms, heads.unbind(1), strict=True)], dim=1)
        return F.rms_norm(heads, heads.shape[-1:], eps=self._norms[0].eps) * self.weight


def fuse_layers(model: nn.Module) -> None:
    """Fuse all such layers of a model whose weights are loaded, one after the other."""
    for module in model.modules():
        if isinstance(module, SharedInput | HeadNorms):
            module.fuse()
