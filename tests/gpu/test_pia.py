"""PIA on a CUDA device: compiled, in another order in memory, and the same bits where they are asked for."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramid_serve.families import PartSource
from pyramid_serve.pia.family import DenoiseOptions
from pyramid_serve.pia.sampler import UNetRow
from pyramid_serve.pia.serving import Denoising
from tests.unit.pia.golden import CHECKPOINT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def denoising(dtype: torch.dtype = torch.float32, **options: Any) -> Denoising:
    part = Denoising(PartSource(CHECKPOINT, None, dtype, torch.device("cuda"), DenoiseOptions(**options)))
    part.warm_up(None)
    return part


def rows(num_rows: int, *, frames: int = 16, height: int = 24, width: int = 20) -> list[UNetRow]:
    """The first of more are those of fewer."""
    generator = torch.Generator("cuda").manual_seed(1)
    return [
        UNetRow(
            torch.randn(9, frames, height, width, generator=generator, device="cuda"),
            torch.tensor(900.0 - row, device="cuda"),
            torch.randn(77, 8, generator=generator, device="cuda"),
        )
        for row in range(num_rows)
    ]


def largest_difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def test_compiled_blocks_predict_what_eager_ones_do() -> None:
    quick, plain = denoising(), denoising(compiled="none", channels_last=False)
    for num_rows in (1, 2, 6):
        for frames in (8, 16):
            given = rows(num_rows, frames=frames)
            assert largest_difference(quick.forward(given), plain.forward(given)) <= 1e-3  # TF32 in convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_bits_that_it_has_alone_where_that_is_asked_for(dtype: torch.dtype) -> None:
    part = denoising(dtype, batch_invariant=True)
    together = part.forward(rows(7))
    for row, prediction in zip(rows(7), together, strict=True):
        assert torch.equal(part.forward([row])[0], prediction)


def test_a_video_alone_has_its_bits_each_time() -> None:
    part = denoising(torch.bfloat16)
    first = part.forward(rows(2))
    for _ in range(3):
        part.forward(rows(6))
        assert all(map(torch.equal, part.forward(rows(2)), first))


def test_as_many_rows_as_a_token_budget_holds_fit_into_attention() -> None:
    part = denoising(torch.bfloat16, compiled="none")
    given = rows(18, frames=8, height=64, width=64)  # 73,728 sequences of the motion modules
    assert largest_difference(part.forward(given)[:2], part.forward(given[:2])) <= 0.1
