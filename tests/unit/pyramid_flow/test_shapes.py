from typing import Any

import pytest

from pyramid_serve.pyramid_flow.shapes import (
    LatentShape,
    nearest_num_latent_frames,
    num_frames_of,
    num_latent_frames_of,
    seconds_of,
)


def test_sixteen_latent_frames_are_five_seconds() -> None:
    assert num_frames_of(16) == 121
    assert seconds_of(16) == pytest.approx(5, abs=0.05)


def test_frames_and_latent_frames_convert_both_ways() -> None:
    assert [num_latent_frames_of(num_frames_of(t)) for t in range(1, 40)] == list(range(1, 40))


@pytest.mark.parametrize("num_frames", [0, 2, 8, 120, -7, 9.0, True, "9", None])
def test_a_number_of_frames_that_is_not_8n_plus_1_is_refused(num_frames: Any) -> None:
    with pytest.raises(ValueError, match=f"num_frames={num_frames!r}"):
        num_latent_frames_of(num_frames)


@pytest.mark.parametrize(("seconds", "expected"), [(0.01, 1), (0.2, 1), (0.3, 2), (5, 16), (5.04, 16), (10, 31)])
def test_seconds_go_to_the_nearest_length(seconds: float, expected: int) -> None:
    assert nearest_num_latent_frames(seconds) == expected


@pytest.mark.parametrize(
    ("height", "width"), [(65, 64), (64, 32), (0, 64), (384, -640), (64.0, 64), (64, "64"), (64, float("nan"))]
)
def test_a_size_that_does_not_split_into_stages_is_refused(height: Any, width: Any) -> None:
    with pytest.raises(ValueError, match="must be a positive multiple of 64"):
        LatentShape.of_pixels(height=height, width=width, num_latent_frames=1)


@pytest.mark.parametrize("num_latent_frames", [0, 2.5, True, "4", None, float("nan")])
def test_a_length_that_is_no_whole_number_is_refused(num_latent_frames: Any) -> None:
    with pytest.raises(ValueError, match="num_latent_frames="):
        LatentShape.of_pixels(height=64, width=64, num_latent_frames=num_latent_frames)


def test_the_longest_768p_sequence_has_the_published_number_of_tokens() -> None:
    shape = LatentShape.of_pixels(height=768, width=1280, num_latent_frames=31)
    assert shape.num_sequence_tokens(30, 2) == 15_360
    assert [shape.num_tokens_at(stage) for stage in range(3)] == [240, 960, 3840]


def test_stages_are_a_quarter_a_half_and_the_whole_of_the_latent_size() -> None:
    shape = LatentShape.of_pixels(height=384, width=640, num_latent_frames=1)
    assert [shape.size_at(stage) for stage in range(3)] == [(12, 20), (24, 40), (48, 80)]
    assert shape.pixel_size == (384, 640)
