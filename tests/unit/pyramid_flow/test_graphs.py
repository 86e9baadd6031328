"""When forwards are recorded as graphs, and which. Recording itself needs CUDA: here a stand-in records."""

import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pyramid_serve.pyramid_flow import flux, mmdit
from pyramid_serve.pyramid_flow.family import DenoiseOptions
from pyramid_serve.pyramid_flow.graphs import Forward, Graphs
from pyramid_serve.pyramid_flow.pack import ClipSequence, layout_of
from pyramid_serve.pyramid_flow.parts import set_up
from tests.unit.pyramid_flow.transformers_at_hand import lively_transformer, random_sequence


class Recorder:
    """Records what a forward is given first, and replays on copies of it, as a graph on its own memory does."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def __call__(self, forward: Forward, inputs: Sequence[Tensor]) -> Forward:
        self.num_recorded += 1
        own = [x.clone() for x in inputs]

        def replay(*given: Tensor) -> Tensor:
            for target, x in zip(own, given, strict=True):
                target.copy_(x)
            return forward(*own).clone()

        return replay


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_a_forward_is_recorded_when_it_comes_for_the_third_time(recorder: Recorder) -> None:
    graphs, numbers = Graphs(recorder), []
    for value in (1.0, 2.0, 3.0, 4.0):
        assert graphs.run("a", doubled, [torch.full((2,), value)]).tolist() == [2 * value] * 2
        numbers.append(recorder.num_recorded)
    assert numbers == [0, 0, 1, 1]


def test_what_comes_seldom_is_never_recorded(recorder: Recorder) -> None:
    graphs = Graphs(recorder, max_graphs=2)
    for round_ in range(2):
        for key in range(100):
            graphs.run((round_, key), doubled, [torch.ones(1)])
    assert recorder.num_recorded == 0


def test_no_more_graphs_are_kept_than_allowed_and_those_in_use_stay(recorder: Recorder) -> None:
    graphs = Graphs(recorder, max_graphs=2)
    for key in ("a", "b", "a", "c"):
        for _ in range(3):
            graphs.run(key, doubled, [torch.ones(1)])
    assert len(graphs) == 2
    graphs.run("a", doubled, [torch.ones(1)])
    assert recorder.num_recorded == 3


def test_what_a_graph_reads_lives_as_long_as_it(recorder: Recorder) -> None:
    graphs, mask = Graphs(recorder, max_graphs=1), nn.Module()
    alive = weakref.ref(mask)
    for _ in range(3):
        graphs.run("a", doubled, [torch.ones(1)], reads=mask)
    del mask
    assert alive() is not None
    for _ in range(3):
        graphs.run("b", doubled, [torch.ones(1)])
    assert alive() is None


@pytest.fixture
def packs_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU."""
    for place in ("pack", "rows"):
        monkeypatch.setattr(f"pyramid_serve.pyramid_flow.{place}.is_one_by_one", lambda device: False)
    layout_of.cache_clear()
    yield
    layout_of.cache_clear()


def steps_of(unit: int, stage: int, *, num_tokens: int) -> list[list[ClipSequence]]:
    """A pack of two sequences at each of four steps."""
    return [
        [random_sequence(unit=unit, stage=stage, timestep=900.0 - 100 * i, num_tokens=n) for n in (num_tokens, 9)]
        for i in range(4)
    ]


@pytest.mark.usefixtures("packs_at_once")
@pytest.mark.parametrize("build", [mmdit.MMDiT, flux.Flux])
@torch.inference_mode()
def test_replayed_steps_are_those_of_the_model(build: type[nn.Module], recorder: Recorder) -> None:
    plain = lively_transformer(build, torch.float32)
    with_graphs = lively_transformer(build, torch.float32)
    with_graphs.graphs = Graphs(recorder)  # type: ignore[assignment]
    for unit, stage, num_tokens in ((0, 0, 5), (1, 1, 5), (0, 0, 6), (1, 1, 5)):
        for pack in steps_of(unit, stage, num_tokens=num_tokens):
            for own, expected in zip(with_graphs(pack), plain(pack), strict=True):
                torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-6)
    assert recorder.num_recorded == 3  # the last stage is that of the second


@pytest.mark.usefixtures("packs_at_once")
@torch.inference_mode()
def test_large_packs_are_not_recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyramid_serve.pyramid_flow.graphs.MAX_TOKENS", 100)
    model = lively_transformer(mmdit.MMDiT, torch.float32)
    model.graphs = Graphs(recorder)  # type: ignore[assignment]
    for pack in steps_of(2, 2, num_tokens=5):
        model(pack)
    assert recorder.num_recorded == 0


def test_graphs_are_refused_where_they_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="graphs=True: needs CUDA, not cpu"):
        model = lively_transformer(mmdit.MMDiT, torch.float32)
        set_up(model, torch.device("cpu"), compiled=None, batch_invariant=False, graphs=True)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="graphs: cannot be had with attention='dense'"):
        DenoiseOptions(graphs=True, attention="dense")
