"""Rows that a model is judged by: choices, blanks to fill, and minimal pairs, from files in their usual forms.

Choices: {query, choices, gold}; {context_options, continuation, gold}, where the choice stands before what is scored;
and as their makers publish them ARC, COPA, HellaSwag, PIQA, MMLU and WinoGrande. Blanks: {context, continuation}, or
LAMBADA's {text}, whose last word is the blank. Pairs: {sentence_good, sentence_bad}, as BLiMP has them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from datamodules.files import BadRows
from datamodules.records import Record, fault_of, records

Kind = Literal["choices", "cloze", "pairs"]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """Several texts of which one is right.

    Args:
        contexts: What goes before each answer.
        answers: What is scored.
        gold: The number of the right one.
        group: Of questions in the file that are counted by themselves, too.
    """

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int
    group: str = ""

    def pairs(self) -> list[tuple[str, str]]:
        """Each context with what goes on from it: after a blank, unless either brings one or nothing goes before."""
        return [
            (context, answer if not context or context[-1].isspace() or answer[0].isspace() else f" {answer}")
            for context, answer in zip(self.contexts, self.answers, strict=True)
        ]


def read_questions(path: Path, kind: Kind, bad_rows: BadRows) -> Iterator[Question]:
    """Raises ValueError that names file and row where one has none of the forms."""
    for number, row in records(path, bad_rows):
        question, reason = None, ""
        try:
            question = next((found for form in FORMS[kind] if (found := form(row)) is not None), None)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            reason = f" ({type(error).__name__}: {error})"
        if question is not None and 0 <= question.gold < len(question.answers) and all(question.answers):
            yield question if question.group else replace(question, group=group_of(row))
        else:
            columns = ", ".join(map(str, row))
            bad_rows.add(str(path), f"{path}, row {number}: {WANTED[kind]}{reason}; it has {columns}")


def group_of(row: Record) -> str:
    return next((str(row[name]) for name in ("category", "subject", "UID") if row.get(name) is not None), "")


def texts(values: object) -> tuple[str, ...]:
    """Of a list of texts, or of numbers. Raises TypeError."""
    if not isinstance(values, list | tuple):
        raise TypeError("its choices are no list")
    values = [str(value) if isinstance(value, int | float) else value for value in values]
    if fault := next((fault for value in values if (fault := fault_of(value))), None):
        raise TypeError(f"a choice {fault}")
    return tuple(values)


def _alike(query: str, choices: object, gold: int, group: str = "") -> Question:
    answers = texts(choices)
    return Question((query,) * len(answers), answers, gold, group)


def _ready(row: Record) -> Question | None:
    if not {"query", "choices", "gold"} <= row.keys():
        return None
    return _alike(str(row["query"]), row["choices"], int(row["gold"]))


def _with_options(row: Record) -> Question | None:
    """The choice stands in the context, and what follows is scored."""
    if not {"context_options", "continuation", "gold"} <= row.keys():
        return None
    contexts = texts(row["context_options"])
    return Question(contexts, (str(row["continuation"]),) * len(contexts), int(row["gold"]))


def _winogrande(row: Record) -> Question | None:
    """https://arxiv.org/abs/1907.10641"""
    if not {"sentence", "option1", "option2", "answer"} <= row.keys():
        return None
    before, _, after = str(row["sentence"]).partition("_")
    contexts = texts([f"{before}{row[name]}" for name in ("option1", "option2")])
    return Question(contexts, (after.strip(),) * 2, int(row["answer"]) - 1)


def _mmlu(row: Record) -> Question | None:
    """With the letters of the choices, as https://arxiv.org/abs/2009.03300 asks without examples."""
    if not {"subject", "question", "choices", "answer"} <= row.keys():
        return None
    subject, choices, answer = str(row["subject"]), texts(row["choices"]), str(row["answer"])
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
    about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    gold = LETTERS.index(answer) if answer in tuple(LETTERS) else int(answer)
    query = f"{about}{str(row['question']).strip()}\n{lines}Answer:"
    return _alike(query, list(LETTERS[: len(choices)]), gold, subject)


def _arc(row: Record) -> Question | None:
    if not {"question", "choices", "answerKey"} <= row.keys():
        return None
    choices = row["choices"]
    gold = list(choices["label"]).index(row["answerKey"])
    return _alike(f"Question: {row['question']}\nAnswer:", choices["text"], gold)


def _copa(row: Record) -> Question | None:
    if not {"premise", "choice1", "choice2", "question", "label"} <= row.keys():
        return None
    word = {"cause": "because", "effect": "therefore"}[str(row["question"])]
    choices = [str(row[name])[:1].lower() + str(row[name])[1:] for name in ("choice1", "choice2")]
    return _alike(f"{str(row['premise']).strip()[:-1]} {word}", choices, int(row["label"]))


def _hellaswag(row: Record) -> Question | None:
    if not {"ctx_a", "ctx_b", "endings", "label", "activity_label"} <= row.keys():
        return None

    def clean(text: str) -> str:
        """Of WikiHow's marks."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    query = clean(f"{row['activity_label']}: {row['ctx_a']} {str(row['ctx_b']).capitalize()}")
    endings = [clean(ending) for ending in texts(row["endings"])]
    return _alike(query, endings, int(row["label"]), str(row["activity_label"]))


def _piqa(row: Record) -> Question | None:
    if not {"goal", "sol1", "sol2", "label"} <= row.keys():
        return None
    return _alike(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _cloze(row: Record) -> Question | None:
    if not {"context", "continuation"} <= row.keys():
        return None
    return _alike(str(row["context"]), [row["continuation"]], 0)


def _last_word(row: Record) -> Question | None:
    if not isinstance(row.get("text"), str) or " " not in row["text"].strip():
        return None
    context, _, word = row["text"].strip().rpartition(" ")
    return _alike(context, [word], 0)


def _pair(row: Record) -> Question | None:
    if not {"sentence_good", "sentence_bad"} <= row.keys():
        return None
    return Question(("", ""), texts([row["sentence_good"], row["sentence_bad"]]), 0)


FORMS: dict[Kind, tuple[Callable[[Record], Question | None], ...]] = {
    "choices": (_ready, _with_options, _winogrande, _mmlu, _arc, _copa, _hellaswag, _piqa),
    "cloze": (_cloze, _last_word),
    "pairs": (_pair,),
}
WANTED = {
    "choices": "wants query, choices and gold (the number of the right one, from 0), or the columns of ARC, COPA, "
    "HellaSwag, PIQA, MMLU or WinoGrande",
    "cloze": "wants context and continuation, or text, whose last word is left out",
    "pairs": "wants sentence_good and sentence_bad",
}
