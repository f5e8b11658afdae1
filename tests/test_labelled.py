"""Texts with labels from any table, as batches that pad little."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import BertTokenizer

from datamodules.example_store import Ragged
from datamodules.labelled import Labelled

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "a", "very"]
ROWS = [("the good film", "pos"), ("a bad film", "neg"), ("very very good", "pos"), ("the bad", "neg")] * 5


@pytest.fixture
def words(tmp_path):
    """A tokenizer that tells the second text of a pair by its token types."""
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


@pytest.fixture
def read(tmp_path, words):
    """The datamodule of a file with this content."""

    def read(name, content, **settings):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        if "val_path" not in settings:
            settings["val_path"] = str(file)
        data = Labelled(path=str(file), tokenizer=words, cache_dir=str(tmp_path / "cache"), **settings)
        data.prepare_data()
        data.setup("fit")
        return data

    return read


def lines(separator, *rows):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def parquet(rows):
    sink = pyarrow.BufferOutputStream()
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "a.csv": lines(",", ("Review", "Sentiment"), *ROWS),
    "b.tsv": lines("\t", ("label", "sentence"), *((label, text) for text, label in ROWS)),
    "c.jsonl": "".join(json.dumps({"id": i, "text": t, "label": y}) + "\n" for i, (t, y) in enumerate(ROWS)),
    "d.json": json.dumps([{"content": t, "category": y} for t, y in ROWS]),
    "e.parquet": parquet(ROWS),
    "f.csv": lines(",", *ROWS),
    "g.tsv": lines("\t", *((label, text) for text, label in ROWS)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_columns_are_found_by_their_usual_names_or_without_a_header_by_what_they_hold(name, read):
    data = read(name, FORMATS[name])
    assert data.label_names == ["neg", "pos"] and data.kind == "one"
    assert [record["text"] for record in data.store.records("train")] == [text for text, _ in ROWS]
    assert data.store.train["labels"].tolist() == [int(label == "pos") for _, label in ROWS]


def test_columns_are_what_the_flags_say(read):
    content = lines(",", ("a", "b", "c"), ("the good film", 1, "x"), ("a bad film", 0, "y"), ("a film", 1, "x"))
    assert read("a.csv", content, text_column="a", label_column="c").label_names == ["x", "y"]
    data = read("b.csv", content.split("\n", 1)[1], text_column="0", label_column="2")
    assert data.label_names == ["x", "y"] and len(data.store.records("train")) == 3


def test_labels_that_are_numbers_are_in_their_order(read):
    rows = [("the film", i) for i in (10, 9, 2, 1)]
    assert read("a.csv", lines(",", ("text", "label"), *rows)).label_names == ["1", "2", "9", "10"]


def test_several_labels_and_numbers_are_told_from_one(read):
    several = "".join(
        json.dumps({"text": t, "labels": y}) + "\n" for t, y in [("a", ["x", "y"]), ("b", []), ("c", ["y"])]
    )
    data = read("a.jsonl", several)
    assert data.kind == "several" and data.store.train["labels"].tolist() == [[1, 1], [0, 0], [0, 1]]
    numbers = read("b.csv", lines(",", ("text", "score"), ("the good film", 4.5), ("a bad film", 1)))
    assert numbers.kind == "number" and numbers.store.train["labels"].tolist() == [4.5, 1.0]
    split = read("c.csv", 'text,label\nfilm,"x;y"\nbad,y\n', label_kind="several", label_separator=";")
    assert split.plan()["columns"] == "text from 'text', label from 'label'"
    assert split.label_names == ["x", "y"] and split.store.train["labels"].tolist() == [[1, 1], [0, 1]]


def test_a_pair_is_read_as_its_model_wants_it(read):
    rows = [("the film", "a very good film", "yes"), ("bad", "good", "no")]
    data = read("a.csv", lines(",", ("premise", "hypothesis", "label"), *rows))
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"][0, :5].tolist() == [2, 6, 3, 5, 3]
    assert batch["token_type_ids"][0, :6].tolist() == [0, 0, 0, 1, 1, 0]
    assert batch["labels"].tolist() == [0, 1] and batch["attention_mask"].sum(-1).tolist() == [5, 9]


def test_what_is_cut_off_is_counted(read):
    data = read("a.csv", lines(",", ("text", "label"), ("the " * 20, "x"), ("film", "y")), max_length=8)
    assert data.lengths.tolist() == [8, 3] and "2 examples at 8 tokens" in data.plan()["cut off"]
    assert data.store.train["input_ids"][0][-1] == 3  # [SEP] is not cut off


def test_an_example_and_its_copy_stand_on_one_side(read):
    rows = [(f"film {i}", i % 2) for i in range(200)] * 2
    data = read("a.csv", lines(",", ("text", "label"), *rows), val_path=None, val_fraction=0.3)
    sides = [{record["text"] for record in data.store.records(split)} for split in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200 and 30 < len(sides[1]) < 90
    assert len(data.store.records("val")) == 2 * len(sides[1])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,label\nfilm,x\n,y\n", ":2: 'text' is empty"),
        ("text,label\nfilm,x\ngood,\n", ":2: 'label' is empty"),
        ("text,label\nfilm,x\ngood,x\n", "has one label only, 'x'"),
        (
            "words,label\nfilm,x\n",
            "has no column that is called like a text; pass --data.text_column, one of: words, label",
        ),
        ("text,topic\nfilm,x\n", "has no column that is called like a label; pass --data.label_column"),
        ("text,label\n", "has no example to train on"),
        ("text,label\nfilm,x\n  ,y\n", ":2: 'text' is empty"),
        ("text,label\nfilm,x\ngood, \n", ":2: 'label' is empty"),
        ("text,label\nfilm\n", ":1: 1 fields where the header has 2"),
    ],
)
def test_a_mistake_is_told_with_its_place(content, told, read):
    with pytest.raises(ValueError, match=r"a\.csv") as error:
        read("a.csv", content)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "train", "val", "told"),
    [
        ("a.csv", "text,score\na,1.5\nb,2\n", "text,score\na,x\n", ":1: label 'x' is no number"),
        ("a.csv", "text,label\na,x\nb,y\n", "text,label\n", "val.csv has no example to hold out"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n{"text": "b", "label": 1}\n', None, ":1: 'label' is nan"),
        ("a.txt", "good film\nbad film\n", None, "has no rows with columns; pass .jsonl, .json, .csv"),
        ("a.csv", "text,label\na,x\nb,y\n", "text,label\na,z\n", ":1: label 'z' is in no training example"),
    ],
)
def test_what_cannot_be_learnt_from_is_told(name, train, val, told, read, tmp_path):
    settings = {}
    if val is not None:
        (tmp_path / "val.csv").write_text(val)
        settings["val_path"] = str(tmp_path / "val.csv")
    with pytest.raises(ValueError) as error:
        read(name, train, **settings)
    assert told in str(error.value) and "\n" not in str(error.value)
    if "'z'" in told:  # and where such rows are left out, none is left
        with pytest.raises(ValueError, match="has no example to hold out"):
            read(name, train, on_bad_row="skip", **settings)


def test_an_unknown_label_of_the_held_out_examples_is_told_or_left_out(read, tmp_path):
    (tmp_path / "val.csv").write_text("text,label\nfilm,pos\nbad,other\n")
    with pytest.raises(ValueError, match=r"val\.csv:2: label 'other' is in no training example"):
        read("a.csv", FORMATS["a.csv"], val_path=str(tmp_path / "val.csv"))
    data = read("a.csv", FORMATS["a.csv"], val_path=str(tmp_path / "val.csv"), on_bad_row="skip")
    assert len(data.store.records("val")) == 1 and sum(data.skipped_rows.values()) == 1


def test_a_row_that_evens_out_the_ranks_carries_nothing(read):
    data = read("a.csv", FORMATS["a.csv"])
    batch = data.collate(data.store.train, np.array([-1, 0]), np.array([-1, 0]))
    assert batch["labels"].tolist() == [-100, 1] and batch["attention_mask"][0].tolist() == [1] + [0] * 7
    assert torch.equal(batch["rows"], torch.tensor([-1, 0]))


def test_every_example_is_seen_once_an_epoch_and_held_out_once_in_all(read):
    rows = [("the " * (1 + i % 17) + f"film {i}", i % 2) for i in range(90)]
    data = read("a.csv", lines(",", ("text", "label"), *rows), batch_size=8)
    seen = [row for batch in data.train_dataloader() for row in batch["rows"].tolist()]
    assert seen == list(range(90))
    held_out = [row for batch in data.val_dataloader() for row in batch["rows"].tolist()]
    assert sorted(held_out) == list(range(90))
    padded = {tuple(batch["input_ids"].shape) for batch in data.val_dataloader()}
    assert len(padded) > 2  # the short ones are not filled up to the longest


def test_a_damaged_store_is_made_again(read, tmp_path):
    first = read("a.csv", FORMATS["a.csv"])
    assert first.plan()["columns"] == "text from 'Review', label from 'Sentiment'"
    file = first.store.folder / "train.input_ids.npy"
    file.write_bytes(file.read_bytes()[:-8])
    again = read("a.csv", FORMATS["a.csv"])
    assert again.store.folder == first.store.folder and len(again.store.train["input_ids"]) == len(ROWS)


def test_ragged_lists_are_padded_to_the_longest():
    ragged = Ragged.of([[1, 2, 3], [], [4]])
    assert ragged.padded(np.array([2, -1, 0]), fill=9, multiple=4).tolist() == [[4, 9, 9, 9], [9] * 4, [1, 2, 3, 9]]
    assert ragged[0].tolist() == [1, 2, 3] and len(ragged) == 3
