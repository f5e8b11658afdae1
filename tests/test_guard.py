"""Steps that go wrong change nothing, are told once, and are never checkpointed."""

import json
from types import SimpleNamespace

import pytest
import torch

from lightning_modules import checkpoint_io
from lightning_modules.callbacks.guard import Guard
from lightning_modules.callbacks.recovery import Recovery
from tests.faults import SpoilsLoss, arguments, command, state


@pytest.fixture
def fit(toy, tmp_path):
    def fit(guard, *callbacks, **trainer):
        settings = {"callbacks": [guard, *callbacks], "default_root_dir": tmp_path, "max_steps": 30} | trainer
        trainer, module, data = toy(trainer=settings)
        trainer.fit(module, data)
        return module

    return fit


def unusual(folder):
    return [json.loads(line) for line in (folder / "unusual_steps.jsonl").read_text().splitlines()]


def test_a_step_that_is_not_finite_is_not_applied_and_its_rows_are_told(fit, tmp_path, capsys):
    from lightning.pytorch import Callback

    class Watch(Callback):
        def __init__(self):
            self.seen = {}

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen[trainer.global_step] = module.network.lm_head.weight.detach().clone()

    watch = Watch()
    module = fit(Guard(), SpoilsLoss([5, 9]), watch, max_steps=12)
    for step, moved in ((4, True), (5, False), (6, True), (9, False), (10, True)):
        assert torch.equal(watch.seen[step], watch.seen[step - 1]) is not moved
    assert all(torch.isfinite(p).all() for p in module.parameters())
    rows = {line["step"]: line["rows"] for line in unusual(tmp_path)}
    assert rows == {5: [16, 17, 18, 19], 9: [32, 33, 34, 35]}
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "step 5: the loss is nan" in warnings[0] and "not applied" in warnings[0]


def test_steps_that_are_done_again_tell_of_themselves_again(tmp_path):
    lines = [json.dumps({"step": step, "rank": 0, "loss": "nan", "rows": []}) for step in (3, 5, 8)]
    (tmp_path / "unusual_steps.jsonl").write_text("\n".join([*lines, '{"step": 9, "ra']))
    Guard().on_train_start(SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, global_step=5), None)
    assert [line["step"] for line in unusual(tmp_path)] == [3, 5]


@pytest.mark.parametrize("guard, last", [(Guard(), 7), (Guard(most_in_a_row=2), 4), (Guard("stop"), 3)])
def test_too_many_in_a_row_stop_the_run(guard, last, fit, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(guard, SpoilsLoss([3, 4, 5, 6, 7, 8]))
    assert stop.value.code == 1 and unusual(tmp_path)[-1]["step"] == last
    assert f"up to {last} were not finite" in capsys.readouterr().err.splitlines()[-1]


def test_rollback_takes_the_weights_of_the_last_checkpoint(fit, tmp_path, capsys):
    from lightning.pytorch.callbacks import ModelCheckpoint

    kept = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_top_k=-1)
    module = fit(Guard("rollback"), SpoilsLoss([11]), kept, max_steps=11, enable_checkpointing=True)
    saved = checkpoint_io.newest(tmp_path / "checkpoints")
    assert "rolled back to the weights of step 8" in capsys.readouterr().err
    there = torch.load(saved, weights_only=True)
    assert there["global_step"] == 8
    assert torch.equal(module.network.lm_head.weight, there["state_dict"]["network.lm_head.weight"])


def test_a_spike_is_told_in_its_step_and_a_clean_run_has_none(fit, tmp_path, capsys):
    fit(Guard(), SpoilsLoss([250], factor=20.0), max_steps=1000)
    assert [line["step"] for line in unusual(tmp_path)] == [250]
    assert "times the usual" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_on_one_rank_is_dropped_by_all(corpus, tmp_path):
    flags = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.max_steps": 15, "ckpt_path": None}
    spoil = {"class_path": "tests.faults.SpoilsLoss", "init_args": {"steps": [6], "rank": 1}}
    argv = arguments(tmp_path, corpus, flags) + [f"--trainer.callbacks+={json.dumps(spoil)}"]
    assert command(argv, tmp_path / "log").wait(60) == 0, (tmp_path / "log").read_text()
    lines = sorted(unusual(tmp_path), key=lambda line: line["rank"])
    assert [line["step"] for line in lines] == [6, 6]
    assert lines[0]["rows"] == [40, 41, 42, 43] and lines[1]["rows"] == [44, 45, 46, 47]
    assert state(tmp_path)  # whole and finite


def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.callbacks.recovery.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="has 1,000 bytes free, and two checkpoints of about .* must fit"):
        fit(Recovery())
