"""On a CUDA device, too, a prediction has the same bits whatever shares its forward, where that is asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.attention import attention_by_name
from pyramid_serve.pyramid_flow.pack import ClipSequence
from pyramid_serve.pyramid_flow.parts import Transformer, set_up
from tests.unit.pyramid_flow.transformers_at_hand import any_sequence, largest_difference, lively_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = [(build, dtype) for build in (mmdit.MMDiT, flux.Flux) for dtype in (torch.float32, torch.bfloat16)]
IDS = ["mmdit-float32", "mmdit-bfloat16", "flux-float32", "flux-bfloat16"]


def on_gpu(sequence: ClipSequence) -> ClipSequence:
    clips = tuple(clip.to("cuda") for clip in sequence.clips)
    return ClipSequence(sequence.prompt.to("cuda"), clips, sequence.timestep)


@pytest.fixture(scope="module", params=KINDS, ids=IDS)
def invariant(request: pytest.FixtureRequest) -> Transformer:
    model: Transformer = lively_transformer(*request.param).to("cuda")  # type: ignore[assignment]
    set_up(model, torch.device("cuda"), compiled=None, batch_invariant=True)
    return model


@settings(deadline=None, max_examples=25, derandomize=True)
@given(pack=st.lists(any_sequence(), min_size=2, max_size=9))
def test_a_sequence_of_any_pack_gives_the_bits_that_it_gives_alone(
    invariant: Transformer, pack: list[ClipSequence]
) -> None:
    sequences, attention = [on_gpu(sequence) for sequence in pack], attention_by_name("flex")
    with torch.inference_mode():
        packed = invariant(sequences, attention=attention)
        for sequence, prediction in zip(sequences, packed, strict=True):
            assert torch.equal(invariant([sequence], attention=attention)[0], prediction)


@pytest.fixture(scope="module", params=KINDS, ids=IDS)
def eager_and_compiled(request: pytest.FixtureRequest) -> tuple[Transformer, Transformer]:
    models: list[Transformer] = [lively_transformer(*request.param).to("cuda") for _ in range(2)]  # type: ignore[misc]
    for model, compiled in zip(models, ("none", "blocks"), strict=True):
        set_up(model, torch.device("cuda"), compiled=compiled, batch_invariant=False)  # type: ignore[arg-type]
    return models[0], models[1]


@settings(deadline=None, max_examples=10, derandomize=True)
@given(pack=st.lists(any_sequence(), min_size=1, max_size=6))
def test_compiled_blocks_predict_what_the_others_do(
    eager_and_compiled: tuple[Transformer, Transformer], pack: list[ClipSequence]
) -> None:
    sequences, attention = [on_gpu(sequence) for sequence in pack], attention_by_name("flex")
    with torch.inference_mode():
        eager, compiled = (model(sequences, attention=attention) for model in eager_and_compiled)
    scale = max(prediction.abs().max().item() for prediction in eager)
    is_half = next(eager_and_compiled[0].parameters()).dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert largest_difference(compiled, eager) <= (5e-2 if is_half else 1e-4) * scale
