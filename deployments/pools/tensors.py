"""Tensors to and from the wire."""

from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from deployments.pools.wire import WireTensor


def to_wire(tensor: Tensor) -> WireTensor:
    """A tensor of any dtype and device, as the wire carries it."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return WireTensor(flat.view(torch.uint8).numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def from_wire(wire: WireTensor, device: torch.device | str = "cpu") -> Tensor:
    """The tensor, a copy: what Ray hands out is read-only. ``ValueError`` where dtype, shape and bytes do not fit."""
    dtype = getattr(torch, wire.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={wire.dtype!r}: must be the name of a torch dtype")
    num_bytes = torch.Size(wire.shape).numel() * dtype.itemsize
    if wire.data.dtype != numpy.uint8 or wire.data.nbytes != num_bytes:
        raise ValueError(
            f"data: {wire.data.nbytes} bytes of {wire.data.dtype}, must be {num_bytes} of uint8 for a {wire.dtype} "
            f"tensor of shape {wire.shape}"
        )
    tensor = torch.empty(wire.shape, dtype=dtype)
    numpy.copyto(tensor.reshape(-1).view(torch.uint8).numpy(), wire.data)
    return tensor.to(device)


def all_to_wire(tensors: Mapping[str, Tensor]) -> dict[str, WireTensor]:
    """Named tensors, as the wire carries them."""
    return {name: to_wire(tensor) for name, tensor in tensors.items()}


def all_from_wire(wire: Mapping[str, WireTensor]) -> dict[str, Tensor]:
    """Named tensors on the CPU. Raises ``ValueError`` as ``from_wire`` does."""
    return {name: from_wire(tensor) for name, tensor in wire.items()}
