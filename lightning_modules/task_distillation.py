"""Distillation of the tasks of fine-tuning: a teacher that was fine-tuned, beside examples with their answers.

Shape suffixes: B examples, T tokens, U tokens of an answer, L labels, N any count of labels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel

from lightning_modules.classification import PROBLEMS, Classification, labels_of
from lightning_modules.completion import Completion, left_padded
from lightning_modules.finetune import NEW, FineTune
from lightning_modules.inner_signals import Seen, seen_by, up_to_last_label
from lightning_modules.losses import IGNORED, Head
from lightning_modules.model_folder import find_folder, load_tokenizer, newest_task, read_config
from lightning_modules.on_policy import write
from lightning_modules.question_answering import QuestionAnswering
from lightning_modules.student import PartOfTeacher
from lightning_modules.summarization import Summarization
from lightning_modules.taught import Target, Taught
from lightning_modules.teacher import Teacher
from lightning_modules.text_generation import TextGeneration
from lightning_modules.translation import Translation


class TaskDistillation(Taught, FineTune):
    """A student of a fine-tuned model.

    Args:
        student: A transformers config by name, for new weights; a folder or Hub name, to go on from; or some of the
            teacher's layers, as {teacher_layers: [0, 2]}, with the teacher's head.
    """

    def __init__(
        self,
        *,
        student: PreTrainedConfig | PartOfTeacher | str,
        teacher: str | list[str] | None = None,
        **settings: object,
    ):
        self.student, named = student, teacher[0] if isinstance(teacher, list) and teacher else teacher
        origin, architecture = (student, None) if isinstance(student, str) else (NEW, student)
        if isinstance(student, PartOfTeacher):
            architecture = student.config(read_config(find_folder(self.teacher_named(named)), "--model.teacher"))
        super().__init__(from_=origin, architecture=architecture, teacher=teacher, **settings)
        if self.on_policy is not None and self.objective != "completions":
            raise ValueError(f"--model.on_policy is for what is written, not for {type(self).__name__}; leave it out")
        for name in ("label_smoothing", "class_weights", "prompt_tokens"):
            if vars(self).get(name):
                raise ValueError(f"--model.{name} is not for a student of a teacher; leave it out")

    @property
    def student_folder(self) -> str | None:
        return self.student if isinstance(self.student, str) else None

    @classmethod
    def default_teacher(cls) -> str | None:
        """The newest model in runs/ that was fine-tuned for this task."""
        return newest_task(cls.__name__.removesuffix("Distillation"))

    def new_network(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        for teacher in self.teachers:
            self._require_positions(teacher.positions, f"--model.teacher {teacher.folder}")
        if isinstance(self.student, PartOfTeacher):
            for name, value in fields.items():
                setattr(self.architecture, name, value)
            network = auto_class.from_config(self.architecture, dtype=torch.float32)
            self.begin_as_part(network)
            return network
        words = self.trainer.datamodule.tokenizer.get_vocab()
        if isinstance(self.student, str) and load_tokenizer(self.origin).get_vocab() != words:
            raise ValueError(
                f"--model.student {self.student} has another tokenizer than its teacher, by which the data are read; "
                "take models that share one"
            )
        return super().new_network(auto_class, fields)

    def made_from(self, data: LightningDataModule) -> str:
        said = super().made_from(data)
        if not isinstance(self.student, PartOfTeacher):
            return said
        layers = ", ".join(map(str, self.student.teacher_layers))
        return said.replace(" from new weights", f" from layers {layers} of its teacher")

    def next_command(self, model: str, data: LightningDataModule) -> str:
        """For the terminal; `model` is quoted."""
        return super().next_command(model, data).replace("recipes/finetune.py", "recipes/distill.py")

    # The loss

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        labels_N = batch["labels"].flatten()
        return labels_N[labels_N != IGNORED]

    def label_count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["rows"] >= 0).sum()

    def seen(self, batch: dict[str, Tensor]) -> dict[str, Seen]:
        """An example counts once, whatever its length."""
        is_real_BT, once_B = batch["attention_mask"].bool(), (batch["rows"] >= 0).float()
        if self.base_config.is_encoder_decoder:  # its decoder reads the text once more
            return {"encoder": seen_by(is_real_BT, once_B, False), "decoder": seen_by(is_real_BT, once_B, True)}
        return {"layers": seen_by(is_real_BT, once_B, not self.is_encoder)}

    @property
    def is_encoder(self) -> bool:
        return type(self.base_config) in AutoModelForMaskedLM._model_mapping

    # What it is worth

    def read(self, batch: dict[str, Tensor], network: PreTrainedModel) -> Tensor:
        """What another network than the student makes of a batch."""
        return self.logits(batch, network)

    @contextmanager
    def with_network(self, network: PreTrainedModel) -> Iterator[None]:
        """Validates another network as if it were the student."""
        own, self.network = self.network, network
        adapter, self.adapter = self.adapter, None  # a network as it is
        predictions, self.predictions = self.predictions, {}
        try:
            self.prepare(network)
            yield
        finally:
            self.network, self.predictions, self.adapter = own, predictions, adapter
            if own is not None:
                self.prepare(self.plain_network)

    @torch.no_grad()
    def judged(self, network: PreTrainedModel) -> dict[str, float]:
        strategy = self.trainer.strategy
        with self.with_network(network.eval()):
            for i, batch in enumerate(self.trainer.datamodule.val_dataloader()):
                self.validation_step(strategy.batch_to_device(batch), i)
            found = {name: float(value) for name, value in self.found().items()}
        return {"nats": found.pop("loss")} | found


class ClassificationDistillation(TaskDistillation, Classification):
    """Of labels. The teacher has the same ones, in any order; of numbers the squared distance is matched."""

    counted = "example"

    @cached_property
    def orders(self) -> dict[int, Tensor]:
        """For each teacher's network the places of the data's labels among its own."""
        names, found = self.trainer.datamodule.label_names, {}
        for teacher in self.teachers:
            own, problem = labels_of(teacher.config), teacher.config.problem_type
            if sorted(own) != sorted(names) and self.kind != "number":
                raise ValueError(
                    f"--model.teacher {teacher.folder} has the labels {', '.join(own)}, the data "
                    f"{', '.join(names)}; pass a teacher of these labels"
                )
            if problem not in (None, PROBLEMS[self.kind]) or (self.kind == "number" and len(own) != 1):
                raise ValueError(
                    f"--model.teacher {teacher.folder} is of {problem or f'{len(own)} labels'}, and the data are of "
                    f"{PROBLEMS[self.kind]}; pass a teacher of the same"
                )
            if own != names and self.kind != "number":
                found[id(teacher.network)] = torch.tensor([own.index(name) for name in names])
        return found

    def head_fields(self) -> dict[str, object]:
        fields = super().head_fields()
        assert self.orders is not None  # refuses other labels before anything is trained
        return fields

    def new_network(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        network = super().new_network(auto_class, fields)
        is_part = isinstance(self.student, PartOfTeacher)
        return self.with_labels_of(self.teachers[0].config, network) if is_part else network

    def logits(self, batch: dict[str, Tensor], network: PreTrainedModel | None = None) -> Tensor:
        network = network or self.plain_network
        logits_BL, order_L = super().logits(batch, network), self.orders.get(id(network))
        return logits_BL if order_L is None else logits_BL[:, order_L]

    def student_head(self, batch: dict[str, Tensor]) -> Head:
        return self._head(self.logits(batch), batch)

    def teacher_head(self, batch: dict[str, Tensor], teacher: Teacher) -> Head:
        return self._head(teacher.asked(partial(self.logits, batch)), batch)

    def _head(self, logits_BL: Tensor, batch: dict[str, Tensor]) -> Head:
        """Of several labels each is a choice of two, whose logits are 0 and its own."""
        logits_BL = logits_BL[batch["rows"] >= 0]
        if self.kind != "several":
            return Head(logits_BL)
        return Head(torch.stack([torch.zeros_like(logits_BL), logits_BL], -1).flatten(0, 1))

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][batch["rows"] >= 0].flatten()
        return labels if self.kind == "number" else labels.long()

    def matched(self, student, target: Target, labels_N, is_own_N, matching, divisor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind != "number":
            return super().matched(student, target, labels_N, is_own_N, matching, divisor)
        taught_N = torch.stack([head.hidden_NC[:, 0] for head in target]).mean(0)
        distance = (student.hidden_NC[:, 0] - taught_N).square().sum()
        error = (student.hidden_NC[:, 0] - labels_N).square().sum()
        objective = torch.lerp(distance, error, float(matching.hard_weight))
        return objective / divisor, error.detach(), distance.detach()


class QuestionAnsweringDistillation(TaskDistillation, QuestionAnswering):
    """Of an answer's first and of its last token."""

    counted = "window"

    def __init__(self, **settings: object):
        super().__init__(**settings)
        if self.divergence == "mse":
            raise ValueError("--model.divergence mse would centre over places where no answer can be; take forward_kl")

    def student_head(self, batch: dict[str, Tensor]) -> Head:
        return self._head(self.logits(batch), batch)

    def teacher_head(self, batch: dict[str, Tensor], teacher: Teacher) -> Head:
        return self._head(teacher.asked(partial(self.logits, batch)), batch)

    @staticmethod
    def _head(logits_BT2: Tensor, batch: dict[str, Tensor]) -> Head:
        return Head(logits_BT2[batch["rows"] >= 0].transpose(1, 2).flatten(0, 1))


