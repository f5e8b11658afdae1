"""Questions to a text whose answer is a span of it, or is not in it.

Shape suffixes: B windows in a batch, T tokens of the longest of them, N any count.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import from_numpy

from datamodules.base import IGNORED, Batch
from datamodules.columns import Column, find_columns
from datamodules.example_store import Fields, Ragged
from datamodules.examples import Examples, Numbered
from datamodules.files import BadRows
from datamodules.library_functions import default_values
from datamodules.records import Record, fault_of, records
from datamodules.tokenization import document_start

QUESTION_NAMES = ("question", "query")
CONTEXT_NAMES = ("context", "passage", "paragraph", "document", "text")
ANSWER_NAMES = ("answers", "answer")
NO_ANSWER = (0, 0)
"""First and last token of an answer that is not in a window."""


class Window(NamedTuple):
    """A question and a part of its context, in numbers."""

    input_ids: list[int]
    token_type_ids: list[int]
    context: tuple[int, int]
    """Tokens of the context: from, and up to but without."""
    starts: list[int]
    """Of each token of the context, in characters."""
    ends: list[int]


class Spans(Examples):
    """Questions, contexts and answers in SQuAD's JSON (1.1 and 2.0), or in rows of jsonl, json or parquet.

    A context that is longer than the model's window is read in windows that overlap; a row of training is a window.

    Args:
        question_column: Column of the question, in rows. Left out: found by its name.
        context_column: Column of the text. Left out: found by its name.
        answer_column: Column of the answers: a text, a list of them, {text, answer_start} or a list of such; nothing
            or an empty list where there is no answer. Left out: found by its name.
        stride: Tokens of the context that a window shares with the one before.
    """

    objective = "spans"

    def __init__(
        self,
        *,
        question_column: str | None = None,
        context_column: str | None = None,
        answer_column: str | None = None,
        stride: int = 64,
        **settings: object,
    ):
        super().__init__(**settings)
        if stride < 0:
            raise ValueError(f"--data.stride is {stride}; it must be 0 or more")
        self.question_column, self.context_column = question_column, context_column
        self.answer_column = answer_column
        self.stride = stride
        self.columns: dict[str, str] = {}
        """As they were found in the first file of rows."""

    def settings(self) -> dict[str, object]:
        return {"columns": [self.question_column, self.context_column, self.answer_column], "stride": self.stride}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.has_unanswerable: bool = self.store.about["unanswerable"] > 0
        """Whether the model may say that there is no answer."""

    # Rows

    def builtin(self) -> Iterator[Record]:
        for i, asked in enumerate(default_values()):
            known = {"references": [asked.answer], "span": [asked.start, len(asked.answer)]} if asked.answer else {}
            yield {
                "id": str(i),
                "title": asked.context,
                "question": asked.question,
                "context": asked.context,
                **({"references": [], "span": None} | known),
            }

    def read(self, files: list[Path], bad_rows: BadRows, answered: bool = True) -> list[Numbered]:
        return [example for file in files for example in self._read(file, bad_rows, answered)]

    def _read(self, file: Path, bad_rows: BadRows, answered: bool) -> Iterator[Numbered]:
        first = next((row for _, row in records(file, BadRows(skip=True))), {})
        if isinstance(first.get("paragraphs"), list):
            yield from self._articles(file, bad_rows, answered)
            return
        wanted = {
            "question": Column(QUESTION_NAMES, self.question_column),
            "context": Column(CONTEXT_NAMES, self.context_column),
        }
        if answered:
            wanted["answer"] = Column(ANSWER_NAMES, self.answer_column)
        header, columns = find_columns(file, wanted)
        self.columns = self.columns or columns
        for number, row in records(file, bad_rows, list(columns.values()), "question_column", header):
            place = f"{file}:{number}"
            asked = {"id": str(row.get("id", number)), "title": row.get("title")}
            values = (row[columns[name]] if name in columns else None for name in ("question", "context", "answer"))
            yield from self._checked(file, place, asked, *values, bad_rows)

    def _articles(self, file: Path, bad_rows: BadRows, answered: bool) -> Iterator[Numbered]:
        """SQuAD's own form."""
        for number, article in records(file, bad_rows, ["paragraphs"], "path"):
            place = f"{file}:article {number}"
            for paragraph in _objects(article["paragraphs"], "paragraphs", file, place, bad_rows):
                for question in _objects(paragraph.get("qas"), "qas", file, place, bad_rows):
                    known_by = str(question.get("id", number))
                    asked = {"id": known_by, "title": article.get("title")}
                    impossible = bool(question.get("is_impossible")) or not answered
                    if not impossible and "answers" not in question:
                        bad_rows.add(str(file), f"{file}:{known_by}: no 'answers'")
                        continue
                    answers = [] if impossible else question["answers"]
                    values = (question.get("question"), paragraph.get("context"), answers)
                    yield from self._checked(file, f"{file}:{known_by}", asked, *values, bad_rows)

    @staticmethod
    def _checked(
        file: Path, place: str, asked: Record, question: object, context: object, answers: object, bad_rows: BadRows
    ) -> Iterator[Numbered]:
        for name, value in (("question", question), ("context", context)):
            if fault := fault_of(value) or (None if value.strip() else "is empty"):
                bad_rows.add(str(file), f"{place}: {name!r} {fault}")
                return
        try:
            texts, starts = _answers(answers)
        except ValueError as error:
            bad_rows.add(str(file), f"{place}: {error}")
            return
        title = asked["title"] if isinstance(asked["title"], str) else None
        record = {"id": asked["id"], "title": title, "question": question.strip(), "context": context}
        yield place, record | {"references": texts, "span": _first_span(texts, starts, context, bad_rows)}

    def key(self, record: Record) -> str:
        return record["title"] or record["context"]

    def texts(self, record: Record) -> str:
        return f"{record['question']} {record['context']}"

    # Numbers

    def encode(self, train: list[Numbered], val: list[Numbered], bad_rows: BadRows) -> tuple[Fields, Fields, dict]:
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer knows no places in the text; pass one with a tokenizer.json")
        # What cannot be pointed at teaches nothing; in a held-out question it counts as the reference scorer has it.
        train[:] = [(place, record) for place, record in train if record["span"] or not record["references"]]
        fields = [self._fields([record for _, record in examples], bad_rows) for examples in (train, val)]
        about = {
            "columns": self.columns,
            "unanswerable": sum(not record["references"] for _, record in train),
            "searched_again": bad_rows.notes["searched again"],
            "not_in_context": bad_rows.notes["not in context"],
            "questions_cut": bad_rows.notes["questions cut"],
        }
        return *fields, about

    def examples_of_rows(self, fields: Fields) -> np.ndarray:
        return np.asarray(fields["example"])

    def encode_asked(self, examples: list[Numbered], bad_rows: BadRows) -> Fields:
        return self._fields([record for _, record in examples], bad_rows)

    def _fields(self, rows: list[Record], bad_rows: BadRows) -> Fields:
        windows, examples, labels = [], [], []
        for i, (row, found) in enumerate(zip(rows, self._windows(rows, bad_rows), strict=True)):
            for window in found:
                windows.append(window)
                examples.append(i)
                labels.append(self._label(row, window))
        fields: Fields = {
            "input_ids": Ragged.of([window.input_ids for window in windows]),
            "starts": Ragged.of([window.starts for window in windows]),
            "ends": Ragged.of([window.ends for window in windows]),
            "contexts": np.array([window.context for window in windows], np.int64).reshape(-1, 2),
            "labels": np.array(labels, np.int64).reshape(-1, 2),
            "example": np.array(examples, np.int64),
        }
        if windows and windows[0].token_type_ids:
            fields["token_type_ids"] = Ragged.of([window.token_type_ids for window in windows])
        return fields

    def _windows(self, rows: list[Record], bad_rows: BadRows) -> Iterator[list[Window]]:
        tokenizer = self.tokenizer
        if not rows:
            return
        special = tokenizer.num_special_tokens_to_add(pair=True) or 2
        least = self.max_length - self.max_length // 2 - special
        if self.stride >= least:
            raise ValueError(
                f"--data.stride is {self.stride}, and windows of {self.max_length} tokens leave {least} to the context "
                "of a long question; pass a smaller one, or a larger --data.max_length"
            )
        questions = self._questions(rows, bad_rows)
        contexts = [row["context"] for row in rows]
        if tokenizer.num_special_tokens_to_add(pair=True) == 0:
            yield from self._plain_windows(questions, contexts)
            return
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found: list[list[Window]] = [[] for _ in rows]
        for i, example in enumerate(encoded["overflow_to_sample_mapping"]):
            inside = [place for place, part in enumerate(encoded.sequence_ids(i)) if part == 1]
            begin, end = (inside[0], inside[-1] + 1) if inside else (0, 0)
            starts, ends = zip(*encoded["offset_mapping"][i][begin:end], strict=True) if inside else ((), ())
            types = encoded["token_type_ids"][i] if "token_type_ids" in encoded else []
            ids = encoded["input_ids"][i]
            found[example].append(Window(ids, types, (begin, end), list(starts), list(ends)))
        yield from found

    def _questions(self, rows: list[Record], bad_rows: BadRows) -> list[str]:
        """The questions, at most half a window long."""
        most, questions = self.max_length // 2, [row["question"] for row in rows]
        encoded = self.tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        bad_rows.notes["questions cut"] += sum(len(places) > most for places in encoded["offset_mapping"])
        return [
            question if len(places) <= most else question[: places[most - 1][1]]
            for question, places in zip(questions, encoded["offset_mapping"], strict=True)
        ]

    def _plain_windows(self, questions: list[str], contexts: list[str]) -> Iterator[list[Window]]:
        """Of a tokenizer that was made for pretraining: question and context each begin as a document does."""
        start = document_start(self.tokenizer)
        asked = self.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        read = self.tokenizer(contexts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for question, ids, places in zip(asked, read["input_ids"], read["offset_mapping"], strict=True):
            before = [start, *question, start]
            room = self.max_length - len(before)
            windows, first = [], 0
            while True:
                part = slice(first, first + room)
                starts, ends = [a for a, _ in places[part]], [b for _, b in places[part]]
                whole = before + ids[part]
                windows.append(Window(whole, [], (len(before), len(whole)), starts, ends))
                if first + room >= len(ids):
                    break
                first += max(1, room - self.stride)
            yield windows

    def _label(self, row: Record, window: Window) -> tuple[int, int]:
        """First and last token of the first answer, or NO_ANSWER."""
        if row.get("span") is None or not window.starts:
            return NO_ANSWER
        first, length = row["span"]
        last = first + length
        if window.starts[0] > first or window.ends[-1] < last:
            return NO_ANSWER
        begin = int(np.searchsorted(window.ends, first, side="right"))
        end = int(np.searchsorted(window.starts, last, side="left")) - 1
        return window.context[0] + begin, window.context[0] + max(begin, end)

    # Batches

    def collate(self, fields: Fields, numbers_B: np.ndarray, examples_B: np.ndarray) -> Batch:
        ids: Ragged = fields["input_ids"]
        ids_BT = ids.padded(examples_B, self.pad_id)
        known_B = np.maximum(examples_B, 0)
        lengths_B = np.where(examples_B < 0, 1, ids.lengths[known_B])
        labels_B2, contexts_B2 = fields["labels"][known_B], fields["contexts"][known_B]
        labels_B2[examples_B < 0] = IGNORED
        contexts_B2[examples_B < 0] = 0
        batch = Batch(
            input_ids=from_numpy(ids_BT),
            attention_mask=from_numpy((np.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(np.int64)),
            labels=from_numpy(labels_B2),
            contexts=from_numpy(contexts_B2),
            rows=from_numpy(numbers_B),
        )
        if "token_type_ids" in fields:
            batch["token_type_ids"] = from_numpy(fields["token_type_ids"].padded(examples_B, 0))
        return batch

    def span(self, window: int, first: int, last: int) -> tuple[int, int]:
        """Characters of the context, from the first to the last token of a span in one of the `asked` windows."""
        fields = self.asked_fields
        begin, starts, ends = int(fields["contexts"][window, 0]), fields["starts"][window], fields["ends"][window]
        return int(starts[first - begin]), int(ends[last - begin])

    # What it is

    def shown(self, example: int) -> list[tuple[str, bool]]:
        ids = self.store.train["input_ids"][example]
        first, last = self.store.train["labels"][example].tolist()
        parts = ((ids[:first], False), (ids[first : last + 1], True), (ids[last + 1 :], False))
        return [(self.tokenizer.decode(part), is_answer) for part, is_answer in parts if len(part)]

    def plan(self) -> dict[str, str]:
        about, train, val = self.store.about, self.store.train, self.store.val
        questions = [int(fields["example"][-1]) + 1 for fields in (train, val)]
        none = f", {about['unanswerable']:,} without an answer" if about["unanswerable"] else ""
        again = f"{about['searched_again']:,} did not start where the data say" if about["searched_again"] else ""
        left_out = (
            f"{about['not_in_context']:,} not in their context, not trained on" if about["not_in_context"] else ""
        )
        cut = f"{about['questions_cut']:,} questions at {self.max_length // 2} tokens" if about["questions_cut"] else ""
        return {
            "text": f"{self.source}: {questions[0]:,} questions{none}, {len(train['labels']):,} windows, "
            f"{int(self.lengths.sum()):,} tokens",
            "columns": ", ".join(f"{name} from {column!r}" for name, column in about["columns"].items()),
            "held out": f"{questions[1]:,} questions, {len(val['labels']):,} windows",
            "answers": "; ".join(note for note in (again, left_out) if note),
            "cut off": cut,
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in about["skipped_rows"].items()),
        }


def _first_span(texts: list[str], starts: list[int], context: str, bad_rows: BadRows) -> list[int] | None:
    """Where the first of the answers stands that is in the context, and its length; None if none is."""
    for text, start in zip(texts, starts, strict=True):
        found = place_of(text, context, start)
        bad_rows.notes["searched again"] += found not in (start, -1) and start >= 0
        if found >= 0:
            return [found, len(text)]
    bad_rows.notes["not in context"] += bool(texts)
    return None


def _objects(value: object, name: str, file: Path, place: str, bad_rows: BadRows) -> list[dict]:
    """The objects of a list; whatever else stands there is told or counted."""
    if not isinstance(value, list):
        bad_rows.add(str(file), f"{place}: {name!r} is no list")
        return []
    for other in (item for item in value if not isinstance(item, dict)):
        bad_rows.add(str(file), f"{place}: in {name!r} stands {type(other).__name__} and no object")
    return [item for item in value if isinstance(item, dict)]


def place_of(text: str, context: str, start: int) -> int:
    """Where a text stands in the context: at `start`, else the nearest place to it, else -1."""
    if start >= 0 and context.startswith(text, start):
        return start
    places, found = [], context.find(text)
    while found >= 0:
        places.append(found)
        found = context.find(text, found + 1)
    return min(places, key=lambda place: abs(place - start), default=-1)


def _answers(given: object) -> tuple[list[str], list[int]]:
    """Texts of the answers, and where the data say that each starts: -1 where they do not say."""
    if given is None or given in ([], ""):
        return [], []
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start", given.get("start"))
        texts = texts if isinstance(texts, list) else [texts]
        starts = starts if isinstance(starts, list) else [starts] * len(texts)
    else:
        listed = given if isinstance(given, list) else [given]
        texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in listed]
        starts = [answer.get("answer_start") if isinstance(answer, dict) else None for answer in listed]
    for text in texts:
        if fault := fault_of(text) or (None if text.strip() else "is empty"):
            raise ValueError(f"an answer {fault}")
    if len(starts) != len(texts):
        raise ValueError(f"{len(texts)} answers and {len(starts)} places")
    return texts, [_place(start) for start in starts]


def _place(start: object) -> int:
    """-1 where the data do not say it; as floats they come from tables with gaps."""
    if start is None or start != start:
        return -1
    if isinstance(start, bool) or not isinstance(start, int | float) or start != int(start):
        raise ValueError(f"an answer starts at {start!r}, which is no place")
    return int(start)
