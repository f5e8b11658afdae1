"""A micro-batch that does not fit into memory is done in parts: the same step."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision, Precision

from lightning_modules import simulation
from lightning_modules.architectures import HeadInput, build
from lightning_modules.exact_step import micro_batch_seed, recount
from lightning_modules.losses import linear_cross_entropy
from lightning_modules.optim import adamw, parameter_groups
from lightning_modules.schedules import Constant


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 TiB")


class Memory(Callback):
    """Holds so many rows, from a step on, and fails beyond: forwards or backwards."""

    def __init__(self, rows, where, from_step=2, from_micro_batch=0):
        self.rows, self.where, self.from_step, self.from_micro_batch = rows, where, from_step, from_micro_batch
        self.place = 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.place = batch_idx % trainer.accumulate_grad_batches

    def on_train_start(self, trainer, module):
        honest = module.loss

        def loss(batch, divisor=1.0):
            late = trainer.global_step + 1 >= self.from_step and self.place >= self.from_micro_batch
            full = trainer.training and late and len(batch["rows"]) > self.rows
            if full and self.where == "forward":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
            objective, nats, count = honest(batch, divisor)
            return (FailsInBackward.apply(objective) if full else objective), nats, count

        module.loss = loss


def fit(toy, *callbacks, accumulate=2, batch_size=8):
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not trainer.fit_loop.epoch_loop._should_accumulate():
                losses.append(float(module.step_loss))

    settings = {"callbacks": [*callbacks, Losses()], "accumulate_grad_batches": accumulate, "max_steps": 4}
    settings |= {"gradient_clip_val": 1.0}
    trainer, module, data = toy(trainer=settings, data={"batch_size": batch_size})
    torch.manual_seed(0)
    trainer.fit(module, data)
    return losses, torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("rows, micro_batch", [(4, 0), (3, 0), (1, 0), (4, 1)])
def test_a_step_that_runs_out_of_memory_is_done_again_in_parts(toy, where, rows, micro_batch, capsys):
    losses, weights = fit(toy)
    told = capsys.readouterr().err
    assert "out of memory" not in told
    losses_in_parts, weights_in_parts = fit(toy, Memory(rows, where, from_micro_batch=micro_batch))
    assert losses_in_parts == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(weights_in_parts, weights, rtol=0, atol=1e-6)
    told = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(told) == {4: 1, 3: 2, 1: 3}[rows] and "from step 1 on, a micro-batch of 8 rows" in told[0]


def test_one_row_too_many_for_the_memory_is_one_line_with_the_mend(toy):
    with pytest.raises(ValueError, match="out of memory at 1 rows a micro-batch on 1 ranks; .* --data.seq_len"):
        fit(toy, Memory(0, "backward"))


def test_other_errors_are_not_taken_for_memory(toy):
    class Fails(Callback):
        def on_train_start(self, trainer, module):
            module.loss = lambda batch, divisor=1.0: (_ for _ in ()).throw(RuntimeError("shapes differ"))

    with pytest.raises(RuntimeError, match="shapes differ"):
        fit(toy, Fails())


def test_seeds_of_micro_batches_differ_and_follow_from_seed_and_row():
    seeds = {micro_batch_seed(seed, row) for seed in range(20) for row in range(-1, 500)}
    assert len(seeds) > 20 * 501 - 5 and max(seeds) < 2**32
    assert micro_batch_seed(3, 8) == micro_batch_seed(3, 8)


@pytest.mark.parametrize("ended", [0, 1])
def test_a_place_in_the_text_has_another_number_of_micro_batches_on_other_ranks(ended):
    """Two epochs of 10 rows and 4 rows of the third: 4 rows at a time, then 2."""
    counts = {"ready": 7, "started": 7, "processed": 7, "completed": 7 - ended}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    recount(progress, 24, 10, 2)
    assert progress["current"]["ready"] == 2 and progress["total"]["ready"] == 12
    assert progress["total"]["completed"] == 12 - ended
    at_the_border = {"total": dict(counts), "current": dict(counts), "is_last_batch": True}
    recount(at_the_border, 20, 10, 4)
    assert at_the_border["current"]["ready"] == 3 and at_the_border["total"]["ready"] == 6


@pytest.mark.parametrize("loss, tolerance", [("ours", 0), ("transformers", 1e-6)])
def test_a_hundred_steps_are_those_of_a_plain_loop(toy, loss, tolerance):
    """Bit by bit with our head and loss; with transformers' logits and torch's cross-entropy to rounding."""
    ours, batches = [], []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            ours.append(float(module.step_loss))
            batches.append(batch)

    settings = {"trainer": {"max_steps": 100, "callbacks": [Keep()]}, "data": {"seq_len": 16}}  # less than an epoch
    trainer, module, data = toy(schedule=Constant(warmup_steps=0), **settings)
    trainer.fit(module, data)
    network = build(module.architecture, module.auto_class, seed=0).train()
    tap, optimizer = HeadInput(network), adamw(parameter_groups(network))
    plain = []
    for batch in batches:
        labels_N = batch["labels"].flatten()
        if loss == "ours":
            with tap.tapped():
                network(batch["input_ids"], use_cache=False)
            hidden_NC = tap.hidden.flatten(0, 1)
            mean, _ = linear_cross_entropy(hidden_NC, network.lm_head.weight, labels_N, divisor=len(labels_N))
        else:
            mean = F.cross_entropy(network(batch["input_ids"]).logits.flatten(0, 1), labels_N)
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        plain.append(mean.item())
    assert len(plain) == 100 and plain[-1] < plain[0] - 1
    assert plain == pytest.approx(ours, rel=max(tolerance, 1e-7), abs=0)
    if not tolerance:
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, module.network.get_parameter(name)), name


def half_precision(scale):
    """Finds in one step that a scale is 2²⁴ times too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-24)
    return MixedPrecision("16-mixed", "cpu", scaler)


