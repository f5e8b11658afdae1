"""What the machine does well: matrix rates, and the precision that follows."""

import ctypes
import platform
import time
from functools import cache

import torch

# Dense bf16 matrix rates from the vendors' data sheets, in FLOP/s. Longest name first where one holds another.
GPU_BF16_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@cache
def matrix_flops(device: str, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of a matrix product: from the table for a known GPU in bf16, else the best of a few measured here."""
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = next((flops for key, flops in GPU_BF16_FLOPS.items() if key in name), None)
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
    fast = product_dtype(device) == torch.bfloat16
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
