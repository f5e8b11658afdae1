"""Checkpoints that are there whole or not at all, carry their own checksum, and are read as tensors only.

A checkpoint is torch's zip file. Its comment, the last bytes of the file, says the step and the SHA-256 of all that
comes before: a cut-off file, a flipped bit or a lost block is found without a second file beside it.
"""

import ctypes
import errno
import hashlib
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from lightning_modules import sharded_checkpoints
from lightning_modules.named_optimizer import filled
from lightning_modules.shards import local

_STAMP = re.compile(rb"step=(\d{12}) sha256=([0-9a-f]{64})")
_STAMP_BYTES = len("step=") + 12 + len(" sha256=") + 64
_GOES_ON_FROM = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "tokens")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DamagedCheckpoint(ValueError):
    """A file that is not what was written."""


class CheckpointFiles(CheckpointIO):
    """Lightning's plugin for checkpoints in one file: written under another name in the same folder, flushed to disk,
    read back and compared, then renamed.

    Where the disk is full training goes on, with one line that says so; until a checkpoint has been written again none
    is removed.
    """

    def __init__(self) -> None:
        self._failed = False

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: object = None) -> None:
        path = Path(path)
        require_finite(checkpoint, path)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(checkpoint, temporary)
            verify(temporary)
            if path.is_dir():  # a sharded checkpoint of the same name
                replace_folder(temporary, path)
            else:
                os.replace(temporary, path)
            _flush(path.parent)
            self._failed = False
        except (OSError, RuntimeError, DamagedCheckpoint) as error:
            free = shutil.disk_usage(path.parent).free + (temporary.stat().st_size if temporary.exists() else 0)
            needed = bytes_of_tensors(checkpoint)
            # torch's writer fails once more on its way out of a full disk.
            causes = (error, error.__context__)
            if free >= needed and not any(isinstance(e, OSError) and e.errno in _NO_SPACE for e in causes):
                raise
            self._failed = True
            print(
                f"warning: {path} was not written: it needs about {needed:,} bytes and {free:,} are free; training "
                "goes on, and what was saved before stays",
                file=sys.stderr,
            )
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, map_location: object = None, weights_only: bool | None = None) -> dict:
        """Raises DamagedCheckpoint for a file that is not what was written."""
        if "://" in str(path):
            raise ValueError(f"{path} is no local file; fetch it, look where it is from, and pass its path")
        verify(Path(path))
        if Path(path).is_dir():
            return _whole(Path(path))
        try:
            # Tensors and plain containers only: a pickle can run any code.
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            why = re.search(r"GLOBAL \S+", str(error))
            raise ValueError(
                f"{path} holds more than tensors and numbers ({why[0] if why else type(error).__name__}); code of a "
                "checkpoint is never run"
            ) from None
        require_finite(checkpoint, Path(path))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        if not self._failed:
            remove(Path(path))


def _whole(folder: Path) -> dict:
    """A sharded checkpoint, as one that is not."""
    tensors, rest = sharded_checkpoints.read_whole(folder), sharded_checkpoints.rest_of(folder)
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    found = rest | {"state_dict": weights}
    if "optimizer" in rest:
        states = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
        found["optimizer_states"] = [filled(found.pop("optimizer"), states) | {"weights": weights}]
    require_finite(found, folder)
    return found


# Writing and checking


