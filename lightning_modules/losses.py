"""Head and loss in one function, over tiles of tokens × vocabulary, so that the logits of a batch never exist at once.

Shape suffixes: N tokens, n tokens of a chunk, C width, V vocabulary, v words of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
LOG2_E = 1.4426950408889634


class HeadLoss(NamedTuple):
    """What stands between the hidden states and the number that is minimised, apart from the matrix product."""

    logit_scale: float = 1.0
    softcap: float | None = None
    """Logits become `softcap · tanh(logits / softcap)`, section 2 of Gemma 2, https://arxiv.org/abs/2408.00118."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target, https://arxiv.org/abs/1512.00567."""
    z_loss: float = 0.0
    """Weight of logsumexp², section 5 of PaLM, https://arxiv.org/abs/2204.02311."""


PLAIN = HeadLoss()


def linear_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    head: HeadLoss = PLAIN,
    divisor: float = 1.0,
    tile_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weightᵀ + bias` against labels in [0, V), summed; a label of -100 counts for nothing.

    Returns (objective / divisor, nats), float32 scalars. `nats` is the plain sum of -log p(label), without gradient;
    the objective has one, and adds what `head` asks for. Products run in the dtype of `hidden_NC` (under autocast: in
    its dtype), all else in float32. The gradients are computed on the way forward. At most `tile_logits` logits exist
    at a time (default: 4 Mi on a CPU, so that they stay in its cache, 128 Mi elsewhere).
    """
    device = hidden_NC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NC.dtype
    tile_logits = tile_logits or (4 if device == "cpu" else 128) * 2**20
    return _LinearCrossEntropy.apply(
        hidden_NC, weight_VC, bias_V, labels_N, head, divisor, tile_logits, dtype, torch.is_grad_enabled()
    )


def cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, *, head: HeadLoss = PLAIN, divisor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The same two sums from finished logits: the plain path, for a head that is not one matrix product."""
    logits_NV = logits_NV.float()
    keep_N = labels_N != IGNORED
    lse_N = logits_NV.logsumexp(-1)
    nats_N = lse_N - logits_NV.gather(-1, labels_N.clamp(min=0)[:, None])[:, 0]
    uniform_N = lse_N - logits_NV.mean(-1)
    objective_N = torch.lerp(nats_N, uniform_N, head.label_smoothing) + head.z_loss * lse_N.square()
    # where, not a product: a logit of -inf in an ignored row must not turn the sum into NaN.
    return torch.where(keep_N, objective_N, 0).sum() / divisor, torch.where(keep_N, nats_N, 0).sum().detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """Two passes over the tiles of a chunk of tokens: first the loss, then the gradients.

    Where a chunk is one tile its logits are kept. Otherwise they are computed again: a fourth matrix product, which
    is cheaper than adding up the gradient of the weight (V × C numbers) once for each of many small chunks.
    """

    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, bias_V, labels_N, head, divisor, tile_logits, dtype, gradients):
        wants_hidden, wants_weight, wants_bias = (gradients and need for need in ctx.needs_input_grad[:3])
        (N, C), V, device = hidden_NC.shape, len(weight_VC), hidden_NC.device
        n = max(1, min(N, max(2048, tile_logits // V)))
        v = max(1, tile_logits // n)
        tiles = [slice(start, start + v) for start in range(0, V, v)]
        hidden_NC, weight_VC = hidden_NC.to(dtype), weight_VC.to(dtype)
        d_hidden_NC = torch.zeros(N, C, device=device, dtype=torch.float32) if wants_hidden else None
        # One chunk writes each part of the weight's gradient once; several need a float32 sum.
        d_weight_VC = (
            torch.zeros(V, C, device=device, dtype=dtype if n == N else torch.float32) if wants_weight else None
        )
        d_bias_V = torch.zeros(V, device=device, dtype=torch.float32) if wants_bias else None
        nats, objective = torch.zeros(2, device=device, dtype=torch.float32).unbind()

        def logits_of(chunk: slice, tile: slice) -> Tensor:
            return _logits(hidden_NC[chunk], weight_VC[tile], bias_V[tile] if bias_V is not None else None, head)

        for chunk in (slice(start, start + n) for start in range(0, N, n)):
            labels_n = labels_N[chunk]
            label_logits_n, lse_n, mean_n, logits_nv = _reduce(lambda tile: logits_of(chunk, tile), tiles, labels_n, V)  # noqa: B023
            chunk_nats, chunk_objective = _sums(label_logits_n, lse_n, mean_n, labels_n, head)
            nats += chunk_nats
            objective += chunk_objective
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            for tile in tiles:
                if len(tiles) > 1:
                    logits_nv = logits_of(chunk, tile)
                d_logits_nv = _d_logits(logits_nv, lse_n, labels_n, tile.start, V, head, divisor)
                if wants_bias:
                    d_bias_V[tile] += d_logits_nv.sum(0)
                d_logits_nv = d_logits_nv.to(dtype)
                if wants_hidden:
                    d_hidden_NC[chunk] += d_logits_nv @ weight_VC[tile]
                if wants_weight:
                    d_weight_VC[tile] += d_logits_nv.T @ hidden_NC[chunk]
        ctx.save_for_backward(d_hidden_NC, d_weight_VC, d_bias_V)
        ctx.mark_non_differentiable(nats)
        return objective / divisor, nats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_objective, _):
        # Reading the factor costs nothing on a CPU and mostly saves a pass over the weight's gradient there.
        scale = d_objective.device.type != "cpu" or d_objective.item() != 1.0
        gradients = [g * d_objective if g is not None and scale else g for g in ctx.saved_tensors]
        return *gradients, *[None] * 6


def _logits(hidden_nC: Tensor, weight_vC: Tensor, bias_v: Tensor | None, head: HeadLoss) -> Tensor:
    """(n, v) float32."""
    logits_nv = (hidden_nC @ weight_vC.T).float()
    if bias_v is not None:
        logits_nv += bias_v
    if head.logit_scale != 1.0:
        logits_nv *= head.logit_scale
    if head.softcap is not None:
        # tanh(x) = 2 sigmoid(2x) - 1, whose vectorised form is 8 times faster on a CPU.
        logits_nv.mul_(2 / head.softcap).sigmoid_().mul_(2 * head.softcap).sub_(head.softcap)
    return logits_nv


def _reduce(logits_of, tiles: list[slice], labels_n: Tensor, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The label's logit, logsumexp and mean over the vocabulary, each (n,), and the logits of the last tile."""
    lse_n = torch.full(labels_n.shape, -torch.inf, device=labels_n.device, dtype=torch.float32)
    label_logits_n = torch.zeros_like(lse_n)
    mean_n = torch.zeros_like(lse_n)
    for tile in tiles:
        logits_nv = logits_of(tile)
        max_n = logits_nv.amax(-1)
        # exp2 is 5 times faster than exp on a CPU.
        sum_n = (logits_nv - max_n[:, None]).mul_(LOG2_E).exp2_().sum(-1)
        lse_n = torch.logaddexp(lse_n, max_n + sum_n.log())
        column_n = labels_n - tile.start
        inside_n = (column_n >= 0) & (column_n < logits_nv.shape[1])
        label_logits_n += logits_nv.gather(-1, torch.where(inside_n, column_n, 0)[:, None])[:, 0] * inside_n
        mean_n += logits_nv.sum(-1) / V
    return label_logits_n, lse_n, mean_n, logits_nv


def _sums(label_logits_n: Tensor, lse_n: Tensor, mean_n: Tensor, labels_n: Tensor, head: HeadLoss):
    """(nats, objective) of a chunk."""
    keep_n = labels_n != IGNORED
    nats_n = lse_n - label_logits_n
    objective_n = torch.lerp(nats_n, lse_n - mean_n, head.label_smoothing) + head.z_loss * lse_n.square()
    return torch.where(keep_n, nats_n, 0).sum(), torch.where(keep_n, objective_n, 0).sum()


def _d_logits(logits_nv, lse_n, labels_n, first_word: int, V: int, head: HeadLoss, divisor: float) -> Tensor:
    """d (objective / divisor) / d (scores before scale and softcap), (n, v) float32. Overwrites the logits."""
    # d softcap(x) / dx = 1 - (softcap(x) / softcap)²
    slope_nv = None if head.softcap is None else 1 - (logits_nv / head.softcap).square_()
    probabilities_nv = logits_nv.sub_(lse_n[:, None]).mul_(LOG2_E).exp2_()
    if head.z_loss:
        probabilities_nv *= 1 + 2 * head.z_loss * lse_n[:, None]
    if head.label_smoothing:
        probabilities_nv -= head.label_smoothing / V
    column_n = labels_n - first_word
    inside_n = (column_n >= 0) & (column_n < logits_nv.shape[1])
    target_n1 = inside_n.to(torch.float32).mul_(head.label_smoothing - 1)[:, None]
    d_logits_nv = probabilities_nv.scatter_add_(-1, torch.where(inside_n, column_n, 0)[:, None], target_n1)
    d_logits_nv *= (labels_n != IGNORED).to(torch.float32).mul_(head.logit_scale / divisor)[:, None]
    return d_logits_nv if slope_nv is None else d_logits_nv.mul_(slope_nv)
