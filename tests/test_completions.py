"""Prompts and answers: found in any form, cut without losing an end, learnt where they should be."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.base import IGNORED
from datamodules.chat_template import PLAIN, segments
from datamodules.instructions import Instructions
from datamodules.pairs import Pairs
from datamodules.tokenization import bpe_tokenizer

TEXTS = ["Write a word.", "Say yes or no: is water wet?", "a red dog runs in the green park", "yes", "no", "### User:"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe_tokenizer(TEXTS * 3, 1000, 300, "masked").save_pretrained(folder)
    return folder


def jsonl(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def opened(data: Instructions | Pairs, apart: bool = False) -> Instructions | Pairs:
    """As a run opens it, for a decoder or (apart) an encoder-decoder."""
    base_config = SimpleNamespace(is_encoder_decoder=apart)
    module = SimpleNamespace(base_config=base_config, start=None)
    data.trainer = SimpleNamespace(lightning_module=module, distributed_sampler_kwargs=None, overfit_batches=0)
    data.prepare_data()
    data.setup("fit")
    return data


def learnt(data, example: int = 0) -> list[str]:
    return [text for text, is_learnt in data.shown(example) if is_learnt]


ANSWERED = [{"instruction": f"Write a word {i}.", "input": "", "output": f"dog {i}"} for i in range(20)]
FORMS = {
    "parts": ANSWERED,
    "other names": [{"question": row["instruction"], "answer": row["output"]} for row in ANSWERED],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for row in ANSWERED
    ],
    "from and value": [
        {"conversations": [{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}]}
        for row in ANSWERED
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_prompt_and_an_answer_becomes_the_same_example(form, tokenizer, tmp_path):
    data = opened(Instructions(path=str(jsonl(tmp_path, FORMS[form])), tokenizer=str(tokenizer)))
    assert sorted(learnt(data, i)[0] for i in range(3)) == sorted(f"dog {i}<|endoftext|>" for i in _places(data)[:3])
    whole = "".join(text for text, _ in data.shown(0))
    i = _places(data)[0]
    assert whole == f"<|endoftext|>### User:\nWrite a word {i}.\n### Assistant:\ndog {i}<|endoftext|>"


def _places(data) -> list[int]:
    """The numbers that the examples of training have in ANSWERED."""
    return [int(record["references"][0].split()[1]) for record in data.store.records("train")]


def test_labels_are_the_next_tokens_of_the_answer_and_its_end_and_no_others(tokenizer, tmp_path):
    data = opened(Instructions(path=str(jsonl(tmp_path, ANSWERED)), tokenizer=str(tokenizer), batch_size=4))
    batch = next(iter(data.train_dataloader()))
    for ids, labels, start in zip(batch["input_ids"], batch["labels"], batch["prompt_lengths"], strict=True):
        known = labels != IGNORED
        assert not known[: start - 1].any() and known[start - 1]
        text = data.tokenizer.decode(labels[known])
        assert text.startswith("dog ") and text.endswith("<|endoftext|>")
        places = known.nonzero()[:-1, 0]
        assert (ids[places + 1] == labels[places]).all()
    assert int(batch["label_bytes"][0]) == len(data.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0][:-1]))


CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "red?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "green?"},
    {"role": "assistant", "content": "no"},
]


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        ("answers", ["yes<|endoftext|>", "no<|endoftext|>"]),
        ("last_answer", ["no<|endoftext|>"]),
    ],
)
def test_of_a_conversation_all_answers_are_learnt_or_the_last(learn, expected, tokenizer, tmp_path):
    file = jsonl(tmp_path, [{"messages": CHAT, "id": i} for i in range(8)])
    data = Instructions(path=str(file), val_path=str(file), tokenizer=str(tokenizer), learn=learn)
    assert learnt(opened(data)) == expected  # and no line end behind an end of text


def test_all_can_be_learnt_prompts_too(tokenizer, tmp_path):
    file = jsonl(tmp_path, ANSWERED)
    data = opened(Instructions(path=str(file), tokenizer=str(tokenizer), learn="all"))
    (text,) = learnt(data)
    assert text.startswith("### User:") and text.endswith("<|endoftext|>")


def test_pieces_of_a_conversation_are_its_whole_text(tokenizer):
    from datamodules.tokenization import load_tokenizer

    loaded = load_tokenizer(str(tokenizer))
    for template in (PLAIN, CHATML):
        loaded.chat_template = template
        pieces = segments(loaded, CHAT)
        assert "".join(piece.text for piece in pieces) == loaded.apply_chat_template(CHAT, tokenize=False)
        assert [piece.is_answer for piece in pieces] == [False, True, False, True]
    # One that leaves out what was thought before: earlier answers are not learnt, the last one is.
    loaded.chat_template = CHATML.replace("m['content']", "m['content'] if loop.last else 'cut'")
    pieces = segments(loaded, CHAT)
    assert [piece.is_answer for piece in pieces] == [False, True] and "no" in pieces[-1].text


def test_a_template_of_the_tokenizer_is_used_and_its_own_end_is_followed_by_the_end_of_text(tokenizer, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    file, template = jsonl(tmp_path, ANSWERED), str(tmp_path / "chatml.jinja")
    data = opened(Instructions(path=str(file), tokenizer=str(tokenizer), chat_template=template))
    assert learnt(data)[0].endswith("<|im_end|>\n<|endoftext|>")
    assert data.shown(0)[0][0].startswith("<|im_start|>user\n")


def test_a_conversation_that_the_template_refuses_is_told_or_counted(tokenizer, tmp_path):
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    )
    file = jsonl(tmp_path, [{"messages": CHAT if i == 2 else CHAT[1:]} for i in range(9)])
    settings = {"path": str(file), "val_path": str(file), "tokenizer": str(tokenizer)}
    settings["chat_template"] = str(tmp_path / "strict.jinja")
    with pytest.raises(ValueError, match="rows.jsonl:3: the chat template says: no system here; mend it, or leave"):
        opened(Instructions(**settings))
    data = opened(Instructions(**settings, on_bad_row="skip"))
    assert len(data.store.records("train")) == 8 and sum(data.skipped_rows.values()) == 2


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_too_long_is_cut_and_counted_and_the_end_of_text_stays(apart, tokenizer, tmp_path):
    long = {"source": "a red dog runs " * 30, "target": "in the green park " * 30}
    file = jsonl(tmp_path, [long, {"source": "yes", "target": "no"}])
    settings = {"tokenizer": str(tokenizer), "max_length": 60, "max_target_length": 20}
    data = opened(Pairs(path=str(file), val_path=str(file), **settings), apart)
    assert data.store.about["cut"] == {"prompts": 2, "answers": 2}
    ids, labels = data.store.train["input_ids"], data.store.train["labels"]
    assert ids.lengths.max() <= 60 and data.longest_answer == 20
    assert [labels[i][-1] for i in range(2)] == [data.tokenizer.eos_token_id] * 2
    if not apart:
        whole = "".join(text for text, _ in data.shown(0))
        assert whole.startswith("<|endoftext|>### User:\na red dog") and "### Assistant:\nin the green" in whole


def test_an_encoder_reads_the_source_as_its_tokenizer_makes_it(tokenizer, tmp_path):
    file = jsonl(tmp_path, [{"source": f"a red dog {i}", "target": f"no {i}"} for i in range(20)])
    data = opened(Pairs(path=str(file), tokenizer=str(tokenizer), prefix="Say: "), apart=True)
    source, target = (text for text, _ in data.shown(0))
    assert source.startswith("Say: a red dog") and target.startswith("no ") and target.endswith("<|endoftext|>")
    batch = next(iter(data.train_dataloader()))
    assert batch["labels"].shape[1] < batch["input_ids"].shape[1] + 8
    assert batch["input_ids"][0][: batch["prompt_lengths"][0]].tolist() == data.tokenizer(source)["input_ids"]


def test_a_conversation_of_many_turns_is_shortened_where_it_is_longest_or_told(tokenizer, tmp_path):
    turns = [{"role": role, "content": f"a red dog {i}"} for i in range(6) for role in ("user", "assistant")]
    turns[2]["content"] = "runs in the green park " * 20
    file = jsonl(tmp_path, [{"messages": turns}, {"messages": CHAT}])
    settings = {"path": str(file), "val_path": str(file), "tokenizer": str(tokenizer)}
    data = opened(Instructions(**settings, max_length=240))
    assert data.lengths.max() < 240 and data.store.about["cut"]["prompts"] == 2
    assert learnt(data)[-1] == "a red dog 5<|endoftext|>" and len(learnt(data)) == 6
    with pytest.raises(ValueError, match=r"rows.jsonl:1: what stands around its 11 messages alone has \d+ tokens"):
        opened(Instructions(**settings, max_length=60))
    data = opened(Instructions(**settings, max_length=60, on_bad_row="skip"))
    assert len(data.store.records("train")) == 1


def test_a_greeting_before_any_question_is_read_and_not_learnt(tokenizer, tmp_path):
    greeted = [{"role": "assistant", "content": "Hello!"}, *CHAT[1:]]
    file = jsonl(tmp_path, [{"messages": greeted}] * 2)
    data = opened(Instructions(path=str(file), val_path=str(file), tokenizer=str(tokenizer)))
    assert learnt(data) == ["yes<|endoftext|>", "no<|endoftext|>"] and "Hello!" in data.shown(0)[0][0]


def test_the_prompt_of_a_conversation_is_what_the_tokenizer_makes_of_it_as_a_whole(tokenizer, tmp_path):
    file = jsonl(tmp_path, [{"messages": CHAT}] * 2)
    data = opened(Instructions(path=str(file), val_path=str(file), tokenizer=str(tokenizer)))
    asked = data.tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=False)
    length = int(data.store.train["prompt_length"][0])
    assert data.store.train["input_ids"][0][:length].tolist() == asked


def test_a_column_that_only_some_rows_have_is_found(tokenizer, tmp_path):
    rows = [{"instruction": f"Say {i}", "output": "yes"} | ({"input": f"dog {i}"} if i else {}) for i in range(9)]
    file = jsonl(tmp_path, rows)
    data = opened(Instructions(path=str(file), val_path=str(file), tokenizer=str(tokenizer)))
    assert [record["input"] for record in data.asked[:2]] == ["Say 0", "Say 1\n\ndog 1"]


def test_line_ends_of_every_kind_stand_in_texts(tokenizer, tmp_path):
    rows = [{"source": f"dog\u2028{i}\x85", "target": "no\u2029"} for i in range(9)]
    file = jsonl(tmp_path, rows)
    data = opened(Pairs(path=str(file), val_path=str(file), tokenizer=str(tokenizer)))
    assert data.asked[3]["source"] == "dog\u20283\x85"


def test_quotes_in_tabbed_files_stand_for_themselves_unless_they_close_a_field(tokenizer, tmp_path):
    lines = [f"dog {i}\tHund {i}" for i in range(9)]
    lines[2], lines[5], lines[7] = 'dog 2\t"halb offen', 'dog 5\t"zu" gesagt', 'dog 7\t"ganz ""zu"""'
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    data = opened(Pairs(path=str(tmp_path / "a.tsv"), val_path=str(tmp_path / "a.tsv"), tokenizer=str(tokenizer)))
    targets = [record["references"][0] for record in data.asked]
    assert (
        len(targets) == 9 and targets[2] == '"halb offen' and targets[5] == '"zu" gesagt' and targets[7] == 'ganz "zu"'
    )


