"""Where text comes from: files, folders, globs, a Hub data set, or the Python standard library of this machine."""

import contextlib
import glob
import hashlib
import json
import os
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules import hub
from datamodules.documents import Piece, pieces
from datamodules.files import ROW_FORMATS, TEXT_FORMATS, BadRows, compression, text_format

if TYPE_CHECKING:
    from datasets import Dataset

_TEST_FOLDER = re.compile(r"test|tests|idle_test|.*_tests?")
_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")


@dataclass(frozen=True)
class TextFile:
    """A file of text or rows, by its path and the SHA-256 of its bytes."""

    path: Path
    digest: str

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def is_one_document(self) -> bool:
        return text_format(self.path) == ".txt"

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def pieces(self, text_column: str, bad_rows: BadRows) -> Iterator[Piece]:
        return pieces(self.path, text_column, bad_rows)


@dataclass(frozen=True)
class HubRows:
    """One split of a Hub data set; `digest` is the fingerprint that `datasets` gives it."""

    name: str
    rows: "Dataset"
    digest: str
    is_one_document = False

    @property
    def size(self) -> int:
        return self.rows.data.nbytes

    def pieces(self, text_column: str, bad_rows: BadRows) -> Iterator[Piece]:
        if text_column not in self.rows.column_names:
            columns = ", ".join(self.rows.column_names)
            raise ValueError(f"{self.name} has no column {text_column!r}; pass --data.text_column, one of: {columns}")
        for number, text in enumerate(self.rows[text_column], 1):
            if not isinstance(text, str):
                bad_rows.add(self.name, f"{self.name}:{number}: {text_column!r} is {type(text).__name__}, no text")
            elif text:
                yield Piece(True, text)
            else:
                bad_rows.empty += 1


Source = TextFile | HubRows


# Files


def standard_library() -> list[Path]:
    """The Python files of this interpreter's standard library, without its tests and what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _NOT_THE_LIBRARY and not _TEST_FOLDER.fullmatch(s)]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise FileNotFoundError(f"no *.py in {root}, this Python's standard library; pass --data.path")
    return sorted(files, key=lambda file: file.relative_to(root).parts)


def find_files(paths: list[str], flag: str) -> list[Path]:
    """The files that paths, folders and globs stand for, each once, in a fixed order.

    In folders the files with a known suffix that hold anything; hidden ones are left out, links are followed.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        for path in _expanded(given, flag):
            files = _files_in(path) if path.is_dir() else [path]
            if not files:
                known = ", ".join(TEXT_FORMATS + ROW_FORMATS)
                raise FileNotFoundError(f"no text file in the folder {path}; {flag} reads {known} (.gz, .xz, .zst)")
            for file in files:
                if not file.stat().st_size:
                    raise ValueError(f"{file} is empty; leave it out of {flag}")
                found.setdefault(file.resolve(), file)
    return list(found.values())


def _expanded(given: str, flag: str) -> list[Path]:
    path = Path(given).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        if not glob.has_magic(given):
            raise FileNotFoundError(f"{given} does not exist; pass files, folders, globs by {flag}") from None
    except OSError as error:  # a link that leads to itself, a folder that may not be entered
        raise OSError(f"{given} cannot be read: {error.strerror}; mend it or leave it out of {flag}") from None
    else:
        return [path]
    matches = sorted(glob.glob(str(path), recursive=True))
    files = [Path(match) for match in matches if "**" not in given or os.path.isfile(match)]
    if not files:
        raise FileNotFoundError(f"nothing matches {given}; mend the pattern of {flag}")
    return files


def _files_in(root: Path) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise PermissionError(f"{error.filename} cannot be read: {error.strerror}; chmod it or leave it out")

    files, entered = [], set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:  # a link back to a folder that holds it
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and s != "__pycache__")
        files += [Path(folder, name) for name in names if not name.startswith(".") and _is_known(name)]
    return sorted(file for file in files if file.is_file() and file.stat().st_size)


def _is_known(name: str) -> bool:
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if compression(path) else path.suffix
    return suffix in TEXT_FORMATS + ROW_FORMATS


class ContentHashes:
    """SHA-256 of files, remembered by (path, size, time of change, inode), so that a big corpus is read once."""

    def __init__(self, memory: Path):
        self.memory = memory
        self.known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):
            self.known = json.loads(memory.read_text())
        self.changed = False

    def __call__(self, path: Path) -> str:
        status = path.stat()
        key, state = str(path.absolute()), [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self.known.get(key)
        if known and known[:3] == state:
            return str(known[3])
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except PermissionError:
            raise PermissionError(f"{path} cannot be read: permission denied; chmod it or leave it out") from None
        # A file written to within the clock's resolution may change again without a new time.
        if time.time_ns() - status.st_mtime_ns > 2 * 10**9:
            self.known[key] = [*state, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        if not self.changed:
            return
        temporary = self.memory.with_name(f"{self.memory.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a cache that may only be read still serves
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.memory)


# The Hub


def is_hub_name(given: str) -> bool:
    """Whether a string reads as `name`, `owner/name` or `owner/name:config` and is nothing on this machine."""
    has_suffix = re.search(r"\.[A-Za-z]\w*$", given)
    return bool(_HUB_NAME.fullmatch(given)) and not has_suffix and not os.path.lexists(given)


def hub_files(given: str, flag: str, cache: Path) -> list[Path]:
    """The training split of a Hub data set as a file of rows, and its validation split where it has one."""
    folder = cache / "hub"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for split in hub_splits(given, flag):
        if split is not None:
            file = folder / f"{hashlib.sha256(f'{split.name} {split.digest}'.encode()).hexdigest()}.parquet"
            if not file.is_file():
                temporary = file.with_suffix(f".{os.getpid()}")
                split.rows.to_parquet(temporary)
                temporary.replace(file)
            files.append(file)
    return files


def hub_splits(given: str, flag: str) -> tuple[HubRows, HubRows | None]:
    """The training split of a Hub data set, and its validation split where it has one."""
    import datasets

    if not hub.is_within_reach():
        datasets.config.HF_HUB_OFFLINE = True  # what was fetched before is still found
    name, _, config = given.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None)
    except ValueError as error:  # the data set wants one of several configurations, and its message lists them
        raise ValueError(f"{given}: {' '.join(str(error).split())}; pass {name}:CONFIG") from None
    except Exception as error:  # whatever lies between this machine and the Hub
        reason = type(error).__name__
        raise FileNotFoundError(
            f"{given} is neither a path on this machine nor a Hub data set within reach ({reason}); mend {flag}"
        ) from None
    if "train" not in splits:
        raise ValueError(f"{given} has no split named train, only {', '.join(splits)}; save it as files")
    rows = {split: HubRows(f"{given} ({split})", rows, rows._fingerprint) for split, rows in splits.items()}
    return rows["train"], rows.get("validation")
