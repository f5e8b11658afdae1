"""W&B sees the run, and never decides whether it trains."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_modules import tracking
from tests.test_recipes import fit


def inspect(run: Path) -> dict:
    """The offline run as W&B's own reader sees it."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(run)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_run_without_an_account_is_logged_offline_under_its_stable_names(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    fit(tmp_path, corpus)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = json.dumps(inspect(run))
    missing = [name for name in (*tracking.METRICS, "tokens") if name not in logged]
    assert not missing, logged[:2000]
    assert f"wandb sync {run}" in " ".join(capsys.readouterr().out.split())


def test_a_server_that_does_not_answer_makes_the_run_offline_within_seconds(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    assert tracking.wandb_mode() == "offline"
    assert time.monotonic() - start < 5
    assert "127.0.0.1 does not answer" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "mode"), [("0" * 40, "online"), ("", "offline")])
def test_a_key_and_an_answering_server_make_it_online(key, mode, monkeypatch, tmp_path):
    import socket

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", key)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert tracking.wandb_mode() == mode


def test_a_run_that_goes_on_keeps_the_metrics_it_had(tmp_path):
    for step, name in ((1, "a"), (2, "b")):
        logger = tracking.MetricsCSV(tmp_path)
        logger.log_metrics({name: 1.0}, step=step)
        logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3 and {"a", "b", "step"} == set(lines[0].split(","))
