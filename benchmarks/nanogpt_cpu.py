"""The baseline of time to loss: a small GPT trained as nanoGPT's README does it on a CPU, written plainly.

4 layers, 4 heads, 128 wide, context 64, no bias, no dropout, learned positions, embedding tied to the head; 2,000 steps
of 12 rows at random offsets; AdamW 1e-3, betas (0.9, 0.99), weight decay 0.1 on matrices; warm-up over 100 steps, then
a cosine to 1e-4; gradients clipped at 1; float32. https://github.com/karpathy/nanoGPT, "I only have a macbook".

Run:
    python benchmarks/nanogpt_cpu.py TEXT SEED [STEPS]      prints one line of JSON

Shape suffixes: B rows, T tokens, C width, H heads, K head size, V vocabulary.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 128, 64
ROWS, STEPS, WARMUP = 12, 2000, 100
HIGHEST_LR, LOWEST_LR = 1e-3, 1e-4
HELD_OUT = 0.1
"""The last part of the text."""


class Block(nn.Module):
    """Pre-norm attention and GELU, section 2.3 of GPT-2."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q_BHTK, k_BHTK, v_BHTK = self.qkv(self.norm_1(x_BTC)).view(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        attended_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTC = x_BTC + self.attention_out(attended_BHTK.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.down(F.gelu(self.up(self.norm_2(x_BTC))))


class GPT(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if into_residual else 0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x_BTC = self.tokens(ids_BT) + self.positions.weight[: ids_BT.shape[1]]
        return self.norm(self.blocks(x_BTC)) @ self.tokens.weight.T


def learning_rate(step: int, steps: int) -> float:
    warmup = min(WARMUP, steps // 2)
    if step < warmup:
        return HIGHEST_LR * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return LOWEST_LR + 0.5 * (1 + math.cos(math.pi * done)) * (HIGHEST_LR - LOWEST_LR)


def train(model: GPT, ids_N: Tensor, steps: int) -> float:
    """Seconds that the training took."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=HIGHEST_LR, betas=(0.9, 0.99))
    offsets = torch.arange(CONTEXT + 1)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        windows = ids_N[torch.randint(len(ids_N) - CONTEXT, (ROWS, 1)) + offsets]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


@torch.no_grad()
def loss_on(model: GPT, ids_N: Tensor) -> float:
    """Nats per character over the whole of a text, in rows that do not overlap."""
    inputs_N, labels_N = ids_N[:-1], ids_N[1:]
    whole = len(inputs_N) // CONTEXT * CONTEXT
    inputs, labels = (x_N[:whole].view(-1, CONTEXT).split(64) for x_N in (inputs_N, labels_N))
    rows = [*zip(inputs, labels, strict=True), (inputs_N[None, whole:], labels_N[None, whole:])]
    losses = (F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in rows if x.numel())
    return sum(map(float, losses)) / len(labels_N)


def main() -> None:
    file, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else STEPS
    torch.manual_seed(seed)
    text = Path(file).read_text(encoding="utf-8")
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    ids_N = torch.tensor([characters[character] for character in text])
    border = int(len(ids_N) * (1 - HELD_OUT))
    model = GPT(len(characters))
    seconds = train(model, ids_N[:border], steps)
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"val_loss": loss_on(model, ids_N[border:]), "seconds": seconds, "parameters": parameters}))


if __name__ == "__main__":
    main()
