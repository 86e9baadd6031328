import pytest
import torch

from pyramid_serve.pyramid_flow.history import halve, history_clips


@pytest.mark.parametrize(
    ("num_units", "stage", "expected"),
    [
        (0, 2, []),
        (1, 0, [(1, 4)]),
        (1, 2, [(1, 16)]),
        (2, 2, [(1, 8), (1, 16)]),
        (4, 0, [(4, 4)]),
        (4, 1, [(3, 4), (1, 8)]),
        (4, 2, [(2, 4), (1, 8), (1, 16)]),
    ],
)
def test_older_frames_are_coarser(num_units: int, stage: int, expected: list[tuple[int, int]]) -> None:
    clips = history_clips(torch.randn(16, num_units, 16, 16), stage)
    assert [(clip.shape[1], clip.shape[2]) for clip in clips] == expected


def test_every_frame_is_there_once_and_in_order() -> None:
    history = torch.arange(5.0).view(1, 5, 1, 1).expand(16, 5, 16, 16)
    for stage in range(3):
        times = [frame.mean().item() for clip in history_clips(history, stage) for frame in clip[0]]
        assert times == [0, 1, 2, 3, 4]


def test_halving_averages_blocks_of_four() -> None:
    x = torch.randn(2, 3, 8, 12)
    assert torch.allclose(halve(x), torch.nn.functional.avg_pool2d(x, 2), atol=1e-6)
