"""What has to be right before many machines train together, found in seconds: one line for each check."""

import hashlib
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import fsspec
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_modules import hardware
from lightning_modules.architectures import bytes_of
from lightning_modules.restarts import join

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "safetensors")
APART = 1.0
"""Seconds that the clocks of two machines may differ by: logs and folders are named by them."""
WRITTEN = 256 * 2**20
"""Bytes that are written to find the rate of the disk."""
ABSENT = ("is not there", "cannot be read")
"""What is said of data that a rank cannot see."""
REDUCED = 64 * 2**20
"""Bytes that are added up to find the rate of the network, on a GPU; on a CPU a quarter of them."""


class Check(NamedTuple):
    name: str
    passed: bool
    found: str


class Ranks:
    """All processes of this run of the doctor; of one there is nothing to ask the others."""

    def __init__(self) -> None:
        self.on_cpu = not torch.cuda.is_available()
        join(self.on_cpu)
        self.count = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = torch.device("cpu" if self.on_cpu else "cuda")

    def all(self, mine: object) -> list:
        """What each rank says."""
        found: list[object] = [mine] * self.count
        if self.count > 1:
            dist.all_gather_object(found, mine)
        return found

    def add_up(self, tensor: Tensor) -> None:
        if self.count > 1:
            dist.all_reduce(tensor)
        if not self.on_cpu:
            torch.cuda.synchronize()


def checks(ranks: Ranks, folder: Path, data: list[str], checkpoint_bytes: float | None) -> Iterator[Check]:
    """In the order of what they cost."""
    yield devices(ranks)
    yield alike(ranks, "versions", versions())
    yield alike(ranks, "source", {"digest": source_digest()})
    yield clocks(ranks)
    if data:
        found = {path: of_data(path) for path in data}
        yield alike(ranks, "data", found, everywhere=lambda found: not found.startswith(ABSENT))
    yield from disk(ranks, folder, checkpoint_bytes)
    yield network(ranks)


def devices(ranks: Ranks) -> Check:
    kinds = sorted(set(ranks.all(torch.cuda.get_device_name() if not ranks.on_cpu else "CPU")))
    hosts = len(set(ranks.all(socket.gethostname())))
    backends = "NCCL" if not ranks.on_cpu and dist.is_nccl_available() else "gloo"
    passed = len(kinds) == 1 and (ranks.on_cpu or dist.is_nccl_available())
    missing = "" if ranks.on_cpu or dist.is_nccl_available() else "; this torch has no NCCL: install one for CUDA"
    return Check("devices", passed, f"{ranks.count} × {', '.join(kinds)} on {hosts} hosts, by {backends}{missing}")


def alike(
    ranks: Ranks, name: str, mine: dict[str, str], everywhere: Callable[[str], bool] = lambda found: True
) -> Check:
    """Whether all ranks say the same."""
    of_ranks = ranks.all((socket.gethostname(), mine))
    for key, value in of_ranks[0][1].items():
        for rank, (host, found) in enumerate(of_ranks):
            if found[key] != value or not everywhere(found[key]):
                other = f", {value} on rank 0" if found[key] != value else ""
                return Check(name, False, f"{key} {found[key]} on rank {rank} ({host}){other}")
    return Check(name, True, ", ".join(f"{key} {value}" for key, value in mine.items()))


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES} | {"Python": platform.python_version()}


