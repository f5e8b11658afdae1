"""Ranks that were not told the same end together, with one line; so does a run whose port is another's."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import Namespace

from lightning_modules.callbacks.agreement import difference
from lightning_modules.cli import accumulated, groups_of_ranks
from lightning_modules.restarts import require_free_port
from tests.test_ddp import ROOT
from tests.test_recipes import SMALL, TOY, fit


def test_the_first_difference_is_named():
    alike = [("a", {"torch": "2.13", "--data.path": "x"}), ("b", {"torch": "2.13", "--data.path": "x"})]
    assert difference(alike) is None
    assert (
        difference([*alike, ("c", {"torch": "2.12", "--data.path": "y"})]) == "rank 2 (c) has torch 2.12, rank 0 2.13"
    )
    assert "--data.seed" in difference([*alike, ("c", alike[0][1] | {"--data.seed": "1"})])


def launched(
    folder: Path, corpus: Path, *of_second: str, more: dict | None = None, script: str = "pretrain"
) -> list[tuple[int, str]]:
    """Codes and errors of two ranks, of which the second has other flags besides."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = TOY | {f"model.architecture.{name}": value for name, value in SMALL["NanoChatConfig"].items()}
    flags |= {"data.path": corpus, "trainer.default_root_dir": folder, "trainer.devices": 2}
    flags |= {"trainer.strategy": "ddp", "data.tokenizer": "bytes"}
    flags = flags if more is None else more
    command = [sys.executable, str(ROOT / "recipes" / f"{script}.py"), "fit"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    environment |= {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [*command, *(of_second if rank else ())],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model.optimizer.lr=0.5", "model.init_args.optimizer.init_args.lr 0.5, rank 0 0.025"),
        ("--data.seed=7", "--data's seed 7, rank 0 0"),
    ],
)
def test_ranks_of_other_flags_or_rows_do_not_begin(flag, said, corpus, tmp_path):
    (first, error), (second, nothing) = launched(tmp_path, corpus, flag)
    assert (first, second) == (2, 2)
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: rank 1 (") and said in last and "start all of them with the same" in last
    assert "Traceback" not in error + nothing and "error:" not in nothing
    assert not (tmp_path / "summary.json").exists()


def test_what_the_first_rank_alone_cannot_read_ends_all(reviews, encoder, tmp_path):
    """The others wait for their parts of it."""
    model = shutil.copytree(encoder, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    flags = {"data.path": reviews / "train.csv", "model.from": model, "trainer.devices": 2, "trainer.max_steps": 1}
    flags |= {"trainer.strategy": "fsdp2", "trainer.accelerator": "cpu", "trainer.default_root_dir": tmp_path / "run"}
    for code, error in launched(tmp_path, reviews, more=flags, script="finetune"):
        assert code == 2 and "gives no AutoModelForSequenceClassification" in error and "Traceback" not in error


def test_a_port_in_use_is_one_line(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(OSError, match="by which ranks find each other is in use"):
            require_free_port()
        monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has found one
        require_free_port()
    monkeypatch.delenv("LOCAL_RANK")
    require_free_port()


@pytest.mark.parametrize(
    ("flags", "micro_batches"),
    [
        ({}, 6),
        ({"devices": 2, "strategy": "ddp"}, 3),
        ({"devices": 2, "strategy": "tp"}, 6),
        ({"devices": 4, "strategy": "fsdp2_tp"}, 3),
        ({"devices": 3, "num_nodes": 2, "strategy": "fsdp2_tp"}, 3),
        ({"devices": [0, 1, 2], "strategy": "fsdp2"}, 2),
    ],
)
def test_micro_batches_follow_from_the_rows_of_a_step(flags, micro_batches):
    trainer = Namespace(**({"devices": 1, "num_nodes": 1, "strategy": "auto", "accelerator": "cpu"} | flags))
    assert accumulated(24, 4, groups_of_ranks(trainer)) == micro_batches


def test_rows_of_a_step_that_do_not_divide_are_one_line(corpus, tmp_path, capsys):
    flags = {"trainer.accumulate_grad_batches": 1, "data.batch_size": 4}
    summary = fit(tmp_path, corpus, **flags, **{"global_batch_size": 12})
    assert summary["tokens"] == 2 * 12 * 32
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path / "other", corpus, **flags, **{"global_batch_size": 10})
    assert stop.value.code == 2
    assert "--global_batch_size 10 is no multiple of 4 rows on each of 1 ranks" in capsys.readouterr().err
