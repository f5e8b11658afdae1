"""From files to documents: take the text column, and say exactly what is wrong and where.

A plain text file is one document; jsonl, json, csv, tsv and parquet hold one in each row. Everything but json is
streamed: a document arrives in pieces of about a million characters.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datamodules.files import BadRows, decoded_blocks, text_format
from datamodules.records import fault_of, records


class Piece(NamedTuple):
    """A document, or a part of one that begins after a line's end."""

    begins_document: bool
    text: str


def pieces(path: Path, text_column: str, bad_rows: BadRows) -> Iterator[Piece]:
    """The documents of a file, in pieces. Raises ValueError or OSError with one line that names file and place."""
    if text_format(path) == ".txt":
        yield from _text_pieces(path)
        return
    for number, record in records(path, bad_rows, [text_column], flag="text_column"):
        text = record[text_column]
        if fault := fault_of(text):
            bad_rows.add(str(path), f"{path}:{number}: {text_column!r} {fault}")
        elif text:
            yield Piece(True, text)
        else:
            bad_rows.empty += 1


# Text


_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
"""Before a single blank between letters, and after a single line end between visible characters: a byte-level BPE's
pre-tokeniser always ends a word there and looks no further back, so both parts have the tokens of the whole."""


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A file's text, cut once a block of it, except where a block has no safe place."""
    begins, held = True, ""
    waiting: list[str] = []
    for block in decoded_blocks(path):
        cut = _last_safe_cut(held)
        if cut:
            yield Piece(begins, "".join(waiting) + held[:cut])
            begins, waiting = False, [held[cut:]]
        else:
            waiting.append(held)
        held = block
    if held:
        yield Piece(begins, "".join(waiting) + held)


def _last_safe_cut(text: str) -> int:
    """0 where there is none."""
    for tail in (512, len(text)):
        cuts = [match.start() for match in _SAFE_CUT.finditer(text, max(0, len(text) - tail))]
        if cuts:
            return cuts[-1]
    return 0
