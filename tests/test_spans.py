"""Questions to a text: SQuAD in its two versions and in rows, long contexts in windows, answers by their places."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules.spans import Spans, place_of
from datamodules.tokenization import bpe_tokenizer
from lightning_modules.question_answering import best_spans, squad_scores
from tests.finetuning import context, squad


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [context(i) for i in range(20)] + ["Which word number 0 1 2?", "Which colour?"]
    bpe_tokenizer(texts, 3000, 400, "masked").save_pretrained(folder)
    return folder


def opened(file: Path, tokenizer: Path, **settings: object) -> Spans:
    data = Spans(path=str(file), tokenizer=str(tokenizer), **settings)
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(start=None), distributed_sampler_kwargs=None, overfit_batches=0
    )
    data.prepare_data()
    data.setup("fit")
    return data


def written(folder: Path, content: object, name: str = "squad.json") -> Path:
    lines = isinstance(content, list)
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def spans_of(data: Spans, split: str = "val") -> list[tuple[str, str | None]]:
    """(answer by the labels, the record's answer) of each window; None where the window holds none."""
    fields, found = getattr(data.store, split), []
    records = data.store.records(split)
    for i, (first, last) in enumerate(fields["labels"].tolist()):
        record = records[int(fields["example"][i])]
        begin = int(fields["contexts"][i, 0])
        here = record["context"][fields["starts"][i][first - begin] : fields["ends"][i][last - begin]] if last else None
        found.append((here, record["references"][0] if record["references"] else None))
    return found


@pytest.mark.parametrize("kind", ["tokenizer", "word_pieces"])
@pytest.mark.parametrize("max_length", [400, 60])
def test_the_labels_of_each_window_are_the_answer_and_every_answer_is_in_one(kind, max_length, tmp_path, request):
    file = written(tmp_path, squad())
    data = opened(file, request.getfixturevalue(kind), max_length=max_length, stride=20, val_fraction=0.4)
    found = spans_of(data) + spans_of(data, "train")
    windows = len(found)
    assert (windows == 36) == (max_length == 400)
    inside = [(here, answer) for here, answer in found if here is not None]
    assert all(here.strip() == answer for here, answer in inside)
    assert {answer for _, answer in inside} == {answer for _, answer in found}
    assert data.lengths.max() <= max_length


@pytest.mark.parametrize("kind", ["tokenizer", "word_pieces"])
def test_windows_cover_the_whole_context_and_share_the_stride(kind, tmp_path, request):
    data = opened(written(tmp_path, squad(words=60)), request.getfixturevalue(kind), max_length=64, stride=10)
    fields = data.store.train
    record = data.store.records("train")[0]
    windows = [i for i, example in enumerate(fields["example"].tolist()) if example == 0]
    assert len(windows) > 2
    ends = 0
    for i in windows:
        starts = fields["starts"][i]
        assert starts[0] <= ends + 1
        assert i == windows[0] or sum(start < ends for start in starts.tolist()) == 10
        ends = int(fields["ends"][i][-1])
    assert ends == len(record["context"])


def test_offsets_that_are_wrong_are_searched_for_again_and_answers_that_are_not_there_are_left_out(tokenizer, tmp_path):
    content = squad(shift=2)
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "nowhere"
    data = opened(written(tmp_path, content), tokenizer, max_length=400)
    assert (data.store.about["searched_again"], data.store.about["not_in_context"]) == (35, 1)
    assert all(here.strip() == answer for here, answer in spans_of(data, "train"))
    assert "35 did not start where the data say; 1 not in their context, not trained on" in data.plan()["answers"]


def test_the_place_nearest_to_the_wrong_one_is_taken():
    assert place_of("a", "a b a c a", 5) == 4 and place_of("a", "a b a", -1) == 0 and place_of("x", "a b", 0) == -1


def test_articles_are_not_split_between_training_and_held_out_questions(tokenizer, tmp_path):
    data = opened(written(tmp_path, squad(40)), tokenizer, val_fraction=0.3)
    sides = [{record["title"] for record in data.store.records(split)} for split in ("train", "val")]
    assert all(sides) and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40


FORMS = {
    "lists of the hub": lambda text, start: {"answers": {"text": [text], "answer_start": [start]}},
    "list of objects": lambda text, start: {"answers": [{"text": text, "answer_start": start}]},
    "a text": lambda text, start: {"answer": text},
    "a list of texts": lambda text, start: {"answers": [text]},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_hold_answers_in_any_of_the_usual_forms(form, tokenizer, tmp_path):
    rows = []
    for i in range(20):
        text = context(i)
        answer = text.split()[4]
        rows.append({"context": text, "question": "Which?"} | FORMS[form](answer, text.index(answer)))
    data = opened(written(tmp_path, rows, "rows.jsonl"), tokenizer, max_length=400)
    assert all(here.strip() == answer for here, answer in spans_of(data, "train"))
    assert "question from 'question'" in data.plan()["columns"]


def test_questions_without_an_answer_point_to_the_first_token(tokenizer, tmp_path):
    data = opened(written(tmp_path, squad(unanswerable=True)), tokenizer)
    assert data.has_unanswerable and "without an answer" in data.plan()["text"]
    records = data.store.records("train")
    for labels, example in zip(data.store.train["labels"], data.store.train["example"], strict=True):
        assert (labels.tolist() == [0, 0]) == (not records[int(example)]["references"])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"context": "a b", "question": " ", "answer": "a"}, "'question' is empty"),
        ({"context": None, "question": "x", "answer": "a"}, "'context' is null"),
        ({"context": "a b", "question": "x", "answers": {"text": ["a", "b"], "answer_start": [0]}}, "2 answers and 1"),
        ({"context": "a b", "question": "x", "answers": [{"text": None}]}, "an answer is null"),
    ],
)
def test_a_row_that_is_no_question_is_told(row, told, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {told}"):
        opened(written(tmp_path, [row], "rows.jsonl"), tokenizer)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ({"paragraphs": ["x"]}, "article 1: in 'paragraphs' stands str and no object"),
        ({"paragraphs": [{"context": "a b", "qas": None}]}, "article 1: 'qas' is no list"),
        ({"paragraphs": [{"context": "a b", "qas": [{"id": "q", "question": "x?"}]}]}, "q: no 'answers'"),
    ],
)
def test_a_damaged_document_of_squad_is_told_or_counted(broken, told, tokenizer, tmp_path):
    content = squad(9)
    content["data"].insert(0, {"title": "broken"} | broken)
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match=told):
        opened(file, tokenizer)
    data = opened(file, tokenizer, on_bad_row="skip")
    assert sum(data.skipped_rows.values()) == 1 and not data.has_unanswerable


