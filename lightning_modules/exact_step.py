"""One optimizer step: the gradient of the mean over all its tokens, however micro-batches, ranks and memory cut it.

What is not finite is never applied, and a micro-batch that does not fit into memory is done in parts.
"""

import re
import sys
from abc import abstractmethod
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.shards import copies, is_sharded, local, part_of, sharded, whole
from lightning_modules.strategies import Sharded


class ExactStep(LightningModule):
    """A subclass has a `network` and says what a batch costs."""

    network: nn.Module | None
    l1: float
    more_sums: ClassVar[tuple[str, ...]] = ()
    """What `training_loss` sums besides: logged as train/<name>, a mean over the step's labels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        """Trained on so far, by all ranks."""
        self.seed = 0
        self.step_is_finite = True
        self.wishes = [0.0, 0.0, 0.0]
        """What this rank asks of all at the end of a step; the sum is `wishes_of_all`. See callbacks/recovery.py."""
        self.wishes_of_all = self.wishes
        self.clock_of_first: float | None = None
        """The first rank's, which all go by; None on one rank."""
        self.parts = 1
        """Of each micro-batch, so that it fits into memory."""
        self._sums: Tensor | None = None
        """(nats, labels, tokens, more_sums …) of the micro-batches of the step so far; None before the first."""
        self._step_so_far: dict[str, Tensor] | None = None
        self._parameters_in_order: list[nn.Parameter] | None = None
        self._cutting = False
        self._window: list[dict[str, Tensor]] = []
        self._nominal = 1

    @abstractmethod
    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(objective / divisor, sum of nats, number of labels) of a batch; only the first has a gradient."""

    def training_loss(self, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, ...]:
        """As `loss`, and behind it `more_sums`: where what is minimised is not what validation measures."""
        return self.loss(batch, divisor=divisor)

    def counted_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens a batch has that count as trained on."""
        return (batch["rows"] >= 0).sum() * batch["input_ids"].shape[1]

    # A step in the middle of its micro-batches, where validation may stand and save

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["tokens"] = int(self.tokens)
        checkpoint["rows_per_micro_step"] = self.trainer.datamodule.rows_per_micro_step
        if self._sums is not None:
            checkpoint["step_so_far"] = self._gathered()
            checkpoint["step_so_far_divisor"] = self._divisor

    def _gathered(self) -> dict[str, Tensor]:
        """(ranks, …) each: gradients and sums so far; of sharded weights (1, …), the sum over all ranks."""
        weights = {name: p for name, p in self.named_parameters() if p.grad is not None}
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            ranks = self.trainer.datamodule.rank_and_ranks[1]  # over which FSDP2 has taken the mean
            found = {"sums": strategy.reduce(self._sums * self.counts_its_rows, reduce_op="sum")[None]}
            for name, parameter in weights.items():
                gradient = parameter.grad.clone()
                strategy.complete(parameter, gradient)
                found[name] = (whole(gradient) * ranks)[None]
            return found
        gathered = self.all_gather({name: p.grad for name, p in weights.items()} | {"sums": self._sums})
        if self.trainer.world_size == 1:
            gathered = {name: value[None] for name, value in gathered.items()}
        return gathered

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.tokens = checkpoint["tokens"]
        self._step_so_far = checkpoint.get("step_so_far")
        self._divisor_so_far = checkpoint.get("step_so_far_divisor", self._divisor)
        data = self.trainer.datamodule
        if self.trainer.state.fn == "fit" and data.rows_per_micro_step != checkpoint["rows_per_micro_step"]:
            # Lightning counts micro-batches of a rank; on another number of ranks the same place has another number.
            consumed = checkpoint[type(data).__qualname__]["consumed"]
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            recount(progress, consumed, data.rows_per_epoch, data.rows_per_micro_step)

    def clock(self) -> float:
        """Part of the time that a run may take which is over, by this rank's clock."""
        return 0.0

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1:
            self.clock_of_first = self.trainer.strategy.broadcast(self.clock())
        self._sums = None
        self._take_up()

    def _take_up(self) -> None:
        """Sums and gradients of the micro-batches that were done before a checkpoint in the middle of a step."""
        if self._step_so_far is None:
            return
        so_far, mine = self._step_so_far, self.global_rank
        if self._divisor_so_far != self._divisor:  # of micro-batches of another size
            factor = self._divisor_so_far / self._divisor
            so_far = {name: value if name == "sums" else value * factor for name, value in so_far.items()}
        strategy = self.trainer.strategy
        if isinstance(strategy, Sharded):
            ranks = self.trainer.datamodule.rank_and_ranks[1]
            self._sums = so_far["sums"].sum(0).to(self.device) * (mine == 0)
            for name, parameter in self.named_parameters():
                if name in so_far:
                    mean = so_far[name].sum(0).to(parameter.dtype) / ranks
                    if strategy.is_partial(parameter):  # which adds them up once more
                        mean = mean / (self.trainer.world_size // ranks)
                    parameter.grad = sharded(part_of(mean, parameter).clone().to(parameter.device), parameter)
            return
        if len(so_far["sums"]) != self.trainer.world_size:  # only their sum over all ranks counts
            so_far = {name: value.sum(0, keepdim=True) for name, value in so_far.items()}
        if mine < len(so_far["sums"]):
            self._sums = so_far["sums"][mine].to(self.device)
            for name, parameter in self.named_parameters():
                if name in so_far:
                    parameter.grad = so_far[name][mine].to(parameter)

    @property
    def _divisor(self) -> int:
        """By which the gradient of a step's sum has been divided on this rank, once backward has run."""
        data = self.trainer.datamodule
        return data.batch_size * data.seq_len * self.trainer.accumulate_grad_batches

    # Forward and backward

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The *sum* of the loss over a constant: `on_before_optimizer_step` divides by the tokens of the whole step."""
        data = self.trainer.datamodule
        # Any constant would do that all micro-batches and ranks of a step share; this one keeps float16 in range.
        self._nominal = data.batch_size * data.seq_len
        if self._sums is None:
            self._step_so_far = None
            # The x axis of the metrics, which Lightning takes up one too low after some checkpoints.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
            self._window.clear()
            self.trainer.optimizers[0].zero_grad()
        self._window.append(batch)
        # Dropout follows from the place in the training, not from what was drawn before: resuming needs no generator's
        # state, and two ranks draw what one draws in two micro-batches.
        seed = micro_batch_seed(self.seed, data.batch_row)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes milliseconds on a machine without a GPU
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self.parts == 1:
            try:
                return self._objective(batch)
            except (RuntimeError, MemoryError) as error:
                self._require_smaller_parts(error)
            self._in_parts(self._all_again())
        else:
            self._in_parts([batch])
        return torch.zeros((), device=self.device, requires_grad=True)  # all gradients are there already

    def _objective(self, batch: dict[str, Tensor]) -> Tensor:
        objective, nats, count, *more = self.training_loss(batch, self._nominal)
        sums = torch.stack([part.double() for part in (nats, count, self.counted_tokens(batch), *more)])
        self._sums = sums if self._sums is None else self._sums + sums
        if self.l1:
            # Counted once a token, so that it, too, does not depend on how the step is split.
            absolute = sum(p.abs().sum() for p in self.network.parameters() if p.ndim >= 2)
            objective = objective + self.l1 * absolute * (count / self._nominal)
        return objective

    def backward(self, loss: Tensor) -> None:
        if self._cutting:
            loss.backward()
            return
        try:
            loss.backward()
        except (RuntimeError, MemoryError) as error:
            self._require_smaller_parts(error)
        else:
            return
        del loss
        self._in_parts(self._all_again())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Lightning's place for it is after the forward pass; `training_step` does it before, to save memory."""

    # Memory

    def _require_smaller_parts(self, error: Exception) -> None:
        """Raises the error again unless it is about memory and the micro-batch in hand can be cut once more."""
        rows, ranks, accumulated = (
            len(self._window[-1]["rows"]),
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
        )
        about_memory = isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error))
        if not about_memory or any(isinstance(c, BatchSizeFinder) for c in self.trainer.callbacks):
            raise error
        if self.parts >= rows or ranks > 1:
            raise ValueError(
                f"out of memory at {max(1, rows // self.parts)} rows a micro-batch on {ranks} ranks; train the same "
                f"with --data.batch_size {max(1, rows // 2)} --trainer.accumulate_grad_batches {2 * accumulated}, "
                "or pass a shorter --data.seq_len"
            ) from None
        self.parts *= 2
        print(
            f"out of memory: from step {self.trainer.global_step} on, a micro-batch of {rows} rows is done in "
            f"{self.parts} parts; the gradient is the same",
            file=sys.stderr,
        )

    def _all_again(self) -> list[dict[str, Tensor]]:
        """The micro-batches of the step so far, none of which counts any more."""
        self._sums = None
        self.trainer.optimizers[0].zero_grad()
        self._take_up()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._window

    def _in_parts(self, batches: list[dict[str, Tensor]]) -> None:
        """Forward and backward of micro-batches in parts; in smaller ones from the step's first on where they do not
        fit either."""
        self._cutting = True
        while (error := self._first_failure(batches)) is not None:
            self._require_smaller_parts(error)
            batches = self._all_again()
        self._cutting = False

    def _first_failure(self, batches: list[dict[str, Tensor]]) -> Exception | None:
        for batch in batches:
            rows = -(-len(batch["rows"]) // self.parts)
            for part in zip(*(value.split(rows) for value in batch.values()), strict=True):
                try:
                    with self.trainer.precision_plugin.train_step_context():
                        objective = self._objective(dict(zip(batch, part, strict=True)))
                    self.trainer.strategy.backward(objective / self.trainer.accumulate_grad_batches, None)
                except (RuntimeError, MemoryError) as error:
                    return error.with_traceback(None)  # whose frames hold what does not fit
        return None

    # The step

    @property
    def counts_its_rows(self) -> bool:
        """Whether no other rank sums the same rows."""
        strategy = self.trainer.strategy
        return not isinstance(strategy, Sharded) or strategy.is_first_of_its_rows

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """One sum over the ranks: of the loss and its tokens, of what each wishes, and of those whose gradient is not
        finite."""
        if self._parameters_in_order is None:
            # Walking through all modules at each step takes as long as a small model's optimizer.
            self._parameters_in_order = list(self.parameters())
        self._stepped = [p for p in self._parameters_in_order if p.grad is not None]
        if isinstance(self.trainer.strategy, Sharded):
            for parameter in self._stepped:
                self.trainer.strategy.complete(parameter, parameter.grad)
        gradients = [local(p.grad) for p in self._stepped]
        pieces = [piece for gradient in gradients for piece in in_pieces(gradient)]
        # Of weights that are offloaded the gradients are on the CPU.
        norms = torch.stack(torch._foreach_norm(pieces, 2, torch.float32)).to(self._sums.device)
        norm = torch.linalg.vector_norm(norms)
        told = self._sums.new_tensor([*self.wishes, 0.0 if self.global_rank else self.clock()])
        sums = self._sums * self.counts_its_rows
        mine = [sums, told, (~torch.isfinite(norm)).double()[None]]
        cut = is_sharded(self._stepped) or isinstance(self.trainer.strategy, FSDPStrategy)
        if cut:
            alike = [self._copies(p) for p in self._stepped for _ in in_pieces(local(p.grad))]
            mine.append((norms.double().square() / norms.new_tensor(alike)).sum()[None])
        reduced = self.trainer.strategy.reduce(torch.cat(mine), reduce_op="sum")
        if cut:
            norm, reduced = reduced[-1].sqrt().float(), reduced[:-1]
        nats, count, tokens, *others, clock, not_finite = reduced
        if self.trainer.world_size > 1:
            self.clock_of_first = float(clock)
        more, wishes = others[: len(self.more_sums)], others[len(self.more_sums) :]
        self._sums = None
        self.wishes_of_all = [float(wish) for wish in wishes] if self.trainer.world_size > 1 else self.wishes
        self.tokens = self.tokens + tokens.long()
        count = torch.where(count > 0, count, 1)  # class weights may sum to less than one
        self.step_loss = nats / count
        self.step_more = {name: value / count for name, value in zip(self.more_sums, more, strict=True)}
        # Lightning has divided by accumulate_grad_batches, DDP by the ranks, training_step by its constant.
        ranks = self.trainer.datamodule.rank_and_ranks[1]
        divided_by = self.trainer.accumulate_grad_batches * ranks * self._nominal
        self._scale = divided_by / count
        self.step_grad_norm = norm * self._scale
        self.step_is_finite = bool(torch.isfinite(nats) & (not_finite == 0))

    @property
    def gradient_scale(self) -> float:
        """By which the sums that backward leaves become the gradient of the mean over the step's tokens."""
        return float(self._scale)

    def _copies(self, parameter: nn.Parameter) -> int:
        """How many ranks have the same part of it."""
        ranks, strategy = self.trainer.world_size, self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):  # each rank a part of all, in groups where it is hybrid
            return ranks // strategy.model.process_group.size()
        return copies(parameter, ranks)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Scales to the mean over the step's tokens and clips by the norm over all gradients in float32, in one pass,
        under every precision, fused optimizers included. What is not finite is taken away, and with it the step."""
        if not self.step_is_finite:
            for parameter in self._stepped:
                parameter.grad = None
            return
        gradients = [local(p.grad) for p in self._stepped]
        factor = self._scale
        if gradient_clip_val and gradient_clip_algorithm != "value":
            factor = factor * (gradient_clip_val / (self.step_grad_norm + 1e-6)).clamp(max=1)
        if factor.device.type != "cpu" or factor != 1:
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))
        if gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -gradient_clip_val)
            torch._foreach_clamp_max_(gradients, gradient_clip_val)


def in_pieces(gradient: Tensor, numbers: int = 2**22) -> tuple[Tensor, ...]:
    """A large bf16 gradient on a CPU in pieces: torch makes a float32 copy to take its norm, and blocks of more than 32
    MiB come as new pages from the kernel each time."""
    if gradient.device.type != "cpu" or gradient.dtype == torch.float32 or gradient.numel() <= numbers:
        return (gradient,)
    return gradient.view(-1).split(numbers) if gradient.is_contiguous() else (gradient,)


def recount(progress: dict, consumed: int, rows_per_epoch: int, rows_per_micro_step: int) -> None:
    """Sets Lightning's progress through the micro-batches of an epoch to the place behind `consumed` rows."""
    epoch = consumed // rows_per_epoch
    if progress["is_last_batch"] and epoch * rows_per_epoch == consumed:
        epoch -= 1
    current = -(-(consumed - epoch * rows_per_epoch) // rows_per_micro_step)
    total = epoch * -(-rows_per_epoch // rows_per_micro_step) + current
    for name, count in (("current", current), ("total", total)):
        counts = progress[name]
        ended = counts["processed"] - counts["completed"]  # 1 within the hook that ends a batch
        counts |= dict.fromkeys(("ready", "started", "processed"), count) | {"completed": count - ended}


def micro_batch_seed(seed: int, row: int) -> int:
    """32 bits that look random, from the run's seed and the number of the micro-batch's first row in the training."""
    word = (seed * 0x9E3779B97F4A7C15 + row + 1) * 0xBF58476D1CE4E5B9 % 2**64
    return (word ^ word >> 31) * 0x94D049BB133111EB % 2**64 >> 32
