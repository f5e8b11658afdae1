"""One LightningModule an objective of pretraining. What they share is in `language_module.py`."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from lightning_modules.language_module import LanguageModule
from lightning_modules.model_folder import max_positions
from lightning_modules.token_loss import shifted_right


class CausalLM(LanguageModule):
    """Predict the next token: decoders (GPT2, Llama, Qwen3, NanoChat …) and our LSTM."""

    objective = "causal"
    auto_class = AutoModelForCausalLM

    def sample(self, tokenizer, prompt: str, max_new_tokens: int, temperature: float) -> str:
        """The prompt and what the model writes after it."""
        ids, limit = _ids(tokenizer, prompt, self.device), max_positions(self.network)
        if limit is not None:
            ids = ids[:, : limit - 1]
            max_new_tokens = min(max_new_tokens, limit - ids.shape[1])
        out = self.network.generate(ids, **_sampling(tokenizer, max_new_tokens, temperature))
        return tokenizer.decode(out[0], skip_special_tokens=True)


class MaskedLM(LanguageModule):
    """Predict the masked tokens, https://arxiv.org/abs/1810.04805: encoders (BERT, ModernBERT …)."""

    objective = "masked"
    auto_class = AutoModelForMaskedLM
    keep_only_labels = True

    def sample(self, tokenizer, prompt: str, max_new_tokens: int, temperature: float) -> str:
        """The prompt with every sixth token hidden and filled in by the model, in ⟦brackets⟧."""
        ids = _ids(tokenizer, prompt, self.device)[:, : max_positions(self.network)]
        hidden = torch.arange(ids.shape[1], device=self.device) % 6 == 3
        masked = ids.masked_fill(hidden, tokenizer.mask_token_id)
        filled = torch.where(hidden, self.network(masked).logits.argmax(-1), ids)[0].tolist()
        words = [tokenizer.decode([i]) for i in filled]
        return "".join(f"⟦{w}⟧" if h else w for w, h in zip(words, hidden.tolist(), strict=True))


class SpanDenoising(LanguageModule):
    """Predict the spans that were cut out, https://arxiv.org/abs/1910.10683: encoder-decoders (T5, BART …)."""

    objective = "denoising"
    auto_class = AutoModelForSeq2SeqLM

    def decoder_inputs(self, batch: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        return {"decoder_input_ids": shifted_right(batch["labels"], config.decoder_start_token_id, config.eos_token_id)}

    def sample(self, tokenizer, prompt: str, max_new_tokens: int, temperature: float) -> str:
        """The prompt with its middle third cut out, and what the model puts there, in ⟦brackets⟧."""
        ids = _ids(tokenizer, prompt, self.device)[0].tolist()
        third = max(1, len(ids) // 3)
        sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        cut = torch.tensor([ids[:third] + [sentinel] + ids[2 * third :]], device=self.device)
        out = self.network.generate(cut, **_sampling(tokenizer, third + 4, temperature))
        filling = tokenizer.decode(out[0], skip_special_tokens=True)
        before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:third], ids[2 * third :]))
        return f"{before}⟦{filling}⟧{after}"


def _ids(tokenizer, prompt: str, device: torch.device) -> Tensor:
    """(1, T), after the token that begins a document, as in training."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return torch.tensor([begin + ids], device=device)


def _sampling(tokenizer, max_new_tokens: int, temperature: float) -> dict:
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return sampling | {"max_new_tokens": max_new_tokens, "pad_token_id": pad}