def source_digest() -> str:
    """Of this project's own code."""
    root = Path(__file__).parents[1]
    parts = ("lightning_modules", "datamodules", "recipes")
    files = sorted(file for part in parts for file in root.glob(f"{part}/**/*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def of_data(path: str) -> str:
    """Names and sizes of what a path, a glob or an address stands for; all of it is read once, where it is made
    tokens."""
    try:
        files, place = fsspec.core.url_to_fs(path)
        places = [place] if files.exists(place) else files.glob(place)
        found = {name: info for place in places for name, info in files.find(place, detail=True).items()}
        sizes = {name: (info or files.info(name))["size"] for name, info in sorted(found.items())}
    except Exception as error:  # whatever lies between this machine and a store
        return f"cannot be read: {error}"
    if not sizes:
        return ABSENT[0]
    root = os.path.commonpath([os.path.dirname(name) for name in sizes])
    digest = hashlib.sha256(repr([(os.path.relpath(name, root), sizes[name]) for name in sizes]).encode()).hexdigest()
    return f"{len(sizes):,} files, {bytes_of(sum(sizes.values()))}, names and sizes {digest[:12]}"


def clocks(ranks: Ranks) -> Check:
    """Read when all have met, which takes milliseconds."""
    ranks.all(None)
    times = ranks.all(time.time())
    spread = max(times) - min(times)
    return Check("clocks", spread < APART, f"{1000 * spread:,.0f} ms apart")


def disk(ranks: Ranks, folder: Path, checkpoint_bytes: float | None) -> Iterator[Check]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rate = written_per_second(folder / f".doctor-{ranks.rank}") if ranks.rank == 0 else 0.0
        free, fault = shutil.disk_usage(folder).free, None
    except OSError as error:
        rate, free, fault = 0.0, 0, f"{folder}: {error.strerror} on rank {ranks.rank} ({socket.gethostname()})"
    if faults := [found for found in ranks.all(fault) if found]:
        yield Check("disk", False, faults[0])
        return
    shared = ranks.all(None) and same_folder(ranks, folder)
    where = "" if ranks.count == 1 else ", the same for all ranks" if shared else ", not the same for all ranks"
    yield Check("disk", shared, f"{folder}: {bytes_of(rate)}/s written and flushed{where}")
    needed = "" if checkpoint_bytes is None else f"; two checkpoints need {bytes_of(2 * checkpoint_bytes)}"
    enough = checkpoint_bytes is None or free >= 2 * checkpoint_bytes
    if checkpoint_bytes is not None and rate:
        needed += f", and one takes {checkpoint_bytes / rate:,.0f} s"
    yield Check("space", all(ranks.all(enough)), f"{bytes_of(free)} free{needed}")


def written_per_second(file: Path) -> float:
    block = os.urandom(2**20)
    start = time.perf_counter()
    try:
        with file.open("wb") as opened:
            while opened.tell() < WRITTEN and time.perf_counter() - start < 2:
                opened.write(block)
            opened.flush()
            os.fsync(opened.fileno())
            size = opened.tell()
    finally:
        file.unlink(missing_ok=True)
    return size / (time.perf_counter() - start)


def same_folder(ranks: Ranks, folder: Path) -> bool:
    """Whether every rank sees what the first one writes."""
    mark = folder / ".doctor-mark"
    if ranks.rank == 0:
        mark.touch()
    ranks.all(None)
    seen = all(ranks.all(mark.exists()))
    if ranks.rank == 0:
        mark.unlink(missing_ok=True)
    return seen


def network(ranks: Ranks) -> Check:
    """The rate of a ring: each rank sends 2 (n - 1) / n of what is added up."""
    if ranks.count == 1:
        return Check("all-reduce", True, "one rank has nobody to wait for; start it by torchrun")
    numbers = torch.ones((REDUCED // 4 if ranks.on_cpu else REDUCED) // 4, device=ranks.device)
    ranks.add_up(numbers)
    best = float("inf")
    for _ in range(3):
        numbers.fill_(1.0)
        ranks.all(None)
        start = time.perf_counter()
        ranks.add_up(numbers)
        best = min(best, time.perf_counter() - start)
    seconds = max(ranks.all(best))
    sent = 2 * (ranks.count - 1) / ranks.count * numbers.numel() * 4
    right = bool((numbers == ranks.count).all())
    size = bytes_of(4 * numbers.numel())
    return Check("all-reduce", right, f"{bytes_of(sent / seconds)}/s of each rank, {1000 * seconds:,.1f} ms for {size}")


def passed(ranks: Ranks, folder: Path, data: list[str], checkpoint_bytes: float | None) -> bool:
    """Prints the checks; whether all were passed."""
    all_passed = True
    start = time.perf_counter()
    for check in checks(ranks, folder, data, checkpoint_bytes):
        all_passed = all_passed and check.passed
        if ranks.rank == 0:
            print(f"{'passed' if check.passed else 'FAILED'}  {check.name:<10}  {check.found}", flush=True)
    if ranks.rank == 0:
        print(f"{time.perf_counter() - start:,.1f} s on {hardware.describe()}", file=sys.stderr)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return all_passed
