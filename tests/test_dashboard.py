"""Dashboards draw what runs log, and sweeps say what the recipes take."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules import tracking
from lightning_modules.dashboards import DASHBOARDS, JOB_TYPES, MEDIA, names_of
from recipes import dashboard
from tests.finetuning import run as finetune
from tests.finetuning import squad
from tests.test_recipes import ROOT, fit
from tests.test_tracking import names_of as names_in
from tests.test_tracking import offline, records

SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
NOT_DRAWN = {"val/perplexity", "val/loss", "train/loss", "val/bits_per_byte", "val/f1_micro"}
"""What one kind of run draws, and another logs, too."""


def logged(folder: Path) -> set[str]:
    (offline_run,) = (folder / "wandb").glob("offline-run-*")
    names = {name for line in records(offline_run, "history") for name in names_in(line)}
    return {name for name in names if "/" in name and name != "trainer/global_step"}


@pytest.fixture(scope="module")
def runs(corpus, reviews, encoder, decoder, tmp_path_factory, shared_cache) -> dict[str, set[str]]:
    """What runs of each kind log; of fine-tuning one of each kind of metric."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, folder)
        spoilt = ({"steps": [18]}, {"steps": [20], "factor": 9.0})  # not finite, and a spike
        spoil = [{"class_path": "tests.faults.SpoilsLoss", "init_args": settings} for settings in spoilt]
        long = {"trainer.max_steps": 22, "trainer.val_check_interval": 11, "trainer.log_every_n_steps": 1}
        fit(folder / "pretrain", corpus, **long, **{"trainer.callbacks": json.dumps(spoil), "allow_import": "tests"})
        short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1"]
        names: set[str] = set()
        (folder / "spans.json").write_text(json.dumps(squad()))
        (folder / "rows.jsonl").write_text(
            "".join(json.dumps({"source": f"say {i}", "target": f"it is {i}"}) + "\n" for i in range(40))
        )
        (folder / "numbers.csv").write_text("text,label\n" + "".join(f"it is {i},{i / 10}\n" for i in range(60)))
        rows = f"--data.path={folder / 'rows.jsonl'}"
        few = "--data.max_val_examples=4"
        by_error = ["--trainer.callbacks.monitor=val/mse", "--trainer.callbacks.mode=min"]
        for name, words in {
            "sentiment": [f"--model.from={encoder}", f"--data.path={reviews / 'train.csv'}"],
            "sentiment_by_numbers": [f"--model.from={encoder}", f"--data.path={folder / 'numbers.csv'}", *by_error],
            "question_answering": [f"--model.from={encoder}", f"--data.path={folder / 'spans.json'}"],
            "translation": [f"--model.from={decoder}", rows, few],
            "summarization": [f"--model.from={decoder}", rows, few],
        }.items():
            task = name.removesuffix("_by_numbers")
            config = f"--config={ROOT / 'recipes' / f'finetune_{task}.yaml'}"
            finetune("fit", config, *words, *short, f"--trainer.default_root_dir={folder / name}")
            names |= logged(folder / name)
        small = {"data.path": corpus, "data.seq_len": 32, "data.batch_size": 4, "trainer.max_steps": 2}
        small |= {"model.teacher": folder / "pretrain", "comparison.control": "false", "samples.max_new_tokens": 4}
        small |= {
            "model.student.hidden_size": 16,
            "model.student.num_attention_heads": 2,
            "trainer.log_every_n_steps": 1,
        }
        small |= {"trainer.val_check_interval": 2, "trainer.log_every_n_steps": 1, "model.student.num_hidden_layers": 1}
        small |= {"model.student.intermediate_size": 16, "trainer.default_root_dir": folder / "distill"}
        distilling = [f"--{name}={value}" for name, value in small.items()]
        finetune("fit", *distilling, script=ROOT / "recipes" / "distill.py")
    of_distilling = logged(folder / "distill")
    return {
        "pretrain": logged(folder / "pretrain"),
        "finetune": names,
        "distill": of_distilling,
        "compress": of_distilling,
    }


@pytest.mark.parametrize("kind", DASHBOARDS)
def test_every_name_that_is_drawn_is_logged_and_the_reverse(kind, runs):
    drawn = set(names_of(kind))
    events = {name for name in drawn if name.startswith("events/")}  # which the pretraining alone was made to have
    assert drawn <= runs[kind] | (events & runs["pretrain"]), drawn - runs[kind]
    assert runs[kind] - drawn <= NOT_DRAWN, runs[kind] - drawn - NOT_DRAWN
    assert set(tracking.METRICS) <= runs["pretrain"]


@pytest.mark.parametrize("kind", DASHBOARDS)
def test_a_workspace_is_written_with_all_its_panels(kind, tmp_path, capsys):
    pytest.importorskip("wandb_workspaces")
    dashboard.main([kind, "--output", str(tmp_path / "view.json")])
    text = (tmp_path / "view.json").read_text()
    assert all(f'"{name}"' in text for name in names_of(kind)) and MEDIA[kind] in text
    sections = json.loads(text)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(DASHBOARDS[kind])] == list(DASHBOARDS[kind])


def test_a_kind_that_there_is_not_is_told_which_there_are(capsys):
    with pytest.raises(SystemExit) as stop:
        dashboard.main(["pretain"])
    assert stop.value.code == 2
    assert "error: kind does not take pretain; it takes pretrain, finetune, distill" in capsys.readouterr().err


@pytest.mark.parametrize("kind", DASHBOARDS)
def test_a_report_draws_each_section_of_the_runs_of_its_kind(kind, monkeypatch):
    """What would be sent; the one question that it asks the server is answered here."""
    interface = pytest.importorskip("wandb_workspaces.reports.v2.interface")
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "x"}})
    text = dashboard.report_of(kind, "project", "entity")._to_model().model_dump_json(by_alias=True, exclude_none=True)
    asked = f'"name":"jobType"}},"op":"=","value":"{JOB_TYPES[kind]}"'
    assert text.count(asked) == len(DASHBOARDS[kind]) + 1
    assert all(f'"{name}"' in text for name in (*names_of(kind), MEDIA[kind], "tokens"))


def test_without_an_account_it_says_so_in_one_line(monkeypatch, tmp_path, capsys):
    pytest.importorskip("wandb_workspaces")
    offline(monkeypatch, tmp_path)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stop:
        dashboard.main(["pretrain"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "wandb login" in error


# Sweeps


def test_there_are_sweeps():
    assert len(SWEEPS) >= 3


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_optimizes_what_is_logged_by_flags_that_there_are(sweep, decoder, monkeypatch):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    chosen = yaml.safe_load(sweep.read_text())
    values = {}
    for name, parameter in chosen["parameters"].items():
        values[name] = {"value": parameter.get("value", parameter.get("min", (parameter.get("values") or [None])[0]))}
    words = create_sweep_command_args({"args": values})["args"]
    command = create_sweep_command(chosen["command"])
    flags = [word for part in command for word in (words if part == "${args}" else [part])]
    flags = flags[flags.index("fit") :]
    flags += [f"--model.teacher={decoder}"] if "distill" in chosen["program"] else []  # else one is trained
    kind = Path(chosen["program"]).stem
    assert chosen["metric"]["name"] in names_of(kind)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [chosen["program"], *flags, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        run_script(chosen["program"])
    assert not stop.value.code


def run_script(program: str) -> None:
    import runpy

    runpy.run_path(str(ROOT / program), run_name="__main__")
