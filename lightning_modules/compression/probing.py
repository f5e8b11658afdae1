"""What computes with few bits on this machine, and how fast: one linear layer, tried."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from lightning_modules.exports.to_onnx import open_session

TOKENS, INPUTS, OUTPUTS = 128, 1024, 4096
TURNS = 9


def float32(layer: nn.Linear, inputs_NC: Tensor) -> Callable[[], object]:
    return lambda: layer(inputs_NC)


def bf16(layer: nn.Linear, inputs_NC: Tensor) -> Callable[[], object]:
    layer, inputs_NC = layer.bfloat16(), inputs_NC.bfloat16()
    return lambda: layer(inputs_NC)


def onnxruntime_int8(layer: nn.Linear, inputs_NC: Tensor) -> Callable[[], object]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        plain, small = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        program = torch.onnx.export(layer, (inputs_NC,), dynamo=True, verbose=False)
        model = program.model_proto
        del model.graph.value_info[:]
        onnx.save(model, plain)
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
        session = open_session(small)
    read = {session.get_inputs()[0].name: inputs_NC.cpu().numpy()}
    return lambda: session.run(None, read)


def torchao(scheme: str, layer: nn.Linear, inputs_NC: Tensor) -> Callable[[], object]:
    from torchao import quantization

    configs = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "int4": quantization.Int4WeightOnlyConfig,
        "float8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }
    model = nn.Sequential(layer.bfloat16())
    quantization.quantize_(model, configs[scheme]())
    inputs_NC = inputs_NC.bfloat16()
    return lambda: model(inputs_NC)


WAYS: dict[str, Callable[[nn.Linear, Tensor], Callable[[], object]]] = {
    "float32": float32,
    "bf16": bf16,
    "int8 inputs and weights, onnxruntime": onnxruntime_int8,
    **{f"{scheme}, torchao": partial(torchao, scheme) for scheme in ("int8", "int8-dynamic", "int4", "float8")},
}


@torch.inference_mode()
def probe(device: str) -> list[str]:
    """A table: each way, whether it works here, and its time beside float32's."""
    torch.manual_seed(0)
    inputs_NC = torch.randn(TOKENS, INPUTS, device=device)
    calls, failed = {}, {}
    for name, make in WAYS.items():
        try:
            calls[name] = make(nn.Linear(INPUTS, OUTPUTS, bias=False, device=device), inputs_NC)
            calls[name]()
        except ModuleNotFoundError as error:
            failed[name] = f"not installed: pip install {error.name}"
        except Exception as error:  # whatever a library says that cannot do it
            failed[name] = " ".join((str(error) or type(error).__name__).split())[:80]
            calls.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    width = max(map(len, WAYS))
    lines = [f"{'':<{width}}  {'ms':>7}  of float32   ({TOKENS} tokens, {INPUTS} → {OUTPUTS}, {device})"]
    for name in WAYS:
        if name in medians:
            lines.append(f"{name:<{width}}  {1000 * medians[name]:>7.2f}  {medians[name] / medians['float32']:>10.2f}")
        else:
            lines.append(f"{name:<{width}}  does not work here: {failed[name]}")
    return lines
