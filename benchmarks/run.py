"""All benchmarks, one after the other, on a quiet machine; writes docs/benchmarks.md.

Run:
    python benchmarks/run.py                                      about 25 minutes on 2 cores
    python benchmarks/run.py --only training --quick              a part, in a minute; writes no page
    python benchmarks/run.py --only time_to_loss --data.path input.txt
    python benchmarks/run.py --only tasks --page docs/benchmarks.md           fine-tuning on real data, an hour
    python benchmarks/run.py --only teaching --page docs/benchmarks.md        distillation, three seeds, two hours
    python benchmarks/run.py --only compressing --keep runs/compressing --page docs/benchmarks.md     1.5 hours
    python benchmarks/run.py --only atlas --keep runs/atlas --page docs/benchmarks.md                 75 minutes
    python benchmarks/run.py --only named_runs --keep runs/named --page docs/benchmarks.md            40 minutes
    python benchmarks/run.py --gpu                                on a CUDA device; writes docs/benchmarks_gpu.md
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# Idle OpenMP threads sleep; read when torch is loaded, so it stands before all imports that load it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import atlas
import compressing
import cpu_kernels
import data_tables
import distillation
import distillation_loss
import finetuning
import fused_loss
import gpu
import ladder
import layer
import named_runs
import peer_distillation
import planned
import startup
import tasks
import teaching
import time_to_loss
import torch
import tournament
import training
from page import ROOT, Table, write
from sizes import GPT2, MIDDLE, SMALL

PARTS = (
    "training",
    "layer",
    "finetuning",
    "fused_loss",
    "distillation_loss",
    "distillation",
    "cpu_kernels",
    "time_to_loss",
    "encoding",
    "loading",
    "planned",
    "startup",
)
LONG = ("tasks", "teaching", "compressing", "peer_distillation", "atlas", "tournament", "ladder", "named_runs")
"""Parts that run only when they are named."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS + LONG, help="these parts alone, and no page unless --page")
    parser.add_argument("--quick", action="store_true", help="few rounds, one thread, small sizes: does it run?")
    parser.add_argument("--gpu", action="store_true", help="the table of CUDA devices")
    parser.add_argument("--compile", choices=("none", "small", "all"), default="small", help="sizes with compiled rows")
    parser.add_argument("--sizes", nargs="+", choices=[s.name for s in (SMALL, MIDDLE, GPT2)], help="of training")
    parser.add_argument("--threads", nargs="+", type=int, help="of training; default: 1 and all cores")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row")
    parser.add_argument("--turn_seconds", type=float, default=1.5)
    parser.add_argument("--seeds", type=int, default=3, help="of time_to_loss and teaching")
    parser.add_argument("--data.path", dest="text", help="tinyshakespeare's input.txt")
    parser.add_argument("--tasks", nargs="+", choices=[group.name for group in tasks.GROUPS], help="of tasks")
    parser.add_argument("--lessons", nargs="+", choices=[x.name for x in teaching.LESSONS], help="of teaching")
    parser.add_argument(
        "--keep", type=Path, help="a folder where finished runs of teaching and compressing stay and are not repeated"
    )
    parser.add_argument("--trl_python", type=Path, help="of an environment with TRL: see peer_distillation.py")
    parser.add_argument("--data_folder", type=Path, default=ROOT / "../shared/data", help="where the data of tasks are")
    parser.add_argument("--page", type=Path, help="where to write the page")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.turn_seconds, options.seeds, options.compile = 2, 0.5, 1, "none"
        options.threads = options.threads or [1]
        options.sizes = options.sizes or [SMALL.name]
    return options


