"""What the datamodules of tasks that write share: prompts and the answers to them, for decoders and encoder-decoders.

Shape suffixes: B examples, T tokens of the longest input of them, U of the longest target, N any count.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from torch import from_numpy
from transformers import PreTrainedTokenizerBase

from datamodules.base import IGNORED, Batch
from datamodules.chat_template import Message, Segment, segments, with_template
from datamodules.example_store import Fields, Ragged
from datamodules.examples import Examples, Numbered
from datamodules.files import BadRows
from datamodules.records import Record

Learnt = Literal["answers", "last_answer", "all"]


class Encoded(NamedTuple):
    """An example in numbers."""

    input_ids: list[int]
    labels: list[int]
    """Of a decoder: what each input has to predict. Of an encoder-decoder: what is to be written."""
    prompt_length: int
    """Inputs before the last answer."""
    label_bytes: int
    """UTF-8 bytes of the text that the labels stand for."""


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
        self.prompts_cut = self.answers_cut = 0

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
        answers = [self._answer_lengths(fields) for fields in (self.store.train, self.store.val)]
        self.longest_answer = int(max(lengths.max() for lengths in answers))
        """In tokens, with its end."""
        if self.encodes_apart:
            self.tokens_per_row += float(answers[0].mean())
            self.seq_len = max(self.seq_len, self.longest_answer)

    def _answer_lengths(self, fields: Fields) -> np.ndarray:
        """(N,) tokens of the last answers, with their ends."""
        labels: Ragged = fields["labels"]
        return labels.lengths if self.encodes_apart else labels.lengths - fields["prompt_length"] + 1

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
        self.prompts_cut = self.answers_cut = 0
        fields = [self._fields(examples, bad_rows) for examples in (train, val)]
        about = {"prompts_cut": self.prompts_cut, "answers_cut": self.answers_cut} | self.about()
        return *fields, about

    def encode_asked(self, rows: list[Record]) -> Fields:
        return self._fields([("", row | {"references": [""]}) for row in rows], BadRows(skip=False))

    def _fields(self, examples: list[Numbered], bad_rows: BadRows) -> Fields:
        """Takes conversations that the chat template refuses out of the list."""
        found, known = [], []
        if self.encodes_apart:
            found = list(self._apart([record for _, record in examples]))
        else:
            for place, record in examples:
                try:
                    found.append(self._together(record))
                    known.append((place, record))
                except TemplateError as error:
                    bad_rows.add(place.rpartition(":")[0], f"{place}: the chat template says: {error}")
            examples[:] = known
        return {
            "input_ids": Ragged.of([example.input_ids for example in found]),
            "labels": Ragged.of([example.labels for example in found]),
            "prompt_length": np.array([example.prompt_length for example in found], np.int64),
            "label_bytes": np.array([example.label_bytes for example in found], np.int64),
        }

    def about(self) -> dict[str, object]:
        """What else is to be told."""
        return {}

    def _apart(self, rows: list[Record]) -> Iterator[Encoded]:
        sources = ["\n\n".join(message["content"] for message in self.conversation(row)) for row in rows]
        targets = [row["references"][0] for row in rows]
        tokenizer, end = self.tokenizer, self.tokenizer.eos_token_id
        whole = [len(ids) for ids in tokenizer(sources, verbose=False)["input_ids"]] if sources else []
        inputs = tokenizer(sources, truncation=True, max_length=self.max_length)["input_ids"] if sources else []
        answers = tokenizer(text_target=targets, verbose=False)["input_ids"] if targets else []
        for length, ids, answer, text in zip(whole, inputs, answers, targets, strict=True):
            self.prompts_cut += length > len(ids)
            answer = answer if answer[-1:] == [end] else [*answer, end]
            labels = self._shortened(answer, self.max_target_length)
            yield Encoded(ids, labels, len(ids), self._bytes(text, labels, len(answer)))

    def _together(self, row: Record) -> Encoded:
        messages = [*self.conversation(row), {"role": "assistant", "content": row["references"][0]}]
        pieces, tokens = self._fitted(messages)
        ids = [token for piece in tokens for token in piece]
        learnt = [self._is_learnt(pieces, i) for i in range(len(pieces)) for _ in tokens[i]]
        labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
        kept = [part for i, part in enumerate(tokens) if self._is_learnt(pieces, i)]
        utf8_bytes = sum(len(self.tokenizer.decode(part, skip_special_tokens=True).encode()) for part in kept)
        # The last token, an end of text, predicts nothing, and the first is predicted by nothing.
        return Encoded(ids[:-1], labels[1:], len(ids) - len(tokens[-1]), utf8_bytes)

    def _fitted(self, messages: list[Message]) -> tuple[list[Segment], list[list[int]]]:
        """Segments and their tokens, at most max_length of them: the longest message before the answer is shortened,
        and where that is not enough the answer, but for its end."""
        pieces, tokens = self._tokens(messages)
        tokens[-1] = self._shortened(tokens[-1], self.max_target_length)
        excess = sum(map(len, tokens)) - self.max_length
        if excess <= 0:
            return pieces, tokens
        self.prompts_cut += 1
        longest = max(range(len(messages) - 1), key=lambda i: len(messages[i]["content"]))
        content = self.tokenizer(messages[longest]["content"], add_special_tokens=False)["input_ids"]
        while excess > 0 and content:
            content = content[: max(0, len(content) - excess)]
            shorter = messages[longest] | {"content": self.tokenizer.decode(content)}
            pieces, tokens = self._tokens([*messages[:longest], shorter, *messages[longest + 1 :]])
            tokens[-1] = self._shortened(tokens[-1], self.max_target_length, count=False)
            excess = sum(map(len, tokens)) - self.max_length
        if excess > 0:
            before = sum(map(len, tokens[:-1]))
            if before >= self.max_length:
                raise ValueError(
                    f"--data.max_length is {self.max_length}, and what stands around an answer alone has {before} "
                    "tokens; raise it"
                )
            tokens[-1] = self._shortened(tokens[-1], self.max_length - before)
        return pieces, tokens

    def _tokens(self, messages: list[Message]) -> tuple[list[Segment], list[list[int]]]:
        pieces = segments(self.tokenizer, messages)
        tokens = self.tokenizer([p.text for p in pieces], add_special_tokens=False, verbose=False)["input_ids"]
        answer, end = tokens[-1], self.tokenizer.eos_token_id
        while end in answer and answer[-1] != end:
            answer = answer[:-1]  # line ends after the end of text are never read
        tokens[-1] = answer if answer[-1:] == [end] else [*answer, end]
        return pieces, tokens

    def _is_learnt(self, pieces: list[Segment], i: int) -> bool:
        return self.learn == "all" or (pieces[i].is_answer and (self.learn == "answers" or i == len(pieces) - 1))

    def _shortened(self, answer: list[int], most: int, count: bool = True) -> list[int]:
        """At most so many tokens, the end of text among them."""
        if len(answer) <= most:
            return answer
        self.answers_cut += count
        return [*answer[: most - 1], answer[-1]]

    def _bytes(self, text: str, kept: list[int], whole: int) -> int:
        return len((text if len(kept) == whole else self.tokenizer.decode(kept, skip_special_tokens=True)).encode())

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
        cut = [f"{count:,} {name} at {most} tokens" for name, most in limits.items() if (count := about[f"{name}_cut"])]
        return {
            "text": f"{self.source}: {len(train['labels']):,} examples, {tokens:,} tokens, {labels:,} of them learnt",
            "columns": ", ".join(f"{name} from {column!r}" for name, column in about.get("columns", {}).items()),
            "held out": f"{len(val['labels']):,} examples",
            "cut off": ", ".join(cut),
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in about["skipped_rows"].items()),
        }
