"""Packs that CUDA graphs replay give the bits of the same kernels launched one by one."""

import pytest
import torch
from torch import nn

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.attention import attention_by_name
from pyramid_serve.pyramid_flow.parts import Transformer, set_up
from tests.gpu.test_sameness import on_gpu
from tests.unit.pyramid_flow.transformers_at_hand import lively_transformer, random_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("compiled", ["none", "blocks"])
@pytest.mark.parametrize("build", [mmdit.MMDiT, flux.Flux])
@torch.inference_mode()
def test_replayed_steps_have_the_bits_of_plain_ones(build: type[nn.Module], compiled: str) -> None:
    plain: Transformer = lively_transformer(build, torch.bfloat16).to("cuda")  # type: ignore[assignment]
    graphs: Transformer = lively_transformer(build, torch.bfloat16).to("cuda")  # type: ignore[assignment]
    for model, with_graphs in ((plain, False), (graphs, True)):
        set_up(model, torch.device("cuda"), compiled=compiled, batch_invariant=False, graphs=with_graphs)  # type: ignore[arg-type]
    attention = attention_by_name("flex")
    stages = [(unit, stage, num_tokens) for unit in (0, 2, 5) for stage in (0, 1, 2) for num_tokens in (5, 128)]
    for unit, stage, num_tokens in 2 * stages:  # more packs than block masks are kept
        for step in range(5):
            pack = [
                on_gpu(random_sequence(unit=unit, stage=stage, timestep=900.0 - step, num_tokens=n))
                for n in (num_tokens, 9)
            ]
            expected = plain(pack, attention=attention)
            assert all(map(torch.equal, graphs(pack, attention=attention), expected))
    assert graphs.graphs is not None
    assert len(graphs.graphs) == len(stages)
