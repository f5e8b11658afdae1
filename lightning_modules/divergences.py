"""How far the student's distribution q over the words of a row is from the teacher's p, and the gradient of that.

Each function takes log p and log q, (R, V) float32, and gives the divergence of each row in nats, (R,), and its
gradient with respect to the student's logits, (R, V). All are zero at p = q, where the gradient vanishes too.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "mse"]
Measured = tuple[Tensor, Tensor]


def forward_kl(log_p_RV: Tensor, log_q_RV: Tensor) -> Measured:
    """KL(p ‖ q): q has to cover all that p does, https://arxiv.org/abs/1503.02531."""
    p_RV = log_p_RV.exp()
    value_R = torch.linalg.vecdot(p_RV, log_p_RV - log_q_RV)
    return value_R, log_q_RV.exp().sub_(p_RV)


def reverse_kl(log_p_RV: Tensor, log_q_RV: Tensor) -> Measured:
    """KL(q ‖ p): q may leave out what it cannot have, https://arxiv.org/abs/2306.08543."""
    return _through_softmax(log_q_RV, log_q_RV - log_p_RV)


def jsd(log_p_RV: Tensor, log_q_RV: Tensor, beta: float) -> Measured:
    """Generalised Jensen-Shannon divergence, https://arxiv.org/abs/2306.13649, divided by β (1 - β): so it goes over
    into KL(p ‖ q) at β = 0 and KL(q ‖ p) at β = 1, and a sweep over β is none over the learning rate."""
    if beta == 0.0:
        return forward_kl(log_p_RV, log_q_RV)
    if beta == 1.0:
        return reverse_kl(log_p_RV, log_q_RV)
    of_p_RV, of_q_RV = _against_mixture(log_p_RV, log_q_RV, beta)
    value_R = torch.linalg.vecdot(log_p_RV.exp(), of_p_RV) / (1 - beta)
    of_q_R, gradient_RV = _through_softmax(log_q_RV, of_q_RV / beta)
    return value_R + of_q_R, gradient_RV


def skew_kl(log_p_RV: Tensor, log_q_RV: Tensor, alpha: float) -> Measured:
    """KL(p ‖ α p + (1 - α) q), https://arxiv.org/abs/2402.03898."""
    of_p_RV, _ = _against_mixture(log_p_RV, log_q_RV, alpha)
    value_R = torch.linalg.vecdot(log_p_RV.exp(), of_p_RV)
    return value_R, _through_softmax(log_q_RV, of_p_RV.exp_().mul_(alpha - 1))[1]


def skew_reverse_kl(log_p_RV: Tensor, log_q_RV: Tensor, alpha: float) -> Measured:
    """KL(q ‖ (1 - α) p + α q), https://arxiv.org/abs/2402.03898."""
    _, of_q_RV = _against_mixture(log_p_RV, log_q_RV, 1 - alpha)
    value_R = torch.linalg.vecdot(log_q_RV.exp(), of_q_RV)
    return value_R, _through_softmax(log_q_RV, of_q_RV - alpha * of_q_RV.exp())[1]


def total_variation(log_p_RV: Tensor, log_q_RV: Tensor) -> Measured:
    """Half the sum of |p - q|, 0 to 1, https://arxiv.org/abs/2307.15190."""
    difference_RV = log_q_RV.exp() - log_p_RV.exp()
    _, gradient_RV = _through_softmax(log_q_RV, difference_RV.sign().mul_(0.5))
    return difference_RV.abs_().sum(-1) / 2, gradient_RV


def mse(log_p_RV: Tensor, log_q_RV: Tensor) -> Measured:
    """Mean squared difference of the logits, each centred in its row, since a softmax sees no more of them,
    https://arxiv.org/abs/2105.08919."""
    difference_RV = log_q_RV - log_p_RV
    difference_RV -= difference_RV.mean(-1, keepdim=True)
    return difference_RV.square().mean(-1), difference_RV * (2 / difference_RV.shape[-1])


def measure(divergence: Divergence, beta: float, alpha: float) -> Callable[[Tensor, Tensor], Measured]:
    """One of the above, by name; `beta` is of jsd, `alpha` of the skewed ones."""
    if divergence == "jsd":
        return lambda log_p_RV, log_q_RV: jsd(log_p_RV, log_q_RV, beta)
    if divergence in ("skew_kl", "skew_reverse_kl"):
        skewed = skew_kl if divergence == "skew_kl" else skew_reverse_kl
        return lambda log_p_RV, log_q_RV: skewed(log_p_RV, log_q_RV, alpha)
    plain = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation, "mse": mse}
    return plain[divergence]


def _against_mixture(log_p_RV: Tensor, log_q_RV: Tensor, share: float) -> Measured:
    """log p/m and log q/m where m = share · p + (1 - share) · q, also where m is nearly one of them."""
    log_ratio_RV = (log_p_RV - log_q_RV).clamp_(-80, 80)  # exp of more is no float32
    if share <= 0.5:
        of_q_RV = torch.expm1(log_ratio_RV).mul_(share).log1p_().neg_()
        return log_ratio_RV.add_(of_q_RV), of_q_RV
    of_p_RV = torch.expm1(-log_ratio_RV).mul_(1 - share).log1p_().neg_()
    return of_p_RV, of_p_RV - log_ratio_RV


def _through_softmax(log_q_RV: Tensor, slope_RV: Tensor) -> Measured:
    """The mean of `slope` under q, and q · (slope - that mean): what a slope along q is along the logits."""
    q_RV = log_q_RV.exp()
    mean_R = torch.linalg.vecdot(q_RV, slope_RV)
    return mean_R, q_RV.mul_(slope_RV - mean_R[:, None])
