"""What needs a CUDA device: full-size models with random weights."""

import pytest
import torch

from benchmarks.library import SHAPES, TRANSFORMERS, published_config, random_history, random_prompt
from pyramid_serve.pyramid_flow.attention import Attention, block_attention, compiled_flex_attention, dense_attention
from pyramid_serve.pyramid_flow.history import history_clips
from pyramid_serve.pyramid_flow.pack import ClipSequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["sd3", "miniflux"])
@pytest.mark.parametrize("attention", [compiled_flex_attention, block_attention])
@torch.inference_mode()
def test_fast_attention_equals_the_dense_one_at_full_size(family: str, attention: Attention) -> None:
    with torch.device("cuda"):
        model = TRANSFORMERS[family](published_config(f"{family}_transformer")).bfloat16().eval()
    prompt = random_prompt(model, num_tokens=77, device="cuda", dtype=torch.bfloat16)
    shape = SHAPES["384p 5 s"]
    sequences = []
    for unit, stage in ((0, 0), (7, 1), (15, 2)):
        current = torch.randn(16, 1, *shape.size_at(stage), device="cuda")
        sequences.append(
            ClipSequence(prompt, (*history_clips(random_history(shape, unit, "cuda"), stage), current), 500.0)
        )
    exact = model(sequences, attention=dense_attention)
    for ours, theirs in zip(model(sequences, attention=attention), exact, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
