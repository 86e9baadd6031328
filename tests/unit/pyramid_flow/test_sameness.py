"""A prediction has the same bits whatever shares its forward, and however many threads compute it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.pack import ClipSequence
from tests.unit.pyramid_flow.transformers_at_hand import (
    any_sequence,
    largest_difference,
    lively_transformer,
    random_sequence,
)


@pytest.fixture(
    scope="module",
    params=[(build, dtype) for build in (mmdit.MMDiT, flux.Flux) for dtype in (torch.float32, torch.bfloat16)],
    ids=["mmdit-float32", "mmdit-bfloat16", "flux-float32", "flux-bfloat16"],
)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return lively_transformer(*request.param)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(pack=st.lists(any_sequence(), min_size=2, max_size=9))
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


@settings(deadline=None, max_examples=5, derandomize=True)
@given(sequences=st.lists(any_sequence(), min_size=1, max_size=4))
def test_texts_and_images_filled_up_to_tiles_of_attention_change_nothing(sequences: list[ClipSequence]) -> None:
    """As a GPU lays a pack out where the same is asked of it."""
    for build in (mmdit.MMDiT, flux.Flux):
        model = lively_transformer(build, torch.float32)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            exact = model(sequences)
            patch.setattr("pyramid_serve.pyramid_flow.rows.is_one_by_one", lambda device: False)
            for module in (mmdit, flux):
                patch.setattr(module, "tile_on", lambda device, batch_invariant: 128)
            assert largest_difference(model(sequences), exact) <= 1e-4
