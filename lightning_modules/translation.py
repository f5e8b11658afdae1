"""Translation, judged as the field does: SacreBLEU and chrF."""

from collections.abc import Sequence

from lightning_modules.completion import Completion, Scores


class Translation(Completion):
    """A text in another language.

    Args:
        bleu_tokenizer: Of SacreBLEU: 13a, or zh, ja-mecab, ko-mecab, char, flores200 where words have no blanks.
        num_beams: Of beam search; 1 always takes the likeliest token.
    """

    def __init__(self, *, bleu_tokenizer: str = "13a", num_beams: int = 4, **settings: object):
        super().__init__(num_beams=num_beams, **settings)
        from sacrebleu.metrics import BLEU, CHRF

        self.signatures = "not yet measured"
        try:
            self.bleu, self.chrf = BLEU(tokenize=bleu_tokenizer), CHRF()
        except ValueError:
            raise ValueError(f"--model.bleu_tokenizer {bleu_tokenizer}: {', '.join(sorted(BLEU.TOKENIZERS))}") from None

    @property
    def units(self) -> str:
        return Completion.units + f"`val_bleu` is SacreBLEU and `val_chrf` chrF, both 0 to 100 ({self.signatures})."

    def score_names(self) -> list[str]:
        return ["bleu", "chrf"]

    def scores(self, written: list[str], references: list[list[str]]) -> Scores:
        most = max(map(len, references))
        streams = [[right[i] if i < len(right) else None for right in references] for i in range(most)]
        metrics = {"bleu": self.bleu, "chrf": self.chrf}
        found = {name: metric.corpus_score(written, streams).score for name, metric in metrics.items()}
        self.signatures = "; ".join(f"{name} {metric.get_signature()}" for name, metric in metrics.items())
        return found

    def row_score(self, written: str, references: Sequence[str]) -> float:
        return self.chrf.sentence_score(written, references).score / 100
