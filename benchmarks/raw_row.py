"""The ceiling: a plain PyTorch loop with every trick of the recipe, and no Trainer.

bf16 weights under float32 masters, the fused head and loss, the CPU kernels, fused AdamW, clipping in few passes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from sizes import Job
from torch import Tensor
from transformers import AutoModelForCausalLM
from turns import Turns, run_row

from lightning_modules import cpu_kernels, hardware
from lightning_modules.architectures import HeadInput, build, find_head_loss, parameter_count
from lightning_modules.losses import linear_cross_entropy
from lightning_modules.optim import Float32Master, adamw, parameter_groups


def batches(job: Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels (B, T) from random places."""
    tokens_N = np.memmap(job.tokens_file, job.tokens_dtype, "r")
    offsets = np.arange(job.size.seq_len + 1)
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(len(tokens_N) - job.size.seq_len, size=(job.size.batch_size, 1))
        windows = torch.from_numpy(tokens_N[starts + offsets].astype(np.int64)).to(job.device, non_blocking=True)
        yield windows[:, :-1], windows[:, 1:].flatten()


def clip(parameters: list[Tensor], most: float) -> None:
    gradients = [p.grad for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    if norm.device.type != "cpu" or norm > most:
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1))


def train(job: Job) -> None:
    config = job.size.architecture(job.vocab_size, **job.size.without_dropout())
    network = build(config, AutoModelForCausalLM, seed=0).train().to(job.device)
    tap = HeadInput(network)
    head = find_head_loss(network, tap)
    assert head is not None, f"no fused loss for {job.size.config}"
    on_cpu = job.device == "cpu"
    if on_cpu:
        hardware.keep_freed_memory()
    if job.bf16 and on_cpu:
        if not job.compile:
            cpu_kernels.install(network)
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()
    if job.compile:
        network.compile()
    groups = parameter_groups(network)
    optimizer = Float32Master(groups, adamw) if job.bf16 and on_cpu else adamw(groups)
    parameters = list(network.parameters())
    autocast = torch.autocast(job.device, torch.bfloat16, enabled=not on_cpu)
    tokens = job.size.batch_size * job.size.seq_len
    turns = Turns(job, parameter_count(network))
    for input_ids, labels_N in batches(job):
        turns.step_begins()
        with autocast:
            with tap.tapped():
                network(input_ids, use_cache=False)
            weight, bias = tap.head.weight, tap.head.bias
            loss, _ = linear_cross_entropy(tap.hidden.flatten(0, 1), weight, labels_N, bias, head=head, divisor=tokens)
        optimizer.zero_grad()  # here, not after the step: their memory is then used again at once
        loss.backward()
        clip(parameters, 1.0)
        optimizer.step()


if __name__ == "__main__":
    run_row(train)
