"""The loss of distillation against plain formulas in float64, and what must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.distillation_loss import Matching, Sparse, linear_distillation
from lightning_modules.losses import IGNORED, PLAIN, Head, HeadLoss

N, C, D, V = 23, 8, 12, 37
ALL = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "mse")


def rows_of_both(seed: int = 0, spread: float = 2.0) -> dict[str, Tensor]:
    """A student's and a teacher's hidden states and heads, and labels of which some count for nothing."""
    torch.manual_seed(seed)
    labels = torch.randint(V, (N,))
    labels[::5] = IGNORED
    return {
        "hidden": spread * torch.randn(N, C),
        "weight": torch.randn(V, C) / math.sqrt(C),
        "bias": torch.randn(V),
        "teacher_hidden": spread * torch.randn(N, D),
        "teacher_weight": torch.randn(V, D) / math.sqrt(D),
        "labels": labels,
    }


def heads(rows: dict[str, Tensor], loss: HeadLoss = PLAIN) -> tuple[Head, list[Head]]:
    for name in ("hidden", "weight", "bias"):
        rows[name].requires_grad_(True).grad = None
    student = Head(rows["hidden"], rows["weight"], rows["bias"], loss)
    return student, [Head(rows["teacher_hidden"], rows["teacher_weight"])]


def capped(logits: Tensor, loss: HeadLoss) -> Tensor:
    logits = logits * loss.logit_scale
    return logits if loss.softcap is None else loss.softcap * torch.tanh(logits / loss.softcap)


def by_formula(p: Tensor, q: Tensor, divergence: str, beta: float, alpha: float) -> Tensor:
    """Of probabilities, (N,), as the papers write it."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if divergence == "forward_kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    if divergence == "jsd":
        m = beta * p + (1 - beta) * q
        return (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta))
    if divergence == "skew_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if divergence == "skew_reverse_kl":
        return kl(q, (1 - alpha) * p + alpha * q)
    if divergence == "total_variation":
        return (p - q).abs().sum(-1) / 2
    difference = q.log() - p.log()
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1)


def oracle(rows: dict[str, Tensor], matching: Matching, loss: HeadLoss = PLAIN):
    """Objective, and gradients of hidden states, weight and bias, in float64 by autograd."""
    double = {name: value.detach().double() for name, value in rows.items() if name != "labels"}
    leaves = [double[name].requires_grad_(True) for name in ("hidden", "weight", "bias")]
    logits = capped(double["hidden"] @ double["weight"].T + double["bias"], loss)
    teacher = double["teacher_hidden"] @ double["teacher_weight"].T
    T, hard = matching.temperature, matching.hard_weight
    p, q = (teacher / T).softmax(-1), (logits / T).softmax(-1)
    value = by_formula(p, q, matching.divergence, matching.beta, matching.alpha)
    nats = F.cross_entropy(logits, rows["labels"].clamp(min=0), reduction="none")
    keep = rows["labels"] != IGNORED
    objective = ((1 - hard) * T * T * value + hard * nats)[keep].sum()
    return objective, torch.autograd.grad(objective, leaves), nats[keep].sum(), value[keep].sum()


def computed(rows, matching, loss=PLAIN, **settings):
    student, teachers = heads(rows, loss)
    objective, nats, value = linear_distillation(student, teachers, rows["labels"], matching, **settings)
    objective.backward()
    return objective.detach(), [rows[name].grad.clone() for name in ("hidden", "weight", "bias")], nats, value


def assert_equal(ours, expected, rtol=1e-5, atol=2e-6):
    for one, other in zip((ours[0], *ours[1], *ours[2:]), (expected[0], *expected[1], *expected[2:]), strict=True):
        torch.testing.assert_close(one.double(), other.detach().double(), rtol=rtol, atol=atol)


# Against the formulas


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("divergence", ALL)
def test_every_divergence_and_its_gradient_are_those_of_the_formula(divergence, hard, temperature):
    for beta in (0.3, 0.7, 1e-4) if divergence == "jsd" else (0.5,):
        matching = Matching(divergence, temperature, hard, beta, alpha=0.1)
        rows = rows_of_both()
        assert_equal(computed(rows, matching), oracle(rows, matching))


