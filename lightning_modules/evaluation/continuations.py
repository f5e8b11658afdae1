"""How probable a model finds a text that goes on from another: what choices, blanks and pairs are judged by.

Of causal models the probability of the continuation's tokens, one after the other; of masked ones each token masked
once, the context in sight (https://arxiv.org/abs/1910.14659). Texts become tokens as lm-eval makes them: blanks at the
end of a context belong to what follows, and what follows is what the tokens of both have more than those of the
context.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.likelihood import (
    BATCH_TOKENS,
    LONGEST_WINDOW,
    Row,
    batches_by_length,
    masked_places,
    require_known,
    special_ids,
    token_scores,
)


class Pair(NamedTuple):
    context: str
    continuation: str


class Found(NamedTuple):
    """Of one continuation."""

    nats: float
    tokens: int
    is_greedy: bool
    """Whether each of its tokens is the most probable one."""


@dataclass
class _Sum:
    nats: float = 0.0
    tokens: int = 0
    is_greedy: bool = True


@dataclass
class _Owned:
    """Rows of the same input are read once: choices of one token differ in the target alone."""

    row: Row
    owners: list[int] = field(default_factory=list)


class Continuations:
    """Scores continuations with one model.

    Args:
        model: A causal or a masked language model.
        tokenizer: Its tokenizer.
        masked: Which of the two it is.
        max_positions: Tokens that the model can read at once; None: any number, and 4096 are read. Of longer texts the
            end is read, and `cut` counts them.
        document_start: Whether a text begins with the token that opens a document (bos, else eos). Left out: as the
            tokenizer does it; where the context is empty, always.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        masked: bool,
        max_positions: int | None,
        document_start: bool | None = None,
    ):
        self.model, self.tokenizer, self.masked, self.document_start = model, tokenizer, masked, document_start
        self.longest = max_positions or LONGEST_WINDOW
        self.cut = 0
        """Texts of which the end alone was read."""
        self.start_id, *self.around = special_ids(tokenizer, masked, "a")
        if not masked and self.start_id is None:
            raise ValueError("the tokenizer has neither bos nor eos, which a text begins with; pass its own")

    def __call__(self, pairs: Sequence[Pair], batch_size: int | None = None) -> list[Found]:
        """In the order of the pairs. The batch size changes nothing but speed."""
        return self.of_rows([self.rows(pair) for pair in pairs], batch_size)

    def of_rows(self, parts: Sequence[Iterable[Row]], batch_size: int | None = None) -> list[Found]:
        """Of each part the sum over its rows."""
        sums = [_Sum() for _ in parts]
        max_tokens = BATCH_TOKENS[self.model.device.type]
        vocab_size, once = self.model.get_input_embeddings().num_embeddings, dict[tuple[int, ...], _Owned]()
        for number, rows in enumerate(parts):
            for row in rows:
                require_known((*row.input_ids, *row.targets), vocab_size)
                only = row.columns[0] if len(row.columns) == 1 else -1 - number
                owned = once.setdefault((*row.input_ids, only), _Owned(Row(row.input_ids, [], [])))
                owned.row.columns.extend(row.columns)
                owned.row.targets.extend(row.targets)
                owned.owners.extend([number] * len(row.columns))
        owners = {id(owned.row): owned.owners for owned in once.values()}
        for batch in batches_by_length((owned.row for owned in once.values()), batch_size, max_tokens):
            nats_N, is_best_N = token_scores(self.model, batch, mask_padding=self.masked)
            owners_N = [number for row in batch for number in owners[id(row)]]
            for number, nats, is_best in zip(owners_N, nats_N.tolist(), is_best_N.tolist(), strict=True):
                found = sums[number]
                found.nats += nats
                found.tokens += 1
                found.is_greedy &= is_best
        return [Found(found.nats, found.tokens, found.is_greedy and found.tokens > 0) for found in sums]

    def rows(self, pair: Pair) -> Iterator[Row]:
        context, continuation = self.ids_of(pair)
        if not self.masked:
            self.cut += len(context) + len(continuation) > self.longest + 1
            ids = [*context, *continuation][-(self.longest + 1) :]
            inputs, count = ids[:-1], min(len(continuation), len(ids) - 1)
            if count:
                yield Row(inputs, list(range(len(inputs) - count, len(inputs))), ids[-count:])
            return
        before, after = self.around
        width = self.room()
        self.cut += len(context) + len(continuation) > width
        ids = [*context, *continuation][-width:]
        places = range(max(0, len(ids) - len(continuation)), len(ids))
        yield from masked_places(ids, places, self.tokenizer.mask_token_id, before, after)

    def room(self) -> int:
        """Tokens of a text that fit into the model."""
        return self.longest - sum(map(len, self.around)) if self.masked else self.longest

    def fits(self, *texts: str) -> bool:
        return all(len(self.plain(text)) <= self.room() for text in texts)

    def ids_of(self, pair: Pair) -> tuple[list[int], list[int]]:
        context, continuation = pair
        if not context.strip():
            context, continuation = "", context + continuation
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if self.masked:
            before = self.plain(context) if context else []
            return self.parted(self.plain(context + continuation), before, continuation)
        if not context:
            ids = self.plain(continuation)
            return ([self.start_id], ids) if ids[:1] != [self.start_id] else (ids[:1], ids[1:])
        return self.parted(self.with_start(context + continuation), self.with_start(context), continuation)

    def parted(self, whole: list[int], before: list[int], continuation: str) -> tuple[list[int], list[int]]:
        """Where both together are no more tokens than the context, what follows is made tokens by itself: nothing would
        be the most probable answer."""
        rest = whole[len(before) :]
        return (before, rest) if rest else (before, self.plain(continuation))

    def plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def with_start(self, text: str) -> list[int]:
        if self.document_start is None:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
            ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
            # An end that the tokenizer puts there would stand between a context and what goes on from it.
            return ids[:-1] if len(ids) > 1 and ids[-1] in ends and self.plain(text)[-1:] != ids[-1:] else ids
        return [self.start_id, *self.plain(text)] if self.document_start else self.plain(text)
