"""Pictures as tensors: the part of reading pictures that needs torch."""

import numpy
import torch
from PIL import Image
from torch import Tensor

from pyramid_serve.media.picture_errors import RefusedError
from pyramid_serve.media.pictures import fitted


def fit_picture(image: Image.Image, *, height: int, width: int, name: str = "picture") -> Tensor:
    """A picture as float32 (3, H, W) in [-1, 1], brought to ``height`` x ``width`` pixels by ``pictures.fitted``."""
    fit = fitted(image, height=height, width=width, name=name)
    pixels = torch.from_numpy(numpy.array(fit)).permute(2, 0, 1)
    return (pixels.float() / 127.5 - 1).contiguous()


def array_of(tensor: Tensor) -> numpy.ndarray:
    """The values of a tensor on the CPU; bfloat16 as float32. ``RefusedError`` for a tensor without dense values."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise RefusedError("must be a dense tensor that holds values")
    values = tensor.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()
