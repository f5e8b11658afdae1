"""What needs a CUDA device: `make test-gpu`. Skips by itself elsewhere."""

import json

import pytest
import torch
from torch.nn import functional as F

from lightning_modules.losses import linear_cross_entropy
from tests.test_recipes import fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_fused_loss_on_a_gpu_equals_a_float64_oracle():
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    labels = torch.randint(0, 1000, (3000,), device="cuda")
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected, (hidden, weight))
    objective, nats = linear_cross_entropy(hidden, weight, labels, tile_logits=10**6)
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    for actual, gradient in zip(torch.autograd.grad(objective, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_a_recipe_trains_on_a_gpu_in_every_precision(corpus, tmp_path, precision, compile):
    flags = {"trainer.accelerator": "cuda", "trainer.precision": precision, "model.compile": compile}
    summary = fit(tmp_path, corpus, **flags, **{"trainer.max_steps": 10})
    assert summary["val_loss"] < 6.0 and summary["steps"] == 10


def test_a_gpu_and_a_cpu_train_alike_in_float32(corpus, tmp_path):
    flags = {"trainer.precision": "32-true", "model.compile": "false", "trainer.max_steps": 5}
    losses = [
        fit(tmp_path / device, corpus, **flags, **{"trainer.accelerator": device})["val_loss"]
        for device in ("cpu", "cuda")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_peak_memory_is_the_gpus(corpus, tmp_path):
    fit(tmp_path, corpus, **{"trainer.accelerator": "cuda"})
    assert json.loads((tmp_path / "summary.json").read_text())["peak_memory_bytes"] < 2**32
