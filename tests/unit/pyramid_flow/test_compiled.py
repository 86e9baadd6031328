"""Blocks compile whole, once for all blocks and packs, into few kernels. On a CPU, which computes packs for it here."""

import re
import shutil
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.compiled import AROUND_ATTENTION, compile_blocks
from pyramid_serve.pyramid_flow.pack import ClipSequence, layout_of
from tests.unit.pyramid_flow.transformers_at_hand import largest_difference, lively_transformer, random_sequence

BUILDS = {"mmdit": mmdit.MMDiT, "flux": flux.Flux}
NUM_KINDS = 2
"""Of blocks: joint ones and the last joint one, or joint and single ones."""


@pytest.fixture(autouse=True)
def packs_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU."""
    for place in ("pack", "rows"):
        monkeypatch.setattr(f"pyramid_serve.pyramid_flow.{place}.is_one_by_one", lambda device: False)
    layout_of.cache_clear()
    torch.compiler.reset()
    yield
    layout_of.cache_clear()
    torch.compiler.reset()


def pack(*sequences: tuple[int, int, int]) -> list[ClipSequence]:
    return [random_sequence(unit=u, stage=s, timestep=300.0, num_tokens=n) for u, s, n in sequences]


@pytest.mark.parametrize("name", BUILDS)
def test_one_compilation_serves_all_blocks_and_packs(name: str) -> None:
    model = lively_transformer(BUILDS[name], torch.float32, num_blocks=3)
    packs = [
        pack((0, 0, 5), (1, 1, 11), (2, 2, 6), (2, 2, 9)),  # a warm-up: two videos, each with both halves of guidance
        pack((3, 2, 128), (2, 2, 17)),
        pack((6, 2, 40), (0, 2, 40), (0, 0, 1)),
        pack(*[(1, stage, 9) for stage in (0, 1, 2) for _ in range(3)]),
    ]
    alone = [pack((2, 1, 11)), pack((6, 2, 128))]
    with torch.inference_mode():
        exact = [model(each) for each in packs + alone]
        compile_blocks(model, backend="eager")
        counters.clear()
        assert difference(model, packs[:1], exact[:1]) <= 1e-5
        num_kinds = NUM_KINDS * len(AROUND_ATTENTION)
        assert counters["stats"]["unique_graphs"] == num_kinds
        assert difference(model, packs[1:], exact[1:4]) <= 1e-5
        assert counters["stats"]["unique_graphs"] == num_kinds
        assert difference(model, alone, exact[4:]) <= 1e-5
        assert counters["stats"]["unique_graphs"] == 2 * num_kinds  # a size of one is compiled for itself
    assert not counters["graph_break"]


@pytest.mark.slow
def test_many_models_of_a_process_can_be_compiled() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with torch.inference_mode():
        for dtype in dtypes:
            for size in (2, 3):  # a model that was built in inference mode or not counts as another
                with torch.inference_mode(size == 2):
                    model = lively_transformer(flux.Flux, dtype, num_blocks=size)
                compile_blocks(model, backend="eager")
                for each in (pack((1, 1, 11), (2, 2, 6), (0, 0, 3)), pack((1, 1, 11))):
                    model(each)


def difference(model: nn.Module, packs: Sequence[list[ClipSequence]], exact: Sequence[Sequence[torch.Tensor]]) -> float:
    return max(largest_difference(model(each), own) for each, own in zip(packs, exact, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_block_is_its_products_and_few_kernels_between_them() -> None:
    """A kernel reads and writes memory once: norm with modulation, q/k norm, rotation, GELU, gate with residual."""
    counts = {}
    for name, build in BUILDS.items():
        model = lively_transformer(build, torch.float32)
        block = model.get_submodule("transformer_blocks.0" if name == "mmdit" else "single_transformer_blocks.0")
        for method in AROUND_ATTENTION:
            count_kernels(block, method, counts)
        with torch.inference_mode():
            model(pack((3, 2, 128), (2, 2, 17), (2, 1, 9)))
    assert counts == {
        "JointBlock.before_attention": (2, 3),
        "JointBlock.after_attention": (6, 6),
        "SingleBlock.before_attention": (1, 2),
        "SingleBlock.after_attention": (1, 2),
    }


def count_kernels(block: nn.Module, method: str, counts: dict[str, tuple[int, int]]) -> None:
    """Let the block's method be compiled, and note how many products and other kernels it became."""
    compiled = torch.compile(getattr(block, method), dynamic=True, fullgraph=True)

    def call(*args: object) -> object:
        out, (code,) = run_and_get_code(compiled, *args)
        body = code[code.index("def call(") :]
        products, kernels = (len(re.findall(name, body)) for name in (r"extern_kernels\.\w+\(", r"cpp_fused\w*\("))
        counts[f"{type(block).__name__}.{method}"] = products, kernels
        return out

    setattr(block, method, call)
