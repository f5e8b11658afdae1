"""`verify` passes on a sound run and fails where a promise is broken; `replay` does a step again."""

import csv
import inspect
import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules import checks
from lightning_modules.schedules import Cosine
from tests.faults import SCRIPT, arguments, command
from tests.finetuning import run as recipe


def run_checks(toy, *names, before=None, **settings):
    """The named checks on a toy run, after `before` has done something to it."""
    found = {}

    class Runs(Callback):
        def on_train_start(self, trainer, module):
            module.network.eval()
            if before is not None:
                before(trainer, module)
            batch = checks.first_batch(trainer)
            for name in names:
                function = getattr(checks, name)
                known = {"trainer": trainer, "module": module, "batch": batch}
                found[name] = function(*(known[wanted] for wanted in inspect.signature(function).parameters))
            trainer.should_stop = True

    trainer, module, data = toy(trainer={"callbacks": [Runs()], "limit_val_batches": 0}, **settings)
    trainer.fit(module, data)
    return found


ALL = ("gradient_splits", "schedule_end", "labels", "overlap", "exported", "packed", "generation")


def test_a_sound_run_passes_every_check(toy):
    found = run_checks(toy, *ALL)
    assert [name for name, check in found.items() if not check.passed] == [] and len(found) == len(ALL)


def unscaled(trainer, module):
    """The mean of each micro-batch's mean, as stock accumulation takes it, where one has fewer labels."""
    honest, loader = module.loss, trainer.datamodule.train_dataloader

    def loss(batch, divisor=1.0):
        objective, nats, count = honest(batch, divisor)
        return objective / count, nats, count

    def ragged():
        for batch in loader():
            batch["labels"][0, 4:] = -100
            yield batch

    module.loss, trainer.datamodule.train_dataloader = loss, ragged


def leaking(trainer, module):
    """Attention that crosses the borders of documents: positions no longer tell them apart."""
    module.network.register_forward_pre_hook(
        lambda network, args, kwargs: (args, {n: v for n, v in kwargs.items() if n != "position_ids"}), with_kwargs=True
    )


def other_weights_exported(trainer, module):
    honest = module.network.save_pretrained

    def save(folder):
        with torch.no_grad():
            module.network.lm_head.weight.mul_(1.01)
        honest(folder)
        with torch.no_grad():
            module.network.lm_head.weight.div_(1.01)

    module.network.save_pretrained = save


def shifted_labels(trainer, module):
    honest = trainer.datamodule.train_dataloader
    trainer.datamodule.train_dataloader = lambda: (
        batch | {"labels": batch["labels"].roll(1, dims=1)} for batch in honest()
    )


def same_text_on_both_sides(trainer, module):
    trainer.datamodule.documents = lambda split: iter(["the same document"])


class NeverEnds(Cosine):
    def shape(self, step, progress):
        return 1.0


def schedule_that_stays(trainer, module):
    module.schedule = NeverEnds()


def broken_cache(trainer, module):
    honest = module.network.generate

    def generate(prompt, use_cache, **settings):
        out = honest(prompt, use_cache=use_cache, **settings)
        return out if not use_cache else out.roll(1, dims=1)

    module.network.generate = generate


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("gradient_splits", unscaled),
        ("packed", leaking),
        ("exported", other_weights_exported),
        ("labels", shifted_labels),
        ("overlap", same_text_on_both_sides),
        ("schedule_end", schedule_that_stays),
        ("generation", broken_cache),
    ],
)
def test_a_check_fails_where_its_promise_is_broken(name, before, toy):
    assert not run_checks(toy, name, before=before)[name].passed


def test_the_table_ends_with_what_passed_and_is_written_as_json(corpus, tmp_path):
    """Two ranks, a kill and all; at toy size."""
    argv = arguments(tmp_path, corpus, {"trainer.default_root_dir": None, "ckpt_path": None}, verb="verify")
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("pass", "FAIL"))]
    assert len(lines) == 9 and "9 of 9 passed" in done.stdout
    (report,) = (tmp_path / "runs").glob("verify-*.json")
    assert [check["passed"] for check in json.loads(report.read_text())] == [True] * 9
    assert "where the loss lies" in done.stdout and "killed at step" in done.stdout


def test_verify_tells_a_mistake_of_the_flags_in_one_line(corpus, tmp_path):
    argv = arguments(tmp_path, corpus, {"data.pth": "x"}, verb="verify")
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean --data.path?" in done.stderr.splitlines()[-1]


