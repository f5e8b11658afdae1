"""With cross_document_attention false, a document in a packed row is as it would be alone."""

import pytest
import torch
import transformers

import lightning_modules.lstm
from lightning_modules.architectures import build
from lightning_modules.language_module import network_inputs
from lightning_modules.pretrain import CausalLM, MaskedLM

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DENSE = SMALL | {"intermediate_size": 32}
BERT = DENSE | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "GPT2": (CausalLM, transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
    "Llama": (CausalLM, transformers.LlamaConfig(**DENSE)),
    "NanoChat": (CausalLM, transformers.NanoChatConfig(**DENSE)),
    "LSTM": (CausalLM, lightning_modules.lstm.LSTMConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)),
    "Bert": (MaskedLM, transformers.BertConfig(**BERT)),
    "ModernBert": (MaskedLM, transformers.ModernBertConfig(**DENSE, pad_token_id=0, local_attention=4)),
}
DOCUMENTS = (5, 9, 2, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family):
    module, config = FAMILIES[family]
    model = build(config, module.auto_class, seed=0).eval()
    ids = torch.randint(2, 50, (1, sum(DOCUMENTS)))
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    with torch.no_grad():
        inputs = network_inputs({"input_ids": ids, "position_ids": positions}, module.objective, config)
        packed = model(**inputs, use_cache=False).logits[0]  # as in training: with a cache borders go unseen
        alone = torch.cat([model(document).logits[0] for document in ids.split(DOCUMENTS, dim=1)])
        across = model(ids).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (packed - across).abs().max() > 1e-4, "without positions documents do see each other"
