"""Training steps recorded on a GPU once, and replayed: a small model's time goes into launching kernels otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlprompt.data.views import Views

Terms = dict[str, Tensor]
Gradients = dict[str, list[Tensor]]
Compute = Callable[[Views], tuple[Terms, Gradients]]
"""What a batch, or a part of one, gives: the loss terms, and the gradients of each objective."""


class _Recording(NamedTuple):
    inputs: Views
    graph: torch.cuda.CUDAGraph
    terms: Terms
    gradients: Gradients


class Recorded:
    """``compute`` as CUDA graphs, one for each shape of its input: the same kernels in the same order.

    It must not wait for the GPU, nor depend on anything that changes from step to step other than its input, the
    values of tensors that stay where they are, and PyTorch's random numbers.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._recordings: dict[tuple, _Recording] = {}

    def prepare(self, views: Views) -> None:
        """Record what views of this shape need, unless that is done; draws random numbers."""
        if (key := _key(views)) in self._recordings:
            return
        with torch.cuda.device(views.labels.device):  # streams and graphs are the current GPU's, which may be another
            self._recordings[key] = self._record(views)

    def _record(self, views: Views) -> _Recording:
        inputs = Views._make(None if t is None else t.clone() for t in views)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made once only, such as frozen class features, is made here
            for _ in range(2):
                self.compute(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            terms, gradients = self.compute(inputs)
        return _Recording(inputs, graph, terms, gradients)

    def __call__(self, views: Views) -> tuple[Terms, Gradients]:
        """What ``compute`` would give, for views of a shape that is prepared."""
        inputs, graph, terms, gradients = self._recordings[_key(views)]
        for there, new in zip(inputs, views, strict=True):
            if there is not None and new is not None:
                there.copy_(new)
        graph.replay()  # its outputs are overwritten by the next replay
        return (
            {term: value.clone() for term, value in terms.items()},
            {name: [g.clone() for g in group] for name, group in gradients.items()},
        )


def _key(views: Views) -> tuple:
    return tuple(None if t is None else (t.shape, t.dtype) for t in views)