def test_a_step_whose_rate_followed_the_clock_has_that_rate_again(toy, monkeypatch):
    """And all its groups of weights have the same one, though time goes on between them."""
    times = iter(range(1, 1000))

    def fit(given: dict[int, float]) -> tuple[dict[int, set[float]], dict]:
        asked, checkpoint = {}, {}
        trainer, module, data = toy(trainer={"max_steps": 4, "limit_val_batches": 0})
        module.given_progress = given
        module.clock = lambda: 0.9 + next(times) / 1000

        def factor(schedule, step: int, progress: float) -> float:
            asked.setdefault(step, set()).add(progress)
            return 1.0

        monkeypatch.setattr(type(module.schedule), "factor", factor)
        trainer.fit(module, data)
        module.on_save_checkpoint(checkpoint)
        return asked, checkpoint

    asked, checkpoint = fit({})
    steps, progress = (numbers.tolist() for numbers in checkpoint["progress_by_clock"])
    assert steps == [0, 1, 2, 3] and progress == sorted(set(progress))
    assert asked == {step: {one} for step, one in zip([*steps, 4], [*progress, 1.0], strict=True)}
    again, checkpoint = fit(dict(zip(steps, progress, strict=True)))
    assert again == asked and "progress_by_clock" not in checkpoint


def test_a_run_that_goes_on_keeps_no_clock_for_steps_that_followed_none(toy, tmp_path):
    trainer, module, data = toy(trainer={"max_steps": 2, "limit_val_batches": 0})
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    again, module, data = toy(trainer={"max_steps": 4, "limit_val_batches": 0})
    module.clock = lambda: 0.9
    again.fit(module, data, ckpt_path=tmp_path / "2.ckpt")
    assert module.progress_by_clock[0].tolist() == [3]  # step 2 has the rate of the checkpoint


def test_a_damaged_checkpoint_is_one_line_of_a_replay(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("trainer: {callbacks: []}\n")
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"cut off")
    with pytest.raises(SystemExit) as stop:
        recipe("replay", f"--run={tmp_path}", "--step=3", script=SCRIPT)
    assert stop.value.code == 2 and "is no whole checkpoint" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [{"trainer.accumulate_grad_batches": 2}, {"trainer.max_time": "00:00:00:20"}])
def test_a_step_replayed_has_the_loss_that_was_logged(ends, corpus, tmp_path):
    assert command(arguments(tmp_path, corpus, ends), tmp_path / "log").wait() == 0
    for step, begins in ((60, "from recovery-0000000"), (5, "from the beginning")):
        replay = [sys.executable, str(SCRIPT), "replay", "--run", str(tmp_path), "--step", str(step)]
        replay += ["--allow_import", "tests"]
        done = subprocess.run(replay, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the same" in done.stdout.splitlines()[-1] and begins in done.stderr
        assert "gradient norm" in done.stdout and "transformer.h.0" in done.stdout
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[0]["train/loss"] = str(float(rows[0]["train/loss"]) + 0.001)  # of step 5
    with (tmp_path / "metrics.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    other = subprocess.run(replay, capture_output=True, text=True)
    assert other.returncode == 1 and "ANOTHER ONE" in other.stdout


@pytest.mark.parametrize("task", ["text_generation", "translation", "question_answering"])
def test_the_checks_of_fine_tuning_pass_on_a_sound_run(task, tmp_path):
    """In one process, as `verify` makes them there."""
    report = tmp_path / "checks.json"
    small = {
        "text_generation": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1},
        "question_answering": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
        "translation": {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    }[task]
    flags = {f"model.architecture.{name}": size for name, size in small.items()}
    flags |= {"model.from": "new", "trainer.precision": "32-true", "trainer.accelerator": "cpu"}
    flags |= {"trainer.default_root_dir": tmp_path, "trainer.max_time": "null"}
    check = {"class_path": "lightning_modules.checks.Checks", "init_args": {"report": str(report)}}
    config = ["--config", f"recipes/finetune_{task}.yaml", f"--trainer.callbacks+={json.dumps(check)}"]
    recipe("fit", *config, *(f"--{name}={value}" for name, value in flags.items()))
    found = json.loads(report.read_text())
    names = [one["name"] for one in found["checks"]]
    assert all(one["passed"] for one in found["checks"]), found["checks"]
    assert {"gradient under other splits", "exported folder", "padded against alone"} <= set(names)
    assert ("written together" in names) == (task != "question_answering")
    assert "⟦" in found["labels"][0]
