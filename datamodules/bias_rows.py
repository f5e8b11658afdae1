"""Rows that bias is measured by, from the files that CrowS-Pairs, StereoSet, WinoBias and BBQ are published as."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.files import BadRows, decoded_blocks, lines_of
from datamodules.questions import Question
from datamodules.records import Record, fault_of, records

Kind = Literal["crows_pairs", "stereoset", "winobias", "bbq"]
NUMBERED = re.compile(r"\s*\d+\s+")
BLANK = "BLANK"
SAME = dict.fromkeys(("man", "boy", "male"), "m") | dict.fromkeys(("woman", "girl", "female"), "f")
SAME |= dict.fromkeys(("transgender", "transgenderwomen", "transgendermen"), "trans")
"""What BBQ's answers are labelled with, in the words of its stereotyped groups, as its authors' own script has them."""


@dataclass(frozen=True)
class Contrast:
    """Two sentences that differ in a few words, of which the first says more of a stereotype."""

    more: str
    less: str
    group: str


@dataclass(frozen=True)
class Association:
    """StereoSet's: what goes on from a context, or fills its blank, in a stereotyped way, against it, or unrelated.

    Args:
        context: With BLANK for a word, or before the sentences.
        texts: Of each kind the word, or the whole sentence that follows.
        group: The kind of bias.
        target: Whom it is about; scores are means over these.
    """

    context: str
    texts: dict[str, str]
    group: str
    target: str


@dataclass(frozen=True)
class BiasQuestion:
    """BBQ's.

    Args:
        question: With its three answers, and the right one.
        is_ambiguous: Whether the context does not say it, so that "unknown" is right.
        unknown: The number of that answer.
        biased: The number of the answer that a stereotype would give; None where the row does not say it.
    """

    question: Question
    is_ambiguous: bool
    unknown: int
    biased: int | None


def read_crows_pairs(path: Path, bad_rows: BadRows) -> Iterator[Contrast]:
    """https://arxiv.org/abs/2010.00133"""
    for number, row in records(path, bad_rows):
        sentences = [row.get("sent_more"), row.get("sent_less")]
        if all(fault_of(text) is None and text.strip() for text in sentences) and "bias_type" in row:
            yield Contrast(*sentences, str(row["bias_type"]))
        else:
            columns = ", ".join(row)
            wanted = "CrowS-Pairs has two sentences, sent_more and sent_less, and a bias_type"
            bad_rows.add(str(path), f"{path}, row {number}: {wanted}; it has {columns}")


def read_winobias(paths: list[Path]) -> Iterator[Contrast]:
    """Lines of pro_stereotyped_* beside those of anti_stereotyped_*, which differ in the pronoun.
    https://arxiv.org/abs/1804.06876"""
    for path in paths:
        name = path.name
        if not name.startswith("pro_"):
            continue
        other = path.with_name(name.replace("pro_", "anti_", 1))
        if not other.is_file():
            raise ValueError(f"{path} lies beside no {other.name}; pass both")
        pairs = [[_plain(line) for line in lines_of(decoded_blocks(p)) if line.strip()] for p in (path, other)]
        if len(pairs[0]) != len(pairs[1]):
            raise ValueError(f"{path} has {len(pairs[0])} sentences, {other} {len(pairs[1])}; pass files that match")
        group = next((part for part in re.split(r"[_.]", name) if part.startswith("type")), "")
        yield from (Contrast(more, less, group) for more, less in zip(*pairs, strict=True))


def _plain(line: str) -> str:
    """Without its number, and the brackets of who is meant."""
    return NUMBERED.sub("", line, count=1).replace("[", "").replace("]", "").strip()


def read_stereoset(path: Path) -> Iterator[Association]:
    """https://arxiv.org/abs/2004.09456"""
    try:
        data = json.loads("".join(decoded_blocks(path)))["data"]
        for kind in ("intrasentence", "intersentence"):
            for row in data.get(kind, []):
                yield _association(row, kind == "intrasentence")
    except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
        raise ValueError(
            f"{path} is no file of StereoSet ({type(error).__name__}: {error}); pass its dev.json"
        ) from None


def _association(row: Record, fills: bool) -> Association:
    context, texts = str(row["context"]), {}
    for sentence in row["sentences"]:
        text = str(sentence["sentence"])
        texts[str(sentence["gold_label"])] = filling(context, text) if fills else text
    if {"stereotype", "anti-stereotype", "unrelated"} - texts.keys():
        raise KeyError("gold_label")
    return Association(context, texts, str(row["bias_type"]), f"{row['bias_type']}/{row['target']}")


def filling(context: str, sentence: str) -> str:
    """What stands for BLANK, without marks around it; where a sentence is not the context with another word, that word
    is looked for. Raises ValueError where there is none."""
    before, _, after = context.partition(BLANK)
    if sentence.startswith(before) and sentence.endswith(after) and len(sentence) >= len(before) + len(after):
        word = sentence[len(before) : len(sentence) - len(after)]
    else:
        place = next(i for i, word in enumerate(context.split()) if BLANK in word)
        word = sentence.split()[place]
    word = word.strip(" .,;:!?\"'")
    if not word:
        raise ValueError(f"nothing stands for BLANK in {sentence!r}")
    return word


def read_bbq(path: Path, bad_rows: BadRows) -> Iterator[BiasQuestion]:
    """https://arxiv.org/abs/2110.08193"""
    for number, row in records(path, bad_rows):
        try:
            yield _bias_question(row)
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            bad_rows.add(str(path), f"{path}, row {number} is none of BBQ ({type(error).__name__}: {error})")


def _bias_question(row: Record) -> BiasQuestion:
    names = ("ans0", "ans1", "ans2")
    info: dict[str, list[str]] = row["answer_info"]
    unknown = next(place for place, name in enumerate(names) if "unknown" in info[name])
    persons = [place for place in range(3) if place != unknown]
    stereotyped = {_norm(group) for group in row["additional_metadata"]["stereotyped_groups"]}
    labels = [[_norm(label) for label in info[name]] for name in names]
    targets = [place for place in persons if stereotyped & set(labels[place])]
    if len(targets) != 1:  # of intersections, such as F-Black, a part
        parts = [{part for label in info[name] for part in map(_norm, re.split("[-_]", label))} for name in names]
        targets = [place for place in persons if stereotyped & parts[place]]
    biased = None
    if len(targets) == 1:
        (target,) = targets
        others = [place for place in persons if place != target]
        biased = target if row["question_polarity"] == "neg" else others[0]
    query = f"{row['context']}\n\nQ: {row['question']}\nA:"
    question = Question((query,) * 3, tuple(str(row[name]) for name in names), int(row["label"]), str(row["category"]))
    return BiasQuestion(question, row["context_condition"] == "ambig", unknown, biased)


def _norm(label: str) -> str:
    """A label of an answer or a group, both in the words of the groups."""
    label = label.lower().replace(" ", "")
    return SAME.get(label, label)
