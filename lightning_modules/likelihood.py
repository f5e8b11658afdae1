"""How probable a model finds a text: in nats, token by token, for causal and for masked language models.

A text is a list of token ids. It is cut into `Row`s that fit the model, so that every token is scored in exactly
one row; rows are batched by length, and the logits exist only where a token is scored.

Shape suffixes: B rows, T tokens in a row, N scored tokens of a batch, D width, V vocabulary.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW = 4096
"""Tokens read at once unless something else is asked for, by models that can read more."""
BATCH_TOKENS = {"cpu": 2**11, "mps": 2**13, "cuda": 2**14}
DOCUMENTS_AT_ONCE = 256
SORTED_ROWS = 4096
"""Rows that are sorted by length together: batches without much padding, in little memory."""
SOFTMAX_LOGITS = 2**23
"""Logits that are turned to float32 at once (32 MiB)."""


@dataclass(frozen=True)
class Row:
    """One input of the model; `targets[i]` is scored with the logits at `columns[i]`."""

    input_ids: Sequence[int]
    columns: Sequence[int]
    targets: Sequence[int]


@dataclass
class Likelihood:
    """A sum over a text. Its ratios are its own: nats per token depend on the tokenizer; bits per byte do not,
    but for bytes that it makes unknown tokens of."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def causal_rows(ids: Sequence[int], start_id: int | None, seq_len: int, stride: int) -> Iterator[Row]:
    """Windows of at most `seq_len` tokens, one every `stride` tokens, each scoring what the one before did not reach.

    The first token is predicted from `start_id`; without one it is not scored. From the second window on, a token
    has at least `seq_len - stride` tokens before it in its window.
    """
    inputs = list(ids[:-1]) if start_id is None else [start_id, *ids[:-1]]
    targets = ids[1:] if start_id is None else ids
    scored = 0
    for begin in range(0, len(targets), stride):
        end = min(begin + seq_len, len(targets))
        yield Row(inputs[begin:end], range(scored - begin, end - begin), targets[scored:end])
        scored = end
        if end == len(targets):
            return


def masked_places(
    ids: Sequence[int], places: Iterable[int], mask_id: int, before: Sequence[int], after: Sequence[int]
) -> Iterator[Row]:
    """A row for each of some places of a text, with this token masked; special tokens stand around it."""
    for place in places:
        masked = [*before, *ids, *after]
        masked[len(before) + place] = mask_id
        yield Row(masked, [len(before) + place], [ids[place]])


def masked_rows(
    ids: Sequence[int], mask_id: int, before: Sequence[int], after: Sequence[int], seq_len: int, stride: int
) -> Iterator[Row]:
    """One row a token, with this token masked: the pseudo-likelihood of Salazar et al., https://arxiv.org/abs/1910.14659.

    `before` and `after` are the special tokens around each row and count towards its `seq_len`. Of a text that does
    not fit, each token is scored in the window in whose middle it lies.
    """
    width = seq_len - len(before) - len(after)
    margin = max(0, width - stride) // 2
    scored = 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + width]
        last = begin + width >= len(ids)
        end = len(ids) if last else begin + margin + stride
        yield from masked_places(window, range(scored - begin, end - begin), mask_id, before, after)
        scored = end
        if last:
            return


@contextmanager
def head_only_at(model: PreTrainedModel, rows_N: Tensor, columns_N: Tensor) -> Iterator[None]:
    """Inside, `model(...)` gives logits (1, N, V): those of the named positions of the batch, in this order.

    The head works position by position, so it is spared all the others, whatever it consists of. A model without
    an inner base model is left as it is, and gives logits (B, T, V).
    """

    def keep_positions(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state[rows_N, columns_N][None]
        return output

    if model.base_model is model:
        yield
        return
    handle = model.base_model.register_forward_hook(keep_positions)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def target_logits(model: PreTrainedModel, rows: Sequence[Row], *, mask_padding: bool) -> tuple[Tensor, Tensor]:
    """The logits that every target of the rows is scored by, row after row, (N, V), and the targets, (N,).

    Rows are padded on the right. A causal model cannot see that far and needs no `mask_padding`, which would cost it
    the fast attention kernels; a bidirectional one needs it.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids_BT = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in rows])
    rows_N = torch.tensor([i for i, row in enumerate(rows) for _ in row.columns], device=model.device)
    columns_N = torch.tensor([column for row in rows for column in row.columns], device=model.device)
    targets_N = torch.tensor([target for row in rows for target in row.targets], device=model.device)
    padding = {}
    if mask_padding:
        lengths_B = torch.tensor([len(row.input_ids) for row in rows])
        padding["attention_mask"] = (torch.arange(longest) < lengths_B[:, None]).long().to(model.device)
    with head_only_at(model, rows_N, columns_N):
        logits = model(input_ids=ids_BT.to(model.device), **padding).logits
    return (logits[rows_N, columns_N] if logits.shape[:2] == ids_BT.shape else logits[0]), targets_N


@torch.inference_mode()
def token_scores(model: PreTrainedModel, rows: Sequence[Row], *, mask_padding: bool) -> tuple[Tensor, Tensor]:
    """-log p of every target, row after row, (N,) float64; and whether it is the most probable, (N,) bool."""
    logits_NV, targets_N = target_logits(model, rows, mask_padding=mask_padding)
    chunk = max(1, SOFTMAX_LOGITS // logits_NV.shape[-1])
    nats, is_best = [], []
    for logits_nV, targets_n in zip(logits_NV.split(chunk), targets_N.split(chunk), strict=True):
        nats.append(F.cross_entropy(logits_nV.float(), targets_n, reduction="none"))
        is_best.append(logits_nV.argmax(-1) == targets_n)
    return torch.cat(nats).double().cpu(), torch.cat(is_best).cpu()


def token_nats(model: PreTrainedModel, rows: Sequence[Row], *, mask_padding: bool) -> Tensor:
    """The first of `token_scores`."""
    return token_scores(model, rows, mask_padding=mask_padding)[0]


def batches_by_length(rows: Iterable[Row], batch_size: int | None, max_tokens: int) -> Iterator[list[Row]]:
    """Batches of `batch_size` rows of similar length, longest first; None: as many rows as hold `max_tokens` tokens."""
    rows = iter(rows)
    while block := list(islice(rows, SORTED_ROWS)):
        block.sort(key=lambda row: len(row.input_ids), reverse=True)
        begin = 0
        while begin < len(block):
            size = batch_size or max(1, max_tokens // len(block[begin].input_ids))
            yield block[begin : begin + size]
            begin += size


def special_tokens_around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, such as [CLS] and [SEP]; "a" stands for one without tokens."""
    plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not plain and text != "a":
        return special_tokens_around(tokenizer, "a")
    full = tokenizer(text, verbose=False)["input_ids"]
    begin = next(i for i in range(len(full) + 1) if full[i : i + len(plain)] == plain)
    return full[:begin], full[begin + len(plain) :]


def special_ids(
    tokenizer: PreTrainedTokenizerBase, masked: bool, sample: str
) -> tuple[int | None, list[int], list[int]]:
    """The token that opens a document, None where there is none; what stands before and after a masked model's text."""
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id)
    start_id = next((token for token in starts if token is not None), None)
    if not masked:
        return start_id, [], []
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer of this masked model has no mask token; pass its own by --tokenizer")
    before, after = special_tokens_around(tokenizer, sample)
    return start_id, before or ([] if start_id is None else [start_id]), after


