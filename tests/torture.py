"""`make torture`: runs that are hurt at random moments, again and again, and what came of them as a table.

Run:
    python -m tests.torture                                 everything, once, about 25 minutes on 2 cores
    python -m tests.torture --only R1 K2 --times 50
    python -m tests.torture --soak_minutes 60               and faults every half minute for an hour
    python -m tests.torture --seed 1234                     the same moments again

The short forms of these tests, at fixed moments, are in tests/.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lightning_modules import checkpoint_io
from lightning_modules.callbacks.recovery import steps_done
from lightning_modules.checkpoint_io import CheckpointFiles, DamagedCheckpoint
from tests.faults import arguments, command, forked, kill_group, members, small_disk, state, summary
from tests.test_checkpoint_io import checkpoint
from tests.test_damaged_inputs import FILE_KINDS, ROW_KINDS
from tests.test_tracking import Server

PAIR = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 2}
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


@dataclass
class Torture:
    """What every test gets: a folder of its own, text, and its own random moments."""

    folder: Path
    corpus: Path
    rng: random.Random
    times: int

    def whole(self, name: str, **flags: object) -> str:
        """The end of a run that nothing disturbs."""
        folder = self.fresh(f"whole-{name}")
        process = command(arguments(folder, self.corpus, flags), folder / "log")
        assert process.wait() == 0, (folder / "log").read_text()[-2000:]
        return state(folder)

    def fresh(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder


def killed_anywhere(t: Torture) -> tuple[int, int, str]:
    """kill -9 at random moments, the same command until done: equal to the whole run, bit by bit."""
    whole, equal, runs, kills = t.whole("R1"), 0, 0, 0
    while kills < t.times:
        folder = t.fresh(f"R1-{runs}")
        argv = arguments(folder, t.corpus, {})
        for _ in range(4):
            process = forked(argv, folder / "log")
            process.join(t.rng.uniform(0, 2.0))
            kills += process.is_alive()
            process.kill()
            process.join()
        process = forked(argv, folder / "log")
        process.join()
        equal += process.exitcode == 0 and state(folder) == whole and not list(folder.rglob("*.partial"))
        runs += 1
    return equal, runs, f"{kills} kills of living processes"


def terminated_pairs(t: Torture) -> tuple[int, int, str]:
    """SIGTERM or SIGINT to either of two ranks: exit code, no orphan, a checkpoint at most one step old; then equal."""
    whole, good, slowest = t.whole("R6", **PAIR), 0, 0.0
    times = max(2, t.times // 5)
    for i in range(times):
        folder, number = t.fresh(f"R6-{i}"), t.rng.choice([signal.SIGTERM, signal.SIGINT])
        argv = arguments(folder, t.corpus, PAIR)
        process = command(argv, folder / "log")
        _some_way(t, folder, process)
        ranks = members(process.pid)
        os.kill(t.rng.choice(ranks), number)
        start = time.monotonic()
        code = process.wait()
        slowest = max(slowest, time.monotonic() - start)
        saved = checkpoint_io.newest(folder / "checkpoints")
        fresh = saved is not None and steps_done(folder / "checkpoints") - checkpoint_io.step_of(saved) <= 1
        orphans = members(process.pid)
        done = command(argv, folder / "log").wait()
        good += code == 128 + number and fresh and not orphans and done == 0 and state(folder) == whole
        kill_group(process)
    return good, times, f"stopped within {slowest:.1f} s"


def torchrun_restarts(t: Torture) -> tuple[int, int, str]:
    """A rank under torchrun is killed: it starts again by itself and ends equal."""
    whole, good, slowest = t.whole("R5", **PAIR), 0, 0.0
    times = max(2, t.times // 5)
    for i in range(times):
        folder = t.fresh(f"R5-{i}")
        process = command(arguments(folder, t.corpus, PAIR), folder / "log", [sys.executable, *TORCHRUN])
        _some_way(t, folder, process)
        listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        start = time.monotonic()
        os.kill(int(t.rng.choice(listed)), signal.SIGKILL)
        code = process.wait()
        slowest = max(slowest, time.monotonic() - start)
        good += code == 0 and state(folder) == whole and not members(process.pid)
        kill_group(process)
    return good, times, f"done {slowest:.1f} s after the kill at the latest"


def _some_way(t: Torture, folder: Path, process: subprocess.Popen, most: int = 50) -> None:
    """Waits until a run is at a random step."""
    step = t.rng.randrange(1, most)
    while process.poll() is None and steps_done(folder / "checkpoints") < step:
        time.sleep(0.002)


def damaged_files(t: Torture, damage: Callable[[random.Random, bytes], bytes]) -> tuple[int, int, str]:
    path = t.fresh("K") / "one.ckpt"
    CheckpointFiles().save_checkpoint(checkpoint(numbers=200_000), path)
    content, found, times = path.read_bytes(), 0, 4 * t.times
    for _ in range(times):
        path.write_bytes(damage(t.rng, content))
        try:
            CheckpointFiles().load_checkpoint(path)
        except DamagedCheckpoint:
            found += 1
    return found, times, f"of a file of {len(content):,} bytes"


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(rng: random.Random, content: bytes) -> bytes:
    damaged, at = bytearray(content), rng.randrange(len(content))
    if rng.random() < 0.5:
        damaged[at] ^= 1 << rng.randrange(8)
    else:
        damaged[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = bytes(len(damaged[at // 4096 * 4096 :][:4096]))
    return bytes(damaged)


SAVES = """
import sys
sys.path.insert(0, {root!r})
from tests.test_checkpoint_io import CheckpointFiles, checkpoint
files, one = CheckpointFiles(), checkpoint(numbers=4_000_000)
while True:
    files.save_checkpoint(one, {path!r})
