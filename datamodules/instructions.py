"""Instructions and the answers to them, and conversations."""

from collections.abc import Iterator
from pathlib import Path

from datamodules.chat_template import Message
from datamodules.columns import Column, find_columns
from datamodules.completions import Completions
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
        source_column: Column of the instruction, by name, or by number where there is no header. Left out: found by
            its name.
        context_column: Column of a text that the instruction is about. Left out: found by its name, if there is one.
        target_column: Column of the answer. Left out: found by its name.
        messages_column: Column of whole conversations: lists of {role, content} or {from, value}. Left out: found by
            its name, if there is one.
    """

    def __init__(
        self,
        *,
        source_column: str | None = None,
        context_column: str | None = None,
        target_column: str | None = None,
        messages_column: str | None = None,
        max_length: int = 512,
        **settings: object,
    ):
        super().__init__(max_length=max_length, **settings)
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

    def row(self, record: Record, answers: list[str]) -> dict[str, object]:
        return {"messages": [*self.conversation(record), {"role": "assistant", "content": answers[0]}]}

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
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # it is asked for anew
        if not messages:
            raise ValueError("no message asks for an answer")
        return {"messages": messages}
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # a question that nobody answered
    if not messages:
        raise ValueError("no message is by the assistant, so there is nothing to learn")
    if len(messages) == 1:
        raise ValueError("nothing stands before the only answer")
    if not messages[-1]["content"].strip():
        raise ValueError("the last answer is empty")
    return {"messages": messages[:-1], "references": [messages[-1]["content"]]}
