"""Configs become networks, and the head's input is found in every family."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from lightning_modules.architectures import HeadInput, build, find_head_loss, flops_per_token
from lightning_modules.losses import HeadLoss

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DENSE = SMALL | {"intermediate_size": 32}
GROUPED = DENSE | {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "GPT2": (AutoModelForCausalLM, {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "Llama": (AutoModelForCausalLM, DENSE),
    "Qwen3": (AutoModelForCausalLM, GROUPED),
    "NanoChat": (AutoModelForCausalLM, DENSE),
    "Gemma2": (AutoModelForCausalLM, GROUPED | {"final_logit_softcapping": 2.0}),
    "Granite": (AutoModelForCausalLM, DENSE | {"logits_scaling": 4.0}),
    "Cohere": (AutoModelForCausalLM, DENSE | {"logit_scale": 0.25}),
    "GPTNeoX": (AutoModelForCausalLM, DENSE),
    "Bert": (AutoModelForMaskedLM, DENSE),
    "Roberta": (AutoModelForMaskedLM, DENSE),
    "ModernBert": (AutoModelForMaskedLM, DENSE | {"pad_token_id": 0}),
    "T5": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 50, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8},
    ),
    "Bart": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
        | {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    ),
}


def network(family):
    auto_class, fields = FAMILIES[family]
    return build(getattr(transformers, f"{family}Config")(**fields), auto_class, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tapped_hidden_states_and_the_rule_give_the_models_own_logits(family):
    model = network(family).eval()
    tap = HeadInput(model)
    rule = find_head_loss(model, tap)
    assert rule is not None, "the fused path covers this family"
    ids = torch.randint(0, 50, (3, 9))
    extra = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(ids, **extra).logits
        with tap.tapped():
            tapped = model(ids, **extra).logits
        scores = model.get_output_embeddings()(tap.hidden) * rule.logit_scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    torch.testing.assert_close(scores, logits, rtol=1e-4, atol=1e-5)
    assert tapped.shape[1] == 1, "the head computes one position while it is tapped"


def test_an_unusual_head_falls_back_to_the_plain_path():
    model = network("Llama")
    head = model.lm_head
    model.lm_head = torch.nn.Sequential(head, torch.nn.ReLU())
    assert find_head_loss(model, HeadInput(model)) is None
    model = network("Llama")
    model.config.logits_scaling = 3.0  # a field that says so, and a model that does not do it
    assert find_head_loss(model, HeadInput(model)) == HeadLoss()


def test_the_tap_leaves_generation_alone():
    model = network("Llama").eval()
    ids = torch.arange(5)[None]
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    tap = HeadInput(model)
    with tap.tapped():
        model(ids)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    one = network("Llama").state_dict()
    torch.manual_seed(2)
    two = network("Llama").state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_flops_are_six_a_weight_and_attention_on_top():
    model = network("Llama")
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    assert flops_per_token(model, seq_len=10) == 6 * weights + 12 * 2 * 16 * 10
    tied = network("T5")  # three embedding modules share one matrix, which is the head's too
    assert flops_per_token(tied, 10) > 6 * tied.lm_head.weight.numel()


def test_an_architecture_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match="T5Config has no AutoModelForCausalLM.*SpanDenoising"):
        build(transformers.T5Config(), AutoModelForCausalLM, seed=0)


def test_fields_that_do_not_fit_together_are_refused():
    config = transformers.Qwen3Config(**SMALL, intermediate_size=32, num_key_value_heads=32)
    model = build(config, AutoModelForCausalLM, seed=0)
    with pytest.raises(ValueError, match="Qwen3Config with these fields does not run"):
        find_head_loss(model, HeadInput(model))
