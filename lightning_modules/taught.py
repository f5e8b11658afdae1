"""What all students share: who teaches them, what of it is matched, and what a run that goes on has to share.

Shape suffixes: B rows, T positions, N any count of labels.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules import hardware
from lightning_modules.distillation_loss import Matching, Sparse, linear_distillation
from lightning_modules.divergences import Divergence
from lightning_modules.inner_signals import InnerLoss, InnerSignals, Seen
from lightning_modules.losses import Head
from lightning_modules.on_policy import OnPolicy
from lightning_modules.scheduled_step import ScheduledStep, require_same
from lightning_modules.teacher import Teacher

Ramp = float | list[float]
"""A number, or two: from the first at the beginning of the run straight to the second at its end."""
Target = list[Head] | Sparse
SELF = "self"
"""Of --model.teacher: the model that the student begins as."""


class Weights(NamedTuple):
    """At a step, the same for all its micro-batches."""

    step: int
    matching: Matching
    outputs: float
    inner: float


class Taught(ScheduledStep):
    """A student that learns what a teacher makes of the same data.

    Args:
        teacher: A run's folder, a model's folder or a Hub name; several count by the mean of their probabilities. self:
            the model that the student begins as. Left out: the newest pretraining in runs/ with such a head.
        divergence: What is minimised between the teacher's distribution p and the student's q: forward_kl is KL(p ‖ q).
        temperature: Divides both models' logits; two numbers go from the first to the second over the run.
        hard_weight: Share of the labels' own loss in the objective; 1 is training without a teacher.
        beta: Of jsd, from 0 (forward_kl) to 1 (reverse_kl).
        alpha: Of the skewed divergences: share of the one distribution that is mixed into the other.
        inner: What is learnt from inside the teacher besides.
        on_policy: Has the student write a part of the rows itself.
    """

    def __init__(
        self,
        *,
        teacher: str | list[str] | None = None,
        divergence: Divergence = "forward_kl",
        temperature: Ramp = 1.0,
        hard_weight: Ramp = 0.0,
        beta: float = 0.5,
        alpha: float = 0.1,
        inner: InnerSignals | None = None,
        on_policy: OnPolicy | None = None,
        **settings: object,
    ):
        super().__init__(**settings)
        _require_range("temperature", temperature, 1e-3, 1e3)
        _require_range("hard_weight", hard_weight, 0.0, 1.0)
        _require_range("beta", beta, 0.0, 1.0)
        _require_range("alpha", alpha, 0.0, 0.99)
        names = teacher if isinstance(teacher, list) else [teacher]
        if not names:
            raise ValueError("--model.teacher is an empty list; name one or more, or leave it out")
        self.teachers = [Teacher(self.teacher_named(name), self.auto_class) for name in names]
        self.start = self.teachers[0].folder
        self.divergence: Divergence = divergence
        self.temperature, self.hard_weight = temperature, hard_weight
        self.beta, self.alpha = beta, alpha
        self.inner, self.on_policy = inner, on_policy
        self.more_sums = ("divergence", "inner") if inner is not None else ("divergence",)
        self.directions_cC: Tensor | None = None
        """Of the teacher's hidden states, those that the student's begin as; None where it is new."""
        self._weights: Weights | None = None
        if inner is not None:
            inner.require_range()
            if len(names) > 1:
                raise ValueError("--model.inner compares with one teacher; pass one, or leave it out")
            if self.compile_network is True:
                raise ValueError(
                    "--model.inner looks into the network, which --model.compile true hides; leave one out"
                )
            self.compile_network = False

    # Who teaches

    def teacher_named(self, name: str | None) -> str:
        """A folder or Hub name, for what --model.teacher says."""
        if name == SELF:
            if (folder := self.student_folder) is None:
                raise ValueError("--model.teacher self: the student is no folder or Hub name; name one as the student")
            return folder
        found = name or self.default_teacher()
        if found is None:
            raise ValueError("no run in runs/ could be the teacher; pass a folder by --model.teacher")
        return found

    @property
    @abstractmethod
    def student_folder(self) -> str | None:
        """Of the model that the student begins as; None where it is new."""

    @classmethod
    @abstractmethod
    def default_teacher(cls) -> str | None:
        """The folder of the teacher where none is named."""

    @property
    def learns_from_teachers(self) -> bool:
        return self.hard_weight != 1.0

    @property
    def asks_teachers(self) -> bool:
        """Whether they are needed at each step."""
        return self.learns_from_teachers

    def begin_as_part(self, network: PreTrainedModel) -> None:
        """Gives a student the weights of its teacher that it begins as."""
        if not hardware.is_planning():
            self.directions_cC = self.as_the_first(lambda: self.student.fill(network, self.teachers[0].read()))

    def load_teachers(self) -> None:
        strategy = self.trainer.strategy
        for teacher in self.teachers:
            if teacher.network is None:
                teacher.load(strategy.root_device, strategy.share_out if self.is_sharded else None)

    def configure_model(self) -> None:
        if self.network is not None:
            return
        data = self.trainer.datamodule
        for teacher in self.teachers:
            teacher.require_fit(data)
        if self.on_policy is not None:
            self.on_policy.require_range(data.seq_len)
            if self.is_sharded:
                raise ValueError("--model.on_policy writes on each rank by itself; take --trainer.strategy ddp for it")
        if self.asks_teachers:
            self.load_teachers()
        super().configure_model()
        if self.inner is not None and self.learns_from_teachers:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                teacher = self.teachers[0].network
                self.inner_loss = InnerLoss(self.inner, self.plain_network, teacher, self.directions_cC)

    def trained_groups(self) -> list[dict]:
        groups = super().trained_groups()
        projections = list(self.inner_loss.parameters()) if hasattr(self, "inner_loss") else []
        return groups + ([{"params": projections, "kind": "embedding"}] if projections else [])

    # The loss

    @abstractmethod
    def student_head(self, batch: dict[str, Tensor]) -> Head:
        """What makes the student's logits, of all labels of a batch, (N, …)."""

    @abstractmethod
    def teacher_head(self, batch: dict[str, Tensor], teacher: Teacher) -> Head:
        """The same of a teacher."""

    @abstractmethod
    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(N,), IGNORED where there is none."""

    @abstractmethod
    def label_count(self, batch: dict[str, Tensor]) -> Tensor:
        """What a sum over the labels is divided by."""

    @abstractmethod
    def seen(self, batch: dict[str, Tensor]) -> dict[str, Seen]:
        """For each stack of layers."""

    def written(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """A batch in which the student has written some rows, and (N,) whether a label is its own."""
        return batch, None

    def require_writing(self, data: LightningDataModule) -> None:
        """Raises ValueError for data in which nothing can be written on."""

    def writing_settings(self) -> dict[str, object]:
        """What decides, besides, what a teacher writes."""
        return {}

    @contextmanager
    def teacher_writes(self) -> Iterator[None]:
        """Around all that the first teacher writes."""
        yield

    counted: ClassVar[str] = "token"
    """What has a label."""
    vocabulary: int | None = None
    """Ids that count, of both models; None: all."""

    def training_loss(self, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, ...]:
        if not self.learns_from_teachers:
            objective, nats, count = self.loss(batch, divisor)
            return objective, nats, count, *[torch.zeros_like(nats) for _ in self.more_sums]
        writes = self.on_policy is not None and not hardware.is_planning()
        batch, is_own_N = self.written(batch) if writes else (batch, None)
        weights = self.weights()
        if weights.inner:
            readers = (partial(self.student_head, batch), partial(self.targets, batch))
            student, target, inner = self.inner_loss(*readers, self.seen(batch))
        else:
            student, target = self.student_head(batch), self.targets(batch)
        matched = self.matched(student, target, self.labels(batch), is_own_N, weights.matching, divisor)
        objective, nats, divergence = matched
        more = (divergence,)
        if self.inner is not None:
            if weights.inner:
                objective = weights.outputs * objective + inner / divisor
            else:  # DDP waits for a gradient of each parameter
                inner = sum((0.0 * p.sum() for p in self.inner_loss.parameters()), torch.zeros_like(nats))
                objective = objective + inner
            more += (inner.detach(),)
        return objective, nats, self.label_count(batch), *more

    def targets(self, batch: dict[str, Tensor]) -> Target:
        return [self.teacher_head(batch, teacher) for teacher in self.teachers]

    def matched(
        self,
        student: Head,
        target: Target,
        labels_N: Tensor,
        is_own_N: Tensor | None,
        matching: Matching,
        divisor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(objective / divisor, nats, divergence); labels that the student wrote have no loss of their own."""
        settings = {"words": self.vocabulary, "divisor": divisor}
        if is_own_N is None or not matching.hard_weight:
            return linear_distillation(student, target, labels_N, matching, **settings)
        parts = []
        for is_of_part_N, of_part in ((~is_own_N, matching), (is_own_N, matching._replace(hard_weight=0.0))):
            some = [head.rows(is_of_part_N) for head in target]
            parts.append(
                linear_distillation(student.rows(is_of_part_N), some, labels_N[is_of_part_N], of_part, **settings)
            )
        return tuple(map(sum, zip(*parts, strict=True)))

    def weights(self) -> Weights:
        step = self.trainer.global_step
        if self._weights is None or self._weights.step != step:
            place = self.progress()
            ramps = [_at(value, place) for value in (self.temperature, self.hard_weight)]
            first = 0.0 if self.inner is None else self.inner.first
            inner = float(self.inner is not None and (not first or place < first))
            outputs = float(not first or place >= first)
            matching = Matching(self.divergence, *ramps, self.beta, self.alpha)
            self._weights = Weights(step, matching, outputs, inner)
        return self._weights

    @abstractmethod
    def judged(self, network: PreTrainedModel) -> dict[str, float]:
        """What a network is worth on all held-out data; "nats" among it, a mean over the labels."""

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["distillation"] = self.settings()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        there, here = checkpoint.get("distillation"), self.settings()
        if there is None:
            raise ValueError("the checkpoint is of another recipe; resume it with the script that made it")
        require_same(there, here)
        super().on_load_checkpoint(checkpoint)

    def settings(self) -> dict[str, object]:
        """What a run that goes on has to share with its beginning."""
        names = ("divergence", "temperature", "hard_weight", "beta", "alpha")
        found = {"weights of the teachers": [teacher.digest for teacher in self.teachers]}
        found |= {name: getattr(self, name) for name in names}
        for name in ("inner", "on_policy"):
            value = getattr(self, name)
            found[name] = "none" if value is None else str(value)
        return found

    # What it is, in words

    def about(self) -> dict[str, object]:
        if not self.learns_from_teachers:
            return super().about() | {"teachers": []}
        return super().about() | {"teachers": [teacher.folder for teacher in self.teachers]} | self.settings()

    def plan(self) -> dict[str, str]:
        if not self.learns_from_teachers:
            return {"teacher": "none, for comparison"}
        how = f"{self.divergence} at temperature {self.temperature}, {self.hard_weight} of the labels' own loss"
        rows = {"teacher": self.describe_teachers(), "matched": how}
        if self.inner is not None:
            rows["inside"] = self.inner.describe()
        if self.on_policy is not None:
            rows["on policy"] = f"{100 * self.on_policy.share:.0f} % of the rows are the student's own"
        return rows

    def describe_teachers(self) -> str:
        return ", ".join(teacher.describe() for teacher in self.teachers)

    def made_from(self, data: LightningDataModule) -> str:
        teachers = ", ".join(teacher.folder for teacher in self.teachers)
        return f"{super().made_from(data)} Teacher: {teachers}."


def _require_range(name: str, value: Ramp, low: float, high: float) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2) or not all(low <= number <= high for number in values):
        raise ValueError(f"--model.{name} is {value}; pass a number from {low:g} to {high:g}, or two to go between")


def _at(value: Ramp, place: float) -> float:
    """Of a number or a pair, `place` (0 to 1) of the way."""
    if not isinstance(value, list):
        return value
    return value[0] + (value[-1] - value[0]) * place
