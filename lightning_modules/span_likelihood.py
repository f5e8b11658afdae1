"""How probable an encoder-decoder finds a text that it was trained to fill spans of: the pseudo-likelihood of spans.

A text is cut into spans of three tokens, as many as denoising has on average. One span in seven is left out at a time,
and the decoder writes them all; over seven readings each token is written exactly once, from all that is not left out
and from what the decoder has written before it. How long a span is, is given away. It is what masked models'
pseudo-likelihood is (https://arxiv.org/abs/1910.14659), with the noise that such models know, and compares with their
kind only.

Shape suffixes: B rows, T tokens of the encoder, L of the decoder, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.likelihood import BATCH_TOKENS, DOCUMENTS_AT_ONCE, Likelihood

SPAN, READINGS = 3, 7
SEQ_LEN = 512
IGNORED = -100


@dataclass(frozen=True)
class Filled:
    """What the encoder reads, and what the decoder writes; sentinels among it are not counted."""

    inputs: list[int]
    labels: list[int]
    counted: list[bool]


class SpanScorer:
    """Cuts documents into windows, scores them and adds up: `total`, `documents`, `not_counted`.

    Args:
        model: An encoder-decoder that was trained by span denoising.
        tokenizer: Its tokenizer, with <extra_id_0> and those behind it.
        seq_len: Tokens read at once; None: 512.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seq_len: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.total, self.documents, self.not_counted, self.unknown = Likelihood(), 0, 0, 0
        vocab = tokenizer.get_vocab()
        self.sentinels: list[int] = []
        while f"<extra_id_{len(self.sentinels)}>" in vocab:
            self.sentinels.append(vocab[f"<extra_id_{len(self.sentinels)}>"])
        if not self.sentinels or tokenizer.eos_token_id is None:
            raise ValueError(
                "this encoder-decoder knows no spans to fill (<extra_id_0>, …), and so gives no probability to a text "
                "without a source"
            )
        self.seq_len = self.stride = min(seq_len or SEQ_LEN, SPAN * READINGS * len(self.sentinels))

    def rows(self, documents: Iterable[str]) -> Iterator[Filled]:
        documents = iter(documents)
        while block := list(islice(documents, DOCUMENTS_AT_ONCE)):
            encoded = self.tokenizer(block, add_special_tokens=False, split_special_tokens=True, verbose=False)
            for text, ids in zip(block, encoded["input_ids"], strict=True):
                self.documents += 1
                self.unknown += ids.count(self.tokenizer.unk_token_id)
                self.total.bytes += len(text.encode())
                for begin in range(0, len(ids), self.seq_len):
                    window = ids[begin : begin + self.seq_len]
                    yield from filled_rows(window, self.sentinels, self.tokenizer.eos_token_id)

    def score(self, documents: Iterable[str], batch_size: int | None = None) -> Likelihood:
        """Adds the documents to `total`. The batch size changes nothing but speed."""
        size = batch_size or max(1, BATCH_TOKENS[self.model.device.type] // self.seq_len)
        rows = self.rows(documents)
        while batch := list(islice(rows, size)):
            nats, tokens = self.batch_nats(batch)
            self.total.nats += nats
            self.total.tokens += tokens
        return self.total

    @torch.inference_mode()
    def batch_nats(self, batch: Sequence[Filled]) -> tuple[float, int]:
        device = self.model.device
        T, L = max(len(row.inputs) for row in batch), max(len(row.labels) for row in batch)
        ids_BT = torch.tensor([row.inputs + [0] * (T - len(row.inputs)) for row in batch], device=device)
        lengths_B = torch.tensor([len(row.inputs) for row in batch], device=device)
        mask_BT = (torch.arange(T, device=device) < lengths_B[:, None]).long()
        # The decoder may not see that far ahead, so that what pads it is nothing to it.
        labels_BL = torch.tensor([row.labels + [0] * (L - len(row.labels)) for row in batch], device=device)
        counted_BL = torch.tensor([row.counted + [False] * (L - len(row.counted)) for row in batch], device=device)
        start_B1 = torch.full_like(labels_BL[:, :1], self.model.config.decoder_start_token_id)
        decoded_BL = torch.cat([start_B1, labels_BL[:, :-1]], dim=1)
        logits_BLV = self.model(input_ids=ids_BT, attention_mask=mask_BT, decoder_input_ids=decoded_BL).logits
        nats = F.cross_entropy(logits_BLV[counted_BL].float(), labels_BL[counted_BL], reduction="none")
        return float(nats.double().sum()), len(nats)


def filled_rows(ids: Sequence[int], sentinels: Sequence[int], end_id: int) -> Iterator[Filled]:
    """A row for each reading in which anything is left out."""
    for reading in range(READINGS):
        inputs, labels, counted, spans = [], [], [], 0
        for number, begin in enumerate(range(0, len(ids), SPAN)):
            part = list(ids[begin : begin + SPAN])
            if number % READINGS != reading:
                inputs += part
                continue
            inputs.append(sentinels[spans])
            labels += [sentinels[spans], *part]
            counted += [False, *[True] * len(part)]
            spans += 1
        if spans:
            yield Filled([*inputs, end_id], labels, counted)
