"""Head and loss in one function, over tiles of tokens × vocabulary, so that the logits of a batch never exist at once.

Shape suffixes: N tokens, n tokens of a chunk, r rows of a block, C width, V vocabulary, v words of a tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules import hardware

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


class Head(NamedTuple):
    """Hidden states and what makes logits of them; without a weight they are the logits."""

    hidden_NC: Tensor
    weight_VC: Tensor | None = None
    bias_V: Tensor | None = None
    loss: HeadLoss = PLAIN

    def to(self, dtype: torch.dtype) -> "Head":
        return self._replace(hidden_NC=self.hidden_NC.to(dtype))

    def rows(self, keep_N: Tensor) -> "Head":
        return self._replace(hidden_NC=self.hidden_NC[keep_N])


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
    tile_logits = tile_logits or (4 if hardware.kind_of(hidden_NC.device) == "cpu" else 128) * 2**20
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

        def product(chunk: slice, tile: slice) -> Tensor:
            return hidden_NC[chunk] @ weight_VC[tile].T

        def bias(tile: slice) -> Tensor | None:
            return None if bias_V is None else bias_V[tile]

        for chunk in (slice(start, start + n) for start in range(0, N, n)):
            labels_n = labels_N[chunk]
            blocks = _blocks(len(labels_n), v, hardware.kind_of(device))
            sums = _Sums(labels_n, V, head)
            for tile in tiles:
                product_nv = product(chunk, tile)
                for rows in blocks:
                    sums.add(rows, tile.start, head_scores(product_nv[rows], bias(tile), head))
            chunk_nats, chunk_objective = sums.nats_and_objective()
            nats += chunk_nats
            objective += chunk_objective
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            for tile in tiles:
                if len(tiles) > 1:
                    product_nv = product(chunk, tile)
                for rows in blocks:
                    scores_rv = head_scores(product_nv[rows], bias(tile), head)
                    d_product_rv = sums.gradient(rows, tile.start, scores_rv, divisor)
                    if wants_bias:
                        d_bias_V[tile] += d_product_rv.sum(0)
                    product_nv[rows] = d_product_rv
                if wants_hidden:
                    d_hidden_NC[chunk] += product_nv @ weight_VC[tile]
                if wants_weight:
                    d_weight_VC[tile] += product_nv.T @ hidden_NC[chunk]
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


def _blocks(n: int, v: int, device: str) -> list[slice]:
    """Rows of a tile that are worked on together: on a CPU so few that they stay in its cache from pass to pass."""
    r = max(1, 2**18 // v) if device == "cpu" else n
    return [slice(start, start + r) for start in range(0, n, r)]


def head_scores(product_rv: Tensor, bias_v: Tensor | None, head: HeadLoss) -> Tensor:
    """Float32 scores, linear in the logits: the logits themselves or, under a soft cap, the sigmoids they come from."""
    scores_rv = product_rv.to(torch.float32, copy=True)
    if bias_v is not None:
        scores_rv += bias_v
    if head.logit_scale != 1.0:
        scores_rv *= head.logit_scale
    if head.softcap is not None:
        # tanh(x) = 2 sigmoid(2x) - 1, whose vectorised form is 8 times faster on a CPU.
        scores_rv.mul_(2 / head.softcap).sigmoid_()
    return scores_rv


class _Sums:
    """What is added up over the vocabulary for each token of a chunk: logsumexp, the label's logit, the mean logit."""

    def __init__(self, labels_n: Tensor, V: int, head: HeadLoss):
        self.labels_n, self.V, self.head = labels_n, V, head
        # logits = stretch · scores + shift
        self.stretch, self.shift = (1.0, 0.0) if head.softcap is None else (2 * head.softcap, -head.softcap)
        self.lse_n = torch.full(labels_n.shape, -torch.inf, device=labels_n.device, dtype=torch.float32)
        self.label_logits_n = torch.zeros_like(self.lse_n)
        self.mean_n = torch.zeros_like(self.lse_n)

    def add(self, rows: slice, first_word: int, scores_rv: Tensor) -> None:
        max_r = scores_rv.amax(-1)
        sum_r = self._exp(scores_rv, self.stretch * max_r).sum(-1)
        self.lse_n[rows] = torch.logaddexp(self.lse_n[rows], self.stretch * max_r + self.shift + sum_r.log())
        inside_r, column_r = self._label(rows, first_word, scores_rv.shape[1])
        label_scores_r = scores_rv.gather(-1, column_r[:, None])[:, 0]
        self.label_logits_n[rows] += torch.where(inside_r, self.stretch * label_scores_r + self.shift, 0)
        if self.head.label_smoothing:
            self.mean_n[rows] += (self.stretch * scores_rv.sum(-1) + self.shift * scores_rv.shape[1]) / self.V

    def nats_and_objective(self) -> tuple[Tensor, Tensor]:
        keep_n = self.labels_n != IGNORED
        nats_n = self.lse_n - self.label_logits_n
        objective_n = torch.lerp(nats_n, self.lse_n - self.mean_n, self.head.label_smoothing)
        objective_n += self.head.z_loss * self.lse_n.square()
        return torch.where(keep_n, nats_n, 0).sum(), torch.where(keep_n, objective_n, 0).sum()

    def gradient(self, rows: slice, first_word: int, scores_rv: Tensor, divisor: float) -> Tensor:
        """d (objective / divisor) / d (matrix product), (r, v) float32."""
        head, lse_r = self.head, self.lse_n[rows]
        d_logits_rv = self._exp(scores_rv, lse_r - self.shift)
        if head.z_loss:
            d_logits_rv *= 1 + 2 * head.z_loss * lse_r[:, None]
        if head.label_smoothing:
            d_logits_rv -= head.label_smoothing / self.V
        inside_r, column_r = self._label(rows, first_word, scores_rv.shape[1])
        target_r = inside_r.to(torch.float32).mul_(head.label_smoothing - 1)
        d_logits_rv.scatter_add_(-1, column_r[:, None], target_r[:, None])
        factor_r = (self.labels_n[rows] != IGNORED).to(torch.float32).mul_(head.logit_scale / divisor)
        if head.softcap is None:
            return d_logits_rv.mul_(factor_r[:, None])
        # d (softcap · tanh(x / softcap)) / dx = 4 s (1 - s), where s = sigmoid(2x / softcap) is the score.
        d_logits_rv.mul_(4 * factor_r[:, None])
        return torch.ops.aten.sigmoid_backward(d_logits_rv, scores_rv)

    def _exp(self, scores_rv: Tensor, minus_r: Tensor) -> Tensor:
        """exp(stretch · scores - minus), in one pass and one of exp2, 5 times faster than exp on a CPU."""
        return torch.add(-LOG2_E * minus_r[:, None], scores_rv, alpha=LOG2_E * self.stretch).exp2_()

    def _label(self, rows: slice, first_word: int, v: int) -> tuple[Tensor, Tensor]:
        """Whether a row's label is in the tile, and its column there (0 where it is not)."""
        column_r = self.labels_n[rows] - first_word
        inside_r = (column_r >= 0) & (column_r < v)
        return inside_r, torch.where(inside_r, column_r, 0)
