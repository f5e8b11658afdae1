"""Two hundred damaged inputs: each is one line with file, place and reason, or left out and counted."""

import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datamodules.text import Text

ROWS = 40
GOOD = [f"row {i} of a text that is long enough to train on, and then some more of it" for i in range(ROWS)]
PLACES = (0, 1, 2, 7, 13, 20, 27, 33, 38, 39)


def jsonl(place: int, line: bytes) -> bytes:
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    lines[place] = line
    return b"\n".join(lines) + b"\n"


def whole() -> bytes:
    return jsonl(0, json.dumps({"text": GOOD[0]}).encode())


def table(values: list) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), sink, row_group_size=4)
    return sink.getvalue().to_pybytes()


def csv(place: int, line: str) -> bytes:
    lines = [f"{i},{text.replace(',', ';')}" for i, text in enumerate(GOOD)]
    lines[place] = line
    return "\n".join(["id,text", *lines, ""]).encode()


ROW_KINDS = {
    "cut line": lambda p: ("a.jsonl", jsonl(p, b'{"text": "abc')),
    "not UTF-8": lambda p: ("a.jsonl", jsonl(p, b'{"text": "a\xff"}')),
    "missing key": lambda p: ("a.jsonl", jsonl(p, b'{"other": "a"}')),
    "key twice": lambda p: ("a.jsonl", jsonl(p, b'{"text": "a", "text": "b"}')),
    "null": lambda p: ("a.jsonl", jsonl(p, b'{"text": null}')),
    "number": lambda p: ("a.jsonl", jsonl(p, b'{"text": 3}')),
    "NaN": lambda p: ("a.jsonl", jsonl(p, b'{"text": NaN}')),
    "list of text": lambda p: ("a.jsonl", jsonl(p, b'{"text": ["a"]}')),
    "list": lambda p: ("a.jsonl", jsonl(p, b'["a", "b"]')),
    "bare word": lambda p: ("a.jsonl", jsonl(p, b"hello")),
    "half a surrogate pair": lambda p: ("a.jsonl", jsonl(p, b'{"text": "\\ud800"}')),
    "null in parquet": lambda p: ("a.parquet", table([None if i == p else text for i, text in enumerate(GOOD)])),
    "few fields": lambda p: ("a.csv", csv(p, "7")),
    "many fields": lambda p: ("a.csv", csv(p, "7,a,b")),
}
"""Kinds of damage to one row: of (place) to (name, content)."""


def cut(content: bytes, place: int) -> bytes:
    return content[: len(content) * (place + 1) // (ROWS + 2)]


def overwritten(content: bytes, place: int, damage: bytes) -> bytes:
    at = len(content) * (place + 1) // (ROWS + 2)
    return content[:at] + damage + content[at + len(damage) :]


TEXT = "\n".join(GOOD).encode()
FILE_KINDS = {
    "cut gzip": lambda p: ("a.jsonl.gz", cut(gzip.compress(whole()), p)),
    "cut xz": lambda p: ("a.txt.xz", cut(lzma.compress(TEXT), p)),
    "cut parquet": lambda p: ("a.parquet", cut(table(GOOD), p)),
    "NUL": lambda p: ("a.txt", overwritten(TEXT, p, b"\0")),
    "binary": lambda p: ("a.txt", overwritten(TEXT, p, b"\xfe\xfa\x80")),
    "cut JSON": lambda p: ("a.json", cut(json.dumps([{"text": text} for text in GOOD]).encode(), p)),
}


def prepared(path: Path, **settings) -> Text:
    data = Text(path=str(path), tokenizer="bytes", seq_len=16, cache_dir=str(path.parent / "cache"), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_damaged_row_is_named_by_file_and_row_or_left_out_and_counted(kind, place, tmp_path):
    name, content = ROW_KINDS[kind](place)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        prepared(tmp_path / name)
    told = str(error.value).removeprefix(str(tmp_path / name))
    # Where the first row lacks it, the column may be called otherwise.
    named = (
        r" has no column 'text'; pass --data.text_column"
        if (kind, place) == ("missing key", 0)
        else rf":{place + 1}: \S"
    )
    assert re.match(named, told)
    assert "\n" not in str(error.value)
    data = prepared(tmp_path / name, on_bad_row="skip")
    assert data.describe()["skipped_rows"] == {str(tmp_path / name): 1}
    documents = [*data.documents("train"), *data.documents("val")]
    kept = [text.replace(",", ";") if name.endswith("csv") else text for i, text in enumerate(GOOD) if i != place]
    assert documents == kept


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", FILE_KINDS)
def test_a_damaged_file_is_one_line_that_names_it(kind, place, tmp_path):
    name, content = FILE_KINDS[kind](place)
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)) as error:
        prepared(tmp_path / name, on_bad_row="skip")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_there_are_two_hundred():
    assert (len(ROW_KINDS) + len(FILE_KINDS)) * len(PLACES) == 200