def measured(options: argparse.Namespace) -> Iterator[list[Table]]:
    """The tables, part by part."""
    wanted = options.only or PARTS
    sizes = [size for size in (SMALL, MIDDLE, GPT2) if not options.sizes or size.name in options.sizes]
    cores = os.cpu_count() or 1
    trained: list[training.Speeds] = []
    if "training" in wanted:
        for size in sizes:
            for threads in options.threads or sorted({1, cores}):
                trained.append(measure_training(options, size, threads))
                yield [training.table(trained[-1], "python benchmarks/run.py --only training")]
    if "layer" in wanted:
        threads = options.threads or sorted({1, cores})
        yield [layer.steps([s for s in sizes if s != GPT2], threads, options.rounds, options.turn_seconds / 2)]
        yield [layer.checkpoints(1_000_000 if options.quick else 124_000_000, options.rounds)]
    if "finetuning" in wanted:
        yield from ([table] for table in finetuning.tables(options.data_folder, cores, min(options.rounds, 3)))
    if "fused_loss" in wanted:
        yield fused_loss.tables(1 if options.quick else 3, cores)
    if "distillation_loss" in wanted:
        yield distillation_loss.tables(1 if options.quick else 3, cores)
    if "distillation" in wanted:
        yield distillation.tables(cores, options.rounds, options.turn_seconds)
    if "cpu_kernels" in wanted:
        yield cpu_kernels.tables(4 * options.rounds)
    if "time_to_loss" in wanted:
        text = time_to_loss.find_text(options.text)
        if text is None:
            print("time_to_loss left out: pass tinyshakespeare's input.txt as --data.path", file=sys.stderr)
        else:
            yield time_to_loss.tables(text, options.seeds)
    if "encoding" in wanted:
        yield [data_tables.encoding(1 if options.quick else 3)]
    if "loading" in wanted:
        yield [data_tables.loading(sizes, options.rounds, trained)]
    if "tasks" in wanted:
        yield from ([table] for table in tasks.tables(options.tasks, options.data_folder))
    if "teaching" in wanted:
        found = teaching.tables(options.lessons, options.data_folder, options.keep, options.seeds)
        yield from ([table] for table in found)
    if "compressing" in wanted:
        yield from ([table] for table in compressing.tables(options.keep, options.data_folder))
    if "atlas" in wanted:
        yield from ([table] for table in atlas.tables(options.keep))
    if "tournament" in wanted:
        yield from ([table] for table in tournament.tables(options.keep))
    if "ladder" in wanted:
        yield from ([table] for table in ladder.tables(options.keep))
    if "named_runs" in wanted:
        yield from ([table] for table in named_runs.tables(options.keep, time_to_loss.find_text(options.text)))
    if "peer_distillation" in wanted:
        yield peer_distillation.tables(options.trl_python, cores, options.rounds, options.turn_seconds)
    if "planned" in wanted:
        yield list(planned.tables())
    if "startup" in wanted:
        yield startup.tables(1 if options.quick else 5)


def measure_training(options: argparse.Namespace, size: training.Size, threads: int) -> training.Speeds:
    big = size == GPT2
    compiled = options.compile == "all" or (options.compile == "small" and not big)
    print(f"training {size.name} on {threads} threads", file=sys.stderr, flush=True)
    if options.compile == "small" and big:
        print("  no compiled rows at this size on a CPU; --compile all runs them", file=sys.stderr)
    # A step of GPT-2 is seconds long: turns of one step, and fewer.
    rounds = min(options.rounds, 3) if big else options.rounds
    return training.measure(size, threads, rounds, options.turn_seconds, compiled)


def measured_on_gpu(options: argparse.Namespace) -> Iterator[list[Table]]:
    yield from ([table] for table in gpu.training(options.rounds, options.turn_seconds))
    yield gpu.precisions()
    text = time_to_loss.find_text(options.text)
    if text is None:
        print("tinyshakespeare left out: pass its input.txt as --data.path", file=sys.stderr)
    else:
        yield gpu.shakespeare(text)


def check(options: argparse.Namespace) -> None:
    """Raises for what is missing, before anything is measured."""
    if options.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA device, and torch sees none; leave it out to measure on the CPU")
    if "peer_distillation" in (options.only or ()) and options.trl_python is None:
        raise ValueError("--only peer_distillation needs --trl_python: see benchmarks/peer_distillation.py")
    if time_to_loss.find_text(options.text) is None and "time_to_loss" in (options.only or ()):
        raise FileNotFoundError("--only time_to_loss needs tinyshakespeare's input.txt; pass it as --data.path")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        check(options)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    page = options.page
    if page is None and not options.only and not options.quick:
        page = ROOT / "docs" / ("benchmarks_gpu.md" if options.gpu else "benchmarks.md")
    tables: list[Table] = []
    for part in measured_on_gpu(options) if options.gpu else measured(options):
        for table in part:
            table.print()
        tables += part
        if page is not None:  # after each part: what was measured is kept if the next one fails
            write(page, tables, os.cpu_count() or 1)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning|torch|transformers")
    main()
