"""The bytes and characters of a file, decompressed; what is wrong with it is one line that names file and place."""

import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

COMPRESSIONS = (".gz", ".xz", ".zst")
ROW_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_FORMATS = (".txt", ".md", ".py")

_BLOCK_BYTES = 1 << 20


class BadRows:
    """What to do with a row that cannot be read: an error, or leave it out and count it."""

    def __init__(self, skip: bool):
        self.skip = skip
        self.skipped: Counter[str] = Counter()
        self.empty = 0
        self.notes: Counter[str] = Counter()
        """What a reader mended or left out by a rule of its own, counted by name."""

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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
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


def decoded_blocks(path: Path) -> Iterator[str]:
    """The file's characters, line ends as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with opened(path) as stream:
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


def lines_of(blocks: Iterator[str]) -> Iterator[str]:
    held = ""
    for block in blocks:
        *lines, held = (held + block).split("\n")
        for line in lines:
            yield line + "\n"
    if held:
        yield held
