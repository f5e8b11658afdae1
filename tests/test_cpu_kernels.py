"""The CPU's own parts compute what transformers' parts compute."""

from copy import deepcopy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

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
