"""What the machine does well: matrix rates, and the precision that follows."""

import ctypes
import os
import platform
import re
import time
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What a run is planned on."""

    name: str
    kind: str
    """cpu or cuda."""
    flops: float
    """Of matrix products in a second, dense."""
    memory: float | None
    """Bytes, of one device."""
    watts: float | None
    """At most, of one device."""


# From the vendors' data sheets: dense bf16 FLOP/s, bytes of memory, watts. Longest name first where one holds another.
GPUS = {
    "B200": (2250e12, 180e9, 1000),
    "GH200": (989e12, 96e9, 900),
    "H200": (989e12, 141e9, 700),
    "H100 PCIe": (756e12, 80e9, 350),
    "H100": (989e12, 80e9, 700),
    "A100 40GB": (312e12, 40e9, 400),
    "A100": (312e12, 80e9, 400),
    "A10G": (70e12, 24e9, 300),
    "L40S": (362e12, 48e9, 350),
    "L4": (121e12, 24e9, 72),
    "RTX 5090": (210e12, 32e9, 575),
    "RTX 4090": (165e12, 24e9, 450),
    "RTX 3090": (71e12, 24e9, 350),
}

PLANNED_FOR: ContextVar[str | None] = ContextVar("planned_for", default=None)
"""While a run is planned, the kind of its device: tensors are fake then, and no numbers come of them."""


SPARED: ContextVar[bool] = ContextVar("spared", default=False)
"""While a rank makes a network whose weights it gets from the first one."""


def is_planning() -> bool:
    return PLANNED_FOR.get() is not None


def reads_weights() -> bool:
    """Whether weights are read for a network that is made now."""
    return not is_planning() and not SPARED.get()


def kind_of(device: torch.device) -> str:
    """cpu, cuda …: of what a run is planned for, or else of a tensor's own."""
    return PLANNED_FOR.get() or device.type


def gpu(name: str) -> Device:
    """Of the table, however its name is written: h100, H100-PCIe, rtx4090."""
    names = {re.sub(r"[\W_]", "", known).lower(): known for known in GPUS}
    known = names.get(re.sub(r"[\W_]", "", name).lower())
    if known is None:
        raise ValueError(f"--hardware {name} is not known; pass one of {', '.join(sorted(names))}")
    return Device(known, "cuda", *GPUS[known])


def here(kind: str, flops: float, ranks: int) -> Device:
    """A device of this machine, of which each rank has a part."""
    if kind == "cuda":
        name = torch.cuda.get_device_name()
        known = next((GPUS[key] for key in GPUS if key in name), None)
        return Device(name, kind, flops, torch.cuda.get_device_properties(0).total_memory, known and known[2])
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Device(describe(), kind, flops, pages * os.sysconf("SC_PAGE_SIZE") / ranks if pages else None, None)


@cache
def matrix_flops(device: str, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of a matrix product: from the table for a known GPU in bf16, else the best of a few measured here."""
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = next((flops for key, (flops, *_) in GPUS.items() if key in name), None)
        if known is not None:
            return known
    size = 1024 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@cache
def product_dtype(device: str) -> torch.dtype:
    """bf16 where matrix products are faster in it, float32 elsewhere.

    By what the processor says of itself, not by timing it: all ranks, and the run that resumes, must decide alike.
    Without AVX512_BF16 or AMX an x86 CPU is up to 100 times slower in bf16; on ARM it is not measured, so float32.
    """
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def best_precision(device: str) -> str:
    """The Trainer's precision that pays here.

    bf16-true keeps float32 master weights in the optimizer (see `Float32Master`); on a CPU it is 1.3 times as fast as
    bf16-mixed, which converts all weights and most activations back and forth.
    """
    fast = (is_planning() and device == "cuda") or product_dtype(device) == torch.bfloat16
    if device == "cuda":
        return "bf16-mixed" if fast else "16-mixed"
    return "bf16-true" if fast else "32-true"


def keep_freed_memory() -> None:
    """Makes glibc reuse what tensors free instead of returning it to the kernel, which hands it back zeroed, page by
    page: a fifth of a small model's step (docs/experiments.md). Blocks of more than 32 MiB still go back."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    libc.mallopt(m_mmap_threshold, 32 * 2**20)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)


def memory_in_use(kind: str) -> int | None:
    """Bytes of tensors on a GPU, of the whole process elsewhere; None where the system does not say."""
    return torch.cuda.memory_allocated() if kind == "cuda" else _of_process("VmRSS")


def peak_memory(kind: str) -> int | None:
    """The most of it since `start_peak_memory`."""
    return torch.cuda.max_memory_allocated() if kind == "cuda" else _of_process("VmHWM")


def start_peak_memory(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # no Linux, or one that does not let its processes: the peak is that since their start
        Path("/proc/self/clear_refs").write_text("5")


def _of_process(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def describe() -> str:
    """The machine in one line."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"
