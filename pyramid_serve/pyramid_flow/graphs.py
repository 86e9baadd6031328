"""CUDA graphs for forwards of small packs whose shape repeats: one launch instead of thousands.

A stage of a unit has 5 to 20 steps over one and the same pack, and on a GPU the launches of a small one take longer
than its arithmetic. A graph replays recorded launches on fixed memory, so everything that changes from step to step is
copied into it first. Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyramid_serve.pyramid_flow.attention import mask_of
from pyramid_serve.pyramid_flow.pack import Pack
from pyramid_serve.pyramid_flow.rows import at_once

Forward = Callable[..., Tensor]
"""Tensors -> one tensor, with no step that waits for the device or copies from the host."""
Layers = Callable[..., Generator[None, None, Tensor]]
"""The same, layer by layer."""
Record = Callable[[Forward, Sequence[Tensor]], Forward]

MAX_TOKENS = 8192
"""Of a pack: larger ones keep a GPU busy for longer than their launches take."""
MAX_GRAPHS = 64
"""Kept at once: the stages of 20 units."""
_NUM_PLAIN_RUNS = 2
"""Before a graph is recorded: the first compiles, and what comes only twice does not pay."""


class _Graph(NamedTuple):
    replay: Forward
    reads: object


class Graphs:
    """The graphs of one model, by what tells its packs apart. The least recently used go first. For one thread."""

    def __init__(self, record: "Record | None" = None, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._record = record or CudaRecorder()
        self._max_graphs = max_graphs
        self._num_runs: OrderedDict[Hashable, int] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def of_pack(self, pack: Pack, layers: Layers, inputs: Sequence[Tensor]) -> Tensor:
        """``layers(*inputs)`` of a pack, which decides what they do: for one model and flex attention."""
        layout, device = pack.layout, inputs[0].device

        def forward(*given: Tensor) -> Tensor:
            return at_once(layers(*given))

        if layout.num_tokens > MAX_TOKENS:
            return forward(*inputs)
        return self.run(pack.shapes, forward, inputs, reads=(layers, mask_of(layout, device)))

    def run(self, key: Hashable, forward: Forward, inputs: Sequence[Tensor], *, reads: object = None) -> Tensor:
        """``forward(*inputs)``, from a graph once the same ``key`` has come often enough.

        Equal keys promise forwards that do the same to inputs of the same shapes. reads: whatever else holds memory
        that the forward reads; it is kept as long as its graph.
        """
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key].replay(*inputs)
        self._num_runs[key] = self._num_runs.pop(key, 0) + 1
        if self._num_runs[key] <= _NUM_PLAIN_RUNS:
            while len(self._num_runs) > 4 * self._max_graphs:
                self._num_runs.popitem(last=False)
            return forward(*inputs)
        del self._num_runs[key]
        while len(self._graphs) >= self._max_graphs:
            self._graphs.popitem(last=False)
        self._graphs[key] = _Graph(self._record(forward, inputs), reads)
        return self._graphs[key].replay(*inputs)


class CudaRecorder:
    """Records forwards as CUDA graphs, which share one pool of memory, since no two of them ever run at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward, inputs: Sequence[Tensor]) -> Forward:
        """A replay of ``forward``. Its result is a copy that later replays leave alone."""
        own = [x.clone() for x in inputs]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = forward(*own)

        def replay(*given: Tensor) -> Tensor:
            for target, x in zip(own, given, strict=True):
                target.copy_(x)
            graph.replay()
            return out.clone()

        return replay
