"""Blocks compile whole, once for all sizes and packs. On a CPU, which computes rows at once for it here."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.pia_gpu import published_unet
from pyramid_serve.families import PartSource
from pyramid_serve.pia.compiled import as_compiled, compile_blocks, set_up
from pyramid_serve.pia.family import DenoiseOptions
from pyramid_serve.pia.model_files import model_files
from pyramid_serve.pia.parts import load_unet
from pyramid_serve.pia.sampler import UNetRow
from pyramid_serve.pia.serving import Denoising
from pyramid_serve.pia.unet import predict
from tests.unit.pia.golden import CHECKPOINT

CPU = torch.device("cpu")
Shape = tuple[int, int, int, int]
"""Rows, frames, height and width of latents."""
PAIR: Shape = (2, 18, 6, 10)
"""No length of it is one of the tiny model's."""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def unet() -> Any:
    return load_unet(model_files(CHECKPOINT), dtype=torch.float32, device=CPU)


def predicted(unet: Any, shape: Shape) -> Tensor:
    num_rows, frames, height, width = shape
    generator = torch.Generator().manual_seed(0)
    rows = [
        UNetRow(
            torch.randn(9, frames, height, width, generator=generator),
            torch.tensor(900.0 / (1 + row)),
            torch.randn(77, 8, generator=generator),
        )
        for row in range(num_rows)
    ]
    with torch.inference_mode():
        return torch.stack(predict(unet, rows, one_by_one=False))


def check_same(unet: Any, change: Callable[[Any], None], shapes: Sequence[Shape]) -> None:
    exact = [predicted(unet, shape) for shape in shapes]
    change(unet)
    for shape, before in zip(shapes, exact, strict=True):
        assert before.std() > 1e-3
        torch.testing.assert_close(predicted(unet, shape), before, atol=1e-5, rtol=1e-5)


def test_what_one_pack_compiled_serves_packs_of_other_sizes(unet: Any) -> None:
    counters.clear()
    check_same(unet, lambda unet: compile_blocks(unet, backend="eager"), [PAIR])
    assert 3 <= (num_compiled := counters["stats"]["unique_graphs"]) <= 10
    for shape in ((2, 24, 6, 24), (4, 20, 18, 4)):
        predicted(unet, shape)
    assert counters["stats"]["unique_graphs"] == num_compiled
    assert not counters["graph_break"]
    with as_compiled():
        predicted(unet, (2, 16, 2, 2))  # a side of 1 at the lowest level
    assert counters["stats"]["unique_graphs"] == num_compiled


@pytest.mark.slow
def test_a_warm_up_compiles_the_published_unet_for_every_size_and_pack() -> None:
    """On no device at all. The first two are what ``Denoising.warm_up`` takes."""
    unet = published_unet()
    compile_blocks(unet, backend="eager")
    counters.clear()
    num_compiled = []
    for num_rows, frames, height, width in (
        *((1, 16, 24, 40), (2, 16, 24, 40)),
        *((2, 16, 64, 64), (1, 16, 64, 64), (2, 8, 64, 64), (1, 8, 48, 64), (4, 16, 64, 40), (2, 32, 64, 64)),
    ):
        with torch.inference_mode(), torch.device("meta"):
            sample, text = torch.empty(num_rows, 9, frames, height, width), torch.empty(num_rows * frames, 77, 768)
            unet(sample, torch.empty(num_rows), encoder_hidden_states=text)
        num_compiled.append(counters["stats"]["unique_graphs"])
    assert num_compiled[1:] == [num_compiled[1]] * 7


@pytest.mark.slow
def test_compiled_kernels_predict_what_the_model_does(unet: Any) -> None:
    check_same(unet, compile_blocks, [PAIR, (1, 16, 6, 10), (2, 16, 20, 20)])


