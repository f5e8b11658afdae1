"""However a run ends, the same command goes on from where it was, bit by bit."""

import csv
import json
import random
import sys
import time
from signal import SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
import torch

from lightning_modules.callbacks.recovery import STEPS_DONE, open_counter, steps_done
from lightning_modules.checkpoint_io import step_of
from tests.faults import arguments, command, forked, killed_until_done, members, signal_at, state, summary


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, cache):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = forked(arguments(folder, corpus, {}), folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder


def test_a_run_killed_at_random_moments_ends_bit_by_bit_as_one_that_was_not(whole, corpus, tmp_path):
    rng = random.Random(0)
    met, resumed = killed_until_done(arguments(tmp_path, corpus, {}), tmp_path, rng, kills=10, longest=1.6)
    assert met >= 5 and resumed >= 3
    assert state(tmp_path) == state(whole)
    assert summary(tmp_path)["val_loss"] == summary(whole)["val_loss"]
    assert not list(tmp_path.glob("**/*.partial"))


def test_every_row_is_trained_on_once_an_epoch_whatever_was_killed(corpus, cache, tmp_path):
    """The numbers of the rows count on through the epochs: each once is each stored row once an epoch."""
    keep = {"class_path": "tests.faults.KeepsRows", "init_args": {"folder": str(tmp_path / "rows")}}
    argv = [*arguments(tmp_path, corpus, {"trainer.max_steps": 240}), f"--trainer.callbacks+={json.dumps(keep)}"]
    met, resumed = killed_until_done(argv, tmp_path, random.Random(1), kills=10, longest=1.6)
    assert met >= 5 and resumed >= 3
    steps = [json.loads((tmp_path / "rows" / f"{step}.json").read_text()) for step in range(1, 241)]
    rows = [row for step in steps for row in step]
    assert rows == list(range(len(rows)))
    rows_per_epoch = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["Text"]["rows_per_epoch"]
    assert len(rows) > 3 * rows_per_epoch


@pytest.mark.parametrize("workers, hash_seed", [(1, "0"), (2, "1")])
def test_workers_the_folder_and_the_hash_seed_change_nothing(workers, hash_seed, whole, corpus, tmp_path):
    argv = arguments(tmp_path, corpus, {"data.num_workers": workers})
    process = command(argv, tmp_path / "log", cwd=tmp_path, PYTHONHASHSEED=hash_seed)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    assert state(tmp_path) == state(whole)


EPOCHS = {"data.seq_len": 64, "data.batch_size": 3, "trainer.accumulate_grad_batches": 2, "trainer.max_steps": 50}
"""Several epochs of an odd number of micro-batches, so that each ends with half an accumulation."""


@pytest.fixture(scope="module")
def whole_epochs(tmp_path_factory, corpus, cache):
    folder = tmp_path_factory.mktemp("whole_epochs")
    assert finished(arguments(folder, corpus, EPOCHS), folder) == 0
    return folder


def finished(argv, folder):
    """The exit code of a run."""
    process = forked(argv, folder / "log")
    process.join()
    return process.exitcode


@pytest.mark.parametrize("step", [1, 2, 8, 16, 17, 19, 30, 49])
def test_a_terminated_run_goes_on_from_any_step_bit_by_bit(step, whole_epochs, corpus, tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    argv = arguments(folder, corpus, EPOCHS)
    assert finished(argv + signal_at(step), folder) == 143
    told = (folder / "log").read_text()
    assert "SIGTERM at step " in told and f"--trainer.default_root_dir '{folder}' --ckpt_path last" in told
    assert finished(argv, folder) == 0
    assert state(folder) == state(whole_epochs)
    assert losses(folder) == losses(whole_epochs)


def losses(folder):
    """Of every validation, and the rows of metrics.csv without their times."""
    with (folder / "metrics.csv").open() as file:
        rows = [{n: v for n, v in row.items() if not n.startswith("perf/")} for row in csv.DictReader(file)]
    return rows


def test_a_second_signal_ends_the_run_at_once(whole, corpus, tmp_path):
    argv = arguments(tmp_path, corpus, {})
    assert finished(argv + signal_at(20, times=2), tmp_path) == 143
    told = (tmp_path / "log").read_text()
    assert "once more stops at once" in told and "is written" not in told
    assert [step_of(path) for path in recoveries(tmp_path)] == [7, 14]
    assert finished(argv, tmp_path) == 0
    assert "going on from step 15" in (tmp_path / "log").read_text()  # of the validation
    assert "4 steps are done again" in (tmp_path / "log").read_text()
    assert state(tmp_path) == state(whole)


def test_the_end_of_a_run_is_saved_where_it_is_not_the_best(corpus, cache, tmp_path):
    worst = {"monitor": "val/loss", "mode": "max", "save_last": True}
    best = {"class_path": "ModelCheckpoint", "init_args": worst}  # so that the first validation is the best
    argv = arguments(tmp_path, corpus, {"recovery.every_n_steps": None, "trainer.callbacks": json.dumps([best])})
    assert finished(argv, tmp_path) == 0
    steps = {path.name: step_of(path) for path in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert steps["last.ckpt"] == 15 and steps["recovery-000000060.ckpt"] == 60


def test_a_run_that_was_killed_before_it_could_count_has_done_no_step(tmp_path):
    assert steps_done(tmp_path) == 0
    (tmp_path / STEPS_DONE).touch()
    assert steps_done(tmp_path) == 0
    open_counter(tmp_path / STEPS_DONE)[:] = (7).to_bytes(8, "little")
    assert steps_done(tmp_path) == 7


def recoveries(folder):
    return sorted((folder / "checkpoints").glob("recovery-*.ckpt"))


def test_so_many_checkpoints_stay_as_are_asked_for_and_the_best_and_the_last_always(corpus, cache, tmp_path):
    assert finished(arguments(tmp_path, corpus, {"recovery.keep": 3}), tmp_path) == 0
    assert [step_of(path) for path in recoveries(tmp_path)] == [42, 49, 56]
    others = {path.name for path in (tmp_path / "checkpoints").glob("*.ckpt")} - {p.name for p in recoveries(tmp_path)}
    assert "last.ckpt" in others and len(others) == 2


# Ranks


@pytest.mark.parametrize("first, then, number, rank", [(1, 2, SIGTERM, 0), (2, 1, SIGTERM, 1), (2, 2, SIGINT, 0)])
def test_a_signal_to_one_rank_stops_all_and_any_number_of_ranks_goes_on(
    first, then, number, rank, whole_pairs, corpus, tmp_path
):
    """With as many rows a step: two ranks, or one with two micro-batches."""
    for ranks, stop in ((first, signal_at(17, number, rank=rank)), (then, [])):
        process = command(arguments(tmp_path, corpus, RANKS[ranks]) + stop, tmp_path / "log")
        assert process.wait(60) == (128 + number if stop else 0), (tmp_path / "log").read_text()
        assert members(process.pid) == []
    assert state(tmp_path) == state(whole_pairs)


RANKS = {
    1: {"data.seq_len": 64, "data.batch_size": 3, "trainer.max_steps": 40, "trainer.accumulate_grad_batches": 2},
    2: {"data.seq_len": 64, "data.batch_size": 3, "trainer.max_steps": 40},
}
RANKS[1] |= {"trainer.val_check_interval": 20, "trainer.strategy": "ddp"}
RANKS[2] |= {"trainer.val_check_interval": 10, "trainer.strategy": "ddp", "trainer.devices": 2}


@pytest.fixture(scope="module")
def whole_pairs(tmp_path_factory, corpus, cache):
    """Of one process; two ranks end equal to it."""
    folders = {}
    for ranks, flags in RANKS.items():
        folders[ranks] = tmp_path_factory.mktemp("whole_pairs")
        process = command(arguments(folders[ranks], corpus, flags), folders[ranks] / "log")
        assert process.wait(120) == 0, (folders[ranks] / "log").read_text()
    assert state(folders[1]) == state(folders[2])
    return folders[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_is_named_and_the_run_ends(rank, corpus, cache, tmp_path):
    flags = RANKS[2] | {"watchdog.minutes": 0.05}
    process = command(arguments(tmp_path, corpus, flags) + signal_at(9, SIGSTOP, rank=rank), tmp_path / "log")
    assert process.wait(60) != 0
    assert f"error: rank {rank} (process" in (tmp_path / "log").read_text()
    assert "has stood still for 3 s in step 9, in" in (tmp_path / "log").read_text()
    deadline = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []


def test_torchrun_starts_again_after_a_rank_was_killed_and_ends_bit_by_bit(whole_pairs, corpus, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    once = signal_at(23, SIGKILL, rank=1, marker=str(tmp_path / "killed"))
    process = command(arguments(tmp_path, corpus, RANKS[2]) + once, tmp_path / "log", launcher)
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "killed").exists() and "going on from step 21" in (tmp_path / "log").read_text()
    assert state(tmp_path) == state(whole_pairs)