def test_the_same_bytes_under_another_suffix_are_other_examples(tokenizer, tmp_path):
    for suffix in ("csv", "tsv"):
        (tmp_path / f"a.{suffix}").write_text("".join(f"dog {i}, x\tHund {i}\n" for i in range(9)))
    sources = []
    for suffix in ("csv", "tsv"):
        file = str(tmp_path / f"a.{suffix}")
        sources.append(opened(Pairs(path=file, val_path=file, tokenizer=str(tokenizer))).asked[0]["source"])
    assert sources == ["dog 0", "dog 0, x"]


# Pairs in all forms


def test_two_files_whose_lines_belong_together_are_pairs(tokenizer, tmp_path):
    (tmp_path / "a.en").write_text("".join(f"dog {i}\n" for i in range(20)))
    (tmp_path / "a.de").write_text("".join(f"Hund {i}\n" for i in range(20)))
    data = opened(Pairs(path=f"{tmp_path}/a.en,{tmp_path}/a.de", tokenizer=str(tokenizer)), apart=True)
    records = data.store.records("train") + data.store.records("val")
    assert len(records) == 20
    assert all(record["references"] == [record["source"].replace("dog", "Hund")] for record in records)


def test_unequal_line_counts_are_told(tokenizer, tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\n")
    with pytest.raises(ValueError, match="a.en has 2 lines and .*a.de 1: they do not belong together"):
        opened(Pairs(path=f"{tmp_path}/a.en,{tmp_path}/a.de", tokenizer=str(tokenizer)))
    with pytest.raises(ValueError, match="a.en has lines only, and no file of targets beside it"):
        opened(Pairs(path=f"{tmp_path}/a.en", tokenizer=str(tokenizer)))


def test_an_empty_reference_is_told_or_counted(tokenizer, tmp_path):
    rows = [{"source": f"dog {i}", "target": "" if i == 3 else "Hund"} for i in range(30)]
    file = jsonl(tmp_path, rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:4: 'target' is empty; mend it, or .* --data.on_bad_row skip"):
        opened(Pairs(path=str(file), tokenizer=str(tokenizer)))
    data = opened(Pairs(path=str(file), tokenizer=str(tokenizer), on_bad_row="skip"))
    assert sum(data.skipped_rows.values()) == 1 and "1 bad rows" in data.plan()["skipped"]


def test_lists_are_sentences_of_a_source_and_several_right_targets_which_are_all_learnt(tokenizer, tmp_path):
    rows = [{"source": ["a red dog.", f"no {i}."], "target": ["yes", "no"]} for i in range(20)]
    file = jsonl(tmp_path, rows)
    data = opened(Pairs(path=str(file), tokenizer=str(tokenizer)))
    held_out = len(data.asked)
    assert data.asked[0]["references"] == ["yes", "no"] and data.asked[0]["source"].startswith("a red dog. no ")
    assert len(data.store.records("train")) == 2 * (20 - held_out)


def test_a_source_is_never_on_both_sides(tokenizer, tmp_path):
    rows = [{"source": f"dog {i % 10}", "target": f"Hund {i}"} for i in range(60)]
    data = opened(Pairs(path=str(jsonl(tmp_path, rows)), tokenizer=str(tokenizer), val_fraction=0.3))
    sides = [{record["source"] for record in data.store.records(split)} for split in ("train", "val")]
    assert all(sides) and not sides[0] & sides[1]


def test_both_languages_of_one_column_are_found_by_their_names(tokenizer, tmp_path):
    file = jsonl(tmp_path, [{"translation": {"en": f"dog {i}", "de": f"Hund {i}"}} for i in range(20)])
    columns = {"source_column": "en", "target_column": "de"}
    data = opened(Pairs(path=str(file), tokenizer=str(tokenizer), **columns), apart=True)
    assert data.asked[0]["source"].startswith("dog") and data.asked[0]["references"][0].startswith("Hund")
    with pytest.raises(ValueError, match="rows.jsonl:1: pass --data.target_column, one of: en, de"):
        opened(Pairs(path=str(file), tokenizer=str(tokenizer), source_column="en"), apart=True)


def test_a_table_without_a_header_is_source_and_target(tokenizer, tmp_path):
    (tmp_path / "a.tsv").write_text("".join(f"dog {i}\tHund {i}\n" for i in range(20)))
    data = opened(Pairs(path=str(tmp_path / "a.tsv"), tokenizer=str(tokenizer)))
    assert len(data.store.records("train")) + len(data.asked) == 20 and data.asked[0]["source"].startswith("dog")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "x", "output": None}, "'output' is null"),
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"instruction": "", "output": "y"}, "'instruction' is empty"),
        ({"messages": []}, "the conversation is no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message is by the assistant"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 is no text but int"),
    ],
)
def test_a_row_that_cannot_be_learnt_from_is_told_by_its_place(row, told, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"rows.jsonl:1: {told}"):
        opened(Instructions(path=str(jsonl(tmp_path, [row])), tokenizer=str(tokenizer)))


