"""Our CPU kernels beside what they replace: forward and backward, milliseconds, in turns.

Run:
    python benchmarks/cpu_kernels.py
    OMP_NUM_THREADS=1 python benchmarks/cpu_kernels.py --rounds 20

Attention over 2,048 tokens in rows of 64 to 1,024, 6 heads of 64; RMSNorm over the same tokens, 384 wide, beside
transformers' LlamaRMSNorm; attention with dropout, as encoders have it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from page import Table
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules import cpu_kernels

TOKENS, HEADS, HEAD_SIZE = 2048, 6, 64
DROPPED_LENGTH = 128
BF16, FLOAT32 = torch.bfloat16, torch.float32


class CausalLayer(nn.Module):
    """All that the attention interface reads of a layer."""

    is_causal = True


def milliseconds(works: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median of forward and backward of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 2):
        for name, work in works.items():
            start = time.perf_counter()
            out = work()
            out.backward(torch.ones_like(out))
            if i >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def attention_works(seq_len: int) -> dict[str, Callable[[], Tensor]]:
    layer = CausalLayer()

    def heads(dtype: torch.dtype) -> list[Tensor]:
        shape = (TOKENS // seq_len, HEADS, seq_len, HEAD_SIZE)
        return [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]

    low, high = heads(BF16), heads(FLOAT32)
    return {
        "ours, bf16": lambda: cpu_kernels.attention(layer, *low, None)[0],
        "SDPA, bf16": lambda: F.scaled_dot_product_attention(*low, is_causal=True),
        "SDPA, float32": lambda: F.scaled_dot_product_attention(*high, is_causal=True),
    }


def dropped_works(seq_len: int) -> dict[str, Callable[[], Tensor]]:
    """An encoder's attention: both sides are seen, some of the probabilities are dropped."""
    layer = CausalLayer()
    shape = (TOKENS // seq_len, HEADS, seq_len, HEAD_SIZE)
    low, high = ([torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)] for dtype in (BF16, FLOAT32))
    return {
        "ours, bf16": lambda: cpu_kernels.attention(layer, *low, None, dropout=0.1, is_causal=False)[0],
        "SDPA, bf16": lambda: F.scaled_dot_product_attention(*low, dropout_p=0.1),
        "SDPA, float32": lambda: F.scaled_dot_product_attention(*high, dropout_p=0.1),
    }


def norm_works(width: int) -> dict[str, Callable[[], Tensor]]:
    theirs = {dtype: LlamaRMSNorm(width).to(dtype) for dtype in (BF16, FLOAT32)}
    x = {dtype: torch.randn(TOKENS, width).to(dtype).requires_grad_() for dtype in (BF16, FLOAT32)}
    norm = theirs[BF16]
    return {
        "ours, bf16": lambda: cpu_kernels.rms_norm(x[BF16], norm.weight, norm.variance_epsilon),
        "transformers, bf16": lambda: theirs[BF16](x[BF16]),
        "transformers, float32": lambda: theirs[FLOAT32](x[FLOAT32]),
    }


def tables(rounds: int) -> list[Table]:
    torch.manual_seed(0)
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/cpu_kernels.py --rounds {rounds}"
    about = f", forward and backward, {torch.get_num_threads()} threads"
    lengths = (64, 128, 256, 512, 1024)
    found = {seq_len: milliseconds(attention_works(seq_len), rounds) for seq_len in lengths}
    attention = Table(
        f"Causal attention, {TOKENS:,} tokens of {HEADS} heads of {HEAD_SIZE}{about}",
        command,
        ["tokens in a row", *(f"{name} (ms)" for name in found[64]), "SDPA bf16 / ours", "SDPA float32 / ours"],
        [
            [f"{seq_len}", *(f"{ms:.2f}" for ms in times.values())]
            + [f"{times[peer] / times['ours, bf16']:.2f}" for peer in ("SDPA, bf16", "SDPA, float32")]
            for seq_len, times in found.items()
        ],
    )
    times = milliseconds(norm_works(HEADS * HEAD_SIZE), rounds)
    norm = of_ours(f"RMSNorm, {TOKENS:,} tokens of {HEADS * HEAD_SIZE}{about}", command, times)
    times = milliseconds(dropped_works(DROPPED_LENGTH), rounds)
    title = (
        f"Attention with dropout, {TOKENS:,} tokens in rows of {DROPPED_LENGTH}, {HEADS} heads of {HEAD_SIZE}{about}"
    )
    return [attention, norm, of_ours(title, command, times)]


def of_ours(title: str, command: str, times: dict[str, float]) -> Table:
    rows = [[name, f"{ms:.3f}", f"{ms / times['ours, bf16']:.2f}"] for name, ms in times.items()]
    return Table(title, command, ["", "ms", "of ours"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    for table in tables(parser.parse_args().rounds):
        table.print()


if __name__ == "__main__":
    main()
