"""What the datamodules of tasks that write share: prompts and the answers to them, for decoders and encoder-decoders.

Shape suffixes: B examples, T tokens of the longest input of them, U of the longest target, N any count.
"""

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from jinja2 import TemplateError
from torch import from_numpy
from transformers import PreTrainedTokenizerBase

from datamodules.base import IGNORED, Batch
from datamodules.chat_template import Message, with_template
from datamodules.conversations import Conversations, Encoded, Learnt, shortened
from datamodules.example_store import Fields, Ragged
from datamodules.examples import Examples, Numbered
from datamodules.files import BadRows
from datamodules.records import Record


class Completions(Examples):
    """A subclass says which conversation an example is. A record has `references`: one or several right answers.

    A decoder reads the conversation by its chat template, and the labels are the answers; an encoder-decoder reads all
    that stands before the last answer, and writes it. Each answer is learnt with its end of text.

    Args:
        max_length: Tokens of a prompt with its answer, or of the prompt alone where an encoder reads it. Of a longer
            one the longest message is cut off at its end, and it is counted.
        max_target_length: Tokens of an answer with its end; longer ones are cut off before their end and counted. Left
            out: as max_length.
        learn: answers, of a conversation all of them; the last_answer alone; or all that a decoder reads.
        chat_template: File of a Jinja template for decoders. Left out: the tokenizer's own, else a plain one.
    """

    objective = "completions"

    def __init__(
        self,
        *,
        max_length: int = 256,
        max_target_length: int | None = None,
        learn: Learnt = "answers",
        chat_template: str | None = None,
        **settings: object,
    ):
        super().__init__(max_length=max_length, **settings)
        if max_target_length is not None and max_target_length < 1:
            raise ValueError(f"--data.max_target_length is {max_target_length}; it must be 1 or more")
        self.max_target_length = max_target_length or self.max_length
        self.chat_template = chat_template
        self.learn = learn

    @abstractmethod
    def conversation(self, record: Record) -> list[Message]:
        """All before the last answer, which is the first of the references."""

    @property
    def encodes_apart(self) -> bool:
        """Whether the model reads prompts by an encoder."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return module is not None and module.base_config.is_encoder_decoder

    def settings(self) -> dict[str, object]:
        return {
            "apart": self.encodes_apart,
            "learn": self.learn,
            "max_target_length": self.max_target_length,
        }

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, by which an answer stops; pass another one")
        if not self.encodes_apart:
            with_template(tokenizer, self.chat_template)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.encodes_apart:
            self.tokens_per_row += float(self.store.train["labels"].lengths.mean())
            self.seq_len = max(self.seq_len, self.longest_answer)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer in the data, with its end."""
        found = []
        for fields in (self.store.train, self.store.val):
            labels: Ragged = fields["labels"]
            answers = labels.lengths if self.encodes_apart else labels.lengths - fields["prompt_length"] + 1
            found.append(int(answers.max()))
        return max(found)

    def costs(self, fields: Fields) -> np.ndarray:
        lengths = fields["input_ids"].lengths
        return lengths + fields["labels"].lengths if self.encodes_apart else lengths

    def texts(self, record: Record) -> str:
        return "\n".join([message["content"] for message in self.conversation(record)] + record["references"])

    # Numbers

    def encode(self, train: list[Numbered], val: list[Numbered], bad_rows: BadRows) -> tuple[Fields, Fields, dict]:
        # Each right answer is trained on; held-out text counts its first.
        train[:] = [
            (place, record | {"references": [reference]})
            for place, record in train
            for reference in record["references"]
        ]
        bad_rows.notes["prompts cut"] = bad_rows.notes["answers cut"] = 0
        fields = [self._fields(examples, bad_rows) for examples in (train, val)]
        cut = {name: bad_rows.notes[f"{name} cut"] for name in ("prompts", "answers")}
        return *fields, {"cut": cut} | self.about()

    def encode_asked(self, examples: list[Numbered], bad_rows: BadRows) -> Fields:
        """A prompt leaves room for the longest answer in the data."""
        asked = [(place, record | {"references": [""]}) for place, record in examples]
        fields = self._fields(asked, bad_rows, room=min(self.longest_answer, self.max_length // 2))
        known = {place for place, _ in asked}
        examples[:] = [(place, record) for place, record in examples if place in known]
        return fields

    def _fields(self, examples: list[Numbered], bad_rows: BadRows, room: int = 0) -> Fields:
        """Takes conversations that cannot be read out of the list."""
        if self.encodes_apart:
            found = list(self._apart([record for _, record in examples], bad_rows))
        else:
            found, known = [], []
            conversations = Conversations(self.tokenizer, self.learn, self.max_length, self.max_target_length)
            for place, record in examples:
                try:
                    found.append(conversations.encoded(self.conversation(record), record["references"][0], room))
                except TemplateError as error:
                    bad_rows.add(place.rpartition(":")[0], f"{place}: the chat template says: {error}")
                except ValueError as error:
                    bad_rows.add(place.rpartition(":")[0], f"{place}: {error}")
                else:
                    known.append((place, record))
            examples[:] = known
            bad_rows.notes["prompts cut"] += conversations.prompts_cut
            bad_rows.notes["answers cut"] += conversations.answers_cut
        return {
            "input_ids": Ragged.of([example.input_ids for example in found]),
            "labels": Ragged.of([example.labels for example in found]),
            "prompt_length": np.array([example.prompt_length for example in found], np.int64),
            "label_bytes": np.array([example.label_bytes for example in found], np.int64),
        }

    def about(self) -> dict[str, object]:
        """What else is to be told."""
        return {}

    def _apart(self, rows: list[Record], bad_rows: BadRows) -> Iterator[Encoded]:
        if not rows:
            return
        sources = ["\n\n".join(message["content"] for message in self.conversation(row)) for row in rows]
        targets = [row["references"][0] for row in rows]
        tokenizer, end = self.tokenizer, self.tokenizer.eos_token_id
        whole = [len(ids) for ids in tokenizer(sources, verbose=False)["input_ids"]]
        inputs = tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"]
        answers = tokenizer(text_target=targets, verbose=False)["input_ids"]
        for length, ids, answer, text in zip(whole, inputs, answers, targets, strict=True):
            bad_rows.notes["prompts cut"] += length > len(ids)
            answer = answer if answer[-1:] == [end] else [*answer, end]
            labels = shortened(answer, self.max_target_length)
            if len(labels) < len(answer):
                bad_rows.notes["answers cut"] += 1
                text = tokenizer.decode(labels, skip_special_tokens=True)
            yield Encoded(ids, labels, len(ids), len(text.encode()))

    # Batches

    def collate(self, fields: Fields, numbers_B: np.ndarray, examples_B: np.ndarray) -> Batch:
        ids: Ragged = fields["input_ids"]
        ids_BT = ids.padded(examples_B, self.pad_id)
        known_B = np.maximum(examples_B, 0)
        lengths_B = np.where(examples_B < 0, 1, ids.lengths[known_B])
        return Batch(
            input_ids=from_numpy(ids_BT),
            attention_mask=from_numpy((np.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(np.int64)),
            labels=from_numpy(fields["labels"].padded(examples_B, IGNORED)),
            rows=from_numpy(numbers_B),
            prompt_lengths=from_numpy(np.where(examples_B < 0, 1, fields["prompt_length"][known_B])),
            label_bytes=from_numpy(np.where(examples_B < 0, 0, fields["label_bytes"][known_B])),
        )

    def batches_in_order(self, first: int, last: int) -> Iterator[Batch]:
        """The examples of training from one to another, as they stand in the data."""
        for start in range(first, last, self.batch_size):
            examples_B = np.arange(start, min(last, start + self.batch_size))
            yield self.collate(self.store.train, examples_B, examples_B)

    @abstractmethod
    def row(self, record: Record, answers: list[str]) -> dict[str, object]:
        """An example with these right answers, as a line of a file that this class reads."""

    def held_out_rows(self) -> Iterator[dict[str, object]]:
        return (self.row(record, record["references"]) for record in self.store.records("val"))

    # What it is

    def shown(self, example: int) -> list[tuple[str, bool]]:
        ids, labels = self.store.train["input_ids"][example], self.store.train["labels"][example]
        if self.encodes_apart:
            return [(self.tokenizer.decode(ids), False), (self.tokenizer.decode(labels), True)]
        whole = np.append(ids, labels[-1])
        learnt = np.append(False, labels != IGNORED)
        borders = [0, *(np.flatnonzero(learnt[1:] != learnt[:-1]) + 1).tolist(), len(whole)]
        pairs = zip(borders, borders[1:], strict=False)
        return [(self.tokenizer.decode(whole[start:end]), bool(learnt[start])) for start, end in pairs]

    def plan(self) -> dict[str, str]:
        about = self.store.about
        train, val = self.store.train, self.store.val
        labels = int((train["labels"].values_N != IGNORED).sum())
        tokens = int(train["input_ids"].lengths.sum()) + labels * self.encodes_apart
        limits = {"prompts": self.max_length, "answers": self.max_target_length}
        cut = [f"{count:,} {name} at {most} tokens" for name, most in limits.items() if (count := about["cut"][name])]
        return {
            "text": f"{self.source}: {len(train['labels']):,} examples, {tokens:,} tokens, {labels:,} of them learnt",
            "columns": ", ".join(f"{name} from {column!r}" for name, column in about.get("columns", {}).items()),
            "held out": f"{len(val['labels']):,} examples",
            "cut off": ", ".join(cut),
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in about["skipped_rows"].items()),
        }
