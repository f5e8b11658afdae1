"""An exact step with its optimizer and its schedule: what pretraining and fine-tuning share."""

import json
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from jsonargparse import lazy_instance
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules import cpu_kernels, hardware
from lightning_modules.architectures import flops_per_token
from lightning_modules.exact_step import ExactStep
from lightning_modules.handing_out import Answer, as_the_first, made_by_the_first
from lightning_modules.named_optimizer import names_of, number_when_loaded
from lightning_modules.optim import Float32Master, adamw, parameter_groups
from lightning_modules.precision import BF16Weights
from lightning_modules.schedules import Cosine, Schedule
from lightning_modules.strategies import Sharded


class LRsOfTheStart(LambdaLR):
    """Leaves the groups alone that a callback adds later, such as BackboneFinetuning, which sets their rate itself."""

    def get_lr(self) -> list[float]:
        return super().get_lr() + [group["lr"] for group in self.optimizer.param_groups[len(self.base_lrs) :]]


class ScheduledStep(ExactStep):
    """A subclass makes the network, in `configure_model`, and calls `make_fast` on it.

    Args:
        optimizer: Any torch optimizer by name. Weight decay touches matrices and embeddings only.
        schedule: Constant, Linear, Cosine, Step, Exponential, InverseSquareRoot or WarmupStableDecay.
        max_tokens: Stop after this many training tokens, and end the schedule there.
        l1: Weight of the sum of absolute weights, in nats per label.
        compile: torch.compile of the network; auto: on a GPU, where it pays.
        activation_checkpointing: Keeps of each layer its input alone and computes the rest once more backward: less
            memory, about a third more FLOPs.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = lazy_instance(Cosine),  # noqa: B008 - so that a saved config holds it by name
        max_tokens: int | None = None,
        l1: float = 0.0,
        compile: bool | Literal["auto"] = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_tokens = max_tokens
        self.l1 = l1
        self.compile_network = compile
        self.activation_checkpointing = activation_checkpointing
        self.start: str | None = None
        """The folder or Hub name of the model whose tokenizer reads the data; None where it is new."""
        self.network: PreTrainedModel | None = None
        self.lr: float | None = None
        self.kernels: list[str] = []
        self.progress_by_clock: tuple[array, array] = array("q"), array("d")
        """Steps whose progress was the clock's, rising, and that progress: what no other run finds out again."""
        self.given_progress: dict[int, float] = {}
        """By step, for a run that repeats one that followed a clock."""
        self._resumed_at = -1
        self._progress: tuple[int, float] | None = None
        """Step and progress that were found out last."""

    def make_fast(self, network: PreTrainedModel) -> None:
        """Shards of a strategy that has them, kernels on a CPU, torch.compile on a GPU, in place; or less memory."""
        if self.activation_checkpointing:
            recompute(network)
        if self.is_sharded and self.l1:
            raise ValueError("--model.l1 sums whole weights, which no rank has; take --trainer.strategy ddp for it")
        if self.is_sharded:
            self.trainer.strategy.parallelize(network)
        on_cpu = hardware.kind_of(self.trainer.strategy.root_device) == "cpu"
        if on_cpu and not hardware.is_planning():
            hardware.keep_freed_memory()
        if on_cpu and not self.is_sharded and self.low_precision and self.compile_network is not True:
            self.kernels = cpu_kernels.install(network)
        wanted = self.compile_network is True or (self.compile_network == "auto" and not on_cpu)
        if wanted and not hardware.is_planning():
            # In place, and the network alone: torch.compile(network) would rename all weights, and a compiled
            # LightningModule cannot log.
            network.compile()

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass is one of all ranks together."""
        return isinstance(self.trainer.strategy, Sharded)

    def made_by_the_first(self, make: Callable[[], Answer]) -> Answer:
        """A network of which a rank other than the first gets its part from it, where a strategy shards it."""
        return made_by_the_first(make) if self.is_sharded and not hardware.is_planning() else make()

    def as_the_first(self, find: Callable[[], Answer]) -> Answer:
        """What the first rank finds, where the others cannot."""
        return as_the_first(find) if self.is_sharded and not hardware.is_planning() else find()

    def of_all_ranks(self, numbers: list[int]) -> list[int]:
        """What ranks have to do together: the numbers of all of them, sorted; of ranks that work alone their own."""
        found: list[list[int]] = [numbers]
        if self.is_sharded:
            found = [[]] * self.trainer.world_size
            dist.all_gather_object(found, numbers)
        return sorted({number for of_rank in found for number in of_rank})

    def unsharded(self, weights: dict[str, Tensor]) -> nn.Module:
        """A network as the own one, with these weights, which no strategy has sharded; it is there to be saved."""
        with torch.device("meta"):
            network = self.auto_class.from_config(self.network.config)
        network.load_state_dict(weights, assign=True)
        if network.can_generate():
            network.generation_config = self.network.generation_config
        network.tie_weights()
        return network

    @contextmanager
    def as_whole(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """With a network of these weights in the place of the sharded one."""
        own, self.network = self.network, self.unsharded(weights)
        try:
            yield
        finally:
            self.network = own

    def exported(self) -> PreTrainedModel:
        """What a model folder gets."""
        return self.network

    def opened(self, folder: Path) -> nn.Module:
        """What `exported` left in a folder."""
        return self.auto_class.from_pretrained(folder)

    # Validation

    @abstractmethod
    def found(self) -> dict[str, float | Tensor]:
        """What all ranks found since the last call, by the names behind val/."""

    def on_validation_epoch_end(self) -> None:
        self._log_found("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_found("test")

    def _log_found(self, stage: str) -> None:
        for name, value in self.found().items():
            # A bare number would become one of torch's default dtype.
            self.log(f"{stage}/{name}", torch.as_tensor(value, dtype=torch.float64), rank_zero_only=False)
        if self.trainer.state.fn == "fit":  # what all of it is drawn over
            self.log("tokens", torch.as_tensor(self.tokens, dtype=torch.float64), rank_zero_only=False)

    def plan(self) -> dict[str, str]:
        """Rows of the plan that are about the model."""
        return {"from": self.start or ""}

    def about(self) -> dict[str, object]:
        """What summary.json holds besides."""
        return {}

    def save_beside(self, folder: Path) -> None:
        """What a run's folder gets besides the model."""

    @property
    def low_precision(self) -> bool:
        """Whether the weights themselves are bf16, and the optimizer keeps float32 masters."""
        return isinstance(self.trainer.precision_plugin, BF16Weights)

    def on_fit_start(self) -> None:
        self.flops_per_token = flops_per_token(self.network, self.trainer.datamodule.seq_len)

    def trained_groups(self) -> list[dict]:
        """Of the optimizer."""
        return parameter_groups(self.network)

    def new_optimizer(self) -> Optimizer:
        groups = self.trained_groups()
        return Float32Master(groups, self.optimizer) if self.low_precision else self.optimizer(groups)

    def configure_optimizers(self) -> dict:
        optimizer = self.new_optimizer()
        # A fused optimizer would divide by float16's scale within its step, after the norm is taken and clipped.
        optimizer._step_supports_amp_scaling = False
        number_when_loaded(optimizer, self)
        scheduler = LRsOfTheStart(optimizer, lambda step: self.schedule.factor(step, self.progress()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.trainer.optimizers:
            checkpoint["optimizer_names"] = names_of(self.trainer.optimizers[0], self)
        if self.progress_by_clock[0]:
            steps, progress = self.progress_by_clock
            checkpoint["progress_by_clock"] = torch.tensor(steps), torch.tensor(progress, dtype=torch.float64)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._resumed_at = checkpoint["global_step"]
        if "progress_by_clock" in checkpoint:
            steps, progress = checkpoint["progress_by_clock"]
            self.progress_by_clock = array("q", steps.tolist()), array("d", progress.tolist())

    def on_train_start(self) -> None:
        """Takes the rate that LearningRateFinder has set; a second group keeps its ratio to the first."""
        super().on_train_start()
        if self.lr is None:
            return
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            scale = self.lr / scheduler.base_lrs[0]
            scheduler.base_lrs = [lr * scale for lr in scheduler.base_lrs]
            factor = self.schedule.factor(0, self.progress())
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["initial_lr"], group["lr"] = lr, lr * factor

    def progress(self) -> float:
        """Part of the run that is done in the middle of the next step, 0 to 1: the largest of those of steps, epochs,
        tokens and time. Of a step it is one number, though each group of weights asks and time goes on."""
        step = self.trainer.global_step
        if step in self.given_progress:
            return self.given_progress[step]
        steps, progress = self.progress_by_clock
        if steps and steps[-1] == step:
            return progress[-1]
        if self._progress is None or self._progress[0] != step:
            by_count, by_clock = self._done()
            self._progress = step, max(by_count, by_clock)
            # The rate of the step that a run goes on with is its checkpoint's; before it, steps are not counted yet.
            if by_clock > by_count and step > self._resumed_at:
                steps.append(step)
                progress.append(by_clock)
        return self._progress[1]

    def _done(self) -> tuple[float, float]:
        """What of the run is done by what is counted, and by the clock."""
        trainer, done = self.trainer, [0.0]
        step = trainer.global_step + 0.5
        if trainer.max_steps > 0:
            done.append(step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != float("inf"):
            steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches) * trainer.max_epochs
            done.append(step / max(1, steps))
        if self.max_tokens:
            done.append(float(self.tokens) / self.max_tokens)
        clock = self.clock() if self.clock_of_first is None else self.clock_of_first
        return min(1.0, max(done)), min(1.0, clock)

    def clock(self) -> float:
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)
        if timer is None or timer.time_remaining() is None:
            return 0.0
        elapsed = timer.time_elapsed()
        return elapsed / (elapsed + timer.time_remaining())


def recompute(network: PreTrainedModel) -> None:
    """Activation checkpointing of each layer, in place; it draws the same dropout again."""
    if not network.supports_gradient_checkpointing:
        kind = type(network).__name__
        raise ValueError(f"--model.activation_checkpointing: {kind} has no layers to recompute; leave it out")
    network.activation_checkpointing_enable({"use_reentrant": False})


NO_PART = ("_name_or_path", "transformers_version", "dtype")
"""Fields of a config that say nothing of its network."""


def comparable(config: PreTrainedConfig) -> dict[str, object]:
    """What makes a network the one it is, wherever it was loaded from and by whichever transformers, in types that a
    checkpoint may hold."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in NO_PART}


def require_same(there: dict[str, object], here: dict[str, object]) -> None:
    """Raises ValueError with what a checkpoint has that the run which goes on from it does not."""
    for name in [*here, *sorted(there.keys() - here.keys() - set(NO_PART))]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"the checkpoint has {name} {there.get(name)}, this run {here.get(name)}; resume with the flags of the "
                "run's config.yaml"
            )