class _Hashing:
    """A file that hashes what is written to it, but for the last two bytes, which are rewritten at the end."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.hash = hashlib.sha256()
        self._last = b""

    def write(self, block: bytes | memoryview) -> int:
        size = self.file.write(block)
        if len(block) < 2:
            block = self._last + bytes(block)
            self._last = b""
        self.hash.update(self._last)
        self.hash.update(block[:-2])
        self._last = bytes(block[-2:])
        return size

    def flush(self) -> None:
        self.file.flush()


def _write(checkpoint: dict, path: Path) -> None:
    with path.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(checkpoint, hashing)
        stamp = f"step={checkpoint.get('global_step', 0):012d} sha256={hashing.hash.hexdigest()}".encode()
        file.seek(-2, os.SEEK_END)  # where a zip file says how long its comment is
        file.write(len(stamp).to_bytes(2, "little") + stamp)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Of a file its content, of a folder the names in it: so that they survive a power cut, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts a folder in the place of another, or of a file, or of none: at any moment the old one or the new one is
    there, whole."""
    for path in (*new.rglob("*"), new):
        _flush(path)
    exchange = 2  # RENAME_EXCHANGE of Linux, https://man7.org/linux/man-pages/man2/rename.2.html
    here = -100  # AT_FDCWD
    libc = ctypes.CDLL(None)
    if not folder.exists():
        new.rename(folder)
    elif not hasattr(libc, "renameat2") or libc.renameat2(here, bytes(new), here, bytes(folder), exchange):
        # Elsewhere there is a moment without either under the name.
        old = folder.with_name(f".{folder.name}.old")
        remove(old)
        folder.rename(old)
        new.rename(folder)
        remove(old)
    remove(new)
    _flush(folder.parent)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify(path: Path) -> None:
    """Raises DamagedCheckpoint unless the file is what was written. Of one that we did not write, the zip's own
    checksums are compared: they cover all of its tensors, though not its every byte."""
    if path.is_dir():
        if fault := sharded_checkpoints.fault(path):
            raise DamagedCheckpoint(f"{path} is damaged: {fault}")
        return
    stamp = _stamp(path)
    if stamp is None:
        _verify_zip(path)
        return
    with path.open("rb") as file:
        digest = hashlib.sha256()
        left = path.stat().st_size - _STAMP_BYTES - 2
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
        length = int.from_bytes(file.read(2), "little")
    if digest.hexdigest() != stamp[2].decode() or length != _STAMP_BYTES:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 is not the one it was written with")


def _stamp(path: Path) -> re.Match[bytes] | None:
    """Step and SHA-256 at the end of a checkpoint that was written here."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _STAMP_BYTES))
        return _STAMP.fullmatch(file.read())


def _verify_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() or (archive.comment and "its stamp")
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DamagedCheckpoint(f"{path} is no whole checkpoint (cut off, or another file): {error}") from None
    if damaged:
        raise DamagedCheckpoint(f"{path} is damaged: {damaged} is not what was written")


def newest(folder: Path) -> Path | None:
    """The checkpoint of a folder that is furthest on and whole; None where there is none at all.

    Says which ones it passes over; raises ValueError where all are damaged, for a run must not begin anew in silence.
    """
    files = list(folder.glob("*.ckpt"))
    steps: dict[Path, int] = {}
    for path in files:
        try:
            steps[path] = step_of(path)
        except DamagedCheckpoint as error:
            print(f"warning: {error}; it is passed over", file=sys.stderr)
    for path in sorted(steps, key=lambda path: (steps[path], path.stat().st_mtime_ns), reverse=True):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            print(f"warning: {error}; it is passed over", file=sys.stderr)
        else:
            return path
    if files:
        raise ValueError(
            f"all {len(files)} checkpoints in {folder} are damaged; restore one from a copy, or leave "
            "--ckpt_path out to begin anew"
        )
    return None


def step_of(path: Path) -> int:
    """The step of a checkpoint; raises DamagedCheckpoint where even that cannot be read."""
    if path.is_dir():
        if not (path / sharded_checkpoints.SEAL).exists():
            raise DamagedCheckpoint(f"{path} is damaged: it was not written to its end")
        return sharded_checkpoints.step_of(path)
    if (stamp := _stamp(path)) is not None:
        return int(stamp[1])
    _verify_zip(path)
    return int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"])


# Numbers


def require_finite(checkpoint: dict, path: Path) -> None:
    """Raises ValueError where a weight or an optimizer's number is NaN or +inf (-inf stands in masks)."""
    for name, tensor in _tensors({name: checkpoint.get(name) for name in ("state_dict", "optimizer_states")}):
        if tensor.is_floating_point() and not (local(tensor) < torch.inf).all():
            raise ValueError(
                f"{path}: {name} is not finite at step {checkpoint.get('global_step')}; no such checkpoint is "
                "kept: go on from the one before with a lower learning rate"
            )


def digest(checkpoint: dict) -> str:
    """SHA-256 of what training goes on from: weights, optimizer, schedule, the place in the text; not of clocks."""
    parts = {name: checkpoint.get(name) for name in _GOES_ON_FROM}
    # Of the datamodule, which is named by its class.
    parts["place"] = [value for value in checkpoint.values() if isinstance(value, dict) and "consumed" in value]
    sha = hashlib.sha256()
    for name, value in _leaves(parts):
        sha.update(name.encode())
        if isinstance(value, Tensor):
            sha.update(str(value.dtype).encode())
            sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


def bytes_of_tensors(checkpoint: dict) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(checkpoint))


def _tensors(value: object) -> Iterator[tuple[str, Tensor]]:
    return ((name, leaf) for name, leaf in _leaves(value) if isinstance(leaf, Tensor))


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of all that nested dicts and lists hold."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
