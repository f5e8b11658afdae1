"""Distillation of language models: the objectives of pretraining, with a teacher beside the text.

Shape suffixes: B rows, T positions, N tokens.
"""

from functools import partial
from typing import Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules.architectures import build, fit_config
from lightning_modules.distillation_loss import Matching, Sparse, kept_words, linear_distillation
from lightning_modules.divergences import Divergence
from lightning_modules.language_module import LanguageModule
from lightning_modules.losses import IGNORED, Head
from lightning_modules.model_folder import newest_pretraining
from lightning_modules.pretrain import CausalLM, MaskedLM, SpanDenoising
from lightning_modules.scheduled_step import require_same
from lightning_modules.student import PartOfTeacher
from lightning_modules.teacher import Teacher

Ramp = float | list[float]
"""A number, or two: from the first at the beginning of the run straight to the second at its end."""


class KeptAs(Protocol):
    """Of the header of a cache, what decides which words are kept."""

    words: int
    temperature: float
    exact: int
    drawn: int


class Distilled(LanguageModule):
    """A student that learns what a teacher makes of the same text.

    Args:
        teacher: A run's folder, a model's folder or a Hub name; several count by the mean of their probabilities. Left
            out: the newest pretraining in runs/ with such a head.
        student: A transformers config by name, for new weights; a folder or Hub name, to go on from; or some of the
            teacher's layers, as {teacher_layers: [0, 2]}.
        divergence: What is minimised between the teacher's distribution p and the student's q: forward_kl is KL(p ‖ q).
        temperature: Divides both models' logits; two numbers go from the first to the second over the run.
        hard_weight: Share of the cross-entropy of the text itself in the objective; 1 is training without a teacher.
        beta: Of jsd, from 0 (forward_kl) to 1 (reverse_kl).
        alpha: Of the skewed divergences: share of the one distribution that is mixed into the other.
    """

    more_sums = ("divergence",)

    def __init__(
        self,
        *,
        student: PreTrainedConfig | PartOfTeacher | str,
        teacher: str | list[str] | None = None,
        divergence: Divergence = "forward_kl",
        temperature: Ramp = 1.0,
        hard_weight: Ramp = 0.0,
        beta: float = 0.5,
        alpha: float = 0.1,
        **settings: object,
    ):
        super().__init__(architecture=student if isinstance(student, PreTrainedConfig) else None, **settings)
        if self.label_smoothing or self.z_loss:
            raise ValueError("--model.label_smoothing and --model.z_loss change what a teacher says; leave them out")
        _require_range("temperature", temperature, 1e-3, 1e3)
        _require_range("hard_weight", hard_weight, 0.0, 1.0)
        _require_range("beta", beta, 0.0, 1.0)
        _require_range("alpha", alpha, 0.0, 0.99)
        names = teacher if isinstance(teacher, list) else [teacher or default_teacher(self.auto_class)]
        if not names or None in names:
            raise ValueError("no pretraining in runs/ could be the teacher; pass a folder by --model.teacher")
        self.teachers = [Teacher(name, self.auto_class) for name in names]
        self.start = self.teachers[0].folder
        self.student = Teacher(student, self.auto_class, "--model.student") if isinstance(student, str) else student
        self.divergence: Divergence = divergence
        self.temperature, self.hard_weight = temperature, hard_weight
        self.beta, self.alpha = beta, alpha
        self._matching: tuple[int, Matching] | None = None

    # The networks

    def new_network(self) -> PreTrainedModel:
        data = self.trainer.datamodule
        for model in (*self.teachers, self.student):
            if isinstance(model, Teacher):
                model.require_fit(data)
        self._require_cache(data)
        if self.learns_from_teachers and data.teacher_cache is None:
            self.load_teachers()
        if isinstance(self.student, PreTrainedConfig):
            return super().new_network()
        if isinstance(self.student, Teacher):
            self.architecture = self.student.config
            return self.student.read()
        self.architecture = self.student.config(self.teachers[0].config)
        fit_config(self.architecture, data.tokenizer, data.vocab_size, data.seq_len)
        if self.architecture.is_encoder_decoder:
            self.architecture.decoder_start_token_id = self.teachers[0].config.decoder_start_token_id
        network = build(self.architecture, self.auto_class, self.seed)
        self.student.fill(network, self.teachers[0].read())
        return network

    @property
    def vocabulary(self) -> int:
        """Ids that count, of both models."""
        return self.trainer.datamodule.vocab_size

    def load_teachers(self) -> None:
        for teacher in self.teachers:
            if teacher.network is None:
                teacher.load(self.trainer.strategy.root_device)

    def _require_cache(self, data: LightningDataModule) -> None:
        """Raises ValueError where what is asked for does not follow from the cache."""
        if data.teacher_cache is None:
            return
        about = data.teacher_cache.about
        if len(self.teachers) > 1 or self.divergence != "forward_kl":
            what = "several teachers" if len(self.teachers) > 1 else self.divergence
            raise ValueError(f"--data.teacher_cache serves forward_kl of one teacher, not {what}; leave the cache out")
        if self.temperature not in (about.temperature, [about.temperature] * 2):
            raise ValueError(
                f"the teacher's cache is of temperature {about.temperature:g} and --model.temperature is "
                f"{self.temperature}; pass the same, or write another cache"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._require_rows()

    def _require_rows(self) -> None:
        """Raises ValueError where a run of known length would read more than its cache has."""
        data, trainer = self.trainer.datamodule, self.trainer
        if data.teacher_cache is None:
            return
        step = trainer.accumulate_grad_batches * data.rows_per_micro_step
        limits = [trainer.max_steps * step, (trainer.max_epochs or -1) * data.rows_per_epoch]
        if self.max_tokens:
            limits.append(-(-self.max_tokens // int(step * data.tokens_per_row)) * step)
        planned = min((rows for rows in limits if rows > 0), default=0)
        # What a decoder reads is the same in each epoch; the noise of the others is not.
        needed = min(planned, data.rows_per_epoch) if self.objective == "causal" else planned
        if self.objective != "causal" and not planned:
            raise ValueError(
                "the noise of another epoch is not in a teacher's cache: say how long the run is by --trainer.max_steps"
            )
        if needed > (rows := data.teacher_cache.about.rows):
            raise ValueError(
                f"the teacher's cache has {rows:,} rows, and this run reads {needed:,}; write it with --rows {needed}"
            )

    @property
    def learns_from_teachers(self) -> bool:
        return self.hard_weight != 1.0

    # The loss

    def training_loss(self, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, ...]:
        if not self.learns_from_teachers:
            objective, nats, count = self.loss(batch, divisor)
            return objective, nats, count, torch.zeros_like(nats)
        labels_N = batch["labels"].flatten()
        keep_N = labels_N != IGNORED
        count = keep_N.sum()
        student = self.token_loss.head(partial(self.network, **self.inputs(batch)))
        if "teacher_ids" in batch:
            parts = [batch.get(f"teacher_{name}") for name in ("ids", "shares", "tail", "entropy")]
            target = Sparse(*(None if part is None else part.flatten(0, 1) for part in parts))
        else:
            target = [teacher.head(partial(self.read, batch)) for teacher in self.teachers]
        if self.keep_only_labels:
            student, labels_N = student.rows(keep_N), labels_N[keep_N]
            target = target.rows(keep_N) if isinstance(target, Sparse) else [head.rows(keep_N) for head in target]
        settings = {"words": self.vocabulary, "divisor": divisor}
        objective, nats, divergence = linear_distillation(student, target, labels_N, self.matching(), **settings)
        return objective, nats, count, divergence

    @torch.no_grad()
    def kept_words(self, batch: dict[str, Tensor], about: KeptAs, seed: int) -> dict[str, np.ndarray]:
        """Of the teacher at every label of a batch, (B, T, …), what a cache holds: see distillation_loss.kept_words."""
        batch = {name: value.to(self.teachers[0].network.device) for name, value in batch.items()}
        head = self.teachers[0].head(partial(self.read, batch))
        found = kept_words(head, about.words, about.temperature, about.exact, about.drawn, seed)
        return {
            name: value.view(*batch["labels"].shape, *value.shape[1:]).cpu().numpy() for name, value in found.items()
        }

    def read(self, batch: dict[str, Tensor], network: PreTrainedModel):
        """What another network than the student makes of a batch."""
        return network(**self.inputs_of(batch, network.config))

    def matching(self) -> Matching:
        """At this place of the run, the same for all micro-batches of a step."""
        step = self.trainer.global_step
        if self._matching is None or self._matching[0] != step:
            at = [_at(value, self.progress()) for value in (self.temperature, self.hard_weight)]
            self._matching = step, Matching(self.divergence, *at, self.beta, self.alpha)
        return self._matching[1]

    @torch.no_grad()
    def compared(self, batch: dict[str, Tensor], network: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over a batch: nats of a network, its KL from the first teacher, labels, and their UTF-8 bytes."""
        labels_N = batch["labels"].flatten()
        keep_N = labels_N != IGNORED
        logits_NV = self.read(batch, network).logits.flatten(0, 1)[keep_N]
        teacher_NV = self.read(batch, self.teachers[0].network).logits.flatten(0, 1)[keep_N]
        labels_N = labels_N[keep_N]
        student, teacher = Head(logits_NV), Head(teacher_NV)
        _, nats, kl = linear_distillation(student, [teacher], labels_N, Matching(), words=self.vocabulary)
        return nats, kl, keep_N.sum(), self.token_bytes.to(labels_N.device)[labels_N].sum()

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
        cache = self.trainer.datamodule.teacher_cache
        of_cache = "none" if cache is None else cache.about.of_words
        return {"weights of the teachers": [teacher.digest for teacher in self.teachers], "cache": of_cache} | {
            name: getattr(self, name) for name in names
        }

    # What it is, in words

    def about(self) -> dict[str, object]:
        if not self.learns_from_teachers:
            return {"teachers": []}
        return {"teachers": [teacher.folder for teacher in self.teachers]} | self.settings()

    def plan(self) -> dict[str, str]:
        if not self.learns_from_teachers:
            return {"teacher": "none, for comparison"}
        how = f"{self.divergence} at temperature {self.temperature}, {self.hard_weight} of the text's own loss"
        cache = self.trainer.datamodule.teacher_cache
        if cache is not None:
            about = cache.about
            return {
                "teacher": f"{cache.folder}: {about.of_words}, {about.bytes_of_a_token:.1f} bytes a token",
                "matched": how,
            }
        return {"teacher": ", ".join(teacher.describe() for teacher in self.teachers), "matched": how}

    def made_from(self, data: LightningDataModule) -> str:
        teachers = ", ".join(teacher.folder for teacher in self.teachers)
        return f"{super().made_from(data)} Teacher: {teachers}."


class CausalDistillation(Distilled, CausalLM):
    """Of a decoder: every next token."""


class MaskedDistillation(Distilled, MaskedLM):
    """Of an encoder: every masked token."""


class DenoisingDistillation(Distilled, SpanDenoising):
    """Of an encoder-decoder: every token of the spans that were cut out."""


def default_teacher(auto_class: type) -> str | None:
    """The newest pretraining in runs/ that no teacher taught."""

    def fits(config: PreTrainedConfig) -> bool:
        found = auto_class._model_mapping.get(type(config), None)
        return found is not None and found.__name__ in (config.architectures or ())

    return newest_pretraining(fits, distilled=False)


def _require_range(name: str, value: Ramp, low: float, high: float) -> None:
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2) or not all(low <= number <= high for number in values):
        raise ValueError(f"--model.{name} is {value}; pass a number from {low:g} to {high:g}, or two to go between")


def _at(value: Ramp, place: float) -> float:
    """Of a number or a pair, `place` (0 to 1) of the way."""
    if not isinstance(value, list):
        return value
    return value[0] + (value[-1] - value[0]) * place
