"""Questions with one right answer, blanks, and pairs of sentences, each decided by what a model finds more probable."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lightning_modules.evaluation.continuations import Continuations, Found, Pair
from lightning_modules.evaluation.measures import Measures


class Question(Protocol):
    answers: tuple[str, ...]
    gold: int
    group: str

    def pairs(self) -> list[tuple[str, str]]:
        """Each context with what goes on from it."""


def answered(questions: Sequence[Question], score: Continuations, batch_size: int | None = None) -> list[list[Found]]:
    """Of each question what was found of each answer."""
    pairs = [Pair(*pair) for question in questions for pair in question.pairs()]
    found = iter(score(pairs, batch_size))
    return [[next(found) for _ in question.answers] for question in questions]


def choices(questions: Sequence[Question], found: list[list[Found]]) -> Measures:
    """Accuracy by the most probable answer, and by the most probable a character (lm-eval's acc and acc_norm)."""
    plain, by_length = [], []
    for question, answers in zip(questions, found, strict=True):
        nats = [answer.nats for answer in answers]
        plain.append(right(nats, question.gold))
        by_length.append(right([n / len(a) for n, a in zip(nats, question.answers, strict=True)], question.gold))
    chance = sum(1 / len(question.answers) for question in questions) / len(questions)
    each = {"accuracy": np.array(plain), "accuracy_by_length": np.array(by_length)}
    both = {"accuracy": chance, "accuracy_by_length": chance}
    return Measures(each, [question.group for question in questions], chance=both)


def cloze(questions: Sequence[Question], found: list[list[Found]]) -> Measures:
    """Blanks whose every token is the most probable one, and the perplexity of a blank, as LAMBADA is counted."""
    each = {
        "accuracy": np.array([float(answers[0].is_greedy) for answers in found]),
        "nats": np.array([answers[0].nats for answers in found]),
    }
    figures = {"accuracy": lambda means: means["accuracy"], "perplexity": lambda means: np.exp(means["nats"])}
    return Measures(each, [question.group for question in questions], figures)


def pairs(questions: Sequence[Question], found: list[list[Found]]) -> Measures:
    """Pairs of which the good sentence is the more probable one."""
    each = {
        "accuracy": np.array(
            [right([a.nats for a in answers], q.gold) for q, answers in zip(questions, found, strict=True)]
        )
    }
    return Measures(each, [question.group for question in questions], chance={"accuracy": 0.5})


def right(nats: Sequence[float], gold: int) -> float:
    """1 where the right one needs least; where several do, its share."""
    least = min(nats)
    best = [place for place, value in enumerate(nats) if value == least]
    return 1 / len(best) if gold in best else 0.0


JUDGES = {"choices": choices, "cloze": cloze, "pairs": pairs}
