"""A run's folder: where it is, that it may be written to, and the checkpoint in it to go on from."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from lightning_modules import checkpoint_io

RUN_FOLDER = "LIGHTNING_LM_RUN_FOLDER"
"""Environment variable by which the ranks that Lightning starts learn the folder that the first one chose."""


def run_folder(recipe: str, chosen: str | None) -> Path:
    """Makes and returns the folder of a run: the chosen one, or runs/<recipe>-<date>-<time>."""
    folder = Path(chosen or os.environ.get(RUN_FOLDER) or f"runs/{recipe}-{moment()}")
    if not chosen:
        os.environ[RUN_FOLDER] = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another rank may have been here
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder} ({error.strerror}); pass another --trainer.default_root_dir"
        ) from error
    return folder


def moment() -> str:
    """Date and time; of ranks that are connected already, each with a clock of its own, the first one's."""
    told = [f"{datetime.now():%Y%m%d-%H%M%S}"]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


@contextmanager
def no_empty_run_folder() -> Iterator[None]:
    """Takes away a folder that a recipe named and made itself, where nothing came of the run."""
    before = os.environ.get(RUN_FOLDER)
    try:
        yield
    finally:
        if (made := os.environ.get(RUN_FOLDER)) and made != before:
            with suppress(OSError):  # not empty: there was a run
                Path(made).rmdir()


def require_new(folder: Path) -> None:
    """Raises FileExistsError where a run would begin among the checkpoints of another, and later be taken for it."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        raise FileExistsError(
            f"{folder} holds the checkpoints of a run: go on with it by --ckpt_path last, or pass another "
            "--trainer.default_root_dir"
        )


def find_checkpoint(asked: str | None, folder: str | None) -> str | None:
    """The file that --ckpt_path stands for: of "last" the newest whole one of the run's folder, None where there is
    none yet. A folder is a sharded checkpoint: its strategy's."""
    if asked is None:
        return None
    if str(asked) == "last":
        if folder is None:
            raise ValueError("--ckpt_path last needs --trainer.default_root_dir, the folder of the run to go on with")
        path = checkpoint_io.newest(Path(folder) / "checkpoints")
        if path is None and "LOCAL_RANK" not in os.environ:
            print(f"no checkpoint in {folder}/checkpoints yet: the run begins", file=sys.stderr)
        return path and str(path)
    if "://" in str(asked):
        raise ValueError(f"--ckpt_path {asked} is no file of this machine; fetch it first")
    if not Path(asked).exists():
        raise FileNotFoundError(f"--ckpt_path {asked} does not exist; checkpoints are in a run's folder checkpoints/")
    if Path(asked).is_file():
        checkpoint_io.verify(Path(asked))
    return str(asked)