def test_a_reference_that_is_no_span_still_counts_where_answers_are_scored(tokenizer, tmp_path):
    text = "seven green stones"
    rows = [{"context": f"{text} {'x' * i}", "question": "How many?", "answers": ["7", "seven"]} for i in range(9)]
    rows.append({"context": "nothing", "question": "How many?", "answers": ["9"]})
    file = written(tmp_path, rows, "rows.jsonl")
    data = opened(file, tokenizer, val_path=str(file))
    assert len(data.asked) == 10 and data.asked[0]["references"] == ["7", "seven"]
    assert len(data.store.records("train")) == 9 and {here.strip() for here, _ in spans_of(data, "train")} == {"seven"}


def test_places_that_a_table_made_floats_are_places(tokenizer, tmp_path):
    answers = {"answers": {"text": ["3"], "answer_start": [15.0]}}
    rows = [{"context": "3 then 3 again 3", "question": f"Which {i}?"} | answers for i in range(9)]
    data = opened(written(tmp_path, rows, "rows.jsonl"), tokenizer, val_path=str(tmp_path / "rows.jsonl"))
    assert data.asked[0]["span"] == [15, 1]


def test_a_stride_that_leaves_a_long_question_no_context_is_told(word_pieces, tmp_path):
    content = squad(9)
    content["data"][0]["paragraphs"][0]["qas"][0]["question"] = "river " * 80
    file = written(tmp_path, content)
    with pytest.raises(ValueError, match="--data.stride is 30, and windows of 64 tokens leave 29"):
        opened(file, word_pieces, max_length=64, stride=30)
    assert opened(file, word_pieces, max_length=64, stride=20).store.about["questions_cut"] == 1


# What the modules do with them


def test_the_best_spans_are_those_of_a_search_through_all():
    torch.manual_seed(0)
    logits = torch.randn(3, 12, 2)
    contexts = torch.tensor([[2, 9], [5, 12], [3, 4]])
    for i, found in enumerate(best_spans(logits, contexts, n_best=5, max_tokens=3)):
        begin, end = contexts[i].tolist()
        all_spans = sorted(
            (
                (float(logits[i, a, 0] + logits[i, b, 1]), a, b)
                for a in range(begin, end)
                for b in range(a, min(a + 3, end))
            ),
            reverse=True,
        )
        assert [span[1:] for span in found] == [span[1:] for span in all_spans[:5]]


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The Denver Broncos", ["Denver Broncos", "Broncos"], 1, 1),  # articles, case, punctuation do not count
        ("denver broncos!", ["Denver Broncos"], 1, 1),
        ("Denver Nuggets", ["Denver Broncos"], 0, 0.5),
        ("in 1999", ["1999", "the year 1999"], 0, 2 / 3),
        ("", [], 1, 1),  # there is none, and none is found
        ("Denver", [], 0, 0),
        ("", ["Denver"], 0, 0),
    ],
)
def test_scores_are_those_of_squad(prediction, references, exact, f1):
    assert squad_scores(prediction, references) == pytest.approx((exact, f1))
