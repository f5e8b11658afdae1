"""Ranks that do not do the same are told apart before the first step, in one line."""

import os
import socket

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.doctor import source_digest, versions


class Agreement(Callback):
    """Compares what each rank was told, which versions and source it runs, and which rows it will read.

    Args:
        flags: Of the command line, with all that a YAML says.
    """

    def __init__(self, flags: dict[str, object] | None = None):
        self.flags = flags or {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        mine = versions() | {"source": source_digest()}
        mine |= {f"--data's {name}": str(value) for name, value in trainer.datamodule.identity().items()}
        mine |= {f"--{name}": str(value) for name, value in self.flags.items()}
        of_ranks: list[tuple[str, dict[str, str]]] = [("", {})] * trainer.world_size
        dist.all_gather_object(of_ranks, (socket.gethostname(), mine))
        if (wrong := difference(of_ranks)) is None:
            return
        if trainer.is_global_zero:
            raise ValueError(f"{wrong}; start all of them with the same command, source, packages and data")
        os._exit(2)  # the first one says it; threads that still talk to it would abort a common exit


def difference(of_ranks: list[tuple[str, dict[str, str]]]) -> str | None:
    """The first thing that a rank has and the first one has not."""
    _, first = of_ranks[0]
    for rank, (host, other) in enumerate(of_ranks):
        for name in [*first, *sorted(other.keys() - first.keys())]:
            if first.get(name) != other.get(name):
                return f"rank {rank} ({host}) has {name} {other.get(name)}, rank 0 {first.get(name)}"
    return None