@pytest.mark.parametrize("loss", [HeadLoss(logit_scale=0.4), HeadLoss(softcap=3.0), HeadLoss(0.5, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scale_and_soft_cap_of_the_head_are_kept(loss, temperature):
    matching, rows = Matching("forward_kl", temperature, 0.25), rows_of_both()
    assert_equal(computed(rows, matching, loss), oracle(rows, matching, loss))


@pytest.mark.parametrize("divergence", ALL)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(divergence):
    rows = rows_of_both()
    rows |= {"teacher_hidden": rows["hidden"].clone(), "teacher_weight": rows["weight"].clone()}
    rows["bias"].zero_()
    objective, gradients, _, value = computed(rows, Matching(divergence, beta=0.3))
    assert abs(float(objective)) < 1e-5 and abs(float(value)) < 1e-5
    assert max(float(g.abs().max()) for g in gradients) < 1e-5


def test_several_teachers_count_by_the_mean_of_their_probabilities():
    rows, matching = rows_of_both(), Matching("forward_kl", 2.0)
    other = torch.randn(N, V)
    student, teachers = heads(rows)
    objective, *_ = linear_distillation(student, [*teachers, Head(other)], rows["labels"], matching)
    first = rows["teacher_hidden"] @ rows["teacher_weight"].T
    p = ((first / 2).softmax(-1) + (other / 2).softmax(-1)) / 2
    mixed = Head(2 * p.log())
    expected, *_ = linear_distillation(student, [mixed], rows["labels"], matching)
    torch.testing.assert_close(objective, expected, rtol=1e-5, atol=1e-5)


def test_heads_that_are_no_matrix_product_give_their_logits():
    """And what is masked out on both sides counts for nothing."""
    rows, matching = rows_of_both(), Matching("forward_kl", 2.0, 0.2)
    whole = computed(rows, matching)
    logits = (rows["hidden"] @ rows["weight"].T + rows["bias"]).detach()
    teacher = rows["teacher_hidden"] @ rows["teacher_weight"].T
    wider, wider_teacher = (F.pad(x, (0, 4), value=-torch.inf) for x in (logits, teacher))
    wider.requires_grad_(True)
    objective, nats, value = linear_distillation(Head(wider), [Head(wider_teacher)], rows["labels"], matching)
    objective.backward()
    torch.testing.assert_close(torch.stack([objective, nats, value]), torch.stack([whole[0], *whole[2:]]))
    torch.testing.assert_close(wider.grad[:, :V] @ rows["weight"], whole[1][0], rtol=1e-4, atol=1e-5)
    assert not wider.grad[:, V:].any()


# What must not change it


@pytest.mark.parametrize("chunk", [1, 7, 256, N])
def test_chunks_change_nothing(chunk):
    matching = Matching("jsd", 2.0, 0.3)
    rows = rows_of_both()
    assert_equal(computed(rows, matching, chunk_tokens=chunk), computed(rows_of_both(), matching), 1e-5, 1e-6)


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
def test_padding_of_a_vocabulary_counts_for_nothing(padded):
    matching = Matching("forward_kl", 1.0, 0.5)
    expected = computed(rows_of_both(), matching)
    rows = rows_of_both()
    if padded != "teacher":
        rows["weight"] = torch.cat([rows["weight"], torch.randn(5, C)])
        rows["bias"] = torch.cat([rows["bias"], torch.randn(5)])
    if padded != "student":
        rows["teacher_weight"] = torch.cat([rows["teacher_weight"], torch.randn(9, D)])
    ours = computed(rows, matching, words=V)
    for extra in (ours[1][1][V:], ours[1][2][V:]):
        assert not extra.any()
    cut = (ours[0], [ours[1][0], ours[1][1][:V], ours[1][2][:V]], *ours[2:])
    assert_equal(cut, expected, 1e-5, 1e-6)


def test_the_step_is_the_sum_of_its_micro_batches():
    matching, whole = Matching("reverse_kl", 2.0, 0.3), rows_of_both()
    expected = computed(whole, matching, divisor=7.0)
    sums, gradient = torch.zeros(3), torch.zeros(V, C)
    for part in (slice(0, 4), slice(4, 5), slice(5, N)):
        rows = {
            name: value.detach() if "weight" in name or name == "bias" else value.detach()[part]
            for name, value in rows_of_both().items()
        }
        objective, gradients, nats, value = computed(rows, matching, divisor=7.0)
        sums += torch.stack([objective, nats, value])
        gradient += gradients[1]
    torch.testing.assert_close(sums, torch.stack([expected[0], *expected[2:]]))
    torch.testing.assert_close(gradient, expected[1][1], rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_label_has_a_gradient_of_zero():
    rows = rows_of_both()
    rows["labels"] = torch.full((N,), IGNORED)
    rows["teacher_hidden"][3] = torch.nan
    objective, gradients, *_ = computed(rows, Matching())
    assert float(objective) == 0 and not any(g.any() for g in gradients)
    rows = {
        name: value.detach()[:0] if name in ("hidden", "teacher_hidden", "labels") else value
        for name, value in rows_of_both().items()
    }
    objective, gradients, *_ = computed(rows, Matching())
    assert float(objective) == 0 and not gradients[1].any()


def test_jsd_goes_over_into_both_kls():
    """And its size stays: a sweep over β is none over the learning rate."""
    for end, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        expected = computed(rows_of_both(spread=0.5), Matching(name))
        assert_equal(computed(rows_of_both(spread=0.5), Matching("jsd", beta=end)), expected)
        near = computed(rows_of_both(spread=0.5), Matching("jsd", beta=abs(end - 1e-5)))
        assert_equal(near, expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_keeps_its_size_at_high_temperatures():
    norms = [float(computed(rows_of_both(), Matching("forward_kl", T))[1][0].norm()) for T in (8.0, 16.0, 32.0)]
    assert norms[1] == pytest.approx(norms[2], rel=0.1) and norms[0] == pytest.approx(norms[2], rel=0.2)


def test_logits_of_low_precision_are_compared_in_float32():
    rows, exact = rows_of_both(), rows_of_both()
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        rows[name] = rows[name].bfloat16()
        exact[name] = rows[name].float()
    ours, expected = computed(rows, Matching()), computed(exact, Matching())
    assert float(ours[3]) == pytest.approx(float(expected[3]), rel=5e-3)
    assert ours[1][1].dtype == torch.bfloat16
    error = (ours[1][1].float() - expected[1][1]).norm() / expected[1][1].norm()
    assert float(error) < 0.01


@pytest.mark.parametrize("divergence", ALL)
def test_autocast_reaches_the_products_alone(divergence):
    """As with bf16 hidden states and weights, whose sums are float32."""
    rows, rounded = rows_of_both(), rows_of_both()
    for name in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        rounded[name] = rounded[name].bfloat16()
    expected = computed(rounded, Matching(divergence))
    with torch.autocast("cpu", torch.bfloat16):
        ours = computed(rows, Matching(divergence))
    assert ours[0].dtype == torch.float32 and float(ours[0]) == pytest.approx(float(expected[0]), rel=5e-3)
    assert ours[1][1].dtype == torch.float32
    error = (ours[1][1] - expected[1][1].float()).norm() / expected[1][1].float().norm()
    assert float(error) < 0.02


# Some of the teacher's words


def teacher_probabilities(rows: dict[str, Tensor]) -> Tensor:
    return (rows["teacher_hidden"] @ rows["teacher_weight"].T).softmax(-1)


def of_sparse(rows: dict[str, Tensor], target: Sparse, **settings):
    student, _ = heads(rows)
    objective, nats, value = linear_distillation(student, target, rows["labels"], Matching(), **settings)
    objective.backward()
    return objective.detach(), [rows[name].grad.clone() for name in ("hidden", "weight", "bias")], nats, value


def test_a_target_that_names_all_words_is_the_whole_one():
    rows = rows_of_both()
    p = teacher_probabilities(rows)
    ids = torch.arange(V).expand(N, V)
    entropy = torch.special.entr(p).sum(-1)
    expected = computed(rows_of_both(), Matching())
    assert_equal(of_sparse(rows, Sparse(ids, p, None, entropy)), expected)
    assert_equal(of_sparse(rows, Sparse(ids[:, :-1], p[:, :-1], p[:, -1])), expected)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_tail_is_matched_as_one_outcome(k):
    rows = rows_of_both()
    p = teacher_probabilities(rows)
    shares, ids = p.topk(k)
    ours = of_sparse(rows, Sparse(ids.int(), shares, 1 - shares.sum(-1)))
    double = {name: rows[name].detach().double().requires_grad_(True) for name in ("hidden", "weight", "bias")}
    q = (double["hidden"] @ double["weight"].T + double["bias"]).softmax(-1)
    named_q, named_p = q.gather(1, ids), shares.double()
    tail_p, tail_q = 1 - named_p.sum(-1), 1 - named_q.sum(-1)
    value = (named_p * (named_p / named_q).log()).sum(-1) + tail_p * (tail_p / tail_q).log()
    total = value[rows["labels"] != IGNORED].sum()
    gradients = torch.autograd.grad(total, list(double.values()))
    assert_equal((ours[0], ours[1], ours[3]), (total, gradients, total), 1e-4, 1e-5)


def test_a_student_that_has_the_teachers_tail_has_no_loss():
    rows = rows_of_both()
    p = (rows["hidden"] @ rows["weight"].T + rows["bias"]).softmax(-1)
    shares, ids = p.topk(5)
    objective, gradients, *_ = of_sparse(rows, Sparse(ids, shares, 1 - shares.sum(-1)))
    assert abs(float(objective)) < 1e-5 and max(float(g.abs().max()) for g in gradients) < 1e-5


def test_a_cache_of_some_words_has_forward_kl_alone():
    rows = rows_of_both()
    target = Sparse(torch.zeros(N, 1, dtype=torch.long), torch.ones(N, 1))
    with pytest.raises(ValueError, match="reverse_kl needs all words"):
        linear_distillation(heads(rows)[0], target, rows["labels"], Matching("reverse_kl"))
