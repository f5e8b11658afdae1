"""Rows of named values from jsonl, json, csv, tsv and parquet files, streamed but for json.

A row is numbered as a person would find it: by lines in jsonl, from 1 on and without the header elsewhere.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.files import ROW_FORMATS, BadRows, compression, decoded_blocks, lines_of, opened, text_format

Record = dict[str, object]


def records(
    path: Path, bad_rows: BadRows, columns: Sequence[str] | None = None, flag: str = "column", header: bool = True
) -> Iterator[tuple[int, Record]]:
    """(number, row) of a file of rows.

    Args:
        columns: Those that every row must have; None: whatever it has.
        flag: The last part of the flag that names a column, for the error where one is missing.
        header: Whether the first line of csv and tsv names the columns; if not they are named "0", "1", …

    Raises ValueError or OSError with one line that names file and place.
    """
    form = text_format(path)
    if form not in ROW_FORMATS:
        raise ValueError(f"{path} has no rows with columns; pass {', '.join(ROW_FORMATS)} (.gz, .xz, .zst)")
    if form == ".parquet":
        return _parquet_records(path, columns, flag)
    if form in (".csv", ".tsv"):
        return _csv_records(path, bad_rows, columns, flag, header)
    return _json_records(path, form, bad_rows, columns, flag)


def fault_of(value: object) -> str | None:
    """Why a value is no text, if it is not."""
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is no text but {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a surrogate pair at character {error.start}"
    return None


def first_fields(path: Path) -> list[str]:
    """What stands in the first line of a csv or tsv file."""
    return next(_csv_lines(path), [])


def missing(path: Path | str, columns: Sequence[str], found: Sequence[str], flag: str) -> str:
    """The error where a column is not there."""
    name = next(column for column in columns if column not in found)
    return f"{path} has no column {name!r}; pass --data.{flag}, one of: {', '.join(map(str, found)) or 'none'}"


def _csv_lines(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)
    if text_format(path) != ".tsv":
        return csv.reader(lines_of(decoded_blocks(path)))
    counts = {line.count("\t") for line in lines_of(decoded_blocks(path)) if line.strip()}
    lines = lines_of(decoded_blocks(path))
    # A field that holds a tab or a line end has to be in quotes; where all lines have as many fields, none does.
    return csv.reader(lines, delimiter="\t") if len(counts) > 1 else map(_tab_fields, lines)


def _tab_fields(line: str) -> list[str]:
    """Quotes stand for themselves unless they open and close a field."""
    fields = line.rstrip("\r\n").split("\t")
    quoted = re.compile(r'"(?:[^"]|"")*"')
    return [field[1:-1].replace('""', '"') if quoted.fullmatch(field) else field for field in fields if line.strip()]


def _csv_records(
    path: Path, bad_rows: BadRows, columns: Sequence[str] | None, flag: str, header: bool
) -> Iterator[tuple[int, Record]]:
    lines = _csv_lines(path)
    names = next(lines, []) if header else [str(i) for i in range(len(first_fields(path)))]
    if not set(columns or ()) <= set(names):
        raise ValueError(missing(path, columns, names, flag))
    wanted = [(names.index(name), name) for name in (names if columns is None else columns)]
    for number, fields in enumerate(lines, 1):
        if len(fields) == len(names):
            yield number, {name: fields[i] for i, name in wanted}
        elif fields:
            bad_rows.add(str(path), f"{path}:{number}: {len(fields)} fields where the header has {len(names)}")


def _parquet_records(path: Path, columns: Sequence[str] | None, flag: str) -> Iterator[tuple[int, Record]]:
    import pyarrow
    import pyarrow.parquet

    with opened(path) as stream:
        source = io.BytesIO(stream.read()) if compression(path) else stream
        try:
            file = pyarrow.parquet.ParquetFile(source)
            names = file.schema_arrow.names
            if not set(columns or ()) <= set(names):
                raise ValueError(missing(path, columns, names, flag))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns and list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"{path} is cut off or damaged ({first_line}); fetch or write it again") from None


def _json_records(
    path: Path, form: str, bad_rows: BadRows, columns: Sequence[str] | None, flag: str
) -> Iterator[tuple[int, Record]]:
    found, names = columns is None, None
    for number, row in (_json_lines if form == ".jsonl" else _json_document)(path, bad_rows, columns):
        if not isinstance(row, dict):
            bad_rows.add(str(path), f"{path}:{number}: no JSON object but {type(row).__name__}")
            continue
        names = names or list(row)
        lacking = [column for column in columns or () if column not in row]
        if not lacking:
            found = True
            yield number, row
        elif found or bad_rows.skip:
            bad_rows.add(str(path), f"{path}:{number}: no {lacking[0]!r}")
        else:
            break
    if names and not found:
        raise ValueError(missing(path, columns, names, flag))


def _json_lines(path: Path, bad_rows: BadRows, columns: Sequence[str] | None) -> Iterator[tuple[int, object]]:
    """One row a line, numbered by lines."""
    quoted = [json.dumps(column) for column in columns or ()]
    with opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")
                # A key that stands twice would lose its first value in silence; looking for it costs time.
                twice = columns is None or any(text.count(name) > 1 for name in quoted)
                row = json.loads(text, object_pairs_hook=_without_repetition if twice else None)
            except UnicodeDecodeError as error:
                bad_rows.add(str(path), f"{path}:{number}: not UTF-8 at its byte {error.start}")
            except ValueError as error:
                bad_rows.add(str(path), f"{path}:{number}: no JSON ({error})")
            else:
                yield number, row


def _without_repetition(pairs: list[tuple[str, object]]) -> Record:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _json_document(path: Path, bad_rows: BadRows, columns: Sequence[str] | None) -> Iterator[tuple[int, object]]:
    """A list of rows, an object that holds one list, or (many files named .json are such) one row a line."""
    text = "".join(decoded_blocks(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, bad_rows, columns)
            return
        raise ValueError(f"{path} is no JSON (line {error.lineno}: {error.msg}); mend it or leave it out") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(f"{path} holds no single list of rows; write one object a line (.jsonl) or one list of them")
    yield from enumerate(lists[0], 1)
