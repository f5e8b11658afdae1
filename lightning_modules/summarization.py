"""Summarization, judged by ROUGE."""

from collections.abc import Sequence

from lightning_modules.completion import Completion, Scores

NAMES = ("rouge1", "rouge2", "rougeL")


class Summarization(Completion):
    """A text in fewer words.

    Args:
        rouge_stemmer: Whether ROUGE compares the stems of English words.
        num_beams: Of beam search; 1 always takes the likeliest token.
    """

    units = (
        Completion.units + "`val_rouge1`, `val_rouge2` and `val_rougeL` are F1, 0 to 100, each with its best reference."
    )

    def __init__(self, *, rouge_stemmer: bool = True, num_beams: int = 4, **settings: object):
        super().__init__(num_beams=num_beams, **settings)
        from rouge_score.rouge_scorer import RougeScorer

        self.rouge = RougeScorer(NAMES, use_stemmer=rouge_stemmer)

    def score_names(self) -> list[str]:
        return list(NAMES)

    def scores(self, written: list[str], references: list[list[str]]) -> Scores:
        found = [self.rouge.score_multi(right, text) for text, right in zip(written, references, strict=True)]
        return {name: 100 * sum(row[name].fmeasure for row in found) / max(1, len(found)) for name in NAMES}

    def row_score(self, written: str, references: Sequence[str]) -> float:
        return self.rouge.score_multi(references, written)["rougeL"].fmeasure
