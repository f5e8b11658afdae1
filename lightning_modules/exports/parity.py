"""Whether an export answers as its source does, and how long both take.

Shape suffixes: B rows, T tokens, V vocabulary, labels or positions, N all places that are compared.
"""

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lightning_modules.exports.answering import Answering, Batch, InTransformers, writes
from lightning_modules.lstm import LSTMForCausalLM
from lightning_modules.model_folder import Head, LoadedModel

PROMPTS = (
    "Once upon a time there was a small house at the end of the road.",
    "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n",
    "The film was long, and its end was",
    "import os",
)
QUESTION = "What does it say?"
"""Asked of each prompt where a model finds answers in a text."""
TEXTS = (*PROMPTS, "naïve  café\t№ 1234567, 日本語 😀\n\n  it's ")
"""Cut into tokens by both tokenizers."""
NEW_TOKENS = 16
TURNS, SECONDS = 15, 10.0
"""How often both are timed, and after how long no further turn begins."""


@dataclass
class Tolerance:
    """What may differ: a logit, where the weights stay float32; else the mean KL(source ‖ export) in nats."""

    measure: str
    most: float


@dataclass
class Parity:
    """What was found.

    Args:
        max_logit_difference: Largest absolute difference of a logit.
        kl: Mean of KL(source ‖ export) over the places, in nats.
        places: Tokens, texts or spans that were compared.
        same_top: Share of places whose most probable token, label or position is the same.
        ties: Of the other places, those where the source's first two are nearer than the tolerance: no difference.
        greedy_tokens: Tokens that transformers wrote by itself after the prompts, the most probable one each time.
        greedy_same: Of those, the ones that the export wrote, too, before its first other token.
        same_ids: Whether a tokenizer that the export brings along gives the same ids.
        prompt_tokens: Tokens of the prompt that was timed.
        seconds: Medians of (source, export): of that prompt, and of one new token after it.
        holds: Whether all is within the tolerance.
    """

    tolerance: Tolerance
    max_logit_difference: float
    kl: float
    places: int
    same_top: float
    ties: int
    greedy_tokens: int
    greedy_same: int
    prompt_tokens: int
    same_ids: bool
    seconds: dict[str, tuple[float, float]]
    holds: bool


def batches_of(loaded: LoadedModel, prompts: list[str], most_tokens: int, rows: int) -> list[Batch]:
    """Each prompt alone, and the first `rows` of them side by side, padded where the model is told of padding."""
    limit = min(most_tokens, loaded.max_positions or most_tokens)
    limit = limit - NEW_TOKENS if loaded.kind == "causal" else limit
    if limit < 1:
        raise ValueError(
            f"{loaded.folder} has {loaded.max_positions} positions, too few to compare {NEW_TOKENS} tokens"
        )
    encoded = [encode(loaded, prompt, limit) for prompt in prompts]
    alone = [{name: torch.tensor([ids]) for name, ids in one.items()} for one in encoded]
    together = encoded[:rows]
    if len(together) < 2:
        return alone
    return [*alone, side_by_side(loaded, together)]


def encode(loaded: LoadedModel, prompt: str, limit: int) -> dict[str, list[int]]:
    """As the model's tokenizer does it, at most `limit` tokens. Raises ValueError for ids that the model lacks."""
    tokenizer = loaded.tokenizer
    texts = (QUESTION, prompt) if loaded.kind == "question-answering" else (prompt,)
    found = dict(tokenizer(*texts))
    if not found["input_ids"]:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        found = {name: [value] for name, value in (("input_ids", start), ("attention_mask", 1))}
    if found["input_ids"] in ([], [None]):
        raise ValueError(f"the prompt {prompt!r} has no tokens; write more by --prompt")
    known = loaded.model.get_input_embeddings().num_embeddings
    if max(found["input_ids"]) >= known:
        raise ValueError(
            f"the tokenizer gives id {max(found['input_ids'])}, the model knows {known}; pass its own by --tokenizer"
        )
    marks_second_text = getattr(loaded.model.config, "type_vocab_size", 0) > 1
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if marks_second_text else [])
    zeros = [0] * len(found["input_ids"])
    return {name: found.get(name, zeros)[:limit] for name in names}


def side_by_side(loaded: LoadedModel, rows: list[dict[str, list[int]]]) -> Batch:
    """On the left padding is before a text that goes on, elsewhere after it."""
    if isinstance(loaded.model, LSTMForCausalLM):
        shortest = min(len(row["input_ids"]) for row in rows)
        return {name: torch.tensor([row[name][:shortest] for row in rows]) for name in rows[0]}
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": loaded.tokenizer.pad_token_id or 0, "attention_mask": 0, "token_type_ids": 0}
    before = loaded.kind == "causal"
    return {
        name: torch.tensor(
            [
                [padding[name]] * (width - len(row[name])) * before
                + row[name]
                + [padding[name]] * (width - len(row[name])) * (not before)
                for row in rows
            ]
        )
        for name in rows[0]
    }


