"""What this process holds in memory, in bytes: resident now, and the most since the last `forget_peak`."""

import resource
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """Of the GPU where there is one in use, else of this process alone.

    On Linux not ru_maxrss: a process inherits that from the one that started it.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """From now on `peak_bytes` counts anew; Linux, CPU."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
