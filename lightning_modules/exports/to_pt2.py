"""PT2: what torch.export saves, a file a graph, which a Python with torch alone runs or compiles.

Its inputs and outputs in their order: `extra_files` "signature.json" of torch.export.load.
"""

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lightning_modules.exports.answering import Run
from lightning_modules.exports.graphs import Graph, files_of, positions_bound, trace
from lightning_modules.model_folder import LoadedModel

_programs: dict[str, torch.nn.Module] = {}


def write(loaded: LoadedModel, graphs: list[Graph], path: Path) -> None:
    for graph, file in zip(graphs, files_of(graphs, path, "pt2"), strict=True):
        signature = json.dumps({"inputs": list(graph.inputs), "outputs": graph.outputs})
        torch.export.save(trace(graph, positions_bound(loaded)), file, extra_files={"signature.json": signature})


def open_runtime(graphs: list[Graph], path: Path) -> Run:
    """In a new process, which has nothing but the files."""
    files = {graph.name: str(file) for graph, file in zip(graphs, files_of(graphs, path, "pt2"), strict=True)}
    process = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_load, initargs=(files, torch.get_num_threads())
    )
    return lambda name, inputs: process.submit(_run, name, inputs).result()


def _load(files: dict[str, str], threads: int) -> None:
    torch.set_num_threads(threads)
    _programs.update({name: torch.export.load(file).module() for name, file in files.items()})


@torch.inference_mode()
def _run(name: str, inputs: dict[str, np.ndarray]) -> tuple[list[np.ndarray], float]:
    tensors = [torch.from_numpy(array.copy()) for array in inputs.values()]
    begin = time.perf_counter()
    outputs = _programs[name](*tensors)
    seconds = time.perf_counter() - begin
    return [output.numpy() for output in outputs], seconds
