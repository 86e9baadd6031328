import pytest
import torch

from pyramid_serve.pyramid_flow.pack import (
    ClipSequence,
    PromptEmbeds,
    SequenceShape,
    layout_of,
    patchify,
    unpatchify,
)

CPU = torch.device("cpu")
SHAPES = (SequenceShape(3, ((2, 1, 2), (1, 2, 4))), SequenceShape(1, ((1, 1, 1),)))


def test_a_sequence_knows_its_shape() -> None:
    prompt = PromptEmbeds(torch.randn(5, 8), torch.randn(4))
    sequence = ClipSequence(prompt, (torch.randn(16, 2, 2, 4), torch.randn(16, 1, 4, 8)), 500.0)
    assert sequence.shape == SequenceShape(5, ((2, 1, 2), (1, 2, 4)))
    assert sequence.num_tokens == 5 + 4 + 8


def test_frame_ends_count_text_with_the_first_frame() -> None:
    assert SHAPES[0].frame_ends == [5, 7, 15]


def test_layout_places_every_token_once() -> None:
    layout = layout_of(SHAPES, CPU)
    assert layout.num_tokens == 15 + 2
    assert sorted([*layout.text.tolist(), *layout.image.tolist()]) == list(range(17))
    assert layout.sequence.tolist() == [0] * 15 + [1] * 2
    assert layout.time.tolist() == [0] * 5 + [1] * 2 + [2] * 8 + [0] * 2
    assert layout.image[layout.current].tolist() == [*range(7, 15), 16]


def test_positions_of_lower_clips_lie_in_the_grid_of_the_current_clip() -> None:
    layout = layout_of((SHAPES[0],), CPU)
    assert layout.positions[:3].abs().sum() == 0
    assert layout.positions[3:7].tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [1, 0.5, 0.5], [1, 0.5, 2.5]]
    assert layout.positions[7:].tolist() == [[2, row, column] for row in (0, 1) for column in range(4)]


def test_joined_streams_split_again() -> None:
    layout = layout_of(SHAPES, CPU)
    text, image = torch.randn(4, 3), torch.randn(13, 3)
    again = layout.split(layout.join(text, image))
    assert torch.equal(again[0], text)
    assert torch.equal(again[1], image)


def test_patches_of_the_current_clips_come_back_as_clips() -> None:
    clips = [torch.randn(16, 1, 4, 8), torch.randn(16, 1, 2, 2)]
    again = unpatchify(torch.cat([patchify(clip) for clip in clips]), SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))


@pytest.mark.parametrize(
    ("clips", "said"),
    [
        ((), "at least the current one"),
        (((16, 1, 5, 6),), "even h and w"),
        (((16, 4, 6),), "must be"),
        (((16, 1, 8, 8), (16, 1, 4, 8)), "larger than the current one"),
    ],
)
def test_clips_that_make_no_sequence_are_refused(clips: tuple[tuple[int, ...], ...], said: str) -> None:
    prompt = PromptEmbeds(torch.randn(5, 8), torch.randn(4))
    with pytest.raises(ValueError, match=said):
        ClipSequence(prompt, tuple(torch.zeros(shape) for shape in clips), 1.0)