def test_a_column_that_is_not_there_is_told(tokenizer, tmp_path):
    file = jsonl(tmp_path, ANSWERED)
    with pytest.raises(ValueError, match="no column 'asked'; pass --data.source_column, one of: instruction"):
        opened(Instructions(path=str(file), tokenizer=str(tokenizer), source_column="asked"))
    with pytest.raises(ValueError, match="no column that is called like a target; pass --data.target_column"):
        opened(Instructions(path=str(jsonl(tmp_path, [{"instruction": "x"}], "b.jsonl")), tokenizer=str(tokenizer)))


def test_a_data_set_of_the_hub_is_read_with_its_validation_split(tokenizer, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    rows = {
        split: Dataset.from_list([{"translation": {"en": f"dog {i}", "de": f"Hund {i}"}} for i in range(count)])
        for split, count in (("train", 20), ("validation", 5))
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: DatasetDict(rows))
    monkeypatch.setattr("datamodules.hub.is_within_reach", lambda: True)
    columns = {"source_column": "en", "target_column": "de"}
    data = opened(Pairs(path="owner/pairs", tokenizer=str(tokenizer), cache_dir=str(tmp_path), **columns), apart=True)
    assert len(data.store.records("train")) == 20 and len(data.asked) == 5


# Order


def test_few_held_out_examples_are_spread_over_all_lengths(tokenizer, tmp_path):
    rows = [{"source": "dog " * (1 + i % 40), "target": f"no {i}"} for i in range(400)]
    file = jsonl(tmp_path, rows)
    settings = {"path": str(file), "val_path": str(file), "tokenizer": str(tokenizer), "val_batch_size": 8}
    data = opened(Pairs(**settings, max_val_examples=40))
    seen = np.concatenate([batch["rows"] for batch in data.val_dataloader()])
    assert len(set(seen.tolist())) == 40 and max(seen) > 300 and min(seen) < 100
    batches = list(opened(Pairs(**settings)).val_dataloader())
    assert sorted(row for batch in batches for row in batch["rows"].tolist()) == list(range(400))
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert max(widths[:10]) > 1.5 * min(widths[:10])
