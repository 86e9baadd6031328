import pytest
import torch

from pyramid_serve.pyramid_flow.pack import (
    PADDING_TIME,
    ClipSequence,
    PromptEmbeds,
    SequenceShape,
    layout_of,
    padded,
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
    assert layout.num_text == 3 + 1
    assert layout.sequence.tolist() == [0] * 3 + [1] + [0] * 12 + [1]
    assert layout.time.tolist() == [0] * 4 + [0] * 2 + [1] * 2 + [2] * 8 + [0]
    assert layout.current.tolist() == [*range(4, 12), 12]
    assert [(span.text, span.image) for span in layout.spans] == [
        (slice(0, 3), slice(4, 16)),
        (slice(3, 4), slice(16, 17)),
    ]


def test_texts_and_images_are_filled_up_to_whole_tiles_that_nobody_sees() -> None:
    layout = layout_of(SHAPES, CPU, tile=8)
    padding = PADDING_TIME
    assert layout.num_text == 8 + 8
    assert layout.sequence.tolist() == [0] * 8 + [1] * 8 + [0] * 16 + [1] * 8
    assert layout.time.tolist()[:16] == [0] * 3 + [padding] * 5 + [0] + [padding] * 7
    assert layout.time.tolist()[16:] == [0] * 2 + [1] * 2 + [2] * 8 + [padding] * 4 + [0] + [padding] * 7
    assert layout.current.tolist() == [*range(4, 12), *[16] * 8]
    assert [(span.text, span.image) for span in layout.spans] == [
        (slice(0, 3), slice(16, 28)),
        (slice(8, 9), slice(32, 33)),
    ]


def test_positions_of_lower_clips_lie_in_the_grid_of_the_current_clip() -> None:
    layout = layout_of((SHAPES[0],), CPU)
    assert layout.positions[:3].abs().sum() == 0
    assert layout.positions[3:7].tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [1, 0.5, 0.5], [1, 0.5, 2.5]]
    assert layout.positions[7:].tolist() == [[2, row, column] for row in (0, 1) for column in range(4)]


def test_patches_of_the_current_clips_come_back_as_clips() -> None:
    clips = [torch.randn(16, 1, 4, 8), torch.randn(16, 1, 2, 2)]
    again = unpatchify(torch.cat([patchify(clip) for clip in clips]), SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(clips, again, strict=True))


def test_patches_come_back_from_whole_tiles() -> None:
    clips = [torch.randn(16, 1, 4, 8), torch.randn(16, 1, 2, 2)]
    again = unpatchify(torch.cat([padded(patchify(clip), 3) for clip in clips]), SHAPES, tile=3)
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