def compare(
    loaded: LoadedModel,
    export: Answering,
    tokenizer: PreTrainedTokenizerBase | None,
    batches: list[Batch],
    tolerance: Tolerance,
) -> Parity:
    """Asks source and export the same: the prompts, what follows them token by token, then the time of both.

    `tokenizer` is the one that the export brings along, where it brings one.
    """
    source = InTransformers(loaded.model, loaded.kind)
    expected, found, greedy, same, greedy_holds = [], [], 0, 0, True
    for batch in batches:
        new_BT = greedily(loaded, batch) if writes(loaded.kind) else None
        expected.append(places(source, batch, new_BT, loaded.kind))
        found.append(places(export, batch, new_BT, loaded.kind))
        if new_BT is not None and len(new_BT) == 1:
            count = new_BT.shape[1]
            agreeing = int((written_by(export, batch, count) == new_BT[0]).long().cumprod(0).sum())
            greedy, same = greedy + count, same + agreeing
            # The place that chose the first other token: a tie may fall to either side.
            greedy_holds &= agreeing == count or bool(gap(expected[-1][agreeing - count - 1]) <= 2 * tolerance.most)
    # Not Python's max, which passes over a NaN.
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max())
    tops = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(expected, found, strict=True)])
    tie = torch.cat([gap(a) <= 2 * tolerance.most for a in expected])
    nats = torch.cat([divergence(a, b) for a, b in zip(expected, found, strict=True)])
    kl = float(nats.mean())
    rounded = tolerance.measure == "kl"
    same_ids = tokenizer is None or all(plain(tokenizer, text) == plain(loaded.tokenizer, text) for text in TEXTS)
    holds = kl <= tolerance.most if rounded else difference <= tolerance.most and greedy_holds
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1] * (len(batch["input_ids"]) == 1))
    return Parity(
        tolerance,
        difference,
        kl,
        len(tops),
        float(tops.float().mean()),
        0 if rounded else int((~tops & tie).sum()),
        greedy,
        same,
        longest["input_ids"].shape[1],
        same_ids,
        times(source, export, longest, writes(loaded.kind)),
        holds and same_ids,
    )


def places(model: Answering, batch: Batch, new_BT: Tensor | None, kind: Head) -> Tensor:
    """(N, V) logits of the places of a batch that are no padding, and of the tokens after it."""
    answer = model.begin(batch)
    logits, mask_BT = answer.logits, batch["attention_mask"].bool()
    if kind == "sequence-classification":
        return logits
    if kind == "question-answering":
        return logits.masked_fill(~mask_BT[:, None], -1e4).flatten(0, 1)
    read = logits.flatten(0, 1) if kind == "encoder-decoder" else logits[mask_BT]
    return read if new_BT is None else torch.cat([read, model.step(new_BT, answer.state).logits.flatten(0, 1)])


def greedily(loaded: LoadedModel, batch: Batch) -> Tensor:
    """(B, T): the most probable tokens after a prompt, as transformers' own `generate` writes them."""
    model, own = loaded.model, loaded.model.generation_config
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    try:
        # Nothing of the model's own settings: no end, no penalty, no forced token.
        model.generation_config = GenerationConfig(
            decoder_start_token_id=model.config.decoder_start_token_id if loaded.kind == "encoder-decoder" else None
        )
        with torch.inference_mode():
            sequences = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0
            )
    finally:
        model.generation_config = own
    return sequences[:, 1 if loaded.kind == "encoder-decoder" else batch["input_ids"].shape[1] :]


def written_by(export: Answering, batch: Batch, tokens: int) -> Tensor:
    """(T): the same by the export alone, a token at a time, each after what was kept of those before."""
    answer, written = export.begin(batch), []
    while True:
        written.append(answer.logits[:, -1:].argmax(-1))
        if len(written) == tokens:
            return torch.cat(written, dim=1)[0]
        answer = export.step(written[-1], answer.state)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def gap(logits_NV: Tensor) -> Tensor:
    """(N): how far the most probable is before the next."""
    if logits_NV.shape[-1] == 1:
        return torch.full(logits_NV.shape[:-1], torch.inf)
    best = logits_NV.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


def divergence(source_NV: Tensor, export_NV: Tensor) -> Tensor:
    """(N): KL(source ‖ export) in nats; of a single number, as if it were the logit of yes against no."""
    if source_NV.shape[-1] == 1:
        source_NV, export_NV = (torch.cat([t, torch.zeros_like(t)], dim=-1) for t in (source_NV, export_NV))
    log_p, log_q = source_NV.double().log_softmax(-1), export_NV.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def times(source: Answering, export: Answering, batch: Batch, writing: bool) -> dict[str, tuple[float, float]]:
    """Median seconds of source and export, in turns: what slows the machine down meets both."""
    taken: dict[str, tuple[list[float], list[float]]] = {"prompt": ([], [])} | (
        {"new token": ([], [])} if writing else {}
    )
    for turn in range(TURNS + 1):
        for side, model in enumerate((source, export)):
            answer = model.begin(batch)
            seconds = {"prompt": answer.seconds}
            if writing:
                seconds["new token"] = model.step(answer.logits[:, -1:].argmax(-1), answer.state).seconds
            if turn:  # the first is for warming up
                for name, value in seconds.items():
                    taken[name][side].append(value)
        if turn and sum(sum(sum(side) for side in both) for both in taken.values()) > SECONDS:
            break
    return {name: tuple(statistics.median(side) for side in both) for name, both in taken.items()}
