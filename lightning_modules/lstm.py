"""A language model over torch.nn.LSTM, the one architecture here that transformers lacks.

Importing this file registers the three classes with AutoConfig, AutoModel and AutoModelForCausalLM. A saved folder
carries a copy of this file, so that `from_pretrained(folder, trust_remote_code=True)` works where this project is not
installed; for that reason nothing else of the project is imported here.

Shape suffixes: B rows, T tokens in a row, D width, L layers, H cells in a layer.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple


@strict
class LSTMConfig(PreTrainedConfig):
    """An LSTM language model: embedding, LSTM layers, and a head that shares the embedding's weights.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Cells in each LSTM layer.
        num_hidden_layers: LSTM layers, one on top of the other.
        embedding_size: Width of the embedding; None: as wide as `hidden_size`. With a tied head of another width, a
            linear map leads from the last layer to it.
        embedding_dropout: Dropout after the embedding, in training only, as all dropout.
        hidden_dropout: Dropout between two LSTM layers.
        output_dropout: Dropout after the last layer.
        initializer_range: Standard deviation of embedding and head at the start. Wide, as small inputs leave the gates
            of an LSTM half open: 0.02 learned far slower (150 steps on Shakespeare, nats a character: 2.6 against 1.9).
        tie_word_embeddings: The head is the embedding (https://arxiv.org/abs/1608.05859).
        use_cache: Return the recurrent state, from which generation goes on.
    """

    model_type = "lstm_lm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50257
    hidden_size: int = 512
    num_hidden_layers: int = 2
    embedding_size: int | None = None
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    output_dropout: float | int = 0.0
    initializer_range: float = 0.2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**kwargs)


@dataclass
class LSTMState:
    """What the layers remember after the tokens read so far; stands where other models have a KV cache."""

    hidden_LBH: Tensor
    cell_LBH: Tensor
    tokens: int

    is_compileable = False
    is_croppable = False

    def get_seq_length(self) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.hidden_LBH = self.hidden_LBH.index_select(1, beam_idx)
        self.cell_LBH = self.cell_LBH.index_select(1, beam_idx)


def document_starts(
    position_ids_BT: Tensor | None, attention_mask_BS: Tensor | None, tokens: int, past: int
) -> Tensor | None:
    """(B, T) bool: the tokens that begin a document, or None where no document begins after the first token.

    Padding begins nothing: on the left it is forgotten when the first real token begins, on the right nothing
    reads its state. `attention_mask_BS` covers the `past` tokens already read and the `tokens` new ones.
    """
    if attention_mask_BS is None:
        return None if position_ids_BT is None else position_ids_BT == 0
    if attention_mask_BS.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask has {attention_mask_BS.shape[1]} columns; the {past} tokens already read and the "
            f"{tokens} new ones need {past + tokens}"
        )
    real_BT = attention_mask_BS[:, past:].bool()
    if position_ids_BT is not None:
        return (position_ids_BT == 0) & real_BT
    return (attention_mask_BS.cumsum(1)[:, past:] == 1) & real_BT


def run_lstm(lstm: nn.LSTM, inputs_BTD: Tensor, state: LSTMState, starts_BT: Tensor | None) -> tuple[Tensor, LSTMState]:
    """The LSTM over whole rows, with the state of a row set to zero where a document begins in it.

    The rows are cut at the columns where any of them begins a document, and the pieces run one after the other: each
    is one call of the fast dense kernel without padding, where a PackedSequence of the documents takes the slow path
    (measured on a CPU, forward and backward of 8 rows x 256 tokens with 8 documents: 0.21 s against 3.1 s).
    """
    tokens = inputs_BTD.shape[1]
    edges = [0, tokens]
    if starts_BT is not None:
        edges = [0, *(starts_BT[:, 1:].any(dim=0).nonzero().flatten() + 1).tolist(), tokens]
    hidden_LBH, cell_LBH, pieces = state.hidden_LBH, state.cell_LBH, []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        if starts_BT is not None:
            starts_1B1 = starts_BT[:, begin][None, :, None]
            hidden_LBH = hidden_LBH.masked_fill(starts_1B1, 0)
            cell_LBH = cell_LBH.masked_fill(starts_1B1, 0)
        piece_BTH, (hidden_LBH, cell_LBH) = lstm(inputs_BTD[:, begin:end], (hidden_LBH, cell_LBH))
        pieces.append(piece_BTH)
    outputs_BTH = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return outputs_BTH, LSTMState(hidden_LBH, cell_LBH, state.tokens + tokens)


class LSTMPreTrainedModel(PreTrainedModel):
    config: LSTMConfig
    base_model_prefix = "model"
    _no_split_modules = ["LSTM"]
    # Assisted decoding would have to take tokens back, and a recurrent state cannot.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Orthogonal recurrence, Glorot inputs, forget gates open (bias 1, https://proceedings.mlr.press/v37/jozefowicz15)."""
        if not isinstance(module, nn.LSTM):
            return super()._init_weights(module)
        for name, parameter in module.named_parameters():
            if name.startswith("weight_hh"):
                init.orthogonal_(parameter)
            elif name.startswith("weight_ih"):
                init.xavier_uniform_(parameter)
            else:
                bias_4H = torch.zeros_like(parameter)
                if name.startswith("bias_ih"):
                    # The gates lie in the order input, forget, cell, output.
                    bias_4H[module.hidden_size : 2 * module.hidden_size] = 1
                init.copy_(parameter, bias_4H)


class LSTMModel(LSTMPreTrainedModel):
    """The LSTM without its head: token ids to hidden states."""

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.lstm = nn.LSTM(
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.hidden_dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.output_dropout = nn.Dropout(config.output_dropout)
        needs_projection = config.tie_word_embeddings and config.embedding_size != config.hidden_size
        self.project = (
            nn.Linear(config.hidden_size, config.embedding_size, bias=False) if needs_projection else nn.Identity()
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LSTMState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, T, D) of `input_ids` (B, T), and the state after them.

        Where `position_ids` (B, T) is 0 a new document begins and the state is forgotten. `attention_mask` marks
        padding with 0, on either side; it covers the past as well where `past_key_values` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, one of them")
        embeds_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens, _ = embeds_BTD.shape
        state = past_key_values
        if state is None:
            zeros_LBH = embeds_BTD.new_zeros(self.config.num_hidden_layers, rows, self.config.hidden_size)
            state = LSTMState(zeros_LBH, zeros_LBH, tokens=0)
        if position_ids is not None:
            position_ids = position_ids.expand(rows, tokens)
        starts_BT = document_starts(position_ids, attention_mask, tokens, state.tokens)
        outputs_BTH, state = run_lstm(self.lstm, self.embedding_dropout(embeds_BTD), state, starts_BT)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(
            last_hidden_state=self.project(self.output_dropout(outputs_BTH)),
            past_key_values=state if use_cache else None,
        )


class LSTMForCausalLM(LSTMPreTrainedModel, GenerationMixin):
    """The LSTM with a language-model head, for training and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        self.model = LSTMModel(config)
        width = config.embedding_size if config.tie_word_embeddings else config.hidden_size
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` starts without a cache and goes on with the LSTMState that the first call returns.
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LSTMState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V). `labels` (B, T) are the `input_ids` themselves, as everywhere in transformers.

        `logits_to_keep` asks for the logits of the last so many tokens only (0: all), or of those columns.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, columns])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=outputs.past_key_values)


AutoConfig.register(LSTMConfig.model_type, LSTMConfig, exist_ok=True)
AutoModel.register(LSTMConfig, LSTMModel, exist_ok=True)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM, exist_ok=True)

LSTMConfig.register_for_auto_class()
LSTMModel.register_for_auto_class("AutoModel")
LSTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
