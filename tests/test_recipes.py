"""Every named run parses and trains at toy size; what a run leaves behind is what the README says."""

import csv
import errno
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
)

from datamodules.tokenization import byte_tokenizer
from lightning_modules.callbacks import report
from lightning_modules.callbacks.samples import Samples
from lightning_modules.pretrain import CausalLM, MaskedLM

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "recipes").glob("pretrain*.yaml"))
AUTO = {"CausalLM": AutoModelForCausalLM, "MaskedLM": AutoModelForMaskedLM, "SpanDenoising": AutoModelForSeq2SeqLM}
SMALL = {
    "NanoChatConfig": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "LlamaConfig": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    | {"num_key_value_heads": 4},
    "BertConfig": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "GPT2Config": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    "T5Config": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8},
    "LSTMConfig": {"hidden_size": 16, "num_hidden_layers": 1},
}
TOY = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.strategy": "auto",
    "trainer.max_steps": 2,
    "trainer.max_time": "null",
    "trainer.val_check_interval": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 2,
    "trainer.accumulate_grad_batches": 1,
    "data.vocab_size": 400,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.num_workers": 0,
    "samples.max_new_tokens": 3,
}


def run(*verb: str, **flags) -> None:
    """`python recipes/pretrain.py VERB --flag value …` in this process; a flag of True stands alone."""
    arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    # --config first: flags override it.
    arguments.sort(key=lambda argument: not argument.startswith("--config"))
    old, sys.argv = sys.argv, ["recipes/pretrain.py", *verb, *arguments]
    try:
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="__main__")
    finally:
        sys.argv = old


def fit(folder: Path, corpus: Path, config: Path | None = None, **flags) -> dict:
    """Trains at toy size into `folder`; returns its summary."""
    chosen = yaml.safe_load((config or ROOT / "recipes" / "pretrain.yaml").read_text())
    architecture = chosen["model"]["init_args"]["architecture"]["class_path"].rpartition(".")[2]
    fields = {f"model.architecture.{name}": value for name, value in SMALL[architecture].items()}
    settings = ({"config": config} if config else {}) | TOY | fields
    settings |= {"data.path": corpus, "trainer.default_root_dir": folder}
    run("fit", **(settings | flags))
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("config", RUNS, ids=lambda path: path.stem)
def test_every_named_run_trains_and_its_folder_loads(config, corpus, tmp_path):
    summary = fit(tmp_path, corpus, config)
    assert summary["steps"] == 2 and math.isfinite(summary["val_loss"])
    objective = yaml.safe_load(config.read_text())["model"]["class_path"]
    model = AUTO[objective].from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size >= len(tokenizer)
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]


def test_a_named_run_opens_with_what_it_is():
    for config in RUNS:
        assert config.read_text().startswith("# "), config


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_a_sample_fits_into_the_positions_that_a_model_has(kind):
    tokenizer = byte_tokenizer(kind)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "num_hidden_layers": 1}
    if kind == "causal":
        network = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_head=1, **sizes))
    else:
        network = AutoModelForMaskedLM.from_config(BertConfig(hidden_size=16, num_attention_heads=1, **sizes))
    module, objective = SimpleNamespace(network=network.eval(), device="cpu"), {"causal": CausalLM, "masked": MaskedLM}
    text = objective[kind].sample(module, tokenizer, "a prompt that is longer than all of these", 48, 0.0)
    assert "a " in text[:20]
    if kind == "causal":
        assert len(CausalLM.sample(module, tokenizer, "short", 48, 0.0)) > len("short")


def test_samples_that_fail_end_no_run(capsys):
    def fails(*_):
        raise RuntimeError("no such thing\nwith more")

    failing = type("Failing", (CausalLM,), {"sample": fails, "is_sharded": False})
    network, module = torch.nn.Linear(1, 1), failing.__new__(failing)
    torch.nn.Module.__init__(module)
    module.network = network
    trainer = SimpleNamespace(sanity_checking=False, state=SimpleNamespace(fn="fit"), is_global_zero=True)
    trainer.datamodule = SimpleNamespace(tokenizer=None)
    Samples(["a"]).on_validation_end(trainer, module)
    assert "warning: no samples (no such thing)" in capsys.readouterr().err and network.training


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Exception("of safetensors")])
def test_a_disk_that_is_full_at_the_end_is_told_in_one_line(error, corpus, tmp_path, monkeypatch, capsys):
    def full(folder, *_):
        folder.with_name(".model.partial").mkdir()
        free = 2**30 if isinstance(error, OSError) else 7  # of which some reason alone could be told
        monkeypatch.setattr(report.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        raise error

    monkeypatch.setattr(report, "save_model", full)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, corpus)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and f"error: {tmp_path / 'model'} was not written" in told and "goes on from" in told
    assert not (tmp_path / ".model.partial").exists() and (tmp_path / "checkpoints" / "last.ckpt").is_file()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        summary = fit(folder, corpus, **{"trainer.max_steps": 6})
    return folder, summary


