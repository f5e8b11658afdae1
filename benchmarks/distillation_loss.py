"""Two heads and the divergence between them: memory, CPU time and exactness of the full path and of ours.

Run:
    python benchmarks/run.py --only distillation_loss

Each way is a process of its own: its extra peak memory is what forward and backward add to the resident inputs, the
gradients included. The divergence is compared with a float64 oracle on the same rounded inputs.
"""

import torch
from costs import Shape, answer, in_a_process, of_loss
from page import Goal, Table
from torch import Tensor

from lightning_modules.distillation_loss import Matching, Sparse, kept_words, linear_distillation
from lightning_modules.losses import Head, linear_cross_entropy

FULL = Shape(4096, 32000, 768)
CACHED = 64
"""Words of a token of a cache."""
NAMES = {
    "full": "all logits of both, float32",
    "ours": "distillation_loss.linear_distillation",
    "cached": f"the same from a cache of {CACHED} words",
    "alone": "cross-entropy alone, losses.linear_cross_entropy",
}


def inputs(shape: Shape) -> dict[str, Tensor]:
    """Normal hidden states in bf16 of student and teacher, heads like GPT-2's, whose logits are spread out."""
    random = torch.Generator().manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=random)).bfloat16()

    tokens, words, width = shape
    return {
        "hidden": normal(tokens, width).requires_grad_(),
        "weight": normal(words, width, scale=0.05).requires_grad_(),
        "teacher_hidden": normal(tokens, width),
        "teacher_weight": normal(words, width, scale=0.1),
        "labels": torch.randint(words, (tokens,), generator=random),
    }


def full(rows: dict[str, Tensor]) -> Tensor:
    """As it stands in most trainers: the logits of both models, then F.kl_div."""
    student = (rows["hidden"] @ rows["weight"].T).float().log_softmax(-1)
    teacher = (rows["teacher_hidden"] @ rows["teacher_weight"].T).float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


def heads(rows: dict[str, Tensor]) -> tuple[Head, Head]:
    return Head(rows["hidden"], rows["weight"]), Head(rows["teacher_hidden"], rows["teacher_weight"])


def ours(rows: dict[str, Tensor]) -> Tensor:
    student, teacher = heads(rows)
    return linear_distillation(student, [teacher], rows["labels"], Matching())[0]


def cached(rows: dict[str, Tensor]) -> Tensor:
    target = Sparse(rows["ids"], rows["shares"], rows["tail"])
    return linear_distillation(heads(rows)[0], target, rows["labels"], Matching())[0]


def alone(rows: dict[str, Tensor]) -> Tensor:
    return linear_cross_entropy(rows["hidden"], rows["weight"], rows["labels"])[0]


@torch.no_grad()
def with_cache(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    _, teacher = heads(rows)
    words = len(rows["teacher_weight"])
    return rows | kept_words(teacher, words, 1.0, min(CACHED, words - 1), 0, seed=0)


@torch.no_grad()
def oracle(shape: Shape) -> float:
    """Mean divergence in float64."""
    rows, total = inputs(shape), 0.0
    for some in torch.arange(shape.tokens).split(128):
        q = (rows["hidden"][some].double() @ rows["weight"].double().T).log_softmax(-1)
        p = (rows["teacher_hidden"][some].double() @ rows["teacher_weight"].double().T).log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / shape.tokens


def measure_here(way: str, shape: Shape, repeats: int) -> dict[str, float]:
    """Extra peak bytes, CPU seconds (median) and mean loss per token, in this process."""
    loss = {"full": full, "ours": ours, "cached": cached, "alone": alone}[way]
    loss(with_cache(inputs(Shape(64, 512, 32)))).backward()  # what libraries allocate once
    rows = inputs(shape)
    rows = with_cache(rows) if way == "cached" else rows
    return of_loss(lambda: loss(rows), [rows["hidden"], rows["weight"]], shape.tokens, repeats)


def tables(repeats: int, threads: int, shape: Shape = FULL) -> list[Table]:
    truth = oracle(shape)
    found = {way: in_a_process(__file__, way, shape, repeats, threads) for way in NAMES}
    base, mine = found["full"], found["ours"]
    rows = [
        [
            NAMES[way],
            f"{figures['extra_bytes'] / 2**20:,.0f}",
            f"{figures['extra_bytes'] / base['extra_bytes']:.1%}",
            f"{figures['seconds']:.2f}",
            f"{figures['loss']:.5f}",
        ]
        for way, figures in found.items()
    ]
    error = abs(mine["loss"] - truth)
    goals = [
        Goal(
            "distillation loss: extra memory of the full path's", mine["extra_bytes"] / base["extra_bytes"], at_most=0.1
        ),
        Goal("distillation loss: CPU time of the full path's", mine["seconds"] / base["seconds"], at_most=1.0),
        Goal("distillation loss: error in nats per token, bf16 products", error, at_most=1e-3),
    ]
    return [
        Table(
            f"Two heads and KL, {shape.tokens:,} tokens, {shape.vocabulary:,} words, {shape.width} wide, bf16",
            "python benchmarks/run.py --only distillation_loss",
            ["", "extra peak MiB", "of the full path", "CPU seconds", "nats per token"],
            rows,
            f"Forward and backward, {threads} threads. In float64 the divergence is {truth:.5f} nats per token.",
            goals,
        )
    ]


if __name__ == "__main__":
    answer(measure_here)
