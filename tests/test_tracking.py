"""W&B sees the run, and never decides whether it trains."""

import csv
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lightning_modules import tracking
from lightning_modules.callbacks.plan import Plan
from tests.faults import small_disk
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
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in " ".join(capsys.readouterr().out.split())


def offline(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_a_run_that_goes_on_is_the_same_run_in_wandb(corpus, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    fit(tmp_path / "a", corpus, **{"trainer.max_steps": 2})
    fit(tmp_path / "a", corpus, **{"trainer.max_steps": 4, "ckpt_path": "last"})
    fit(tmp_path / "b", corpus, **{"trainer.max_steps": 2})
    names = [sorted(folder.name[-8:] for folder in (tmp_path / run / "wandb").glob("offline-run-*")) for run in "ab"]
    assert len(names[0]) == 2 and names[0][0] == names[0][1] != names[1][0]


def records(run: Path, kind: str) -> list[dict]:
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [found[kind] for found in map(json.loads, lines) if found["type"] == kind]


def test_every_logged_name_is_drawn_over_tokens(corpus, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    layers = {"trainer.callbacks+": "Layers", "trainer.callbacks.every_n_steps": 2}
    fit(tmp_path, corpus, **layers, **{"trainer.callbacks.histograms": "true", "trainer.log_every_n_steps": 1})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    over = {found["name"]: found.get("step_metric") for found in records(run, "metric") if "name" in found}
    logged = {name for line in records(run, "history") for name in names_of(line)}
    named = {name for name in logged if "/" in name and name != "trainer/global_step"}
    assert {"train/loss", "val/loss", "val/bits_per_byte"} <= named
    assert any(name.startswith("layers/grad_norm/") for name in named)
    assert any(name.startswith("layers/weights/") for name in named)
    assert not [name for name in named if over.get(name) != "tokens"]
    assert "layers/" not in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    last = {name: value for line in records(run, "history") for name, value in line["item"].items()}
    norms = [value for name, value in last.items() if name.startswith("layers/grad_norm/")]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(last["train/grad_norm"], rel=1e-4)
    (about,) = [found for found in records(run, "run") if found.get("tags")][-1:]
    assert {"CausalLM", "causal"} <= set(about["tags"]) and about["run_group"] == about["job_type"] == "pretrain"


def names_of(history: dict) -> list[str]:
    """Of a histogram, which is written in parts, its own."""
    return [re.sub(r"\.(_type|values|bins|packedBins\.\w+)$", "", name) for name in history["item"]]


def test_a_model_is_kept_as_an_artifact_where_that_is_asked_for(corpus, tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    kept = []
    monkeypatch.setattr(tracking, "keep_model", lambda loggers, folder, aliases: kept.append((folder, aliases)))
    fit(tmp_path, corpus, **{"trainer.callbacks+": "lightning_modules.callbacks.model_artifact.ModelArtifact"})
    ((folder, aliases),) = kept
    assert folder == tmp_path / "model" and aliases == ["best", "latest"] and (folder / "config.json").is_file()


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("end", [{"trainer.max_steps": 7}, {"trainer.max_steps": 50, "model.max_tokens": 7 * 4 * 32}])
def test_the_last_step_is_logged_as_it_was(end, corpus, tmp_path):
    """Lightning would repeat the row before it, since the run is told to end."""
    fit(tmp_path, corpus, **{"trainer.log_every_n_steps": 5, "trainer.val_check_interval": 7} | end)
    before, last = (row for row in metrics(tmp_path) if row["train/loss"])
    assert (before["step"], last["step"]) == ("4", "6")
    assert before["train/loss"] != last["train/loss"] and before["train/grad_norm"] != last["train/grad_norm"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert float(last["tokens"]) == summary["tokens"] and float(last["train/lr"]) > 0
    (held_out,) = (row for row in metrics(tmp_path) if row["val/loss"])
    assert float(held_out["tokens"]) == summary["tokens"]


def logger(folder: Path) -> tracking.MetricsCSV:
    found = tracking.MetricsCSV(folder)
    found.experiment  # noqa: B018  (made when it is first asked for)
    return found


def test_a_full_disk_tears_no_row_and_ends_no_run(tmp_path, monkeypatch, capsys):
    log, real = logger(tmp_path), os.write
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    whole = (tmp_path / "metrics.csv").read_text()
    monkeypatch.setattr(os, "write", lambda place, content: real(place, content[:2]))  # as much as there is room for
    for step in (1, 2):
        log.log_metrics({"a": 2.0 + step}, step)
        log.save()
    assert (tmp_path / "metrics.csv").read_text() == whole
    assert capsys.readouterr().err.count("its rows wait") == 1
    monkeypatch.undo()
    log.log_metrics({"a": 9.0, "b": 7.0}, 3)
    log.save()
    assert [(row["step"], row["a"], row["b"]) for row in metrics(tmp_path)] == [
        ("0", "1.0", ""), ("1", "3.0", ""), ("2", "4.0", ""), ("3", "9.0", "7.0"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("a,step\n1,0\n2,1\n3,2\n", ["0", "1"]),
        ("a,step\n1,0\n2,1\n3", ["0", "1"]),
        ("a,step\n1,0\n2,1,7,1\n,\n5,x\n", ["0"]),
        ("a,step\n1,0\n\0\0\0\0", ["0"]),
        ("", []),
        ("a,b\n1,2\n", []),
    ],
)
def test_a_torn_file_of_metrics_stops_no_run_that_goes_on(content, kept, tmp_path):
    (tmp_path / "metrics.csv").write_text(content)
    log = logger(tmp_path)
    tracking.forget_after([log], 2)
    log.log_metrics({"a": 1.0, "c": 2.0}, 2)
    log.save()
    assert [row["step"] for row in metrics(tmp_path)] == [*kept, "2"]


def test_a_loggers_failure_at_the_end_is_one_line(tmp_path, capsys, monkeypatch):
    """A user's own W&B logger knows nothing of giving up; an artifact is a copy of the model, which may not fit."""
    from lightning.pytorch.loggers import WandbLogger

    ended = []
    own = WandbLogger.__new__(WandbLogger)
    own._experiment = SimpleNamespace(finish=lambda: ended.append(1))
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: self._experiment))
    tracking.finish([own])
    assert ended == [1]
    shielded = tracking.ShieldedWandb.__new__(tracking.ShieldedWandb)
    monkeypatch.setattr(tracking.ShieldedWandb, "version", "v")
    tracking.keep_model([shielded], tmp_path / "none", ["best"])
    assert "is no artifact" in capsys.readouterr().err


def test_a_server_of_ones_own_is_found_as_wandb_login_leaves_it(tmp_path, monkeypatch):
    offline(monkeypatch, tmp_path)
    server = Server(200)
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert tracking.wandb_mode() == "offline"
    (tmp_path / "settings").write_text(f"[default]\nbase_url = http://{address}/\n")
    (tmp_path / "netrc").write_text(f"machine {address}\n  login user\n  password {'k' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.wandb_mode() == "online"


class Server(http.server.ThreadingHTTPServer):
    """Stands for W&B's: answers everything alike, after some seconds."""

    def __init__(self, status: int, seconds: float = 0.0):
        self.status, self.seconds = status, seconds
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that did not wait


class Answer(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        time.sleep(self.server.seconds)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def wandb_server(monkeypatch, tmp_path):
    """Says to W&B which server there is, with a key of the right form unless another is given."""

    def is_at(server, key="0" * 40):
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("NETRC", str(tmp_path / "none"))
        monkeypatch.setenv("WANDB_API_KEY", key)
        port = server.server_address[1] if server else 9
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        return server

    return is_at


@pytest.mark.parametrize(
    ("server", "key", "mode", "told"),
    [
        (lambda: Server(200), "0" * 40, "online", ""),
        (lambda: Server(200), "", "offline", ""),
        (lambda: Server(401), "0" * 40, "offline", "127.0.0.1 answers 401 Unauthorized"),
        (lambda: Server(200, seconds=30), "0" * 40, "offline", "127.0.0.1 does not answer"),
        (lambda: None, "0" * 40, "offline", "127.0.0.1 does not answer"),
    ],
    ids=["well", "no key", "wrong key", "slow", "unreachable"],
)
def test_only_a_server_that_takes_the_key_at_once_makes_a_run_online(server, key, mode, told, wandb_server, capsys):
    wandb_server(server(), key)
    start = time.monotonic()
    assert tracking.wandb_mode() == mode
    assert time.monotonic() - start < 5
    warnings = capsys.readouterr().err.splitlines()
    assert warnings == ([f"W&B: {told}; this run is logged offline"] if told else [])


def test_a_server_that_fails_when_the_run_begins_makes_it_offline(corpus, tmp_path, wandb_server, monkeypatch, capsys):
    """It takes the key and then nothing that W&B itself sends; the run is that without W&B."""
    wandb_server(Server(200))
    summary = fit(tmp_path / "with", corpus)
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B")]) == 1
    assert list((tmp_path / "with" / "wandb").glob("offline-run-*"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert fit(tmp_path / "without", corpus)["val_loss"] == summary["val_loss"]


def test_a_run_whose_wandb_dies_goes_on_with_one_warning(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def kill(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 5:
            for child in psutil.Process().children(recursive=True):
                if "wandb-core" in child.name():
                    child.kill()

    monkeypatch.setattr(Plan, "on_train_batch_start", kill)
    fit(tmp_path, corpus, **{"trainer.max_steps": 30, "trainer.val_check_interval": 10})
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B")]
    assert len(warnings) == 1 and "metrics.csv alone is written from here on" in warnings[0]
    with (tmp_path / "metrics.csv").open() as file:
        assert len(file.readlines()) == 1 + 30 + 3


def test_a_run_whose_wandb_has_a_full_disk_is_the_same_run(corpus, tmp_path, monkeypatch, capsys):
    whole = fit(tmp_path / "whole", corpus)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "full").mkdir()
    try:
        with small_disk(tmp_path / "full" / "wandb", "64k"):
            summary = fit(tmp_path / "full", corpus)
    except subprocess.CalledProcessError:
        pytest.skip("this process may not mount a small disk")
    assert summary["val_loss"] == whole["val_loss"]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("W&B")]
    assert len(warnings) == 1 and "metrics.csv" in warnings[0]  # what W&B notices of it, and when, varies
    lines = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "full")]
    assert len(lines[0]) == len(lines[1]) > 2


def test_a_run_that_goes_on_keeps_the_metrics_it_had(tmp_path):
    for step, name in ((1, "a"), (2, "b")):
        logger = tracking.MetricsCSV(tmp_path)
        logger.log_metrics({name: 1.0}, step=step)
        logger.save()
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3 and {"a", "b", "step"} == set(lines[0].split(","))
