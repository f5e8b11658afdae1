"""The CPU's own parts compute what transformers' parts compute."""

from copy import deepcopy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lightning_modules import cpu_kernels
from lightning_modules.cpu_kernels import install, rms_norm

FIELDS = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
FAMILIES = {
    "NanoChat": FIELDS | HEADS,
    "Llama": FIELDS | HEADS | {"num_key_value_heads": 2},
    "Qwen3": FIELDS | HEADS | {"num_key_value_heads": 2, "head_dim": 8},
    "GPT2": {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4},
}


def models(family):
    """The same weights in float64, in bf16, and in bf16 with our parts."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    plain, fast = (
        AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="sdpa").bfloat16().eval()
        for _ in range(2)
    )
    exact = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager").double().eval()
    for model in (fast, exact):
        model.load_state_dict(plain.state_dict())
    return exact, plain, fast, install(fast)


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids, **inputs).logits.double().flatten(0, 1), ids.flatten())
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed documents"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_our_parts_a_model_is_as_near_to_float64_as_without(family, packed):
    exact, plain, fast, replaced = models(family)
    assert "attention" in replaced
    ids = torch.randint(0, 50, (3, 24))
    starts = torch.tensor([[0, 1, 2, 3, 4] + list(range(12)) + list(range(7))] * 3)
    inputs = {"position_ids": starts} if packed else {}
    loss, gradient = loss_and_gradients(exact, ids, **inputs)
    for_plain, for_fast = (loss_and_gradients(m, ids, **inputs) for m in (plain, fast))
    assert for_fast[0] == pytest.approx(loss, abs=2e-2)
    error_plain, error_fast = ((g - gradient).norm() / gradient.norm() for _, g in (for_plain, for_fast))
    assert error_fast < 1.5 * error_plain + 1e-3, (error_fast, error_plain)


def test_our_attention_is_left_for_what_it_does_not_do():
    """Decoding with a cache goes to torch's attention, and gives the same tokens."""
    _, plain, fast, _ = models("Llama")
    ids = torch.arange(6)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(ids, **settings), fast.generate(ids, **settings))


def test_the_weights_and_their_names_stay(tmp_path):
    _, plain, fast, _ = models("Qwen3")
    assert fast.state_dict().keys() == plain.state_dict().keys()
    fast.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fast.parameters(), strict=True))


def test_rms_norm_has_the_gradient_of_its_formula():
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-2), (x,), atol=1e-4, rtol=1e-3)


def test_a_norm_that_computes_something_else_is_left_alone():
    config = transformers.GemmaConfig(**FIELDS, **HEADS, num_key_value_heads=2, head_dim=8)  # scales by 1 + weight
    model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if type(module).__name__ == "GemmaRMSNorm":
            torch.nn.init.constant_(module.weight, 0.5)
    assert not any("RMSNorm" in part for part in install(model))


def test_dropout_leaves_out_its_share_anew_each_time_and_the_same_for_a_seed():
    x = torch.ones(1001, 333, dtype=torch.bfloat16)
    torch.manual_seed(0)
    masks = [cpu_kernels.keep_mask(x, 0.1) for _ in range(2)]
    shares = [float((~mask).float().mean()) for mask in masks]
    both = float((~masks[0] & ~masks[1]).float().mean())
    assert shares == pytest.approx([0.1, 0.1], abs=2e-3) and both == pytest.approx(0.01, abs=1e-3)
    # Four of them are of one random number, and know nothing of each other.
    beside = float((~masks[0].flatten()[:-1] & ~masks[0].flatten()[1:]).float().mean())
    assert beside == pytest.approx(0.01, abs=1e-3)
    torch.manual_seed(0)
    assert torch.equal(cpu_kernels.keep_mask(x, 0.1), masks[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_has_the_gradient_of_its_formula_with_dropout_too(dropout, monkeypatch):
    torch.manual_seed(0)
    keep = torch.rand(3, 5, 5) >= dropout
    monkeypatch.setattr(cpu_kernels, "keep_mask", lambda like, share: keep)
    query, key, value = (torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(5, 5, dtype=torch.float64)

    def ours(query, key, value):
        return cpu_kernels._Attention.apply(query, key, value, bias, 0.5, dropout)

    probabilities = (query @ key.mT * 0.5 + bias).softmax(-1) * (keep / (1 - dropout) if dropout else 1)
    torch.testing.assert_close(ours(query, key, value), probabilities @ value)
    assert torch.autograd.gradcheck(ours, (query, key, value))


def test_an_encoder_in_training_drops_as_much_as_transformers_own_and_nothing_in_evaluation():
    torch.manual_seed(0)
    config = transformers.BertConfig(**FIELDS, **HEADS, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    plain = transformers.BertModel(config).bfloat16()
    fast = deepcopy(plain)
    assert "7 dropout" in " ".join(install(fast))
    ids, mask = torch.randint(0, 50, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    spreads = []
    for model in (plain, fast):
        model.train()
        found = torch.stack([model(**inputs).last_hidden_state.detach().float() for _ in range(200)])
        spreads.append((found.mean(0)[0], found.std(0)[0].mean()))
    (mean_plain, spread_plain), (mean_fast, spread_fast) = spreads
    assert float(spread_fast / spread_plain) == pytest.approx(1, abs=0.05)
    assert float((mean_fast - mean_plain).abs().mean()) < 0.2 * float(spread_plain)
    outputs = [model.eval()(**inputs).last_hidden_state.float()[mask.bool()] for model in (plain, fast)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0.06)