def require_known(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for a tokenizer of another model."""
    if max(ids, default=0) >= vocab_size:
        raise ValueError(f"the tokenizer gives id {max(ids)}, the model knows {vocab_size} ids; pass its own")


class Scorer:
    """Cuts documents into rows for one model, scores them and adds up: `total`, `documents`, `not_counted`, `unknown`:
    tokens that stand for what the tokenizer has no words for, cheap at any number of bytes.

    Args:
        model: A causal or a masked language model.
        tokenizer: Its tokenizer.
        masked: Which of the two it is.
        max_positions: Tokens that the model can read at once; None: any number.
        seq_len: Tokens to read at once; None: `max_positions`, and at most 4096.
        stride: Tokens from one window of a long document to the next; None: half a window.
        sample: A text, that shows the special tokens around every text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        masked: bool,
        max_positions: int | None,
        seq_len: int | None,
        stride: int | None,
        sample: str,
    ):
        self.model, self.tokenizer, self.masked = model, tokenizer, masked
        self.total, self.documents, self.not_counted, self.unknown = Likelihood(), 0, 0, 0
        self.start_id, self.before, self.after = special_ids(tokenizer, masked, sample)
        if seq_len and max_positions and seq_len > max_positions:
            raise ValueError(f"--seq_len {seq_len}: the model has {max_positions} positions; pass at most so many")
        self.seq_len = seq_len or min(max_positions or LONGEST_WINDOW, LONGEST_WINDOW)
        width = self.seq_len - len(self.before) - len(self.after)
        if width < 1:
            raise ValueError(f"--seq_len {seq_len} leaves no room beside the special tokens; pass a larger one")
        self.stride = stride or max(1, width // 2)
        if self.stride > width:
            raise ValueError(f"--stride {stride} would pass over tokens; pass at most {width}, or a larger --seq_len")

    def rows(self, documents: Iterable[str]) -> Iterator[Row]:
        vocab_size = self.model.get_input_embeddings().num_embeddings
        documents = iter(documents)
        while block := list(islice(documents, DOCUMENTS_AT_ONCE)):
            # What looks like a special token in a text is text.
            encoded = self.tokenizer(block, add_special_tokens=False, split_special_tokens=True, verbose=False)
            for text, ids in zip(block, encoded["input_ids"], strict=True):
                require_known(ids, vocab_size)
                self.documents += 1
                self.unknown += ids.count(self.tokenizer.unk_token_id)
                self.total.bytes += len(text.encode())
                yield from self.rows_of_document(text, ids)

    def rows_of_document(self, text: str, ids: Sequence[int]) -> Iterator[Row]:
        if self.masked:
            return masked_rows(ids, self.tokenizer.mask_token_id, self.before, self.after, self.seq_len, self.stride)
        if self.start_id is None and ids:
            self.not_counted += 1
            first = self.tokenizer.decode(ids[:1])
            # Part of a character decodes to another one: its bytes are left to the token that completes it.
            self.total.bytes -= len(first.encode()) if text.startswith(first) else 0
        return causal_rows(ids, self.start_id, self.seq_len, self.stride)

    def score(self, documents: Iterable[str], batch_size: int | None = None) -> Likelihood:
        """Adds the documents to `total`. The batch size changes nothing but speed."""
        max_tokens = BATCH_TOKENS[self.model.device.type]
        for batch in batches_by_length(self.rows(documents), batch_size, max_tokens):
            nats_N = token_nats(self.model, batch, mask_padding=self.masked)
            self.total.nats += nats_N.sum().item()
            self.total.tokens += len(nats_N)
            if sys.stderr.isatty():
                print(
                    f"\r{self.total.tokens:,} tokens, {self.total.nats_per_token:.4f} nats each ",
                    end="",
                    file=sys.stderr,
                )
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return self.total