class CompletionDistillation(TaskDistillation, Completion):
    """Of every token of the answers."""

    @property
    def vocabulary(self) -> int:
        return self.trainer.datamodule.vocab_size

    def label_count(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORED).sum()

    def student_head(self, batch: dict[str, Tensor]) -> Head:
        head = self.token_loss.head(partial(self.plain_network, **self.inputs(batch)))
        return head.rows(batch["labels"].flatten() != IGNORED)

    def teacher_head(self, batch: dict[str, Tensor], teacher: Teacher) -> Head:
        head = teacher.head(lambda network: network(**self.inputs(batch, network.config)))
        return head.rows(batch["labels"].flatten() != IGNORED)

    def seen(self, batch: dict[str, Tensor]) -> dict[str, Seen]:
        count_B = (batch["labels"] != IGNORED).sum(-1)
        if not self.encodes_apart:
            return {"layers": seen_by(up_to_last_label(batch["labels"]), count_B, True)}
        encoder = seen_by(batch["attention_mask"].bool(), count_B, False)
        return {"encoder": encoder, "decoder": seen_by(up_to_last_label(batch["labels"]), count_B, True)}

    def teachers_rows(self, batch: dict[str, Tensor]) -> list[dict[str, object]]:
        """The examples with the teacher's answers instead of theirs, but where it writes nothing."""
        data = self.trainer.datamodule
        batch = {name: value.to(self.teachers[0].network.device) for name, value in batch.items()}
        answers = self.write(batch)
        pairs = zip(batch["rows"].tolist(), answers, strict=True)
        records = self.training_records
        return [data.row(records[row], [text] if text else records[row]["references"]) for row, (text, _) in pairs]

    def writing_settings(self) -> dict[str, object]:
        return {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}

    @contextmanager
    def teacher_writes(self) -> Iterator[None]:
        with self.with_network(self.teachers[0].network):
            yield

    @cached_property
    def training_records(self) -> list[dict[str, object]]:
        return self.trainer.datamodule.store.records("train")

    @torch.no_grad()
    def written(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """The student's answers to some of the prompts, each up to its end, as long as the longest in the data or as
        both models have room for."""
        longest, rows_B = self.trainer.datamodule.longest_answer, batch["rows"]
        numbers_BU = self.on_policy.numbers(self.seed, rows_B, longest).to(rows_B.device)
        lengths_B = torch.ones_like(rows_B) if self.encodes_apart else batch["prompt_lengths"]
        positions = min(found or 2**31 for found in (self.positions, *(teacher.positions for teacher in self.teachers)))
        new_B = (positions - lengths_B + 1).clamp(max=longest)  # what is written last is not read
        is_own_B = (numbers_BU[:, 0] < self.on_policy.share) & (rows_B >= 0) & (new_B > 0)
        own_B = is_own_B.nonzero()[:, 0]
        if not len(own_B):
            return batch, None
        answers_bU = torch.full((len(own_B), longest), IGNORED, device=rows_B.device)
        for new in new_B[own_B].unique().tolist():  # a row's room is its own, whatever it shares a batch with
            some = (new_B[own_B] == new).nonzero()[:, 0]
            found_bU = self._own_answers(
                {n: v[own_B[some]] for n, v in batch.items()}, numbers_BU[own_B[some], 1:], new
            )
            answers_bU[some, : found_bU.shape[1]] = found_bU
        changed = self._with_answers(batch, own_B, answers_bU)
        return changed, is_own_B[:, None].expand_as(changed["labels"])[changed["labels"] != IGNORED]

    def _own_answers(self, batch: dict[str, Tensor], numbers_BU: Tensor, new: int) -> Tensor:
        """(B, U) of at most `new` tokens; IGNORED behind the end."""
        settings = self.generation(new)
        settings.num_beams = 1
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if not self.encodes_apart:
            ids_BP, mask_BP = left_padded(batch["input_ids"], batch["prompt_lengths"], self.trainer.datamodule.pad_id)
            prompts = {"input_ids": ids_BP, "attention_mask": mask_BP}
        before = 1 if self.encodes_apart else prompts["input_ids"].shape[1]
        drawn = (numbers_BU, self.vocabulary, self.on_policy.temperature)
        ids_BU = write(self.plain_network, prompts, *drawn, settings)[:, before:]
        is_end_BU = torch.isin(ids_BU, torch.tensor(settings.eos_token_id, device=ids_BU.device))
        return ids_BU.masked_fill(is_end_BU.cumsum(-1) - is_end_BU.long() > 0, IGNORED)

    def _with_answers(self, batch: dict[str, Tensor], own_B: Tensor, answers_bU: Tensor) -> dict[str, Tensor]:
        ids_BT, labels, pad = batch["input_ids"], batch["labels"], self.trainer.datamodule.pad_id
        if self.encodes_apart:
            written = int((answers_bU != IGNORED).sum(-1).max())
            return batch | {"labels": _put(labels, own_B, answers_bU[:, :written], IGNORED)}
        lengths_b = batch["prompt_lengths"][own_B]
        width = int((lengths_b + (answers_bU != IGNORED).sum(-1)).max()) - 1
        read_bT = answers_bU.new_full((len(own_B), width), pad)
        learnt_bT = torch.full_like(read_bT, IGNORED)
        for i, (row, length) in enumerate(zip(own_B.tolist(), lengths_b.tolist(), strict=True)):
            answer_U = answers_bU[i][answers_bU[i] != IGNORED]
            read_bT[i, :length] = ids_BT[row, :length]
            read_bT[i, length : length + len(answer_U) - 1] = answer_U[:-1]
            learnt_bT[i, length - 1 : length + len(answer_U) - 1] = answer_U
        changed = {"input_ids": _put(ids_BT, own_B, read_bT, pad), "labels": _put(labels, own_B, learnt_bT, IGNORED)}
        return batch | changed


def _put(whole_BT: Tensor, rows_b: Tensor, some_bT: Tensor, filling: int) -> Tensor:
    """Some rows in place of others, as wide as the widest."""
    width = max(whole_BT.shape[1], some_bT.shape[1])
    wide_BT, wide_bT = (F.pad(part, (0, width - part.shape[1]), value=filling) for part in (whole_BT, some_bT))
    return wide_BT.index_copy(0, rows_b, wide_bT)


class TextGenerationDistillation(CompletionDistillation, TextGeneration):
    """Of answers to instructions and in conversations."""


class TranslationDistillation(CompletionDistillation, Translation):
    """Of texts in another language."""


class SummarizationDistillation(CompletionDistillation, Summarization):
    """Of summaries."""
