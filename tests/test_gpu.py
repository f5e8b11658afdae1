"""What needs a CUDA device: `make test-gpu`. Skips by itself elsewhere."""

import json

import pytest
import torch
from torch.nn import functional as F

from lightning_modules.losses import linear_cross_entropy
from tests.test_recipes import SMALL, fit

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


def test_float16_trains_as_float32_does_with_a_fused_optimizer(corpus, tmp_path):
    flags = {"trainer.accelerator": "cuda", "trainer.max_steps": 10, "trainer.gradient_clip_val": 0.3}
    flags |= {"model.compile": "false", "model.optimizer": "lightning_modules.optim.adamw"}
    losses = [
        fit(tmp_path / precision, corpus, **flags, **{"trainer.precision": precision})["val_loss"]
        for precision in ("32-true", "16-mixed")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


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


def test_the_plan_is_what_a_gpu_takes(corpus, tmp_path):
    """Within a tenth, of tensors; without torch.compile, which takes less."""
    flags = {"trainer.accelerator": "cuda", "model.compile": "false", "trainer.precision": "bf16-mixed"}
    sizes = {"model.architecture.hidden_size": 768, "model.architecture.intermediate_size": 3072}
    sizes |= {"model.architecture.num_hidden_layers": 6, "model.architecture.num_attention_heads": 12}
    sizes |= {"data.seq_len": 512, "data.batch_size": 16, "trainer.limit_val_batches": 0}
    summary = fit(tmp_path, corpus, **flags, **sizes, **{"trainer.max_steps": 5})
    planned, measured = summary["planned"]["peak_memory_bytes"], summary["measured"]["peak_memory_bytes"]
    assert measured == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2", "FSDP2"])
def test_a_recipe_trains_under_every_strategy(corpus, tmp_path, strategy):
    flags = {"trainer.accelerator": "cuda", "trainer.strategy": strategy, "trainer.gradient_clip_val": 0.1}
    flags |= {"trainer.strategy.cpu_offload": "true"} if strategy == "FSDP2" else {}
    flags |= {"trainer.precision": "32-true", "trainer.max_steps": 5, "model.compile": "false"}
    summary = fit(tmp_path / "one", corpus, **flags)
    flags.pop("trainer.strategy.cpu_offload", None)
    plain = fit(tmp_path / "plain", corpus, **(flags | {"trainer.strategy": "auto"}))
    assert summary["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2", "tp"])
def test_two_gpus_are_two_micro_batches(corpus, tmp_path, strategy):
    """With clipping, by the norm of all parts together."""
    architecture = {"model.architecture": "transformers.LlamaConfig", "model.optimizer": "AdamW"}
    architecture |= {f"model.architecture.{name}": value for name, value in SMALL["LlamaConfig"].items()}
    flags = {"trainer.accelerator": "cuda", "trainer.gradient_clip_val": 0.1, "trainer.precision": "32-true"}
    flags |= {"trainer.max_steps": 5, "model.compile": "false", "global_batch_size": 8} | architecture
    two = fit(tmp_path / "two", corpus, **flags, **{"trainer.devices": 2, "trainer.strategy": strategy})
    one = fit(tmp_path / "one", corpus, **flags)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
