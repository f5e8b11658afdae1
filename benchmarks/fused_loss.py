"""Head and loss of a large vocabulary: memory, CPU time and exactness of three ways to compute them.

Run:
    python benchmarks/run.py --only fused_loss

Each way is a process of its own: its extra peak memory is what forward and backward add to the resident inputs, the
gradients included. The loss is compared with a float64 oracle on the same rounded inputs.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from memory import forget_peak, peak_bytes, resident_bytes
from page import Goal, Table
from torch import Tensor

from lightning_modules.losses import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_NC, weight_VC, labels_N) to the summed loss in nats."""


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    width: int


FULL = Shape(2048, 50257, 768)


def plain(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
    """As transformers' models do it: all logits, in float32."""
    return F.cross_entropy((hidden_NC @ weight_VC.T).float(), labels_N, reduction="sum")


def ours(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_NC, weight_VC, labels_N)[0]


def torchs(hidden_NC: Tensor, weight_VC: Tensor, labels_N: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_NC, weight_VC, labels_N, reduction="sum", options=options)


WAYS: dict[str, Loss] = {"plain": plain, "ours": ours, "torch": torchs}
NAMES = {
    "plain": "all logits, float32",
    "ours": "losses.linear_cross_entropy",
    "torch": "torch's F.linear_cross_entropy, chunked",
}


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Normal hidden states in bf16, a head like GPT-2's at its start, any labels."""
    random = torch.Generator().manual_seed(0)
    hidden_NC = torch.randn(shape.tokens, shape.width, generator=random).bfloat16().requires_grad_()
    weight_VC = (0.02 * torch.randn(shape.vocabulary, shape.width, generator=random)).bfloat16().requires_grad_()
    return hidden_NC, weight_VC, torch.randint(shape.vocabulary, (shape.tokens,), generator=random)


def oracle(shape: Shape) -> float:
    """Mean nats per token in float64."""
    hidden_NC, weight_VC, labels_N = inputs(shape)
    with torch.no_grad():
        weight_VC = weight_VC.double()
        parts = zip(hidden_NC.double().split(128), labels_N.split(128), strict=True)
        return sum(float(F.cross_entropy(h @ weight_VC.T, y, reduction="sum")) for h, y in parts) / shape.tokens


def measure_here(way: str, shape: Shape, repeats: int) -> dict[str, float]:
    """Extra peak bytes, CPU seconds (median) and mean nats per token, in this process."""
    loss = WAYS[way]
    loss(*inputs(Shape(64, 512, 32))).backward()  # what libraries allocate once
    hidden_NC, weight_VC, labels_N = inputs(shape)
    seconds = []
    forget_peak()
    before = resident_bytes()
    for i in range(repeats):
        hidden_NC.grad = weight_VC.grad = None
        start = time.process_time()
        nats = loss(hidden_NC, weight_VC, labels_N)
        nats.backward()
        seconds.append(time.process_time() - start)
        if i == 0:
            extra = peak_bytes() - before
    return {"extra_bytes": extra, "seconds": statistics.median(seconds), "loss": nats.item() / shape.tokens}


def measure(way: str, shape: Shape, repeats: int, threads: int) -> dict[str, float]:
    """The same in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "10000"}
    arguments = [sys.executable, str(Path(__file__)), way, *map(str, shape), str(repeats)]
    done = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def tables(repeats: int, threads: int, shape: Shape = FULL) -> list[Table]:
    truth = oracle(shape)
    found = {way: measure(way, shape, repeats, threads) for way in WAYS}
    base, mine = found["plain"], found["ours"]
    rows = [
        [
            NAMES[way],
            f"{figures['extra_bytes'] / 2**20:,.0f}",
            f"{figures['extra_bytes'] / base['extra_bytes']:.1%}",
            f"{figures['seconds']:.2f}",
            f"{figures['loss']:.5f}",
            f"{abs(figures['loss'] - truth):.1e}",
        ]
        for way, figures in found.items()
    ]
    goals = [
        Goal("fused loss: extra memory of the plain path's", mine["extra_bytes"] / base["extra_bytes"], at_most=0.15),
        Goal("fused loss: CPU time of the plain path's", mine["seconds"] / base["seconds"], at_most=1.0),
        Goal("fused loss: error in nats per token, bf16 products", abs(mine["loss"] - truth), at_most=1e-3),
    ]
    title = f"Head and loss, {shape.tokens:,} tokens × {shape.vocabulary:,} words × {shape.width} wide, bf16"
    columns = ["", "extra peak MiB", "of plain", "CPU seconds", "nats per token", "error"]
    notes = f"Forward and backward, {threads} threads. In float64 the loss is {truth:.5f} nats per token."
    return [Table(title, "python benchmarks/run.py --only fused_loss", columns, rows, notes, goals)]


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    *dimensions, count = map(int, numbers)
    print(json.dumps(measure_here(name, Shape(*dimensions), count)))
