"""From a transformers config to a network that is ready to train, and what it costs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules import hardware
from lightning_modules.losses import HeadLoss


def fit_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seq_len: int) -> None:
    """Fills in what follows from the data, in place: vocabulary, special tokens, positions.

    A vocab_size that was set and is larger than the tokenizer's stays (padded rows); a smaller one is an error.
    """
    name = type(config).__name__
    default = type(config)()
    if config.vocab_size == default.vocab_size:
        config.vocab_size = vocab_size
    elif config.vocab_size < vocab_size:
        raise ValueError(
            f"the tokenizer needs {vocab_size} ids, but --model.architecture.vocab_size is {config.vocab_size}; "
            f"leave it out, or pass at least {vocab_size}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        if positions != default.max_position_embeddings:
            raise ValueError(
                f"rows of {seq_len} tokens do not fit {name}'s {positions} positions; "
                f"lower --data.seq_len or raise --model.architecture.max_position_embeddings"
            )
        config.max_position_embeddings = seq_len
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    begin = tokenizer.bos_token_id
    if not config.is_encoder_decoder and begin not in (None, tokenizer.eos_token_id) and _is_put_first(tokenizer):
        config.eos_token_id = [tokenizer.eos_token_id, begin]  # with which the next document begins
    # A row of the embedding at pad_token_id never learns (nn.Embedding's padding_idx): only for a real padding token.
    config.pad_token_id = tokenizer.pad_token_id
    for name in ("cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(tokenizer, name))
    if config.is_encoder_decoder:
        config.decoder_start_token_id = tokenizer.bos_token_id or tokenizer.pad_token_id or tokenizer.eos_token_id


def _is_put_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its begin of text before each text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def require_in(auto_class: type, config: PreTrainedConfig) -> None:
    """Raises ValueError where there is no network of `auto_class` (AutoModelForCausalLM …) with such a config."""
    if type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"--model.architecture {type(config).__name__} has no {auto_class.__name__}; take one that has, or "
            f"another --model: CausalLM for decoders, MaskedLM for encoders, SpanDenoising for encoder-decoders"
        )


def build(config: PreTrainedConfig, auto_class: type, seed: int) -> PreTrainedModel:
    """A freshly initialised network of `auto_class`, a pure function of config and seed."""
    require_in(auto_class, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Whatever dtype a config says that came from a folder: how weights are trained, a run says.
        return auto_class.from_config(config, dtype=torch.float32)


class HeadInput:
    """Taps the hidden states that enter the output head, while the head itself computes one position only.

    So the network runs as its authors wrote it, with all that comes before the head, and never makes the logits of a
    whole batch: `with tap: model(**batch)`, then `tap.hidden` is (B, T, C).
    """

    def __init__(self, model: PreTrainedModel):
        self.head = model.get_output_embeddings()
        self.hidden: Tensor | None = None
        self.open = False
        self.head.register_forward_pre_hook(self._hook)

    def _hook(self, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not self.open:
            return None
        self.hidden = args[0]
        # Of rows that do not lie side by side torch would make the product with a copy of the head for each.
        return (args[0][:, :1].contiguous(),)

    @contextmanager
    def tapped(self) -> Iterator["HeadInput"]:
        self.open = True
        try:
            yield self
        finally:
            self.open = False


def find_head_loss(model: PreTrainedModel, tap: HeadInput) -> HeadLoss | None:
    """How the logits follow from the head's input, found by trying it on a few tokens; None if no rule fits.

    Covers one matrix product with bias, times a scale (Cohere, Granite), with a soft-cap (Gemma 2, NanoChat).
    """
    config, head = model.config, model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.arange(6, device=head.weight.device)[None] % config.vocab_size
    extra = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, **extra).logits.float()
            with tap.tapped():
                model(input_ids=ids, **extra)
            scores = head(tap.hidden).float()
    except (RuntimeError, IndexError) as error:
        if hardware.is_planning():  # then it may be the shapes alone that do not run
            raise
        raise ValueError(
            f"--model.architecture {type(config).__name__} with these fields does not run: {error}; "
            f"see that widths divide by heads and num_attention_heads by num_key_value_heads"
        ) from error
    model.train(training)
    softcap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0, getattr(model, "logit_scale", None), 1 / (getattr(config, "logits_scaling", None) or 1)]
    tolerance = 1e-5 if head.weight.dtype == torch.float32 else 2e-2
    for scale in (s for s in scales if s is not None):
        guess = scores * scale
        guess = guess if softcap is None else softcap * torch.tanh(guess / softcap)
        if torch.allclose(guess, logits, rtol=tolerance, atol=tolerance):
            return HeadLoss(logit_scale=float(scale), softcap=softcap)
    return None


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""How configs call the number of experts of a layer."""


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def active_parameters(model: nn.Module) -> int:
    """Those that a token meets: of experts as many as it is sent to."""
    config = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    there = next((count for name in EXPERTS if (count := getattr(config, name, None))), None)
    share = chosen / there if chosen and there else 1.0
    return round(sum(p.numel() * (share if ".experts." in n else 1) for n, p in model.named_parameters()))


def flops_per_token(model: PreTrainedModel, seq_len: int) -> int:
    """Of forward and backward: 6 a weight that multiplies, and 12 · layers · width · seq_len for full attention.

    Appendix B of PaLM, https://arxiv.org/abs/2204.02311. Looking up an embedding multiplies nothing; a head does, also
    when it shares the embedding's matrix.
    """
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()  # None of a model that says labels
    weights = active_parameters(model) - sum(table.numel() for table in tables.values())
    weights += head.weight.numel() if head is not None and id(head.weight) in tables else 0
    config = model.config
    layers = getattr(config, "num_hidden_layers", 0)
    width = getattr(config, "hidden_size", 0) if hasattr(config, "num_attention_heads") else 0
    return 6 * weights + 12 * layers * width * seq_len


def bytes_of(count: float) -> str:
    """1,234,567 bytes as "1.2 MB"."""
    power = min(4, int(math.log10(max(count, 1)) // 3))
    return f"{count / 1000**power:.{1 if power else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