def test_the_order_in_memory_changes_nothing_but_rounding(unet: Any) -> None:
    check_same(unet, lambda unet: set_up(unet, CPU, compiled=None, channels_last=True), [PAIR])
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_attention_is_torchs_fused_one(unet: Any) -> None:
    names = {type(module.processor).__name__ for module in unet.modules() if hasattr(module, "processor")}
    assert names == {"AttnProcessor2_0"}  # of scaled_dot_product_attention


@pytest.mark.parametrize(
    ("device", "options", "compiles", "is_channels_last"),
    [
        ("cpu", {}, False, False),
        ("cuda", {}, True, True),
        ("cuda", {"compiled": "none", "channels_last": False}, False, False),
        ("cpu", {"compiled": "blocks"}, True, False),
    ],
)
def test_a_unet_is_made_quicker_on_cuda_unless_asked_otherwise(
    unet: Any,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    options: dict[str, Any],
    compiles: bool,
    is_channels_last: bool,
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr("pyramid_serve.pia.compiled.compile_blocks", compiled.append)
    chosen = DenoiseOptions(**options)
    set_up(unet, torch.device(device), compiled=chosen.compiled, channels_last=chosen.channels_last)
    assert (compiled == [unet]) is compiles
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is is_channels_last


def test_no_call_has_more_sequences_than_attention_can_count(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counting(_: Any, rows: Sequence[UNetRow]) -> list[Tensor]:
        calls.append(len(rows))
        return [row.sample[:4] for row in rows]

    monkeypatch.setattr("pyramid_serve.pia.unet._predict_at_once", counting)
    row = UNetRow(torch.zeros(9, 8, 64, 64), torch.tensor(1.0), torch.zeros(77, 8))
    assert len(predict(unet, [row] * 32, one_by_one=False)) == 32
    assert calls == [15, 15, 2]  # of 64 * 64 sequences a row, 65,535 at most
    calls.clear()
    predict(unet, [row] * 3, one_by_one=True)
    assert calls == [1, 1, 1]


def test_a_denoiser_that_is_batch_invariant_computes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(_: Any, rows: Sequence[UNetRow], *, one_by_one: bool) -> list[Tensor]:
        asked.append(one_by_one)
        return []

    monkeypatch.setattr("pyramid_serve.pia.serving.predict", noted)
    monkeypatch.setattr("pyramid_serve.pia.serving.load_unet", lambda *_, **__: torch.nn.Identity())
    for device, invariant in (("cpu", False), ("meta", False), ("meta", True)):
        options = DenoiseOptions(compiled="none", channels_last=False, batch_invariant=invariant)
        Denoising(PartSource(CHECKPOINT, None, torch.float32, torch.device(device), options)).forward([])
    assert asked == [True, False, True]


@pytest.mark.parametrize(
    ("device", "size", "expected"),
    [
        ("cpu", None, [(1, 2, 2)]),
        ("cpu", (16, 8), [(1, 4, 8)]),
        ("meta", None, [(1, 6, 10), (2, 6, 10)]),
        ("meta", (16, 16), [(1, 6, 10), (2, 6, 10), (1, 8, 8), (2, 8, 8)]),
    ],
)
def test_a_warm_up_begins_with_a_size_whose_lengths_all_differ(
    monkeypatch: pytest.MonkeyPatch, device: str, size: tuple[int, int] | None, expected: list[tuple[int, int, int]]
) -> None:
    """Rows, height and width of latents of each forward."""
    forwards: list[tuple[int, ...]] = []

    def noted(_: Any, rows: Sequence[UNetRow], *, one_by_one: bool) -> list[Tensor]:
        forwards.append((len(rows), *rows[0].sample.shape[2:]))
        return []

    monkeypatch.setattr("pyramid_serve.pia.serving.predict", noted)
    unet = load_unet(model_files(CHECKPOINT), dtype=torch.float32, device=CPU)
    monkeypatch.setattr("pyramid_serve.pia.serving.load_unet", lambda *_, **__: unet)
    options = DenoiseOptions(compiled="none", channels_last=False)
    Denoising(PartSource(CHECKPOINT, None, torch.float32, torch.device(device), options)).warm_up(size)
    assert forwards == expected
