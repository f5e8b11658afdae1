"""Both heads, the divergence and the hard loss in one function, over chunks of tokens, gradients computed on the way.

Shape suffixes: N tokens, n tokens of a chunk, R rows of a block, C width of the model a head is of, V vocabulary,
K words of a sparse target.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.divergences import Divergence, Measured, measure
from lightning_modules.losses import IGNORED, Head, head_scores

NEVER = -1e30
"""Log-probability of a word that a model rules out: -inf would turn a product with 0 into NaN."""


class Matching(NamedTuple):
    """What of a teacher's distribution is matched, and how much of the objective the labels themselves are."""

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    """Both models' logits are divided by it, and the divergence multiplied by its square, so that the size of the
    gradient stays, https://arxiv.org/abs/1503.02531."""
    hard_weight: float = 0.0
    """The objective is (1 - hard_weight) · T² · divergence + hard_weight · cross-entropy of the labels."""
    beta: float = 0.5
    """Of jsd; like alpha, of the skewed divergences, explained in divergences.py."""
    alpha: float = 0.1


class Sparse(NamedTuple):
    """A teacher's distribution, at the temperature of the matching, by some of its words."""

    ids_NK: Tensor
    shares_NK: Tensor
    """Float32; those of an id that stands there twice add up."""
    tail_N: Tensor | None = None
    """Share of all other words, matched as one outcome, https://arxiv.org/abs/2503.16870. None: the shares are drawn,
    add up to one, and are the teacher's in expectation."""
    entropy_N: Tensor | None = None
    """Of the teacher, in nats, where shares are drawn: what their cross-entropy is in excess of the divergence."""

    def rows(self, some: Tensor | slice) -> "Sparse":
        return Sparse(*(None if part is None else part[some] for part in self))


