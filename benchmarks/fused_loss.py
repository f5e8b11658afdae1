"""Head and loss of a large vocabulary: memory, CPU time and exactness of three ways to compute them.

Run:
    python benchmarks/run.py --only fused_loss

Each way is a process of its own: its extra peak memory is what forward and backward add to the resident inputs, the
gradients included. The loss is compared with a float64 oracle on the same rounded inputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from costs import Shape, answer, in_a_process, of_loss
from page import Goal, Table
from torch import Tensor

from lightning_modules.losses import linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_NC, weight_VC, labels_N) to the summed loss in nats."""


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
    return of_loss(lambda: loss(hidden_NC, weight_VC, labels_N), [hidden_NC, weight_VC], shape.tokens, repeats)


def tables(repeats: int, threads: int, shape: Shape = FULL) -> list[Table]:
    truth = oracle(shape)
    found = {way: in_a_process(__file__, way, shape, repeats, threads) for way in WAYS}
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
    title = f"Head and loss, {shape.tokens:,} tokens, {shape.vocabulary:,} words, {shape.width} wide, bf16"
    columns = ["", "extra peak MiB", "of plain", "CPU seconds", "nats per token", "error"]
    notes = f"Forward and backward, {threads} threads. In float64 the loss is {truth:.5f} nats per token."
    return [Table(title, "python benchmarks/run.py --only fused_loss", columns, rows, notes, goals)]


if __name__ == "__main__":
    answer(measure_here)
