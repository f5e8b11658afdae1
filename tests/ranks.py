"""What a rank does in tests/test_strategies.py: short runs of several recipes under several strategies, in one process.

Run by the test as `python tests/ranks.py JOB`, with the environment that torchrun would set.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import BertConfig, LlamaConfig, Qwen3Config, T5Config

from datamodules.instructions import Instructions
from datamodules.labelled import Labelled
from datamodules.text import Text
from lightning_modules import handing_out, hardware, strategies
from lightning_modules.adapter import Adapter
from lightning_modules.callbacks.report import whole_weights
from lightning_modules.classification import Classification
from lightning_modules.distillation import CausalDistillation
from lightning_modules.inner_signals import InnerSignals
from lightning_modules.optim import MuonAdamW
from lightning_modules.pretrain import CausalLM, MaskedLM, SpanDenoising
from lightning_modules.shards import local
from lightning_modules.strategies import FSDP2
from lightning_modules.text_generation import TextGeneration

ROWS, STEPS = 8, 50
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
Made = tuple[LightningModule, LightningDataModule]


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def language(module: type, architecture, job: dict, rows: int, **settings: object) -> Made:
    text = {"path": job["texts"], "seq_len": 32, "val_fraction": 0.2, "vocab_size": 400}
    data = Text(batch_size=rows, objective=module.objective, **text)
    return module(architecture=architecture, optimizer=adamw, **settings), data


def decoder(job: dict, rows: int) -> Made:
    return language(CausalLM, LlamaConfig(num_key_value_heads=4, tie_word_embeddings=True, **SIZES), job, rows)


def muon(job: dict, rows: int) -> Made:
    module, data = decoder(job, rows)
    module.optimizer = partial(Float32Muon, lr=0.02, weight_decay=0.1)
    return module, data


class Float32Muon(MuonAdamW):
    """bf16 makes more of another order of summing."""

    def step(self, closure=None):
        with patch.object(hardware, "product_dtype", lambda device: torch.float32):
            return super().step(closure)


def normed_heads(job: dict, rows: int) -> Made:
    """Weights that each rank of tensor parallel has whole, and the gradient of its heads alone."""
    return language(CausalLM, Qwen3Config(num_key_value_heads=4, head_dim=8, **SIZES), job, rows)


def encoder(job: dict, rows: int) -> Made:
    return language(MaskedLM, BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SIZES), job, rows)


def encoder_decoder(job: dict, rows: int) -> Made:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}
    return language(SpanDenoising, T5Config(**sizes), job, rows)


def labels(job: dict, rows: int) -> Made:
    data = Labelled(path=f"{job['reviews']}/train.csv", val_path=f"{job['reviews']}/val.csv", batch_size=rows)
    return Classification(from_=job["encoder"], dropout=0.0, optimizer=adamw), data


def answers(job: dict, rows: int) -> Made:
    data = Instructions(path=job["answers"], val_fraction=0.2, batch_size=rows)
    adapter = Adapter(rank=2, target_modules="all-linear")
    return TextGeneration(from_=job["decoder"], adapter=adapter, optimizer=adamw, max_new_tokens=4), data


def distilled(job: dict, rows: int) -> Made:
    inner = InnerSignals(hidden=1.0, embeddings=1.0)
    student = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    data = Text(path=job["texts"], seq_len=32, val_fraction=0.2, batch_size=rows)
    return CausalDistillation(teacher=job["decoder"], student=student, inner=inner, optimizer=adamw), data


RECIPES: dict[str, Callable[[dict, int], Made]] = {
    found.__name__: found
    for found in (decoder, muon, normed_heads, encoder, encoder_decoder, labels, answers, distilled)
}


STRATEGIES = {
    "fsdp2_groups": lambda: FSDP2(group_size=2),
    "fsdp2_offload": lambda: FSDP2(cpu_offload=True),
}
"""Besides those that have a name."""


MADE: list[bool] = []
"""Whether this rank had the weights of a network before it was handed out."""


def watched(network: nn.Module, *settings: object) -> None:
    MADE.append(not any(parameter.is_meta for parameter in network.parameters()))
    handing_out.hand_out(network, *settings)


strategies.hand_out = watched


class Losses(Callback):
    """Of every step, as all ranks together have it."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        self.found.append((float(module.step_loss), float(module.step_grad_norm)))


def kept(module: LightningModule) -> list[float]:
    """Which part of the network this rank has, and of its teacher."""
    networks = [module.network, *(teacher.network for teacher in getattr(module, "teachers", []))]
    for part in (part for network in networks for part in network.modules() if isinstance(part, FSDPModule)):
        part.reshard()  # what lies outside of all layers stays gathered after a validation
    weights = [list(network.parameters()) for network in networks]
    return [sum(local(p).numel() for p in some) / sum(p.numel() for p in some) for some in weights]


def exported(module: LightningModule, file: Path) -> dict[str, float]:
    """The norms of the weights of the folder that a run leaves, which the first rank writes."""
    weights = whole_weights(module.network) if module.is_sharded else None
    if not module.trainer.is_global_zero:
        return {}
    folder = file.with_suffix(".model")
    with nullcontext() if weights is None else module.as_whole(weights):
        module.exported().save_pretrained(folder)
    return {name: float(weight.norm()) for name, weight in load_file(folder / "model.safetensors").items()}


def main(job: dict) -> None:
    found = {}
    for strategy, recipe in job["cases"]:
        losses = Losses()
        trainer = Trainer(
            accelerator="cpu",
            devices=job["ranks"],
            strategy=STRATEGIES[strategy]() if strategy in STRATEGIES else strategy,
            max_steps=STEPS,
            gradient_clip_val=0.5,
            callbacks=[losses],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            val_check_interval=STEPS,
            check_val_every_n_epoch=None,
        )
        groups = {"auto": 1, "tp": 1, "fsdp2_tp": job["ranks"] // 2}.get(strategy, job["ranks"])
        module, data = RECIPES[recipe](job, ROWS // groups)
        trainer.fit(module, data)
        val = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        of_ranks = [MADE] * job["ranks"]
        if job["ranks"] > 1:
            dist.all_gather_object(of_ranks, list(MADE))
        MADE.clear()
        case = {
            "made": of_ranks,
            "steps": losses.found,
            "val": val,
            "kept": kept(module),
            "norms": exported(module, Path(job["file"])),
        }
        found[f"{strategy} {recipe}"] = case
        if trainer.is_global_zero:
            print(strategy, recipe, losses.found[-1], val, flush=True)
            Path(job["file"]).write_text(json.dumps(found))
    if dist.is_initialized():  # or the threads of one rank may still talk to another that has gone
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
