"""However a run ends, the same command goes on from where it was, bit by bit."""

import csv
import random

import pytest

from tests.faults import arguments, forked, killed_until_done, signal_at, state, summary


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
    met = killed_until_done(arguments(tmp_path, corpus, {}), tmp_path / "log", rng, kills=10, longest=2.0)
    assert met >= 5
    assert state(tmp_path) == state(whole)
    assert summary(tmp_path)["val_loss"] == summary(whole)["val_loss"]
    assert not list(tmp_path.glob("**/*.partial"))


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


@pytest.mark.parametrize("step", [1, 2, 7, 8, 15, 16, 17, 18, 19, 30, 45, 49])
def test_a_terminated_run_goes_on_from_any_step_bit_by_bit(step, whole_epochs, corpus, tmp_path):
    argv = arguments(tmp_path, corpus, EPOCHS)
    assert finished(argv + signal_at(step), tmp_path) == 143
    assert "SIGTERM at step " in (tmp_path / "log").read_text()
    assert finished(argv, tmp_path) == 0
    assert state(tmp_path) == state(whole_epochs)
    assert losses(tmp_path) == losses(whole_epochs)


def losses(folder):
    """Of every validation, and the rows of metrics.csv without their times."""
    with (folder / "metrics.csv").open() as file:
        rows = [{n: v for n, v in row.items() if not n.startswith("perf/")} for row in csv.DictReader(file)]
    return rows
