"""`explain` says where each setting comes from, and what is idle or contradicts itself."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_modules.explaining import canonical, names_of, origins
from tests.faults import SCRIPT
from tests.finetuning import run as recipe
from tests.test_recipes import ROOT, fit


def explained(capsys, *words: str, script: Path = SCRIPT) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """By name the value and its origin; and the remarks."""
    recipe("explain", *words, script=script)
    lines = capsys.readouterr().out.splitlines()
    found = [re.split(r"\s{2,}", line) for line in lines if line and not line.startswith(("note: ", "nothing"))]
    settings = {name: (" ".join(value), origin) for name, *value, origin in found}
    return settings, [line.removeprefix("note: ") for line in lines if line.startswith("note: ")]


def test_each_value_has_the_place_where_it_was_said_last(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = yaml.safe_load((ROOT / "recipes" / "pretrain.yaml").read_text())
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(first))
    (tmp_path / "second.yaml").write_text("data: {batch_size: 6}\nguard: {spike_factor: 9.0}\n")
    words = ["--config", "first.yaml", "--config=second.yaml", "--model.optimizer.lr=0.5", "--trainer.max_steps", "50"]
    found, _ = explained(capsys, *words, "--global_batch_size", "24", "--model.schedule", "Cosine")
    assert found["model.optimizer.lr"] == ("0.5", "flag") and found["trainer.max_steps"] == ("50", "flag")
    assert found["model.schedule"] == ("Cosine", "flag") and found["model.schedule.warmup_fraction"][1] == "default"
    assert found["data.batch_size"] == ("6", "second.yaml") and found["guard.spike_factor"] == ("9.0", "second.yaml")
    assert found["model.optimizer.adamw_lr"][1] == "first.yaml" and found["data.seed"] == ("0", "default")
    assert found["trainer.accumulate_grad_batches"] == ("4", "computed: --global_batch_size")
    assert found["data.objective"] == ("causal", "linked: --model")
    assert found["model.architecture.vocab_size"][1] == "computed: the tokenizer"
    assert found["trainer.precision"][1].startswith("computed: ")
    assert not list(tmp_path.glob("runs"))  # nothing is begun


def test_a_precision_that_was_asked_for_is_not_computed(capsys):
    found, _ = explained(capsys, "--trainer.precision=32-true")
    assert found["trainer.precision"] == ("32-true", "flag")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.schedule.warmup_steps=900"], "no shorter than the run of 750"),
        (["--model.schedule=Step"], "it never falls"),
        (["--model.schedule.warmup_fraction=0.5", "--model.schedule.decay_fraction=0.8"], "together are 130%"),
        (["--trainer.callbacks.monitor=val/beauty"], "val/beauty, which is never logged"),
        (["--trainer.max_steps=100"], "there is none before the end"),
        (["--model.max_tokens=30000"], "the run has 10 steps: there is none before the end"),
        (["--model.max_tokens=30000", "--global_batch_size=24"], "the run has 5 steps: there is none before the end"),
        (["--model.max_tokens=30000", "--trainer.max_epochs=3"], "750 steps, 3 epochs, 30,000 tokens or 0:01:50"),
        (["--model=MaskedLM"], "fit refuses this: --model.architecture NanoChatConfig has no AutoModelForMaskedLM"),
        (
            ["--model.schedule.warmup_steps=9", "--model.schedule.warmup_fraction=0.1"],
            "warmup_fraction changes nothing",
        ),
        (["--trainer.precision=16-mixed"], "Lightning takes bf16-mixed here"),
        (["--trainer.fast_dev_run=true", "--trainer.overfit_batches=2"], "--trainer.overfit_batches: --trainer.fast"),
        (["--data.mask_fraction=0.3"], "the objective is causal"),
        (["--data.val_path=x.txt", "--data.val_fraction=0.2"], "--data.val_fraction changes nothing"),
        (["--data.tokenizer=bytes", "--data.vocab_size=5000"], "--data.vocab_size changes nothing"),
        (
            ["--trainer.gradient_clip_algorithm=norm", "--trainer.gradient_clip_val=null"],
            "without --trainer.gradient_clip_val",
        ),
        (["--samples.max_new_tokens=0", "--samples.temperature=1"], "--samples.max_new_tokens is 0"),
        (["--energy.measure=false", "--energy.country=DEU"], "--energy.country changes nothing"),
        (["--model.optimizer.lr=0"], "nothing is learnt"),
        (["--push.private=false"], "--push.private changes nothing without --push.to"),
        (
            ["--global_batch_size=24", "--trainer.accumulate_grad_batches=4"],
            "--trainer.accumulate_grad_batches changes nothing",
        ),
        (["--trainer.deterministic=true"], "it refuses some operations"),
    ],
)
def test_what_is_idle_or_contradicts_itself_is_told(words, said, capsys):
    _, remarks = explained(capsys, *words)
    assert any(said in remark for remark in remarks), remarks


def test_what_is_said_last_counts_be_it_a_flag_or_a_file(tmp_path, capsys):
    (tmp_path / "later.yaml").write_text("trainer: {max_steps: 40}\n")
    (tmp_path / "energy.yaml").write_text("country: DEU\n")
    words = ["--trainer.max_steps", "50", "--config", str(ROOT / "recipes" / "pretrain.yaml")]
    words += ["--config", str(tmp_path / "later.yaml"), "--energy", str(tmp_path / "energy.yaml")]
    found, _ = explained(capsys, *words, "--model.architecture.vocab_size", "9000")
    assert found["trainer.max_steps"] == ("40", str(tmp_path / "later.yaml"))
    assert found["energy.country"] == ("DEU", str(tmp_path / "energy.yaml"))
    assert found["model.architecture.vocab_size"] == ("9000", "flag")


def test_what_follows_from_the_data_is_not_said_as_the_class_has_it(capsys):
    found, remarks = explained(capsys, "--data.seq_len=512")
    assert found["model.architecture.vocab_size"] == ("as the data has it", "computed: the tokenizer")
    assert any("rows of 512 tokens do not fit the 256 positions" in remark for remark in remarks)
    positions = "model.architecture.max_position_embeddings"
    final = {positions: 2048, "data.seq_len": 4096}
    (found,) = (one for one in origins(final, final, ["--data.seq_len=4096"], {}) if one.name == positions)
    assert (found.value, found.origin) == ("4096", "computed: --data.seq_len")


def test_a_runs_own_config_says_no_more_than_what_it_was_made_from(corpus, tmp_path, capsys):
    """Which holds every setting, those that nobody said, too."""
    fit(tmp_path, corpus)
    capsys.readouterr()
    words = ["--config", str(tmp_path / "config.yaml")]
    _, remarks = explained(capsys, *words, "--trainer.deterministic=false")
    assert not [remark for remark in remarks if "deterministic" in remark or "changes nothing" in remark], remarks


def test_an_optimizer_without_a_rate_of_its_own_is_explained(capsys):
    _, remarks = explained(capsys, "--model.optimizer=transformers.Adafactor", "--model.optimizer.lr=null")
    assert not [remark for remark in remarks if "nothing is learnt" in remark]


def test_the_default_run_has_nothing_idle_but_its_two_ends(capsys):
    _, remarks = explained(capsys)
    assert len(remarks) <= 2 and all("what comes first" in remark or "never stops it" in remark for remark in remarks)


def test_other_recipes_are_explained_too(encoder, reviews, capsys):
    words = [f"--model.from={encoder}", f"--data.path={reviews / 'train.csv'}"]
    found, _ = explained(capsys, *words, script=ROOT / "recipes" / "finetune.py")
    assert found["model"] == ("Classification", "flag") or found["model"][0] == "Classification"
    assert found["model.from"] == (str(encoder)[:60], "flag")
    words += ["--model.adapter.rank=2", "--model.freeze_backbone=true"]
    _, remarks = explained(capsys, *words, script=ROOT / "recipes" / "finetune.py")
    assert any("--model.freeze_backbone changes nothing" in remark for remark in remarks)


def test_names_are_as_flags_say_them():
    assert canonical("model.init_args.optimizer.init_args.lr") == "model.optimizer.lr"
    assert canonical("model.class_path") == "model" and canonical("model.init_args.from_") == "model.from"
    assert set(names_of({"a": {"class_path": "X", "init_args": {"b": 1, "c": [2]}}})) == {"a", "a.b", "a.c"}
