"""What a run will do, take and cost, before it does: parameters, FLOPs, memory by part, time, energy and money."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_modules import simulation
from lightning_modules.architectures import active_parameters, bytes_of
from lightning_modules.hardware import Device
from lightning_modules.precision import BF16Weights
from lightning_modules.shards import local
from lightning_modules.simulation import Footprint
from lightning_modules.strategies import Sharded

PLANNED_MFU = 0.45
"""Share of the matrix rate that the time in the plan supposes."""
USABLE = 0.92
"""Part of a device's memory that tensors may fill: the rest is the driver's, the libraries' and in gaps."""
TOKENS_PER_PARAMETER = 20
"""Which make the best model for a number of FLOPs, https://arxiv.org/abs/2203.15556."""


class Length(NamedTuple):
    """Of a run."""

    steps: int
    tokens: float
    epochs: float


@dataclass(frozen=True)
class Forecast:
    """Sizes are in bytes; `footprint` is None where it could not be foreseen."""

    device: Device
    devices: int
    parameters: dict[str, int]
    """By part."""
    active: int
    """Parameters that a token meets."""
    trained: int
    model_flops: int
    """Of a token, by which MFU is counted: architectures.flops_per_token."""
    counted_flops: float | None
    """Of a token, operation by operation; less padding there is none."""
    footprint: Footprint | None
    length: Length | None
    mfu: float = PLANNED_MFU
    price: float | None = None
    """USD of a device for an hour."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    @property
    def seconds(self) -> float | None:
        if self.length is None:
            return None
        return self.length.tokens * self.model_flops / (self.mfu * self.device.flops * self.devices)

    @property
    def kilowatt_hours(self) -> float | None:
        """At most."""
        if self.seconds is None or self.device.watts is None:
            return None
        return self.seconds / 3600 * self.devices * self.device.watts / 1000

    @property
    def cost(self) -> float | None:
        """USD."""
        if self.seconds is None or self.price is None:
            return None
        return self.seconds / 3600 * self.devices * self.price

    @property
    def room(self) -> float | None:
        """Bytes of a device that tensors may fill."""
        return None if self.device.memory is None else USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        return self.footprint is None or self.room is None or self.footprint.peak_bytes <= self.room

    def summary(self) -> dict[str, object]:
        """For a JSON file."""
        found: dict[str, object] = {
            "hardware": self.device.name,
            "devices": self.devices,
            "parameters": self.total,
            "active_parameters": self.active,
            "flops_per_token": self.counted_flops,
            "model_flops_per_token": self.model_flops,
        }
        if self.footprint is not None:
            found |= {"peak_memory_bytes": self.footprint.peak_bytes, "memory": self.footprint.peak, "fits": self.fits}
            found |= {"host_memory_bytes": self.footprint.host}
        if self.length is not None:
            found |= {"steps": self.length.steps, "tokens": round(self.length.tokens), "seconds": self.seconds}
            found |= {"mfu": self.mfu, "kilowatt_hours": self.kilowatt_hours, "usd": self.cost}
        return found

    # In words

    def memory(self) -> str:
        if self.footprint is None:
            return ""
        parts = sorted(self.footprint.peak.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{part} {bytes_of(size)}" for part, size in parts if size >= self.footprint.peak_bytes / 200)
        of_all = "" if self.device.memory is None else f" of {bytes_of(self.device.memory)}"
        each = " on each device" if self.devices > 1 else ""
        host = f"; {bytes_of(self.footprint.host)} in the memory of its host" if self.footprint.host else ""
        return f"{bytes_of(self.footprint.peak_bytes)}{of_all}{each} at its peak: {shown}{host}"

    def run(self, is_measured: bool) -> str:
        if self.length is None:
            return ""
        steps, tokens, epochs = self.length
        flops = tokens * self.model_flops
        where = "measured here" if is_measured else f"of {self.devices:,} × {self.device.name}"
        rate = f"{self.device.flops * self.devices:.1e} FLOP/s {where}"
        return (
            f"{steps:,} steps = {tokens:,.0f} tokens = {epochs:.2f} epochs, {flops:.1e} FLOP, about "
            f"{duration(self.seconds)} at {self.mfu:.0%} of the {rate}"
        )

    def compute(self) -> str:
        """FLOPs of a token, and how many tokens would be best for the model and for the compute."""
        counted = "" if self.counted_flops is None else f", {self.counted_flops:.3g} counted with the loss"
        flops = f"{self.model_flops:.3g} FLOP a token{counted}"
        best = TOKENS_PER_PARAMETER * self.active
        if self.length is None:
            return f"{flops}; compute-optimal for this model: {best:.2g} tokens"
        each, ratio = TOKENS_PER_PARAMETER, self.length.tokens / self.active
        optimal = math.sqrt(self.length.tokens * self.model_flops / (6 * each))
        return (
            f"{flops}; compute-optimal for this model: {best:.2g} tokens, {each} a parameter (this run: {ratio:.2g}); "
            f"for this compute: {optimal:.2g} parameters on {each * optimal:.2g} tokens"
        )


def forecast(
    trainer: Trainer,
    module: LightningModule,
    device: Device,
    footprint: Footprint | None,
    tokens_of_batch: int,
    mfu: float = PLANNED_MFU,
    price: float | None = None,
) -> Forecast:
    """Of a module whose network is there, be it of fake tensors; `tokens_of_batch` is what `footprint` was taken on."""
    network = module.network
    if footprint is not None and isinstance(trainer.strategy, DDPStrategy):
        trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        footprint = footprint.with_part("buckets", trained)
    return Forecast(
        device=device,
        devices=trainer.world_size,
        parameters=by_part(network),
        active=active_parameters(network),
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        model_flops=module.flops_per_token,
        counted_flops=footprint and footprint.flops / tokens_of_batch,
        footprint=footprint,
        length=length(trainer, module),
        mfu=mfu,
        price=price,
    )


def by_part(network: nn.Module) -> dict[str, int]:
    """Parameters of the layers, the embeddings, the head, and of what is learnt beside them."""
    embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    found: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        part = "embeddings" if id(parameter) in embeddings else "head" if id(parameter) in of_head else "layers"
        found["adapter" if ".lora_" in name else part] += parameter.numel()
    return dict(found)


def step_tokens(trainer: Trainer) -> float:
    """That all ranks together take in a step, without padding."""
    data = trainer.datamodule
    return data.tokens_per_row * data.batch_size * trainer.accumulate_grad_batches * data.rank_and_ranks[1]


def length(trainer: Trainer, module: LightningModule) -> Length | None:
    """Of a run that says how long it is; one that ends by the clock does not."""
    data, tokens = trainer.datamodule, step_tokens(trainer)
    steps = [trainer.max_steps] if trainer.max_steps > 0 else []
    if module.max_tokens:
        steps.append(math.ceil(module.max_tokens / tokens))
    if trainer.max_epochs and trainer.max_epochs > 0:
        batches = trainer.num_training_batches  # known once a run has begun
        if batches == float("inf"):
            batches = -(-data.rows_per_epoch // data.rows_per_micro_step)
        steps.append(-(-batches // trainer.accumulate_grad_batches) * trainer.max_epochs)
    if not steps:
        return None
    planned = min(steps) * tokens
    return Length(min(steps), planned, planned / (data.tokens_per_row * data.rows_per_epoch))


@contextmanager
def imagined(
    trainer: Trainer, module: LightningModule, device: Device
) -> Iterator[Callable[[int], tuple[Footprint, int]]]:
    """Makes a module's networks of fake tensors; what it gives says for a number of rows what a step takes, and the
    tokens of a micro-batch."""
    data = trainer.datamodule
    batch = next(iter(data.train_dataloader()))
    with simulation.simulated(device.kind, simulation.labelled_share(batch)) as live:
        module.configure_model()
        trainer.precision_plugin.convert_module(module)
        module.on_fit_start()

        def foresee(rows: int) -> tuple[Footprint, int]:
            some = simulation.widened(batch, rows, *widest(data))
            found = simulation.footprint(module, some, live, trainer.accumulate_grad_batches)
            return found, some["input_ids"].numel()

        yield foresee


def most_rows(foresee: Callable[[int], tuple[Footprint, int]], plan: Forecast, rows: int) -> int | None:
    """Of a micro-batch that fits; 0 where none does, None where the room is not known."""
    if plan.footprint is None or plan.room is None:
        return None
    buckets, room = plan.footprint.peak.get("buckets", 0), plan.room
    taken = {0: sum(plan.footprint.kept.values()), rows: plan.footprint.peak_bytes}
    # A row takes more or less by which part of the step is the peak, so that each guess is looked at; but of very many
    # rows memory is straight, and a loss in small tiles takes long to look at.
    while True:
        low = max((count for count, size in taken.items() if size <= room), default=0)
        high = min((count for count, size in taken.items() if size > room), default=None)
        if high is not None and high - low <= max(1, low // 50):
            return low
        other = max(count for count in taken if count < low) if high is None else high
        of_row = max(1.0, (taken[other] - taken[low]) / (other - low))
        guess = max(low + 1, int(low + (room - taken[low]) / of_row))
        if high is None and low >= 64 * rows:
            return guess
        guess = min(guess, 4 * low if high is None else high - 1)
        taken[guess] = foresee(guess)[0].peak_bytes + buckets


def besides(plan: Forecast, trainer: Trainer, most: int | None) -> dict[str, str]:
    """Rows of a plan that are for those who have not begun yet."""
    found = {}
    if most is not None:
        found["fits"] = advice(plan, trainer, most)
    if plan.kilowatt_hours is not None:
        hours = plan.kilowatt_hours
        most = f"{hours:,.1f} kWh" if hours >= 1 else f"{1000 * hours:.1f} Wh"
        found["energy"] = f"at most {most}, at {plan.device.watts:,.0f} W a device"
    if plan.cost is not None:
        found["cost"] = f"{plan.cost:,.2f} USD, at {plan.price:,.2f} USD for an hour of a device"
    if plan.footprint is not None:
        weights = (2 if isinstance(trainer.precision_plugin, BF16Weights) else 4) * plan.total
        found["checkpoint"] = f"about {bytes_of(plan.footprint.checkpoint)}; the model's folder {bytes_of(weights)}"
    return found


def advice(plan: Forecast, trainer: Trainer, most: int) -> str:
    """Whether it fits, and what to change where it does not."""
    data, room = trainer.datamodule, bytes_of(plan.room)
    if plan.fits:
        return f"yes, into {room} of each device; at most {most:,} rows a micro-batch"
    if most:
        of_step = trainer.accumulate_grad_batches * data.batch_size
        rows = next(count for count in range(min(most, of_step), 0, -1) if of_step % count == 0)
        flags = f"--data.batch_size {rows} --trainer.accumulate_grad_batches {of_step // rows}"
        return f"no, not into {room} of each device; the same training does with {flags}"
    kept = sum(plan.footprint.kept.values())
    if kept < 0.7 * plan.room and not trainer.lightning_module.activation_checkpointing:
        return f"no, not even one row into {room}; add --model.activation_checkpointing true"
    strategy, groups = trainer.strategy, data.rank_and_ranks[1]
    sharing = strategy.ranks_of_a_copy if isinstance(strategy, Sharded) else 1
    enough = math.ceil(kept * sharing / (0.6 * plan.room))
    if kept >= 0.7 * plan.room and isinstance(strategy, Sharded) and enough <= plan.devices:
        sizes = (size for size in range(1, groups + 1) if groups % size == 0)
        size = next(size for size in sizes if size * plan.devices // groups >= enough)
        return f"no, not into {room} of each device; pass --trainer.strategy.group_size {size}"
    if kept >= 0.7 * plan.room:
        return f"no, not into {room} of each device; pass --trainer.strategy fsdp2 on {enough} devices or more"
    return f"no, not even one row into {room}; pass --trainer.strategy fsdp2_tp, or a shorter --data.seq_len"


def simulate(trainer: Trainer, module: LightningModule, device: Device) -> tuple[Footprint, int]:
    """What a step of a run that is about to begin will take, and the tokens of the micro-batch it was counted on."""
    data = trainer.datamodule
    batch = next(iter(data.train_dataloader()))
    share = simulation.labelled_share(batch)
    batch = simulation.widened(batch, data.batch_size, *widest(data))
    with simulation.simulated(device.kind, share) as live, simulation.stand_in(module):
        found = simulation.footprint(module, batch, live, trainer.accumulate_grad_batches)
    return found, batch["input_ids"].numel()


def bytes_there(trainer: Trainer, module: LightningModule) -> int:
    """Of all tensors of the networks and the optimizers."""
    teachers = [teacher.network for teacher in getattr(module, "teachers", []) if teacher.network is not None]
    tensors = [t for network in (module, *teachers) for t in (*network.parameters(), *network.buffers())]
    for optimizer in trainer.optimizers:
        kept = [getattr(optimizer, "masters", []), optimizer.state]  # of gradients no page is used yet
        tensors += [t for t in tree_leaves(kept) if isinstance(t, Tensor)]
    blocks = {(block := local(t).untyped_storage()).data_ptr(): block.nbytes() for t in tensors}
    return sum(blocks.values())


def widest(data: LightningDataModule) -> tuple[int | None, int | None]:
    """Tokens of the longest row, and of the longest answer where a decoder of its own reads it; examples are padded to
    a multiple of eight, and rows of text are all alike."""
    if data.objective in ("causal", "masked", "denoising"):
        return None, None
    answer = getattr(data, "longest_answer", None)
    return -(-data.seq_len // 8) * 8, answer and -(-answer // 8) * 8


def duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.0f} s" if seconds >= 1 else "less than a second"


def time_limit(trainer: Trainer) -> float | None:
    """Seconds left of max_time."""
    timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)
    return timer.time_remaining() if timer else None


def time_allowed(trainer: Trainer) -> float | None:
    """Seconds of max_time, those that are over, too."""
    timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)
    left = timer.time_remaining() if timer else None
    return None if left is None else timer.time_elapsed() + left