def test_a_run_leaves_the_files_that_are_promised(finished):
    folder, summary = finished
    for name in ("config.yaml", "metrics.csv", "summary.json", "checkpoints/last.ckpt", "model/README.md"):
        assert (folder / name).is_file(), name
    keys = "val_loss val_loss_final val_bits_per_byte tokens steps seconds tokens_per_second parameters"
    assert set(f"{keys} peak_memory_bytes precision versions model_dir".split()) <= set(summary)
    assert summary["tokens"] == 6 * 4 * 32
    assert Path(summary["model_dir"]) == folder / "model"


def test_metrics_have_their_stable_names(finished):
    folder, _ = finished
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"train/loss", "train/grad_norm", "train/lr", "perf/tokens_per_second", "perf/mfu", "tokens"}
    assert names | {"val/loss", "val/perplexity", "val/bits_per_byte"} <= set(rows[0])
    logged = [float(row["tokens"]) for row in rows if row["train/loss"]]
    assert logged[-1] == 6 * 4 * 32


def test_the_exported_folder_gives_the_held_out_loss_of_the_summary(finished, corpus):
    """Token by token with plain transformers, in float64: what was measured is what was exported."""
    from datamodules.text import Text

    folder, summary = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    data = Text(path=str(corpus), tokenizer="bpe", vocab_size=400, seq_len=32, batch_size=4)
    data.prepare_data()
    data.setup("validate")
    nats = count = 0
    for i, batch in enumerate(data.val_dataloader()):
        if i == 2:
            break
        logits = model(batch["input_ids"]).logits.flatten(0, 1)
        nats += torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum").item()
        count += (batch["labels"] != -100).sum().item()
    assert summary["val_loss"] == pytest.approx(nats / count, rel=2e-3)


def test_the_saved_config_is_the_same_run_again(finished, corpus, tmp_path):
    folder, summary = finished
    run("fit", config=folder / "config.yaml", **{"trainer.default_root_dir": tmp_path})
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["val_loss"] == summary["val_loss"]


def test_validate_and_test_and_predict_take_a_checkpoint(finished, tmp_path, capsys):
    folder, summary = finished
    flags = {"config": folder / "config.yaml", "ckpt_path": folder / "checkpoints" / "last.ckpt"}
    digits = str(summary["val_loss_final"])[:6]
    run("validate", **flags)
    assert digits in capsys.readouterr().out
    run("test", **flags, **{"trainer.limit_test_batches": 2})
    assert digits in capsys.readouterr().out
    run("predict", **flags, **{"trainer.default_root_dir": tmp_path})
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    # The run validated on the first two batches.
    first = [row for row in rows if row["row"] < 8]
    assert len(rows) > 8 and len(first) == 8 and mean > 0
    mean = sum(row["loss"] * row["tokens"] for row in first) / sum(row["tokens"] for row in first)
    assert mean == pytest.approx(summary["val_loss_final"], rel=1e-3)


def test_text_of_fewer_rows_than_the_validation_interval_is_trained_on(corpus, tmp_path):
    summary = fit(tmp_path, corpus, **{"trainer.max_steps": 40, "trainer.val_check_interval": 300, "data.seq_len": 128})
    assert summary["tokens"] < 40 * 4 * 128 and summary["steps"] == 40 and summary["val_loss"] > 0


def test_validate_needs_no_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("validate", **{"data.path": corpus, "data.tokenizer": "bytes", "trainer.limit_val_batches": 1})
    assert not list(tmp_path.iterdir())


def test_the_best_weights_are_exported_not_the_last(corpus, tmp_path):
    """A learning rate that destroys the model after the first validation."""
    flags = {"trainer.max_steps": 8, "trainer.val_check_interval": 2, "model.optimizer": "torch.optim.SGD"}
    summary = fit(tmp_path, corpus, **flags, **{"model.optimizer.lr": 30.0, "model.schedule": "Constant"})
    assert summary["val_loss"] < summary["val_loss_final"]
    best = [path for path in (tmp_path / "checkpoints").glob("step-*.ckpt")]
    state = torch.load(best[0], weights_only=True)["state_dict"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.lm_head.weight.float(), state["network.lm_head.weight"].float())


