"""The training step: exact in tokens, causal, and able to learn."""

import math

import pytest
import torch
from torch.optim import SGD

from datamodules.base import IGNORED
from lightning_modules.architectures import build
from lightning_modules.schedules import Constant


def ragged(batch, dataloader_idx=0):
    """Takes labels away from the rows, more from some, so that micro-batches count unequal tokens."""
    labels = batch["labels"].clone()
    for i, row in enumerate(batch["rows"].tolist()):
        labels[i, : (row * 11) % 30] = IGNORED
    return batch | {"labels": labels}


def weights_after_a_step(toy, batch_size, accumulate, **trainer):
    """One SGD step without momentum: the change of the weights is the gradient."""
    torch.manual_seed(0)
    trainer, module, data = toy(
        optimizer=lambda groups: SGD(groups, lr=1.0),
        schedule=Constant(warmup_steps=0),
        data={"batch_size": batch_size},
        trainer={"max_steps": 1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0, **trainer},
    )
    data.on_after_batch_transfer = ragged
    trainer.fit(module, data)
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 4), (1, 8)])
def test_the_gradient_does_not_depend_on_how_a_step_is_split(toy, batch_size, accumulate):
    whole = weights_after_a_step(toy, 8, 1)
    split = weights_after_a_step(toy, batch_size, accumulate)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_the_labels_of_the_step(toy):
    """Against transformers' logits and torch's own mean, on the rows that the step saw."""
    stepped = weights_after_a_step(toy, 2, 4)
    trainer, module, data = toy(data={"batch_size": 8}, trainer={"max_steps": 1, "limit_val_batches": 0})
    seen = []
    data.on_after_batch_transfer = lambda batch, dataloader_idx: seen.append(ragged(batch)) or batch
    trainer.fit(module, data)
    network = build(module.architecture, module.auto_class, seed=0)
    (batch,) = seen
    logits = network(batch["input_ids"]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    plain = torch.cat([(p - p.grad).detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(stepped, plain, rtol=0, atol=1e-6)


def test_clipping_by_norm_gives_the_chosen_norm(toy):
    torch.manual_seed(0)
    before = weights_after_a_step(toy, 8, 1, gradient_clip_val=1e-9)
    after = weights_after_a_step(toy, 8, 1, gradient_clip_val=0.01)
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def validate(toy, **data):
    trainer, module, data = toy(data=data)
    return trainer.validate(module, data, verbose=False)[0]


def test_validation_does_not_depend_on_its_batch_size(toy):
    one, seven = validate(toy, val_batch_size=1), validate(toy, val_batch_size=7)
    for name in ("val/loss", "val/perplexity", "val/bits_per_byte"):
        assert one[name] == pytest.approx(seven[name], rel=1e-6)


def test_the_initial_loss_is_log_v(toy):
    assert validate(toy)["val/loss"] == pytest.approx(math.log(257), abs=0.05)


def test_bits_per_byte_are_the_nats_of_all_held_out_tokens_over_all_held_out_bytes(toy):
    trainer, module, data = toy()
    metrics = trainer.validate(module, data, verbose=False)[0]
    about = data.describe()
    nats = metrics["val/loss"] * about["val_tokens"]
    assert metrics["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / about["val_bytes"], rel=0.02)


def test_a_token_cannot_see_the_future(toy):
    trainer, module, data = toy(trainer={"max_steps": 1, "limit_val_batches": 0})
    trainer.fit(module, data)
    embeddings = module.network.get_input_embeddings()(torch.randint(0, 256, (1, 12))).detach().requires_grad_()
    module.network(inputs_embeds=embeddings).logits[0, 5].sum().backward()
    reached = embeddings.grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 6 + [False] * 6


def test_one_batch_can_be_memorised(toy):
    trainer, module, data = toy(
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        trainer={"max_steps": 150, "overfit_batches": 1, "limit_val_batches": 0},
    )
    trainer.fit(module, data)
    assert module.step_loss < 0.1


def test_the_loss_is_reported_per_token_of_the_whole_step(toy):
    """Before the first update: the mean over 8 rows, whichever way they come."""
    losses = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        trainer, module, data = toy(
            data={"batch_size": batch_size},
            trainer={"max_steps": 1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0},
        )
        trainer.fit(module, data)
        losses.append(float(module.step_loss))
        assert int(module.tokens) == 8 * 32
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_l1_and_z_loss_and_label_smoothing_change_the_gradient_and_not_the_reported_loss(toy):
    def step(**settings):
        trainer, module, data = toy(trainer={"max_steps": 1, "limit_val_batches": 0}, **settings)
        trainer.fit(module, data)
        return float(module.step_loss), float(module.step_grad_norm)

    plain = step()
    for setting in ({"l1": 1e-3}, {"z_loss": 1e-2}, {"label_smoothing": 0.2}):
        loss, norm = step(**setting)
        assert loss == plain[0] and norm != plain[1], setting