"""


def killed_saves(t: Torture) -> tuple[int, int, str]:
    """kill -9 while checkpoints are written: under the final name there is only what is whole."""
    folder, temporary = t.fresh("K3"), t.fresh("K3-tmp")
    path, whole, times = folder / "one.ckpt", 0, 4 * t.times
    root = str(Path(__file__).parents[1])
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVES.format(root=root, path=str(path))], env=os.environ | {"TMPDIR": str(temporary)}
        )
        while not path.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(t.rng.uniform(0, 0.6))
        process.kill()
        process.wait()
        checkpoint_io.verify(path)
        whole += not list(temporary.iterdir())
        path.unlink()
    return whole, times, "whole each time, and nothing in the temporary folder"


def all_damaged(t: Torture) -> tuple[int, int, str]:
    """Every checkpoint of a run is damaged somewhere: the same command refuses, and begins nothing anew."""
    folder = t.fresh("K5")
    argv = arguments(folder, t.corpus, {})
    process = forked(argv, folder / "log")
    process.join()
    contents = {path: path.read_bytes() for path in (folder / "checkpoints").glob("*.ckpt")}
    refused, times = 0, max(2, t.times // 5)
    for i in range(times):
        for path, content in contents.items():
            damaged = content
            while damaged == content:  # a block of zeros is not damaged by zeros
                damaged = t.rng.choice([cut, flipped])(t.rng, content)
            path.write_bytes(damaged)
        log = folder / f"log-{i}"
        process = forked(argv, log)
        process.join()
        told = log.read_text().splitlines()[-1]
        refused += process.exitcode == 2 and "are damaged; restore one from a copy" in told
    return refused, times, f"{len(contents)} checkpoints each"


def damaged_inputs(t: Torture) -> tuple[int, int, str]:
    """Text that is damaged at a random row: one line with the file, exit code 2, before anything else."""
    told, kinds = 0, ROW_KINDS | FILE_KINDS
    for i in range(t.times):
        name, content = kinds[t.rng.choice(sorted(kinds))](t.rng.randrange(1, 40))
        folder = t.fresh(f"D1-{i}")
        (folder / name).write_bytes(content)
        process = forked(arguments(folder / "run", folder / name, {}), folder / "log")
        process.join()
        lines = (folder / "log").read_text().splitlines()
        named = lines[-1].startswith("error: ") and str(folder / name) in lines[-1]
        told += process.exitcode == 2 and named and not (folder / "run" / "checkpoints").exists()
    return told, t.times, "one line each, exit code 2"


def full_disks(t: Torture) -> tuple[int, int, str]:
    """A disk that is full at a random moment: training goes on to the same end, and a whole checkpoint stays."""
    if os.geteuid():
        return 0, 0, "left out: mounting a small disk needs root"
    whole, good, times = t.whole("K4"), 0, max(2, t.times // 5)
    end = summary(t.folder / "whole-K4")["val_loss_final"]
    for i in range(times):
        size = t.rng.randrange(900, 1400)  # kB: two to three checkpoints
        with small_disk(t.folder / f"K4-{i}", f"{size}k") as folder:
            log = t.folder / f"K4-{i}.log"
            process = command(arguments(folder, t.corpus, {"recovery.keep": 20}), log)
            code, told = process.wait(), log.read_text()
            complained = "was not written: it needs about" in told or "bytes free, and two checkpoints" in told
            stays = checkpoint_io.newest(folder / "checkpoints") is not None
            # To its end and equal, or all but the model, or not begun: one line of each.
            ends = summary(folder)["val_loss_final"] == end if code == 0 else code in (1, 2)
            good += complained and ends and (stays or code == 2) and "Traceback" not in told
    return good, times, f"without a full disk it ends at {whole[:8]}"


def spoiled_losses(t: Torture) -> tuple[int, int, str]:
    """NaN in the loss of random steps on one of two ranks: dropped by both, no checkpoint is not finite."""
    good, times = 0, max(2, t.times // 5)
    for i in range(times):
        folder, steps = t.fresh(f"N1-{i}"), sorted(t.rng.sample(range(2, 58), 4))
        spoil = {"class_path": "tests.faults.SpoilsLoss", "init_args": {"steps": steps, "rank": t.rng.randrange(2)}}
        argv = [*arguments(folder, t.corpus, PAIR), f"--trainer.callbacks+={json.dumps(spoil)}"]
        code = command(argv, folder / "log").wait()
        lines = [json.loads(line) for line in (folder / "unusual_steps.jsonl").read_text().splitlines()]
        told = sorted({line["step"] for line in lines if line["loss"] == "nan"})
        files = CheckpointFiles()
        finite = [files.load_checkpoint(path) for path in (folder / "checkpoints").glob("*.ckpt")]
        good += code == 0 and told == steps and bool(finite)
    return good, times, "each bad step told, each checkpoint finite"


def wandb_away(t: Torture) -> tuple[int, int, str]:
    """W&B's server does not answer, refuses the key, answers too late, or its own process is killed: the run begins
    within seconds and ends equal."""
    whole, equal, latest, times = t.whole("W1"), 0, 0.0, max(4, t.times // 5)
    for i in range(times):
        kind = ("unreachable", "wrong key", "slow", "killed")[i % 4]
        folder = t.fresh(f"W1-{i}")
        server = {"wrong key": Server(401), "slow": Server(200, seconds=30)}.get(kind)
        url = f"http://127.0.0.1:{server.server_address[1] if server else 9}"
        mode = "offline" if kind == "killed" else "online"
        variables = {"WANDB_MODE": mode, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": url}
        start = time.monotonic()
        process = command(arguments(folder, t.corpus, {}), folder / "log", **variables)
        _some_way(t, folder, process, most=2)
        latest = max(latest, time.monotonic() - start)
        if kind == "killed":
            for child in psutil.Process(process.pid).children(recursive=True):
                if "wandb-core" in child.name():
                    child.kill()
        equal += process.wait() == 0 and state(folder) == whole
    return equal, times, f"the first step {latest:.1f} s after the command at the latest"


SIGNALS = {"kill one": signal.SIGKILL, "stop one": signal.SIGSTOP, "term": signal.SIGTERM, "int": signal.SIGINT}


def soak(t: Torture, minutes: float) -> tuple[int, int, str]:
    """Faults about every 30 s on two ranks until the time is up, then to the end: equal; what was done again."""
    steps = int(60 * minutes * 20)
    flags = PAIR | {"trainer.max_steps": steps, "trainer.val_check_interval": 200, "recovery.every_n_steps": 50}
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/loss", "save_last": True}}
    flags |= {"trainer.callbacks": json.dumps([best])}  # without early stopping
    flags |= {"trainer.log_every_n_steps": 50, "watchdog.minutes": 0.1}
    folder, end, faults, repeated = t.fresh("L1"), time.monotonic() + 60 * minutes, 0, 0
    argv = arguments(folder, t.corpus, flags)
    while True:
        process = command(argv, folder / "log")
        wait = t.rng.expovariate(1 / 30) + 6
        if time.monotonic() + wait > end:
            break
        try:
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            faults += 1
        kind = t.rng.choice(["kill", "kill one", "stop one", "term", "int", "damage"])
        ranks = members(process.pid)
        if kind in ("kill", "damage"):
            kill_group(process)
        else:
            os.kill(t.rng.choice(ranks), SIGNALS[kind])
        process.wait()
        deadline = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_group(process)
        newest = checkpoint_io.newest(folder / "checkpoints")
        if newest is not None:
            repeated += steps_done(folder / "checkpoints") - checkpoint_io.step_of(newest)
        if kind == "damage" and newest is not None:
            newest.write_bytes(newest.read_bytes()[:-100])
    code = process.wait()
    whole = t.whole("L1", **flags)
    good = code == 0 and state(folder) == whole and not list(folder.rglob("*.partial"))
    done = summary(folder)["steps"]
    return (
        int(good),
        1,
        f"{faults} faults; {done} steps, {repeated} of them twice: {done / (done + repeated):.0%} of use",
    )


TESTS: dict[str, tuple[str, Callable[[Torture], tuple[int, int, str]]]] = {
    "R1": ("killed at random moments, ends equal", killed_anywhere),
    "R5": ("torchrun restarts a killed rank, ends equal", torchrun_restarts),
    "R6": ("SIGTERM or SIGINT to either rank, ends equal", terminated_pairs),
    "K1": ("cut-off checkpoints found", lambda t: damaged_files(t, cut)),
    "K2": ("flipped bits and lost blocks found", lambda t: damaged_files(t, flipped)),
    "K3": ("killed while saving, what is there is whole", killed_saves),
    "K4": ("disk full, a checkpoint stays", full_disks),
    "K5": ("all checkpoints damaged, refused", all_damaged),
    "N1": ("losses that are not finite, dropped", spoiled_losses),
    "D1": ("damaged text, told in one line", damaged_inputs),
    "W1": ("W&B out of reach, ends equal", wandb_away),
}


def corpus_in(folder: Path) -> Path:
    folder.mkdir()
    for i in range(8):
        lines = [f"def f{i}_{j}(x, y={j * i}):\n    return x * {j} + y - {i}\n\n" for j in range(30)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--times", type=int, default=50, help="kills of R1; the other tests take a part or a multiple")
    parser.add_argument("--soak_minutes", type=float, default=0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}: --seed {seed} makes the same moments again", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        corpus = corpus_in(Path(name) / "corpus")
        jobs = {key: TESTS[key] for key in options.only}
        if options.soak_minutes:
            jobs["L1"] = (f"{options.soak_minutes:g} minutes of faults", lambda t: soak(t, options.soak_minutes))
        for key, (text, test) in jobs.items():
            start = time.monotonic()
            good, of, more = test(Torture(Path(name), corpus, random.Random(f"{seed} {key}"), options.times))
            failed += good < of
            verdict = "pass" if good == of and of else "skip" if not of else "FAIL"
            seconds = time.monotonic() - start
            print(f"{verdict}  {key}  {text:<46} {good:>4} of {of:<4} {seconds:5.0f} s  {more}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