def test_max_tokens_ends_the_run_and_the_schedule(corpus, tmp_path):
    flags = {"trainer.max_steps": -1, "model.max_tokens": 5 * 4 * 32, "trainer.max_epochs": 50}
    summary = fit(tmp_path, corpus, **flags)
    assert summary["steps"] == 5 and summary["val_loss"] is not None


def test_help_opens_with_the_recipe_and_names_the_subcommands(capsys):
    wanted_of = (((), "Pretrain a language model"), ((), "replay     --run DIR --step N"), (("fit",), "--data.seq_len"))
    for arguments, wanted in wanted_of:
        with pytest.raises(SystemExit) as end:
            run(*arguments, help=True)
        assert not end.value.code and wanted in capsys.readouterr().out


def test_a_verb_that_there_is_not_is_one_line(capsys):
    for word, said in (("fitt", "did you mean fit?"), ("verfy", "did you mean verify?"), ("x", "there are fit, valid")):
        with pytest.raises(SystemExit) as stop:
            run(word)
        assert stop.value.code == 2 and f"error: there is no {word}; {said}" in capsys.readouterr().err


MISTAKES = {
    "--data.pth=x": "there is no --data.pth; did you mean --data.path?",
    "--data.on_bad_row=drop": "--data.on_bad_row does not take drop; it takes error, skip",
    "--model.optimizer=Nope": "--model.optimizer Nope: there is no such class",
    "--model.architecture=transformers.FooConfig": "transformers.FooConfig: there is no such class",
    "--model.architecture.hiden_size=3": "did you mean --model.architecture.hidden_size?",
    "--trainer.callbacks.patience=3": "--trainer.callbacks.patience: such a flag is for the last callback of the list",
    "--trainer.callbacks.monitr=val/loss": "did you mean --trainer.callbacks.monitor?",
    "--data.path=/no/such/folder": "/no/such/folder does not exist",
    "--model.architecture.vocab_size=10": "--model.architecture.vocab_size is 10",
    "--trainer.default_root_dir=/proc/no": "cannot write to /proc/no",
    "--data.seq_len=100000000": "less than one row",
    "--model.architecture=transformers.T5Config": "T5Config has no AutoModelForCausalLM",
    "--model.schedule.warmup_fraction=2": "warmup_fraction=2.0",
    "--model.optimizer.iterations=9": "iterations=9; pass 1 to 5",
    "--ckpt_path=/no/such.ckpt": "--ckpt_path /no/such.ckpt does not exist",
    f"--ckpt_path={Path(__file__)}": "is no whole checkpoint",
    "--trainer.devices=0": "devices",
    "--trainer.enable_checkpointing=false": "leave the flag out, or the callbacks, too",
    "--trainer.check_val_every_n_epoch=2 --trainer.val_check_interval=1000": "`val_check_interval` (1000) must be less",
}


def test_a_mistake_leaves_no_empty_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("fit", **{"data.path": corpus, "data.seq_len": 10**8, "data.tokenizer": "bytes"})
    assert not list((tmp_path / "runs").iterdir())
    mine = tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(SystemExit):
        run("fit", **{"data.path": corpus, "data.seq_len": 10**8, "trainer.default_root_dir": mine})
    assert mine.is_dir()  # the user's own stays


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(flag, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    flags = {"data.path": corpus, "trainer.default_root_dir": tmp_path, "data.tokenizer": "bytes"}
    flags |= dict(part[2:].split("=", 1) for part in flag.split())
    with pytest.raises(SystemExit) as stop:
        run("fit", **flags)
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("error: ") and MISTAKES[flag] in errors[-1]
    assert not any(line.startswith("Traceback") for line in errors)


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(corpus, tmp_path):
    """As with `| head -1`."""
    flags = [f"--{name}={value}" for name, value in (TOY | {"data.path": corpus, "trainer.max_steps": 6}).items()]
    flags += [f"--model.architecture.{name}={value}" for name, value in SMALL["NanoChatConfig"].items()]
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "fit", *flags]
    command.append(f"--trainer.default_root_dir={tmp_path}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in told and "BrokenPipe" not in told
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
