"""Training steps recorded on a GPU once, and replayed: a small model's time goes into launching kernels otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlprompt.data.batches import Batch

Terms = dict[str, Tensor]
Gradients = dict[str, list[Tensor]]
Compute = Callable[[Batch], tuple[Terms, Gradients]]
"""What a batch, or a part of one, gives: the loss terms, and the gradients of each objective."""


class _Graph(NamedTuple):
    inputs: Batch
    graph: torch.cuda.CUDAGraph
    terms: Terms
    gradients: Gradients


class Graphs:
    """``compute`` as CUDA graphs: the same kernels in the same order.

    There is one for each shape of its input and each size of the whole batch, by which it weighs a part. It must not
    wait for the GPU, nor depend on anything that changes from step to step other than its input, the values of tensors
    that stay where they are, and PyTorch's random numbers.
    """

    def __init__(self, compute: Compute) -> None:
        self.compute = compute
        self._graphs: dict[tuple, _Graph] = {}

    def prepare(self, batch: Batch) -> None:
        """Record what a batch of this shape needs, unless that is done; draws random numbers."""
        if (key := _key(batch)) in self._graphs:
            return
        with torch.cuda.device(batch.labels.device):  # streams and graphs are the current GPU's, which may be another
            self._graphs[key] = self._capture(batch)

    def _capture(self, batch: Batch) -> _Graph:
        inputs = batch.map(torch.clone)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is made once only, such as frozen class features, is made here
            for _ in range(2):
                self.compute(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            terms, gradients = self.compute(inputs)
        return _Graph(inputs, graph, terms, gradients)

    def __call__(self, batch: Batch) -> tuple[Terms, Gradients]:
        """What ``compute`` would give, for a batch of a shape that is prepared."""
        inputs, graph, terms, gradients = self._graphs[_key(batch)]
        new = batch.tensors()
        for name, there in inputs.tensors().items():
            there.copy_(new[name])
        graph.replay()  # its outputs are overwritten by the next replay
        return (
            {term: value.clone() for term, value in terms.items()},
            {name: [g.clone() for g in group] for name, group in gradients.items()},
        )


def _key(batch: Batch) -> tuple:
    return batch.whole, *((name, t.shape, t.dtype) for name, t in batch.tensors().items())