def test_float16_trains_as_float32_does_and_goes_on_after_a_step_that_overflows(toy):
    """With the default optimizer, which is fused, and clipping."""

    found = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            weight = module.network.lm_head.weight.detach().clone()
            found[-1].append((module.step_is_finite, float(module.step_loss), float(module.step_grad_norm), weight))

    for plugin in (Precision(), half_precision(2.0**16), half_precision(2.0**40)):
        found.append([])
        settings = {"max_steps": 6, "gradient_clip_val": 0.3, "callbacks": [Steps()], "plugins": [plugin]}
        trainer, module, data = toy(schedule=Constant(warmup_steps=0), trainer=settings)
        trainer.fit(module, data)
    whole, half, overflowing = found
    for (_, loss, norm, weight), (_, loss_of_half, norm_of_half, weight_of_half) in zip(whole, half, strict=True):
        assert (loss_of_half, norm_of_half) == pytest.approx((loss, norm), rel=1e-2)
        assert torch.allclose(weight, weight_of_half, rtol=0, atol=2e-3)
    assert [step[0] for step in overflowing] == [False] + 5 * [True]
    assert overflowing[-1][1] < overflowing[0][1] - 0.1 and overflowing[1][2] < 100


def test_gradients_on_the_cpu_meet_sums_on_a_gpu(toy, monkeypatch):
    """As FSDP2 offloads them; on fake tensors, and another device in the place of a GPU."""
    factors = []
    monkeypatch.setattr(torch, "_foreach_mul_", lambda gradients, factor: factors.append(factor))
    trainer, module, data = toy()
    data.trainer = trainer
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
    module.trainer = SimpleNamespace(strategy=strategy, datamodule=data, callbacks=[], world_size=1, global_rank=0)
    module.trainer.accumulate_grad_batches = 1
    with simulation.simulated("cpu"):
        module.network = torch.nn.Linear(3, 2)
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        module._sums = torch.empty(3, dtype=torch.float64, device="meta")
        module.on_before_optimizer_step(None)
        module.configure_gradient_clipping(None, 1.0)
    assert module.step_grad_norm.device.type == "meta" and factors[0].device.type == "cpu"
