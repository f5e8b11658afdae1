import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.losses import HeadLoss, cross_entropy, linear_cross_entropy

N, C, V = 37, 16, 101


def inputs(dtype=torch.float32, N=N, C=C, V=V):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((N, C), (V, C), (V,)))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)], labels


def oracle(hidden, weight, bias, labels, head):
    """Float64, by the book."""
    logits = head.logit_scale * (hidden.double() @ weight.double().T + bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    nats = F.cross_entropy(logits, labels, reduction="sum")
    objective = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=head.label_smoothing)
    return objective + head.z_loss * logits.logsumexp(-1)[labels != -100].square().sum(), nats


HEADS = [
    HeadLoss(),
    HeadLoss(label_smoothing=0.1),
    HeadLoss(z_loss=1e-2),
    HeadLoss(softcap=3.0),
    HeadLoss(logit_scale=0.25),
    HeadLoss(logit_scale=0.5, softcap=2.0, label_smoothing=0.2, z_loss=1e-3),
]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("tile_logits", [1, V, 7 * N, 10**9], ids="tile{}".format)
def test_loss_and_gradients_equal_a_float64_oracle_for_every_tiling(head, tile_logits):
    tensors, labels = inputs()
    expected, expected_nats = oracle(*tensors, labels, head)
    expected_gradients = torch.autograd.grad(expected / 13, tensors)
    hidden, weight, bias = tensors
    objective, nats = linear_cross_entropy(hidden, weight, labels, bias, head=head, divisor=13, tile_logits=tile_logits)
    assert objective.item() * 13 == pytest.approx(expected.item(), rel=1e-6)
    assert nats.item() == pytest.approx(expected_nats.item(), rel=1e-6)
    for actual, wanted in zip(torch.autograd.grad(objective, tensors), expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_weight_adds_up_over_chunks_of_tokens():
    (hidden, weight, bias), labels = inputs(N=5000, V=7)
    expected, _ = oracle(hidden, weight, bias, labels, HeadLoss())
    wanted = torch.autograd.grad(expected, weight)[0]
    objective, _ = linear_cross_entropy(hidden, weight, labels, bias, tile_logits=7)  # 3 chunks of 2,048 tokens
    torch.testing.assert_close(torch.autograd.grad(objective, weight)[0], wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_plain_path_is_the_same_function(head):
    tensors, labels = inputs()
    hidden, weight, bias = tensors
    logits = head.logit_scale * (hidden @ weight.T + bias)
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    plain = cross_entropy(logits, labels, head=head, divisor=5)
    fused = linear_cross_entropy(hidden, weight, labels, bias, head=head, divisor=5)
    torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-6)


def test_uniform_logits_cost_log_v():
    labels = torch.arange(10)
    _, nats = linear_cross_entropy(torch.zeros(10, C), torch.randn(V, C), labels)
    assert nats.item() / 10 == pytest.approx(math.log(V), rel=1e-6)


def test_bf16_inputs_lose_nothing_after_the_matrix_product():
    (hidden, weight, _), labels = inputs(torch.bfloat16)
    wanted = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum").item()
    _, nats = linear_cross_entropy(hidden, weight, labels)
    # The logits themselves are rounded to bf16 by the product, with errors that average out; the sum is not.
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(wanted, rel=2e-3)


def test_a_batch_without_a_label_costs_nothing_and_has_zero_gradients():
    (hidden, weight, bias), labels = inputs()
    objective, nats = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), bias)
    objective.backward()
    assert objective.item() == 0 and nats.item() == 0
    assert all(not x.grad.any() for x in (hidden, weight, bias))


def test_an_infinite_logit_in_an_ignored_row_does_not_poison_the_plain_path():
    logits = torch.randn(3, V)
    logits[1] = torch.inf
    objective, _ = cross_entropy(logits, torch.tensor([1, -100, 2]))
    assert torch.isfinite(objective)


def test_autocast_decides_the_dtype_of_the_products():
    (hidden, weight, _), labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = linear_cross_entropy(hidden, weight, labels)
    _, in_bf16 = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert under_autocast.item() == in_bf16.item()


def test_the_upstream_gradient_is_applied():
    (hidden, weight, _), labels = inputs()
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels)[0], hidden)[0]
    thrice = torch.autograd.grad(3 * linear_cross_entropy(hidden, weight, labels)[0], hidden)[0]
    torch.testing.assert_close(thrice, 3 * once)
