"""Why a picture is refused, and the checks of its size."""

from PIL import Image


class RefusedError(Exception):
    """Why a picture is refused: a text for the user, without the name of the field. ``read_picture`` adds the name."""


def check_size(image: Image.Image, max_pixels: int | None) -> None:
    """Raise ``RefusedError`` for an image without pixels, or with more than ``max_pixels``."""
    check_num_pixels(image.width, image.height, max_pixels)


def check_num_pixels(width: int, height: int, max_pixels: int | None) -> None:
    """Raise ``RefusedError`` for a size without pixels, or with more than ``max_pixels``."""
    if width < 1 or height < 1:
        raise RefusedError(f"not a readable image: {width}x{height} has no pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise RefusedError(f"{width}x{height} is more than {max_pixels} pixels")
