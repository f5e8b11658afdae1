"""Instructions and the answers to them, and conversations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datamodules.chat_template import Message
from datamodules.columns import Column, find_columns
from datamodules.completions import Completions, Learnt
from datamodules.examples import Numbered
from datamodules.files import BadRows
from datamodules.library_functions import questions
from datamodules.records import Record, fault_of, records

PROMPT_NAMES = ("instruction", "prompt", "question", "query", "problem")
CONTEXT_NAMES = ("input", "context")
ANSWER_NAMES = ("output", "response", "answer", "completion", "solution")
MESSAGES_NAMES = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other words for the roles."""


class Instructions(Completions):
    """Instructions with answers, or conversations, from jsonl, json, csv, tsv or parquet.

    Args:
        path: Files, folders or globs. Left out: questions about functions of the Python standard library.
        val_path: Held-out examples, like `path`. Left out: a part of `path`.
        predict_path: Prompts for `predict`, like `path` without answers.
        val_fraction: Share of the examples to hold out, by a hash of their prompt.
        source_column: Column of the instruction, by name, or by number where there is no header. Left out: found by
            its name.
        context_column: Column of a text that the instruction is about. Left out: found by its name, if there is one.
        target_column: Column of the answer. Left out: found by its name.
        messages_column: Column of whole conversations: lists of {role, content} or {from, value}. Left out: found by
            its name, if there is one.
        learn: answers, of a conversation all of them; the last_answer alone; or all, prompts too.
        tokenizer: A folder, "vocab.json,merges.txt" or a Hub name. Left out: the model's own.
        vocab_size: Ids of a tokenizer that is trained on these texts, where there is no model to begin with.
        chat_template: File of a Jinja template. Left out: the tokenizer's own, else a plain one.
        max_length: Tokens of a prompt with its answer, or of the prompt alone where an encoder reads it. The longest
            message of a longer one is cut off at its end, and counted.
        max_target_length: Tokens of an answer with its end; longer ones are cut off before their end and counted. Left
            out: as max_length.
        batch_size: Examples in a micro-batch of one rank.
        val_batch_size: Examples in a batch of validation. Left out: as `batch_size`.
        num_workers: Processes that load examples beside the training process.
        on_bad_row: What to do with a row that cannot be read: stop with an error, or skip and count it.
        cache_dir: Where tokens are kept. Left out: $XDG_CACHE_HOME or ~/.cache, and there lightning-lm-recipes.
        seed: Decides the order of the examples, together with their number consumed.
        allow_changed_data: Whether a checkpoint of other examples, tokenizer or seed may be gone on from.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        predict_path: str | list[str] | None = None,
        val_fraction: float = 0.1,
        source_column: str | None = None,
        context_column: str | None = None,
        target_column: str | None = None,
        messages_column: str | None = None,
        learn: Learnt = "answers",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        chat_template: str | None = None,
        max_length: int = 512,
        max_target_length: int | None = None,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        on_bad_row: Literal["error", "skip"] = "error",
        cache_dir: str | None = None,
        seed: int = 0,
        allow_changed_data: bool = False,
    ):
        shared = (tokenizer, max_length, batch_size, val_batch_size, num_workers, on_bad_row, cache_dir, seed)
        super().__init__(
            *(path, val_path, predict_path, val_fraction, *shared, allow_changed_data),
            max_target_length=max_target_length,
            vocab_size=vocab_size,
            chat_template=chat_template,
            learn=learn,
        )
        self.source_column, self.context_column, self.target_column = source_column, context_column, target_column
        self.messages_column = messages_column
        self.columns: dict[str, str] = {}
        """As they were found in the first file."""

    def settings(self) -> dict[str, object]:
        columns = [self.source_column, self.context_column, self.target_column, self.messages_column]
        return super().settings() | {"columns": columns}

    def builtin(self) -> Iterator[Record]:
        return ({"input": question, "references": [answer]} for question, answer in questions())

    def conversation(self, record: Record) -> list[Message]:
        if "messages" in record:
            return record["messages"]
        return [{"role": "user", "content": record["input"]}]

    def key(self, record: Record) -> str:
        return "\0".join(message["content"] for message in self.conversation(record))

    def about(self) -> dict[str, object]:
        return {"columns": self.columns}

    # Rows

    def read(self, files: list[Path], bad_rows: BadRows, answered: bool = True) -> list[Numbered]:
        return [example for file in files for example in self._read(file, bad_rows, answered)]

    def _read(self, file: Path, bad_rows: BadRows, answered: bool) -> Iterator[Numbered]:
        by_parts = any((self.source_column, self.context_column, self.target_column))
        usual = () if by_parts else MESSAGES_NAMES
        has_messages = False
        if not by_parts:
            header, columns = find_columns(file, {"messages": Column(usual, self.messages_column, required=False)})
            has_messages = "messages" in columns
        if not has_messages:
            wanted = {
                "source": Column(PROMPT_NAMES, self.source_column),
                "context": Column(CONTEXT_NAMES, self.context_column, required=False),
            }
            if answered:
                wanted["target"] = Column(ANSWER_NAMES, self.target_column)
            header, columns = find_columns(file, wanted)
        self.columns = self.columns or columns
        # An empty context is often left out.
        required = [column for name, column in columns.items() if name != "context"]
        for number, row in records(file, bad_rows, None if "context" in columns else required, "source_column", header):
            place = f"{file}:{number}"
            try:
                if has_messages:
                    record = _of_messages(row[columns["messages"]], answered)
                else:
                    record = self._of_parts(row, columns)
            except (KeyError, ValueError) as error:
                bad_rows.add(str(file), f"{place}: {error.args[0]}")
                continue
            yield place, record

    @staticmethod
    def _of_parts(row: Record, columns: dict[str, str]) -> Record:
        parts = {name: row.get(column) for name, column in columns.items()}
        if "context" in parts and parts["context"] is None:
            parts["context"] = ""
        if isinstance(parts.get("target"), int | float) and not isinstance(parts["target"], bool):
            parts["target"] = str(parts["target"])
        for name, value in parts.items():
            if fault := fault_of(value) or (None if value.strip() or name == "context" else "is empty"):
                raise ValueError(f"{columns[name]!r} {fault}")
        prompt = [parts["source"], parts.get("context", "")]
        answer = {"references": [parts["target"]]} if "target" in parts else {}
        return {"input": "\n\n".join(part for part in prompt if part.strip())} | answer


def _of_messages(turns: object, answered: bool) -> Record:
    if not isinstance(turns, list) or not turns:
        raise ValueError("the conversation is no list of messages")
    messages = []
    for i, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"message {i} is no object but {type(turn).__name__}")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str):
            raise ValueError(f"message {i} has no role")
        if fault := fault_of(content):
            raise ValueError(f"message {i} {fault}")
        messages.append({"role": ROLES.get(role, role), "content": content})
    if not answered:
        return {"messages": messages}
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a question that nobody answered
    if not messages:
        raise ValueError("no message is by the assistant, so there is nothing to learn")
    if not messages[-1]["content"].strip():
        raise ValueError("the last answer is empty")
    return {"messages": messages[:-1], "references": [messages[-1]["content"]]}
