"""Answers to instructions and in conversations."""

import re
from collections.abc import Sequence

from lightning_modules.completion import Completion, Scores

SHORT = 8
"""Words up to which an answer is right or wrong."""
FINAL = "####"
"""Stands before the short answer behind a long way to it, as in GSM8K, https://arxiv.org/abs/2110.14168."""


class TextGeneration(Completion):
    """Instruction tuning."""

    units = (
        Completion.units + f"`val_exact_match`, 0 to 100, is the part of the answers of at most {SHORT} words (or of "
        f"what stands behind {FINAL}) that is right but for case, blanks and a final period; `val_chrf` is 0 to 100."
    )

    def __init__(self, **settings: object):
        super().__init__(**settings)
        from sacrebleu.metrics import CHRF

        self.chrf = CHRF()

    def score_names(self) -> list[str]:
        asked = self.trainer.datamodule.asked
        has_short = any(short_answer(record["references"][0]) is not None for record in asked)
        return ["exact_match", "chrf"] if has_short else ["chrf"]

    def scores(self, written: list[str], references: list[list[str]]) -> Scores:
        streams = [[right[0] for right in references]]
        found = {"chrf": self.chrf.corpus_score(written, streams).score}
        right = [
            matches(text, answers[0])
            for text, answers in zip(written, references, strict=True)
            if short_answer(answers[0]) is not None
        ]
        return {"exact_match": 100 * sum(right) / len(right)} | found if right else found

    def row_score(self, written: str, references: Sequence[str]) -> float:
        if short_answer(references[0]) is not None:
            return float(matches(written, references[0]))
        return self.chrf.sentence_score(written, references).score / 100


def short_answer(text: str) -> str | None:
    """What can be right or wrong of an answer: all of it where it is short, what stands behind ####, or nothing."""
    if FINAL in text:
        return _normal(text.rpartition(FINAL)[2]).replace(",", "")
    return _normal(text) if len(text.split()) <= SHORT else None


def matches(written: str, reference: str) -> bool:
    """Whether an answer is the short answer of the reference."""
    if FINAL not in reference:
        return _normal(written) == short_answer(reference)
    return FINAL in written and _normal(written.rpartition(FINAL)[2]).replace(",", "") == short_answer(reference)


def _normal(text: str) -> str:
    return re.sub(r"\s+", " ", text.strip().rstrip(".").strip()).casefold()
