"""Lightning's own tuners work on a recipe's module and datamodule."""

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder

from lightning_modules.schedules import Constant


def test_the_learning_rate_that_is_found_is_the_one_that_trains(toy, tmp_path):
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-5, max_lr=1.0)
    trainer, module, data = toy(
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.123),
        schedule=Constant(warmup_steps=0),
        trainer={"callbacks": [finder], "default_root_dir": tmp_path, "limit_val_batches": 0},
    )
    trainer.fit(module, data)
    assert finder.optimal_lr is not None
    assert module.lr == finder.optimal_lr.suggestion() != 0.123
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([module.lr] * 3)
    assert trainer.global_step == 3 and int(module.tokens) == 3 * 4 * 32, "the search itself is not counted"


def test_the_batch_size_that_is_found_is_the_one_that_trains(toy, tmp_path):
    finder = BatchSizeFinder(mode="power", max_trials=2, steps_per_trial=1, init_val=16)
    trainer, module, data = toy(
        trainer={"callbacks": [finder], "default_root_dir": tmp_path, "limit_val_batches": 0, "max_steps": 2}
    )
    trainer.fit(module, data)
    assert data.batch_size == finder.optimal_batch_size != 4
    assert int(module.tokens) == 2 * data.batch_size * 32


def test_early_stopping_ends_a_run_that_no_longer_learns(toy):
    stopping = EarlyStopping("val/loss", patience=2, min_delta=100.0, check_on_train_epoch_end=False)
    trainer, module, data = toy(trainer={"callbacks": [stopping], "max_steps": 100, "val_check_interval": 2})
    trainer.fit(module, data)
    assert trainer.global_step == 6