def linear_distillation(
    student: Head,
    target: Sequence[Head] | Sparse,
    labels_N: Tensor,
    matching: Matching,
    *,
    words: int | None = None,
    divisor: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective of `matching`, summed over the tokens whose label is not -100.

    Several teachers count by the mean of their probabilities. The first `words` ids of both vocabularies count, in both
    losses; what stands behind is padding. Returns (objective / divisor, nats, divergence), float32 scalars: nats is the
    sum of -log q(label), divergence its sum at the temperature; both without gradient. Products run in the dtype of the
    hidden states (under autocast: in its dtype), all else in float32.
    """
    if isinstance(target, Sparse) and matching.divergence != "forward_kl":
        raise ValueError(f"{matching.divergence} needs all words of the teacher; of some of them there is forward_kl")
    words = words or (student.hidden_NC.shape[1] if student.weight_VC is None else len(student.weight_VC))
    device = student.hidden_NC.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student = student.to(dtype)
        target = target if isinstance(target, Sparse) else [head.to(dtype) for head in target]
    fixed = (student.loss, target, labels_N, matching, words, divisor, chunk_tokens, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):  # which would take sums of products in bf16
        return _LinearDistillation.apply(*student[:3], *fixed)


@torch.no_grad()
def kept_words(
    teacher: Head, words: int, temperature: float, exact: int, drawn: int, seed: int, chunk_tokens: int = 256
) -> dict[str, Tensor]:
    """What stands for a distribution in a cache: ids (N, exact + drawn); of the likeliest their shares (N, exact) and
    the tail (N,), the share of all others; where words are drawn, each for an equal part of the tail, the entropy (N,).
    """
    generator = torch.Generator(teacher.hidden_NC.device).manual_seed(seed)
    logits, parts = _Logits(teacher, words), []
    for start in range(0, len(teacher.hidden_NC), chunk_tokens):
        logits.take(slice(start, start + chunk_tokens))
        log_p_nV = logits.log_softmax(logits.scores(slice(None)), temperature)
        parts.append(_kept_words(log_p_nV, exact, drawn, generator))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _kept_words(log_p_nV: Tensor, exact: int, drawn: int, generator: torch.Generator) -> dict[str, Tensor]:
    p_nV, found, ids = log_p_nV.exp(), {}, []
    if drawn:
        found["entropy"] = -torch.linalg.vecdot(p_nV, log_p_nV)
    if exact:
        shares_nH, ids_nH = p_nV.topk(exact)
        p_nV.scatter_(1, ids_nH, 0.0)
        found |= {"shares": shares_nH, "tail": p_nV.sum(-1)}
        ids.append(ids_nH)
    if drawn:
        ids.append(_systematic_sample(p_nV, drawn, generator))
    return found | {"ids": torch.cat(ids, 1)}


def _systematic_sample(mass_nV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n, count) words, of which each stands there count · mass / total times in expectation, and never a whole time
    more or less: equally spaced places, of one random beginning, along the cumulated mass."""
    cumulated_nV = mass_nV.cumsum(-1, dtype=torch.float64)
    begin_n1 = torch.rand(len(mass_nV), 1, dtype=torch.float64, generator=generator, device=mass_nV.device)
    places_nD = (begin_n1 + torch.arange(count, device=mass_nV.device)) / count * cumulated_nV[:, -1:]
    return torch.searchsorted(cumulated_nV, places_nD, right=True).clamp_(max=mass_nV.shape[1] - 1)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, weight_VC, bias_V, loss, target, labels_N, matching, words, divisor, chunk, gradients):
        wants_hidden, wants_weight, wants_bias = (gradients and need for need in ctx.needs_input_grad[:3])
        device = hidden_NC.device.type
        student = _Logits(Head(hidden_NC, weight_VC, bias_V, loss), words)
        teacher = _Named(target) if isinstance(target, Sparse) else _All(target, words, matching)
        d_hidden_NC = torch.zeros_like(hidden_NC, dtype=student.dtype) if wants_hidden else None
        d_weight_VC = torch.zeros_like(weight_VC, dtype=torch.float32) if wants_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias else None
        sums_3 = torch.zeros(3, device=hidden_NC.device)
        n = chunk or max(256, (4 if device == "cpu" else 64) * 2**20 // words)
        r = max(1, 2**18 // words) if device == "cpu" else n  # so few rows that they stay in a CPU's cache
        for tokens in (slice(start, start + n) for start in range(0, len(labels_N), n)):
            labels_n = labels_N[tokens]
            student.take(tokens)
            teacher.take(tokens)
            for rows in (slice(start, start + r) for start in range(0, len(labels_n), r)):
                d_rows = _block(student, teacher, rows, labels_n[rows], matching, divisor, sums_3)
                if wants_bias:
                    d_bias_V[:words] += d_rows.sum(0)
                student.product_nV[rows] = d_rows
            if wants_hidden:
                d_hidden_NC[tokens, : student.width] = student.through_weight()
            if wants_weight:
                _add_product(d_weight_VC, student.product_nV, student.hidden_NC[tokens])
        ctx.save_for_backward(d_hidden_NC, d_weight_VC, d_bias_V)
        objective, nats, divergence = sums_3.unbind()
        ctx.mark_non_differentiable(nats, divergence)
        return objective / divisor, nats, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, d_objective, *_):
        scale = d_objective.device.type != "cpu" or d_objective.item() != 1.0
        gradients = [g * d_objective if g is not None and scale else g for g in ctx.saved_tensors]
        return *gradients, *[None] * 8


def _block(
    student: "_Logits",
    teacher: "_All | _Named",
    rows: slice,
    labels_R: Tensor,
    matching: Matching,
    divisor: float,
    sums_3: Tensor,
) -> Tensor:
    """(R, V) gradient of objective / divisor with respect to the product of hidden states and weight."""
    T, hard = matching.temperature, matching.hard_weight
    keep_R, column_R1 = labels_R != IGNORED, labels_R.clamp(min=0)[:, None]
    scores_RV = student.scores(rows)
    log_q_RV = student.log_softmax(scores_RV)
    nats_R = -log_q_RV.gather(1, column_R1)[:, 0]
    hard_RV = log_q_RV.exp().scatter_add_(1, column_R1, log_q_RV.new_full(column_R1.shape, -1.0)) if hard else None
    if T != 1.0:
        log_q_RV = student.log_softmax(scores_RV, T)
    value_R, d_RV = teacher.measured(rows, log_q_RV)
    objective_R = torch.lerp(T * T * value_R, nats_R, hard)
    # where, not a product: what an ignored row has must not turn the sum into NaN.
    sums_3 += torch.stack([torch.where(keep_R, part_R, 0).sum() for part_R in (objective_R, nats_R, value_R)])
    d_RV *= T * (1 - hard)  # T², and 1 / T from the logits' own division
    if hard_RV is not None:
        d_RV.add_(hard_RV, alpha=hard)
    d_RV = student.through_head(d_RV, scores_RV)
    return torch.where(keep_R[:, None], d_RV.div_(divisor), 0)


def _add_product(d_weight_VC: Tensor, d_product_nV: Tensor, hidden_nC: Tensor, words_at_once: int = 4096) -> None:
    """Adds to the gradient of a weight, in float32 whatever its factors are, since it is the sum of many chunks."""
    for start in range(0, d_product_nV.shape[1], words_at_once):
        some = slice(start, min(start + words_at_once, d_product_nV.shape[1]))
        if hidden_nC.dtype == torch.float32:
            d_weight_VC[some].addmm_(d_product_nV[:, some].T, hidden_nC)
        else:
            d_weight_VC[some] += d_product_nV[:, some].T @ hidden_nC


class _Logits:
    """Those of a model, of a chunk of tokens at a time."""

    def __init__(self, head: Head, words: int):
        hidden_NC, weight_VC, bias_V, self.loss = head
        self.hidden_NC, self.dtype = hidden_NC, hidden_NC.dtype
        self.weight_VC = None if weight_VC is None else weight_VC.to(self.dtype)[:words]
        self.bias_V = None if bias_V is None else bias_V[:words]
        self.words = words
        self.width = words if weight_VC is None else hidden_NC.shape[1]
        self.stretch = 1.0 if self.loss.softcap is None else 2 * self.loss.softcap
        """Logits are stretch · scores + a number, which a softmax does not see."""

    def take(self, tokens: slice) -> None:
        hidden_nC = self.hidden_NC[tokens]
        self.product_nV = hidden_nC[:, : self.words].clone() if self.weight_VC is None else hidden_nC @ self.weight_VC.T

    def scores(self, rows: slice) -> Tensor:
        return head_scores(self.product_nV[rows], self.bias_V, self.loss)

    def log_softmax(self, scores_RV: Tensor, temperature: float = 1.0) -> Tensor:
        stretch = self.stretch / temperature
        return (scores_RV if stretch == 1.0 else scores_RV * stretch).log_softmax(-1).clamp_(min=NEVER)

    def through_head(self, d_logits_RV: Tensor, scores_RV: Tensor) -> Tensor:
        """The gradient with respect to the product, of that to the logits."""
        if self.loss.logit_scale != 1.0:
            d_logits_RV *= self.loss.logit_scale
        if self.loss.softcap is None:
            return d_logits_RV
        # d (softcap · tanh(x / softcap)) / dx = 4 s (1 - s), where s = sigmoid(2x / softcap) is the score.
        return torch.ops.aten.sigmoid_backward(d_logits_RV.mul_(4), scores_RV)

    def through_weight(self) -> Tensor:
        return self.product_nV if self.weight_VC is None else self.product_nV @ self.weight_VC


class _All:
    """Teachers of whom every word's probability is known."""

    def __init__(self, heads: Sequence[Head], words: int, matching: Matching):
        self.teachers = [_Logits(head, words) for head in heads]
        self.temperature = matching.temperature
        self.measure = measure(matching.divergence, matching.beta, matching.alpha)

    def take(self, tokens: slice) -> None:
        for teacher in self.teachers:
            teacher.take(tokens)

    def measured(self, rows: slice, log_q_RV: Tensor) -> Measured:
        of_each = [teacher.log_softmax(teacher.scores(rows), self.temperature) for teacher in self.teachers]
        if len(of_each) > 1:
            of_each = [torch.stack(of_each).logsumexp(0).sub_(math.log(len(of_each)))]
        return self.measure(of_each[0], log_q_RV)


class _Named:
    """A teacher of whom some words' probabilities are known."""

    def __init__(self, target: Sparse):
        self.target = target

    def take(self, tokens: slice) -> None:
        self.chunk = self.target.rows(tokens)

    def measured(self, rows: slice, log_q_RV: Tensor) -> Measured:
        """Forward KL of the named words, and of all others as one."""
        ids_RK, shares_RK, tail_R, entropy_R = self.chunk.rows(rows)
        ids_RK = ids_RK.long()
        log_q_RK = log_q_RV.gather(1, ids_RK)
        q_RV = log_q_RV.exp()
        if tail_R is None:
            value_R = -torch.linalg.vecdot(shares_RK, log_q_RK)
            value_R = value_R if entropy_R is None else value_R - entropy_R
            return value_R, q_RV.scatter_add_(1, ids_RK, -shares_RK)
        q_RK = log_q_RK.exp()
        rest_RV = q_RV.scatter_(1, ids_RK, 0.0)
        rest_R = rest_RV.sum(-1).clamp_(min=torch.finfo(torch.float32).tiny)
        value_R = (torch.special.xlogy(shares_RK, shares_RK) - shares_RK * log_q_RK).sum(-1)
        value_R += torch.special.xlogy(tail_R, tail_R) - tail_R * rest_R.log()
        d_RV = rest_RV.mul_((1 - tail_R / rest_R)[:, None])
        return value_R, d_RV.scatter_(1, ids_RK, q_RK - shares_RK)
