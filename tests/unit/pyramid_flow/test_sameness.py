"""A prediction has the same bits whatever shares its forward, and however many threads compute it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence, PromptEmbeds
from tests.unit.pyramid_flow.transformers_at_hand import FLUX_CONFIG, MMDIT_CONFIG, random_sequence


@st.composite
def sequences(draw: st.DrawFn) -> ClipSequence:
    """A sequence of a random unit, stage, size, text length and timestep."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    unit, stage = draw(st.integers(0, 6)), draw(st.integers(0, 2))
    height, width = (8 * draw(st.integers(1, 3)) for _ in range(2))
    num_text_tokens = draw(st.integers(1, 20) | st.just(128))
    scale = 2 ** (2 - stage)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    clips = history_clips(random(16, unit, height, width), stage)
    prompt = PromptEmbeds(random(num_text_tokens, 24), random(20))
    return ClipSequence(prompt, (*clips, random(16, 1, height // scale, width // scale)), draw(st.floats(0, 1000)))


def lively(build: type[mmdit.MMDiT] | type[flux.Flux], dtype: torch.dtype) -> nn.Module:
    """A tiny transformer in which everything acts on the result: weights as large as those of a trained model."""
    config = {mmdit.MMDiT: mmdit.MMDiTConfig, flux.Flux: flux.FluxConfig}[build]
    model = build(config.from_dict(MMDIT_CONFIG if build is mmdit.MMDiT else FLUX_CONFIG))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture(
    scope="module",
    params=[(build, dtype) for build in (mmdit.MMDiT, flux.Flux) for dtype in (torch.float32, torch.bfloat16)],
    ids=["mmdit-float32", "mmdit-bfloat16", "flux-float32", "flux-bfloat16"],
)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return lively(*request.param)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(pack=st.lists(sequences(), min_size=2, max_size=9))
def test_a_sequence_of_any_pack_gives_the_bits_that_it_gives_alone(model: nn.Module, pack: list[ClipSequence]) -> None:
    with torch.inference_mode():
        packed = model(pack)
        for sequence, prediction in zip(pack, packed, strict=True):
            assert torch.equal(model([sequence])[0], prediction)


@pytest.mark.parametrize("num_threads", [2, 4])
def test_the_number_of_threads_changes_no_bit(model: nn.Module, num_threads: int) -> None:
    pack = [
        random_sequence(unit=unit, stage=stage, timestep=300.0, num_tokens=num_tokens)
        for unit, stage, num_tokens in ((0, 0, 5), (1, 1, 11), (2, 2, 7), (3, 2, 128))
    ]
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            alone = model(pack)
            torch.set_num_threads(num_threads)
            assert all(map(torch.equal, model(pack), alone))
    finally:
        torch.set_num_threads(before)
