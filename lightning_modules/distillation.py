"""Distillation of language models: the objectives of pretraining, with a teacher beside the text.

Shape suffixes: B rows, T positions, N tokens.
"""

import math
from functools import partial
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from lightning_modules.architectures import build, fit_config
from lightning_modules.distillation_loss import Matching, Sparse, kept_words, linear_distillation
from lightning_modules.inner_signals import Seen, seen_by, up_to_last, up_to_last_label
from lightning_modules.language_module import LanguageModule
from lightning_modules.losses import IGNORED, Head
from lightning_modules.model_folder import newest_pretraining
from lightning_modules.on_policy import write
from lightning_modules.pretrain import CausalLM, MaskedLM, SpanDenoising
from lightning_modules.student import PartOfTeacher
from lightning_modules.taught import Target, Taught
from lightning_modules.teacher import Teacher


class KeptAs(Protocol):
    """Of the header of a cache, what decides which words are kept."""

    words: int
    temperature: float
    exact: int
    drawn: int


class Distilled(Taught, LanguageModule):
    """A student of a language model.

    Args:
        student: A transformers config by name, for new weights; a folder or Hub name, to go on from; or some of the
            teacher's layers, as {teacher_layers: [0, 2]}.
    """

    def __init__(self, *, student: PreTrainedConfig | PartOfTeacher | str, **settings: object):
        self.student = student
        super().__init__(architecture=student if isinstance(student, PreTrainedConfig) else None, **settings)
        if self.label_smoothing or self.z_loss:
            raise ValueError("--model.label_smoothing and --model.z_loss change what a teacher says; leave them out")
        if isinstance(student, str):
            self.student = Teacher(student, self.auto_class, "--model.student")
        if self.on_policy is not None and self.objective != "causal":
            raise ValueError(f"--model.on_policy is for what writes on, not for {type(self).__name__}; leave it out")

    # The networks

    @property
    def student_folder(self) -> str | None:
        return self.student if isinstance(self.student, str) else None

    @classmethod
    def default_teacher(cls) -> str | None:
        """The newest pretraining in runs/ that no teacher taught."""

        def fits(config: PreTrainedConfig) -> bool:
            found = cls.auto_class._model_mapping.get(type(config), None)
            return found is not None and found.__name__ in (config.architectures or ())

        return newest_pretraining(fits, distilled=False)

    @property
    def asks_teachers(self) -> bool:
        return self.learns_from_teachers and self.trainer.datamodule.teacher_cache is None

    def new_network(self) -> PreTrainedModel:
        data = self.trainer.datamodule
        self._require_cache(data)
        if self.on_policy is not None:
            self.require_writing(data)
        if isinstance(self.student, PreTrainedConfig):
            return super().new_network()
        if isinstance(self.student, Teacher):
            self.student.require_fit(data)
            self.architecture = self.student.config
            return self.student.read()
        self.architecture = self.student.config(self.teachers[0].config)
        fit_config(self.architecture, data.tokenizer, data.vocab_size, data.seq_len)
        if self.architecture.is_encoder_decoder:
            self.architecture.decoder_start_token_id = self.teachers[0].config.decoder_start_token_id
        network = build(self.architecture, self.auto_class, self.seed)
        self.begin_as_part(network)
        return network

    def require_writing(self, data: LightningDataModule) -> None:
        if not data.cross_document_attention:
            raise ValueError(
                "what is written goes on through documents, by which --data.cross_document_attention false ends "
                "attention; leave the flag out"
            )

    @property
    def plain_network(self) -> PreTrainedModel:
        return self.network

    @property
    def vocabulary(self) -> int:
        """Ids that count, of both models."""
        return self.trainer.datamodule.vocab_size

    def _require_cache(self, data: LightningDataModule) -> None:
        """Raises ValueError where what is asked for does not follow from the cache."""
        if data.teacher_cache is None:
            return
        about = data.teacher_cache.about
        if self.inner is not None or self.on_policy is not None:
            asked = "--model.inner" if self.inner is not None else "--model.on_policy"
            raise ValueError(f"{asked} needs the teacher itself at each step; leave --data.teacher_cache out")
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
        if rows < data.rows_per_epoch and data.lacks_rows(needed or rows):
            raise ValueError(
                f"the teacher's cache has {rows:,} of {data.rows_per_epoch:,} rows, and not those that --data.seed "
                f"{data.seed} begins with; pass the seed that it was written with, or write all rows"
            )

    # The loss

    def student_head(self, batch: dict[str, Tensor]) -> Head:
        head = self.token_loss.head(partial(self.network, **self.inputs(batch)))
        return head.rows(batch["labels"].flatten() != IGNORED) if self.keep_only_labels else head

    def teacher_head(self, batch: dict[str, Tensor], teacher: Teacher) -> Head:
        head = teacher.head(partial(self.read, batch))
        return head.rows(batch["labels"].flatten() != IGNORED) if self.keep_only_labels else head

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        labels_N = batch["labels"].flatten()
        return labels_N[labels_N != IGNORED] if self.keep_only_labels else labels_N

    def label_count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def targets(self, batch: dict[str, Tensor]) -> Target:
        if "teacher_ids" not in batch:
            return super().targets(batch)
        parts = [batch.get(f"teacher_{name}") for name in ("ids", "shares", "tail", "entropy")]
        target = Sparse(*(None if part is None else part.flatten(0, 1) for part in parts))
        return target.rows(batch["labels"].flatten() != IGNORED) if self.keep_only_labels else target

    def seen(self, batch: dict[str, Tensor]) -> dict[str, Seen]:
        ids_BT, labels = batch["input_ids"], batch["labels"]
        count_B = (labels != IGNORED).sum(-1)
        is_read_BT = batch.get("attention_mask", torch.ones_like(ids_BT)).bool()
        positions_BT = batch.get("position_ids")
        if self.objective == "causal":
            return {"layers": seen_by(up_to_last_label(labels), count_B, True, positions_BT)}
        if self.objective == "masked":
            is_text_BT = up_to_last(ids_BT != self.trainer.datamodule.fill_id)
            return {"layers": seen_by(is_text_BT, count_B, False, positions_BT)}
        written = seen_by(up_to_last_label(labels), count_B, True)
        return {"encoder": seen_by(is_read_BT, count_B, False, positions_BT), "decoder": written}

    @torch.no_grad()
    def written(
        self, batch: dict[str, Tensor], network: PreTrainedModel | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The first part of a row is the text's, and carries no loss; the rest is the student's, or another's."""
        ids_BT, labels_BT, T = batch["input_ids"], batch["labels"], batch["input_ids"].shape[1]
        prompt = self.on_policy.prompt_tokens or max(1, T // 4)
        numbers_BU = self.on_policy.numbers(self.seed, batch["rows"], T + 1 - prompt).to(ids_BT.device)
        is_own_B = (numbers_BU[:, 0] < self.on_policy.share) & (labels_BT != IGNORED).all(-1)
        own_B = is_own_B.nonzero()[:, 0]
        if not len(own_B):
            return batch, None
        settings = GenerationConfig(
            max_new_tokens=T + 1 - prompt,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,  # a row goes on with the next document
        )
        prompts = {"input_ids": ids_BT[own_B, :prompt]}
        prompts["attention_mask"] = torch.ones_like(prompts["input_ids"])  # no id of theirs is padding
        drawn = (numbers_BU[own_B, 1:], self.vocabulary, self.on_policy.temperature)
        own_bT = write(network or self.network, prompts, *drawn, settings)
        labels_bT = own_bT[:, 1:].clone()
        labels_bT[:, : prompt - 1] = IGNORED
        changed = {"input_ids": ids_BT.index_copy(0, own_B, own_bT[:, :-1])}
        changed["labels"] = labels_BT.index_copy(0, own_B, labels_bT)
        return batch | changed, is_own_B[:, None].expand(-1, T).flatten()

    def teachers_rows(self, batch: dict[str, Tensor]) -> list[dict[str, str]]:
        """Documents, whole or in part, of the rows that the teacher writes from their beginnings."""
        batch = {name: value.to(self.teachers[0].network.device) for name, value in batch.items()}
        written, _ = self.written(batch, self.teachers[0].network)
        lengths_B = up_to_last_label(written["labels"]).sum(-1)
        tokenizer, texts = self.trainer.datamodule.tokenizer, []
        ends = {self.trainer.datamodule.document_start, tokenizer.eos_token_id}
        for ids_T, labels_T, length in zip(written["input_ids"], written["labels"], lengths_B.tolist(), strict=True):
            ids = torch.cat([ids_T[:length], labels_T[length - 1 : length]]).tolist()
            documents = [list(part) for is_end, part in groupby(ids, ends.__contains__) if not is_end]
            texts += [tokenizer.decode(document, skip_special_tokens=True) for document in documents]
        return [{"text": text} for text in texts if text]

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

    @torch.inference_mode()
    def judged(self, network: PreTrainedModel) -> dict[str, float]:
        """Loss on the held-out text, and divergence from the first teacher there."""
        strategy, sums = self.trainer.strategy, torch.zeros(4, dtype=torch.float64, device=self.device)
        for batch in self.trainer.datamodule.val_dataloader():
            sums += torch.stack([part.double() for part in self.compared(strategy.batch_to_device(batch), network)])
        nats, divergence, tokens, utf8_bytes = (float(value) for value in strategy.reduce(sums, reduce_op="sum"))
        per_byte = nats / utf8_bytes / math.log(2)
        return {"nats": nats / tokens, "bits_per_byte": per_byte, "kl_to_teacher": divergence / tokens}

    # What it is, in words

    def settings(self) -> dict[str, object]:
        cache = self.trainer.datamodule.teacher_cache
        return super().settings() | {"cache": "none" if cache is None else cache.about.of_words}

    def describe_teachers(self) -> str:
        cache = self.trainer.datamodule.teacher_cache
        if cache is None:
            return super().describe_teachers()
        return f"{cache.folder}: {cache.about.of_words}, {cache.about.bytes_of_a_token:.1f} bytes a token"


class CausalDistillation(Distilled, CausalLM):
    """Of a decoder: every next token."""


class MaskedDistillation(Distilled, MaskedLM):
    """Of an encoder: every masked token."""


class DenoisingDistillation(Distilled, SpanDenoising):
    """Of an encoder-decoder: every token of the spans that were cut out."""
