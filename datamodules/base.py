"""The contract between datamodules and lightning_modules: the batch, and what a datamodule tells of its text.

Shape suffixes: B rows in a batch, T tokens in a row, U tokens in a target row, V vocabulary.
"""

from typing import NotRequired, Protocol, TypedDict

from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""A label with this value carries no loss."""


class Batch(TypedDict):
    """A batch of rows.

    `labels[b, t]` is what position t of row b has to predict: the labels are already aligned with the
    positions (a causal row of T tokens has T labels, the last of which is the token after the row), so
    nobody shifts them again. IGNORED marks a position without loss.
    """

    input_ids: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, or (B, U) for an encoder-decoder, whose decoder reads the labels shifted right. Of whole texts:
    (B,) int64, (B, number of labels) float32 where several may hold, (B,) float32 of numbers."""
    rows: Tensor
    """(B,) int64: the absolute number of each row in the order of training, counted over all epochs; -1 is a
    row without a label that only evens out the ranks. In validation: the row's number in the held-out text."""
    position_ids: NotRequired[Tensor]
    """(B, T) int64, only where attention stops at document borders: positions that restart at each document."""
    attention_mask: NotRequired[Tensor]
    """(B, T) int64, only where rows are padded: 1 for tokens, 0 for padding."""
    prompt_lengths: NotRequired[Tensor]
    """(B,) int64, only of examples with an answer: the tokens of `input_ids` that stand before it."""
    label_bytes: NotRequired[Tensor]
    """(B,) int64, only of examples with an answer: UTF-8 bytes of the text that the labels stand for."""
    contexts: NotRequired[Tensor]
    """(B, 2) int64, only of questions to a text: where the text begins in `input_ids`, and where it has ended. Their
    labels are (B, 2) int64: the first and the last token of the answer, twice 0 where there is none."""
    teacher_ids: NotRequired[Tensor]
    """(B, T, K) int64, only where a teacher's cache is read: words of the distribution at each label, as `Sparse` of
    distillation_loss.py has them; with it teacher_shares (B, T, K), and teacher_tail or teacher_entropy (B, T),
    float32."""
    token_type_ids: NotRequired[Tensor]
    """(B, T) int64, only of encoders that tell the second text of a pair by it."""


class TextData(Protocol):
    """What a LanguageModule reads from its datamodule, from `setup` on."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    """Number of ids the model needs: the largest id + 1."""
    token_bytes: Tensor
    """(V,) float64: UTF-8 bytes of text that each id stands for; 0 for special tokens. Where a tokenizer is not
    exact in bytes (it lowercases, say): the mean over the held-out text."""
    seq_len: int
    batch_size: int
    objective: str
    rows_per_epoch: int
    consumed: int
    """Rows trained on so far, by all ranks together."""
    rows_per_micro_step: int
    """Rows that all ranks together take at a time."""
    tokens_per_row: float
    """On average, without padding."""
    skipped_rows: dict[str, int]
    """Rows left out, by file."""
    batch_row: int
    """Number, in the whole training, of the first row of the batch in hand: what a micro-batch's seed follows from."""
