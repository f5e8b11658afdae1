"""SciTLDR by its own sentences: the first of each abstract, to be better than; and pairs from which to learn to choose.

A small model that begins anew does not learn from 2,000 summaries to take over words of its source. From which sentence
of some of an abstract's a summary takes most it does: five times as many pairs, out of the same training data.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from lightning_modules.summarization import Summarization

PAIRS = 5
"""Of each abstract: all its sentences, and four times some of them."""
WORDS = range(5, 46)
"""Of a sentence that may be chosen."""


def papers(file: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Sentences and summaries."""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        yield [sentence.strip() for sentence in row["source"]], row["target"]


def scorer() -> Summarization:
    from transformers import BartConfig

    return Summarization(from_="new", architecture=BartConfig())


def first_sentences(file: Path) -> dict[str, float]:
    """ROUGE of the first sentence as the summary, by the names of a run's summary.json."""
    found = list(papers(file))
    scores = scorer().scores([sentences[0] for sentences, _ in found], [targets for _, targets in found])
    return {f"val_{name}": value for name, value in scores.items()}


def write_chosen(file: Path, to: Path) -> None:
    """Pairs of sentences and the one of them whose ROUGE-1 with a summary is the highest."""
    rouge, rng, pairs = scorer().rouge, random.Random(0), []
    for sentences, targets in papers(file):
        worth = [rouge.score_multi(targets, sentence)["rouge1"].fmeasure for sentence in sentences]
        may_be = [i for i, sentence in enumerate(sentences) if len(sentence.split()) in WORDS]
        for number in range(PAIRS):
            some = sorted(rng.sample(range(len(sentences)), min(len(sentences), rng.randint(2, 6))))
            some = some if number else range(len(sentences))
            if choice := [i for i in some if i in may_be]:
                best = max(choice, key=worth.__getitem__)
                pairs.append({"source": [sentences[i] for i in some], "target": sentences[best]})
    to.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
