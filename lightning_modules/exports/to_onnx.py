"""ONNX: a folder with a file for each graph, and with the config and the tokenizer that belong to them."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightning_modules.exports.answering import Run
from lightning_modules.exports.graphs import Graph, positions_bound, trace
from lightning_modules.model_folder import LoadedModel

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def write(loaded: LoadedModel, graphs: list[Graph], folder: Path) -> None:
    folder.mkdir()
    for graph in graphs:
        program = trace(graph, positions_bound(loaded))
        shapes = tuple(graph.axes[name] for name in graph.inputs)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=graph.outputs,
            dynamic_shapes=shapes,
        )
        for node in exported.model.graph:
            node.metadata_props.clear()  # the lines of Python that each came from, as large as a small model
        exported.save(folder / f"{graph.name}.onnx")
    loaded.model.config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    if loaded.model.can_generate():
        loaded.model.generation_config.save_pretrained(folder)


def quantize(folder: Path) -> None:
    """Weights to 8 bits in place; activations follow as they come (onnxruntime's dynamic quantization)."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for file in sorted(folder.glob("*.onnx")):
        model = onnx.load(file)
        # Shapes found before are in the way of the quantizer's own.
        del model.graph.value_info[:]
        before = file.with_suffix(".float")
        onnx.save(model, before)
        quantize_dynamic(before, file, weight_type=QuantType.QInt8, per_channel=True)
        before.unlink()


def open_session(file: Path) -> "InferenceSession":
    """With as many threads as torch has, that sleep while they wait: spinning, they would slow down for some
    milliseconds whatever is timed after them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def open_runtime(folder: Path) -> Run:
    sessions = {file.stem: open_session(file) for file in folder.glob("*.onnx")}

    def run(name: str, inputs: dict[str, np.ndarray]) -> tuple[list[np.ndarray], float]:
        begin = time.perf_counter()
        outputs = sessions[name].run(None, inputs)
        return outputs, time.perf_counter() - begin

    return run
