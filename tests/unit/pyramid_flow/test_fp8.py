"""Products in fp8 come near those of the weights, wherever blocks multiply and nowhere else."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch._dynamo.utils import counters

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.compiled import compile_blocks
from pyramid_serve.pyramid_flow.family import DenoiseOptions
from pyramid_serve.pyramid_flow.fp8 import DTYPE, Fp8Product, in_fp8, use_fp8
from pyramid_serve.pyramid_flow.parts import set_up
from tests.unit.pyramid_flow.transformers_at_hand import largest_difference, lively_transformer, random_sequence

CPU = torch.device("cpu")


def _multiplies_rows() -> bool:
    """Whether torch has such products on a CPU, which releases before 2.13 may lack."""
    try:
        Fp8Product(torch.ones(16, 16))(torch.ones(2, 16), torch.ones(16, 16), None)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _multiplies_rows(), reason="needs products in fp8 on a CPU")


def test_every_row_has_a_scale_of_its_own() -> None:
    rows = torch.randn(5, 64) * torch.tensor([[1e-3], [1.0], [1e4], [0.0], [1e-30]])
    stored, scale = in_fp8(rows)
    assert stored.dtype == DTYPE
    back = stored.float() * scale
    assert ((back - rows).abs()[:3] <= 0.0625 * rows.abs()[:3] + scale[:3] * 2**-9).all()  # 3 bits of mantissa
    assert not back[3].any()
    assert back.isfinite().all()


def test_a_product_is_near_the_exact_one() -> None:
    x, weight, bias = torch.randn(40, 256), torch.randn(96, 256), torch.randn(96)
    out = Fp8Product(weight)(x, weight, bias)
    exact = torch.nn.functional.linear(x, weight, bias)
    assert out.dtype == x.dtype
    assert (out - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("build", [mmdit.MMDiT, flux.Flux])
@torch.inference_mode()
def test_a_model_in_fp8_is_near_itself(build: type[nn.Module]) -> None:
    model = lively_transformer(build, torch.float32)
    pack = [random_sequence(unit=2, stage=1, timestep=500.0), random_sequence(unit=0, stage=2, timestep=100.0)]
    exact = model(pack)
    use_fp8(model)
    in_8_bits = model(pack)
    assert 1e-4 < largest_difference(in_8_bits, exact) < 0.2 * max(x.abs().max().item() for x in exact)


@pytest.mark.slow
@torch.inference_mode()
def test_blocks_in_fp8_still_share_what_is_compiled() -> None:
    pack = [random_sequence(unit=2, stage=1, timestep=500.0), random_sequence(unit=0, stage=2, timestep=100.0)]
    num_graphs = []
    for num_blocks in (2, 4):
        model = lively_transformer(mmdit.MMDiT, torch.float32, num_blocks=num_blocks)
        use_fp8(model)
        plain = model(pack)
        torch.compiler.reset()
        compile_blocks(model, backend="eager")
        counters.clear()
        assert largest_difference(model(pack), plain) < 1e-4
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] == num_graphs[1] > 0


def test_fp8_is_refused_where_it_cannot_be_had() -> None:
    model = lively_transformer(mmdit.MMDiT, torch.float32)
    with pytest.raises(ValueError, match="fp8=True: needs a GPU that multiplies it"):
        set_up(model, CPU, compiled=None, batch_invariant=False, fp8=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8=True: cannot be had with batch_invariant"):
        set_up(model, CPU, compiled=None, batch_invariant=True, fp8=True)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        DenoiseOptions.model_validate({"fp8": "e4m3"})
