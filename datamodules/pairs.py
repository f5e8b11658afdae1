"""Texts and what is to be written of them: translation, summarization."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datamodules.chat_template import Message
from datamodules.columns import Column, find_columns
from datamodules.completions import Completions
from datamodules.examples import Numbered
from datamodules.files import BadRows, decoded_blocks, lines_of, text_format
from datamodules.library_functions import described
from datamodules.records import Record, fault_of, records
from datamodules.sources import is_hub_name

SOURCE_NAMES = ("source", "src", "document", "article", "text", "dialogue", "input", "body")
TARGET_NAMES = ("target", "tgt", "summary", "highlights", "tldr", "abstract", "translation", "output", "headline")
NESTED = "translation"
"""A column that holds both sides by their languages, as in the translation sets of the Hub."""


class Pairs(Completions):
    """Sources with targets, from two files whose lines belong together, or from tsv, csv, jsonl, json or parquet.

    Args:
        path: Files, folders or globs of rows, or two text files with a line for each source and each target, as
            "train.en,train.de". Left out: functions of the Python standard library.
        source_column: Column of the source, by name, or by number where there is no header. Left out: found by its
            name.
        target_column: Column of the target, or of a list of right ones. Left out: found by its name.
        builtin_task: Without a path: describe (a docstring to the signature of its function) or document (a function
            to its docstring).
        prefix: Stands before each source, as "translate English to German: ".
    """

    def __init__(
        self,
        *,
        path: str | list[str] | None = None,
        source_column: str | None = None,
        target_column: str | None = None,
        builtin_task: Literal["describe", "document"] = "describe",
        prefix: str = "",
        **settings: object,
    ):
        super().__init__(path=path, **settings)
        self.source_column, self.target_column = source_column, target_column
        self.builtin_task = builtin_task
        self.prefix = prefix
        self.columns: dict[str, str] = {}
        """As they were found in the first file."""

    def settings(self) -> dict[str, object]:
        columns = [self.source_column, self.target_column]
        return super().settings() | {"columns": columns, "prefix": self.prefix, "builtin": self.builtin_task}

    def builtin(self) -> Iterator[Record]:
        for function in described():
            if self.builtin_task == "describe":
                yield {"source": function.docstring, "references": [function.signature]}
            elif 40 <= len(function.body) <= 1000:
                yield {"source": function.body, "references": [function.docstring]}

    def conversation(self, record: Record) -> list[Message]:
        return [{"role": "user", "content": self.prefix + record["source"]}]

    def row(self, record: Record, answers: list[str]) -> dict[str, object]:
        return {"source": record["source"], "target": answers}

    def key(self, record: Record) -> str:
        return record["source"]

    def about(self) -> dict[str, object]:
        return {"columns": self.columns}

    # Rows

    def files(self, path: str | list[str], flag: str) -> list[Path]:
        """Of aligned files each source is followed by its target."""
        if isinstance(path, str) and is_hub_name(path):
            return super().files(path, flag)
        listed = [path] if isinstance(path, str) else path
        names = [name.strip() for given in listed for name in ([given] if Path(given).exists() else given.split(","))]
        return super().files(names, flag)

    def read(self, files: list[Path], bad_rows: BadRows, answered: bool = True) -> list[Numbered]:
        lines = [file for file in files if text_format(file) == ".txt"]
        if not answered:
            found = [e for file in lines for e in _lines(file, file, bad_rows)]
        elif len(lines) % 2:
            raise ValueError(f"{lines[-1]} has lines only, and no file of targets beside it; pass source,target")
        else:
            found = [e for i in range(0, len(lines), 2) for e in _lines(*lines[i : i + 2], bad_rows)]
            if lines:
                self.columns = self.columns or {"source": lines[0].name, "target": lines[1].name}
        found += [e for file in files if file not in lines for e in self._rows(file, bad_rows, answered)]
        return found if answered else [(place, {"source": record["source"]}) for place, record in found]

    def _rows(self, file: Path, bad_rows: BadRows, answered: bool) -> Iterator[Numbered]:
        nested = NESTED if self._is_nested(file) else None
        wanted = {"source": Column(SOURCE_NAMES, self.source_column)}
        if answered:
            wanted["target"] = Column(TARGET_NAMES, self.target_column)
        if nested:
            header, columns = True, {name: column.asked or "" for name, column in wanted.items()}
        else:
            header, columns = find_columns(file, wanted)
        self.columns = self.columns or columns
        names, found = [nested] if nested else list(columns.values()), False
        for number, row in records(file, bad_rows, names, "target_column", header):
            place = f"{file}:{number}"
            if nested:
                row = row[nested] if isinstance(row[nested], dict) else {}
                lacking = [name for name, column in columns.items() if column not in row]
                if lacking and not found:
                    raise ValueError(f"{place}: pass --data.{lacking[0]}_column, one of: {', '.join(row) or 'none'}")
                if lacking:
                    bad_rows.add(str(file), f"{place}: no {columns[lacking[0]]!r}")
                    continue
                found = True
            texts = {name: _texts(row[column]) for name, column in columns.items()}
            faults = [
                f"{columns[name]!r} {fault}"
                for name, several in texts.items()
                for text in (several or [""])
                if (fault := fault_of(text) or (None if text.strip() else "is empty"))
            ]
            if faults:
                bad_rows.add(str(file), f"{place}: {faults[0]}")
            else:  # a list of sentences is one source, and a list of targets are several right ones
                yield place, {"source": " ".join(texts["source"]), "references": texts.get("target", [""])}

    def _is_nested(self, file: Path) -> bool:
        if text_format(file) in (".csv", ".tsv"):
            return False
        first = next((row for _, row in records(file, BadRows(skip=True))), {})
        return isinstance(first.get(NESTED), dict)


def _texts(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _lines(source: Path, target: Path, bad_rows: BadRows) -> Iterator[Numbered]:
    sources, targets = ([line.rstrip("\r\n") for line in lines_of(decoded_blocks(f))] for f in (source, target))
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources):,} lines and {target} {len(targets):,}: they do not belong together; pass two "
            "files with a line for each source and each target"
        )
    for number, (text, translated) in enumerate(zip(sources, targets, strict=True), 1):
        if text.strip() and translated.strip():
            yield f"{source}:{number}", {"source": text, "references": [translated]}
        elif text.strip() or translated.strip():
            bad_rows.add(str(source), f"{source if translated.strip() else target}:{number}: is empty")
