"""Decode steps as CUDA graphs: some two hundred kernels that the host launches as one.

There is a graph for every number of rows and reach that was asked for.  Graphs refer to memory by address: weights
must be updated in place, and whoever allocates a cache anew makes ``Graphs`` anew.

Left out on purpose: prefills, whose shapes are many and whose kernels are long, and rows that are streamed alone.
"""

from __future__ import annotations

import torch

from rlhf_ray.generation.decode import DecodeStep


class Graphs:
    """The graphs of one step; they run one after the other, so they share the memory of what is in between."""

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def run(self, rows: int, reach: int) -> None:
        """As ``DecodeStep.run``."""
        graph = self._graphs.get((rows, reach))
        if graph is not None:
            graph.replay()
            return
        # Libraries and kernels are loaded at first use, which a capture forbids: the first step is run as it is.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step.run(rows, reach)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[rows, reach] = self._capture(rows, reach)

    def _capture(self, rows: int, reach: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # A learner in another thread of this process may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._step.run(rows, reach)
        return graph
