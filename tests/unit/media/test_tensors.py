from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from pyramid_serve.media.pictures import read_picture
from pyramid_serve.media.tensors import fit_picture
from pyramid_serve.pyramid_flow.codec import to_uint8


def test_a_picture_of_the_size_comes_through_unchanged() -> None:
    picture = read_picture(Path(__file__).parents[2] / "golden/mmdit/i2v_image.png")
    pixels = fit_picture(picture, height=64, width=128)
    expected = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (128, 66), (64, 32)])
def test_a_picture_is_scaled_to_cover_the_size_and_cut_from_its_centre(width: int, height: int) -> None:
    # A cross through the middle stays in the middle, whatever is cut off.
    image = Image.new("RGB", (width, height))
    image.paste("white", (0, height // 2 - 3, width, height - height // 2 + 3))
    image.paste("white", (width // 2 - 3, 0, width - width // 2 + 3, height))
    pixels = fit_picture(image, height=64, width=128)
    assert pixels.shape == (3, 64, 128)
    assert pixels.min() >= -1
    assert pixels.max() == 1
    assert torch.allclose(pixels, pixels.flip(1), atol=0.3)
    assert torch.allclose(pixels, pixels.flip(2), atol=0.3)


def test_a_cut_between_two_pixels_is_rounded_as_pillow_does() -> None:
    image = Image.fromarray(numpy.arange(67 * 128 * 3, dtype=numpy.uint8).reshape(67, 128, 3))
    expected = numpy.asarray(image.crop((0, 1.5, 128, 65.5)))
    assert torch.equal(
        to_uint8(fit_picture(image, height=64, width=128).unsqueeze(1) + 1e-3)[0], torch.tensor(expected)
    )


def test_a_picture_too_narrow_to_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="picture: 10000x1 is too long and narrow for 1280x768"):
        fit_picture(Image.new("RGB", (10000, 1)), height=768, width=1280)
