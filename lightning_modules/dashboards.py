"""What a W&B workspace shows of each kind of run: sections of panels over `tokens`, by the names that runs log."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["pretrain", "finetune", "distill", "compress"]


@dataclass(frozen=True)
class Panel:
    """Args:
    title: Above it.
    names: What it draws, each over tokens.
    is_log: Whether its axis is logarithmic.
    """

    title: str
    names: tuple[str, ...]
    is_log: bool = False


Sections = dict[str, tuple[Panel, ...]]

TRAINING: Sections = {
    "Optimization": (
        Panel("Gradient norm", ("train/grad_norm",), True),
        Panel("Learning rate", ("train/lr",)),
        Panel(
            "Unusual steps: the loss of a spike, 1 where it is not finite", ("events/loss_spikes", "events/not_finite")
        ),
    ),
    "Speed": (
        Panel("Tokens per second", ("perf/tokens_per_second",)),
        Panel("MFU", ("perf/mfu",)),
    ),
}
TEXT: Sections = {
    "Loss": (
        Panel("Loss, nats a token", ("val/loss", "train/loss")),
        Panel("Bits per byte, held out", ("val/bits_per_byte",)),
        Panel("Perplexity, held out", ("val/perplexity",), True),
    ),
}
TAUGHT: Sections = {
    "Loss": (
        Panel("Loss, nats a token", ("val/loss", "train/loss")),
        Panel("Divergence from the teacher", ("train/divergence",), True),
        Panel("Bits per byte, held out", ("val/bits_per_byte",)),
    ),
}
TASKS: Sections = {
    "Loss": (Panel("Loss", ("val/loss", "train/loss")),),
    "The task": (
        Panel("Labels: accuracy", ("val/accuracy",)),
        Panel("Labels: macro F1, MCC", ("val/f1_macro", "val/mcc")),
        Panel("Numbers: Pearson, Spearman", ("val/pearson", "val/spearman")),
        Panel("Numbers: squared error", ("val/mse",), True),
        Panel("Answers: F1, exact match", ("val/f1", "val/exact_match")),
        Panel("Texts: BLEU, chrF", ("val/bleu", "val/chrf")),
        Panel("Texts: ROUGE", ("val/rouge1", "val/rouge2", "val/rougeL")),
        Panel("Texts: bits per byte, ended", ("val/bits_per_byte", "val/stopped")),
    ),
}
DASHBOARDS: dict[Kind, Sections] = {
    "pretrain": TEXT | TRAINING,
    "finetune": TASKS | TRAINING,
    "distill": TAUGHT | TRAINING,
    "compress": TAUGHT | TRAINING,
}
MEDIA = {"pretrain": "samples", "finetune": "predictions", "distill": "samples", "compress": "samples"}
"""The table that shows what a model makes of texts."""
JOB_TYPES = {"pretrain": "pretrain", "finetune": "finetune", "distill": "distill", "compress": "distill"}
"""By which recipe's runs W&B groups them."""


def names_of(kind: Kind) -> list[str]:
    return sorted({name for panels in DASHBOARDS[kind].values() for panel in panels for name in panel.names})
