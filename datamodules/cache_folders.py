"""Folders of the cache are there whole or not at all, whoever else makes them at the same time."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


def cache_root(chosen: str | None) -> Path:
    """The chosen folder, else lightning-lm-recipes in $XDG_CACHE_HOME or ~/.cache."""
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-lm-recipes"


@contextlib.contextmanager
def written_whole(folder: Path, is_sound: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder beside `folder`, synced and renamed to it at the end.

    A sound folder that another process has put there meanwhile stays; a damaged one is replaced.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _put_in_place(temporary, folder, is_sound)
        _sync(folder.parent)  # the name, too, is to survive a power cut
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise OSError(f"{folder.parent} cannot be written: {error.strerror}; pass another --data.cache_dir") from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path, is_sound: Callable[[Path], bool]) -> None:
    temporary.chmod(0o755)  # mkdtemp's folders are private, and a cache may be shared
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        if is_sound(folder):
            return
        damaged = temporary.with_name(f"{temporary.name}.damaged")
        os.rename(folder, damaged)
        os.rename(temporary, folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
