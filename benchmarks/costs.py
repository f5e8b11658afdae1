"""What a loss costs in a process of its own: extra peak memory, CPU time, and its value."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from memory import forget_peak, peak_bytes, resident_bytes
from torch import Tensor
from turns import environment


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    width: int


def of_loss(loss: Callable[[], Tensor], leaves: list[Tensor], tokens: int, repeats: int) -> dict[str, float]:
    """Forward and backward: peak bytes beside what is resident before, CPU seconds (median), mean loss per token."""
    seconds = []
    forget_peak()
    before = resident_bytes()
    for i in range(repeats):
        for leaf in leaves:
            leaf.grad = None
        start = time.process_time()
        value = loss()
        value.backward()
        seconds.append(time.process_time() - start)
        if i == 0:
            extra = peak_bytes() - before
    return {"extra_bytes": extra, "seconds": statistics.median(seconds), "loss": value.item() / tokens}


def in_a_process(script: str, way: str, shape: Shape, repeats: int, threads: int) -> dict[str, float]:
    """What the script's `measure_here` finds in a fresh one."""
    arguments = [sys.executable, script, way, *map(str, shape), str(repeats)]
    done = subprocess.run(arguments, env=environment(threads), stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def answer(measure_here: Callable[[str, Shape, int], dict[str, float]]) -> None:
    """The other side of `in_a_process`."""
    way, *numbers = sys.argv[1:]
    *dimensions, repeats = map(int, numbers)
    print(json.dumps(measure_here(way, Shape(*dimensions), repeats)))
