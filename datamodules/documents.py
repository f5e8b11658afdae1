"""From files to documents: decompress, decode, take the text column, and say exactly what is wrong and where.

A plain text file is one document; jsonl, json, csv, tsv and parquet hold one in each row. Everything but json is
streamed: a document arrives in pieces of about a million characters.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

COMPRESSIONS = (".gz", ".xz", ".zst")
ROW_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_FORMATS = (".txt", ".md", ".py")

_BLOCK_BYTES = 1 << 20


class Piece(NamedTuple):
    """A document, or a part of one that begins after a line's end."""

    begins_document: bool
    text: str


class BadRows:
    """What to do with a row that cannot be read: an error, or leave it out and count it."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.skipped: Counter[str] = Counter()
        self.empty = 0

    def add(self, file: str, message: str) -> None:
        if not self.skip:
            raise ValueError(f"{message}; mend it, or leave such rows out with --data.on_bad_row skip")
        self.skipped[file] += 1


def compression(path: Path) -> str:
    """ ".gz", ".xz" or ".zst", or "" for a file that is not compressed."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def text_format(path: Path) -> str:
    """The suffix that says how a file is read, without its compression: ".txt" for every unknown one."""
    suffix = Path(path.stem).suffix if compression(path) else path.suffix
    return suffix.lower() if suffix.lower() in ROW_FORMATS else ".txt"


def pieces(path: Path, text_column: str, bad_rows: BadRows) -> Iterator[Piece]:
    """The documents of a file, in pieces. Raises ValueError or OSError with one line that names file and place."""
    form = text_format(path)
    if form == ".txt":
        yield from _text_pieces(path)
        return
    for text in _row_texts(path, form, text_column, bad_rows):
        if text:
            yield Piece(True, text)
        else:
            bad_rows.empty += 1


def _row_texts(path: Path, form: str, text_column: str, bad_rows: BadRows) -> Iterator[str]:
    if form == ".parquet":
        rows = _parquet_values(path, text_column)
    elif form in (".csv", ".tsv"):
        rows = _csv_values(path, text_column, bad_rows)
    else:
        rows = _json_values(path, form, text_column, bad_rows)
    for number, value in rows:
        fault = _fault(value)
        if fault:
            bad_rows.add(str(path), f"{path}:{number}: {text_column!r} {fault}")
        else:
            yield value


def _fault(value: object) -> str | None:
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


# Bytes


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file; what breaks on the way is told as one line."""
    try:
        with _decompressed(path) as stream:
            yield stream
    except PermissionError:
        raise PermissionError(f"{path} cannot be read: permission denied; chmod it or leave it out") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is cut off or damaged ({error}); fetch or compress it again") from None


def _decompressed(path: Path) -> BinaryIO:
    if compression(path) == ".gz":
        return gzip.GzipFile(path)
    if compression(path) == ".xz":
        return lzma.LZMAFile(path)
    if compression(path) == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), _BLOCK_BYTES)
    return path.open("rb")


# Text


def _decoded_blocks(path: Path) -> Iterator[str]:
    """The file's characters, line ends as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with _opened(path) as stream:
        while True:
            block = stream.read(_BLOCK_BYTES)
            if not offset and block.startswith(codecs.BOM_UTF8):
                offset = len(codecs.BOM_UTF8)
                block = block[offset:]
            if b"\0" in block:
                raise ValueError(f"{path} is no text: byte {offset + block.index(0)} is NUL; leave it out")
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - waiting + error.start
                raise ValueError(
                    f"{path} is not UTF-8 at byte {place}; convert it (iconv -t UTF-8) or leave it out"
                ) from None
            if text:
                yield text
            if not block:
                return
            offset += len(block)


_SAFE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
"""Before a single blank between letters, and after a single line end between visible characters: a byte-level BPE's
pre-tokeniser always ends a word there and looks no further back, so both parts have the tokens of the whole."""


def _text_pieces(path: Path) -> Iterator[Piece]:
    """A file's text, cut once a block of it, except where a block has no safe place."""
    begins, held = True, ""
    waiting: list[str] = []
    for block in _decoded_blocks(path):
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


def _lines(blocks: Iterator[str]) -> Iterator[str]:
    held = ""
    for block in blocks:
        *lines, held = (held + block).split("\n")
        for line in lines:
            yield line + "\n"
    if held:
        yield held


# Rows


def _missing(path: Path, column: str, found: list[str]) -> str:
    return f"{path} has no column {column!r}; pass --data.text_column, one of: {', '.join(map(str, found)) or 'none'}"


def _csv_values(path: Path, column: str, bad_rows: BadRows) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(sys.maxsize)
    separator = "\t" if text_format(path) == ".tsv" else ","
    reader = csv.reader(_lines(_decoded_blocks(path)), delimiter=separator)
    header = next(reader, [])
    if column not in header:
        raise ValueError(_missing(path, column, header))
    index = header.index(column)
    for number, row in enumerate(reader, 1):
        if len(row) == len(header):
            yield number, row[index]
        elif row:
            bad_rows.add(str(path), f"{path}:{number}: {len(row)} fields where the header has {len(header)}")


def _parquet_values(path: Path, column: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    with _opened(path) as stream:
        source = io.BytesIO(stream.read()) if compression(path) else stream
        try:
            file = pyarrow.parquet.ParquetFile(source)
            if column not in file.schema_arrow.names:
                raise ValueError(_missing(path, column, file.schema_arrow.names))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value
        except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(f"{path} is cut off or damaged ({first_line}); fetch or write it again") from None


def _json_values(path: Path, form: str, column: str, bad_rows: BadRows) -> Iterator[tuple[int, object]]:
    found, names = False, None
    for number, row in (_json_rows if form == ".jsonl" else _json_document)(path, column, bad_rows):
        if not isinstance(row, dict):
            bad_rows.add(str(path), f"{path}:{number}: no JSON object but {type(row).__name__}")
            continue
        names = names or list(row)
        if column in row:
            found = True
            yield number, row[column]
        elif found or bad_rows.skip:
            bad_rows.add(str(path), f"{path}:{number}: no {column!r}")
        else:
            break
    if names and not found:
        raise ValueError(_missing(path, column, names))


def _json_rows(path: Path, column: str, bad_rows: BadRows) -> Iterator[tuple[int, object]]:
    """One row a line, numbered by lines."""
    quoted = json.dumps(column)
    with _opened(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")
                # A key that stands twice would lose its first value in silence; looking for it costs time.
                twice = text.count(quoted) > 1
                row = json.loads(text, object_pairs_hook=_without_repetition if twice else None)
            except UnicodeDecodeError as error:
                bad_rows.add(str(path), f"{path}:{number}: not UTF-8 at its byte {error.start}")
            except ValueError as error:
                bad_rows.add(str(path), f"{path}:{number}: no JSON ({error})")
            else:
                yield number, row


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return row


def _json_document(path: Path, column: str, bad_rows: BadRows) -> Iterator[tuple[int, object]]:
    """A list of rows, an object that holds one list, or (many files named .json are such) one row a line."""
    text = "".join(_decoded_blocks(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_rows(path, column, bad_rows)
            return
        raise ValueError(f"{path} is no JSON (line {error.lineno}: {error.msg}); mend it or leave it out") from None
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError(f"{path} holds no single list of rows; write one object a line (.jsonl) or one list of them")
    yield from enumerate(lists[0], 1)
