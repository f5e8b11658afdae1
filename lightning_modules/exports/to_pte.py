"""PTE: ExecuTorch's file for phones and boards, its matrix products by XNNPACK. A row at a time."""

import time
from pathlib import Path

import numpy as np
import torch

from lightning_modules.exports.answering import Run
from lightning_modules.exports.graphs import ALL, Graph, files_of, trace
from lightning_modules.model_folder import LoadedModel

MOST_TOKENS = 128
"""Read at once by a decoder: ExecuTorch plans the memory of the largest input. A longer prompt goes in parts."""
MOST_PAST = 2048
DTYPES = {"float32": torch.float32, "int64": torch.int64}


def longest(loaded: LoadedModel) -> dict[str, int]:
    """Bounds of the axes: as many positions as the model has, within reason for a phone."""
    past = min(loaded.max_positions or MOST_PAST, MOST_PAST)
    whole = loaded.kind != "causal"  # a text that is read in one go
    tokens = min(past, 512) if whole else min(past, MOST_TOKENS)
    return {"batch": 1, "tokens": tokens, "past": past, ALL: past + tokens, "source": min(past, 512)}


def write(loaded: LoadedModel, graphs: list[Graph], path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    for graph, file in zip(graphs, files_of(graphs, path, "pte"), strict=True):
        lowered = to_edge_transform_and_lower(trace(graph, longest(loaded)), partitioner=[XnnpackPartitioner()])
        with file.open("wb") as stream:
            lowered.to_executorch().write_to_file(stream)


def open_runtime(graphs: list[Graph], path: Path) -> Run:
    from executorch.runtime import Runtime

    methods = {}
    for graph, file in zip(graphs, files_of(graphs, path, "pte"), strict=True):
        methods[graph.name] = Runtime.get().load_program(file).load_method("forward")

    def run(name: str, inputs: dict[str, np.ndarray]) -> tuple[list[np.ndarray], float]:
        # By torch's own strides: numpy's of an empty array are none that ExecuTorch takes.
        tensors = [torch.empty(array.shape, dtype=DTYPES[array.dtype.name]) for array in inputs.values()]
        for tensor, array in zip(tensors, inputs.values(), strict=True):
            tensor.copy_(torch.from_numpy(array))
        begin = time.perf_counter()
        outputs = methods[name].execute(tensors)
        seconds = time.perf_counter() - begin
        # They lie in the runtime's own memory, where the next call puts its own.
        return [output.numpy().copy() for output in outputs], seconds

    return run
