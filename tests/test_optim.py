import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from lightning_modules import hardware, optim
from lightning_modules.optim import Float32Master, MuonAdamW, orthogonalize, parameter_groups

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.3),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-2),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
    "LAMB": lambda groups: pytest.importorskip("pytorch_optimizer").Lamb(groups, lr=1e-2),
    "MuonAdamW": lambda groups: MuonAdamW(groups, lr=0.02),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(toy, name, precision):
    from lightning_modules.precision import BF16Weights

    runs = {"max_steps": 40, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    if precision == "bf16-true":
        runs["plugins"] = [BF16Weights()]
    trainer, module, data = toy(optimizer=OPTIMIZERS[name], trainer=runs)
    trainer.fit(module, data)
    assert module.step_loss < 5.0, "log 257 is 5.55"
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.network.parameters()} == {dtype}
    assert {b.dtype for b in module.network.buffers()} == {torch.float32}, "rotary frequencies stay exact"


def test_weight_decay_touches_matrices_and_embeddings_only():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11))
    groups = {group["kind"]: group for group in parameter_groups(model)}
    assert all(p.ndim == 2 for kind in ("matrix", "embedding") for p in groups[kind]["params"])
    assert all(p.ndim == 1 for p in groups["vector"]["params"]) and groups["vector"]["weight_decay"] == 0.0
    # The head shares the embedding's matrix: it is in one group, once.
    assert sum(p is model.lm_head.weight for g in groups.values() for p in g["params"]) == 1
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200, 8, 8), (50, 16, 4), (50, 4, 16), (3, 64, 64)])
def test_orthogonalize_brings_all_singular_values_near_one(shape, dtype, monkeypatch):
    monkeypatch.setattr(hardware, "product_dtype", lambda device: dtype)
    torch.manual_seed(0)
    result = orthogonalize(torch.randn(shape))
    singular = torch.linalg.svdvals(result.float())
    assert result.dtype == dtype
    assert singular.max() < 1.3, "even where a matrix is nearly singular"
    assert singular.quantile(0.05) > 0.7


def test_orthogonalize_keeps_the_singular_vectors():
    torch.manual_seed(0)
    matrix = torch.randn(1, 12, 8)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalize(matrix).float(), U @ Vh, atol=0.2, rtol=0)


def test_muon_with_the_adamw_kinds_is_adamw():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    muon = MuonAdamW([{"params": [ours], "kind": "embedding"}], adamw_lr=0.1, weight_decay=0.1, eps=1e-8)
    adamw = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        ours.grad = theirs.grad = torch.randn(4, 3)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "able, precision", [("avx2", "32-true"), ("avx512_bf16", "bf16-true"), ("amx_bf16", "bf16-true")]
)
def test_precision_follows_what_the_cpu_says_it_can_do(able, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True})
    monkeypatch.setattr(hardware, "product_dtype", hardware.product_dtype.__wrapped__)
    assert hardware.best_precision("cpu") == precision


def test_an_interrupted_step_leaves_the_weights_in_place():
    weight = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    optimizer = Float32Master([{"params": [weight]}], lambda groups: torch.optim.SGD(groups, lr=0.5))

    def interrupt(*_):
        raise KeyboardInterrupt

    optimizer.optimizer.register_step_pre_hook(interrupt)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert weight.shape == (4, 3) and (weight == 1).all()


def stepped(optimizer_class, steps=3, **settings):
    """Weights after some steps, and how many float32 gradients each call of the inner optimizer saw."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3).bfloat16()) for _ in range(4)]
    optimizer = Float32Master([{"params": weights}], lambda groups: optimizer_class(groups, **settings))
    seen = []
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(sum(m.grad is not None for m in optimizer.masters))
    )
    for _ in range(steps):
        for weight in weights[:3]:  # the last one has no gradient
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert all(tensor.grad is None for tensor in weights + optimizer.masters)
    return weights, seen


@pytest.mark.parametrize(
    "optimizer_class, settings",
    [(torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {"momentum": 0.9}), (MuonAdamW, {"weight_decay": 0.1})],
)
def test_float32_masters_step_in_parts_as_in_one(optimizer_class, settings, monkeypatch):
    whole, seen_whole = stepped(optimizer_class, lr=0.1, **settings)
    monkeypatch.setattr(optim, "PART", 20)
    parts, seen_parts = stepped(optimizer_class, lr=0.1, **settings)
    assert seen_whole == [3] * 3 and seen_parts == [2, 1] * 3
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_an_optimizer_that_may_look_at_all_gradients_gets_them_at_once(monkeypatch):
    class Joint(torch.optim.SGD):
        pass

    monkeypatch.setattr(optim, "PART", 1)
    assert stepped(Joint, lr=0.1)[1] == [3] * 3


def test_float32_masters_keep_updates_that_bf16_would_round_away():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Float32Master([{"params": [weight]}], lambda groups: torch.optim.SGD(groups, lr=1e-4))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(0.99, abs=0.005)  # bf16 alone: 1 - 1e-4 rounds to 1


def test_float32_masters_with_float32_weights_are_the_optimizer_itself():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    master = Float32Master([{"params": [ours]}], lambda groups: torch.optim.Adam(groups, lr=0.1))
    plain = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(4, 3)
        master.step()
        plain.step()
    assert torch.equal(ours, theirs)


def test_float32_masters_continue_exactly_from_their_state():
    def run(steps, state=None, weight=None):
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16) if weight is None else weight)
        optimizer = Float32Master([{"params": [weight]}], lambda groups: torch.optim.Adam(groups, lr=1e-3))
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            weight.grad = torch.full_like(weight, 1 + step)
            optimizer.step()
        return weight.detach().clone(), optimizer

    whole, _ = run(range(10))
    half, optimizer = run(range(5))
    continued, _ = run(range(5, 10), optimizer.state_dict(), half)
    assert torch.equal(continued, whole)
