"""Losses that a refactoring must not change: one line a step in golden.txt, rewritten by `make golden`."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, GPT2Config, T5Config

from lightning_modules import hardware
from lightning_modules.optim import MuonAdamW
from lightning_modules.pretrain import MaskedLM, SpanDenoising

GOLDEN = Path(__file__).with_name("golden.txt")
STEPS = 10
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RUNS = {
    "causal llama adamw": {},
    "causal gpt2 muon packed": {
        "architecture": GPT2Config(n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        "optimizer": lambda groups: MuonAdamW(groups),
        "data": {"cross_document_attention": False},
    },
    "masked bert": {
        "module": MaskedLM,
        "architecture": BertConfig(**BERT, hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    },
    "denoising t5": {
        "module": SpanDenoising,
        "architecture": T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, dropout_rate=0),
    },
}


def losses(toy, settings) -> list[float]:
    trainer, module, data = toy(
        trainer={"max_steps": STEPS, "limit_val_batches": 0, "gradient_clip_val": 1.0},
        **({"optimizer": lambda groups: torch.optim.AdamW(groups, lr=3e-3)} | settings),
    )
    found = []
    module.on_train_batch_end = lambda outputs, batch, batch_idx: found.append(float(module.step_loss))
    trainer.fit(module, data)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name, toy, request, monkeypatch):
    # On this CPU or that: Muon's products would be bf16 where that is fast.
    monkeypatch.setattr(hardware, "product_dtype", lambda device: torch.float32)
    found = losses(toy, RUNS[name])
    lines = dict(line.split(": ") for line in GOLDEN.read_text().splitlines()) if GOLDEN.exists() else {}
    if request.config.getoption("--rewrite-golden"):
        lines[name] = " ".join(f"{loss:.6f}" for loss in found)
        GOLDEN.write_text("".join(f"{name}: {values}\n" for name, values in sorted(lines.items())))
    assert found == pytest.approx([float(value) for value in lines[name].split()], abs=2e-4)
