"""Spans that answer questions: over windows, batches and ranks as by a plain search, none where there is none."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForQuestionAnswering

from lightning_modules.question_answering import squad_scores
from tests.finetuning import as_command, refused, run, squad


@pytest.fixture(scope="session")
def reader(tmp_path_factory, word_pieces) -> Path:
    """A pretrained encoder, with weights as large as trained ones."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = AutoTokenizer.from_pretrained(word_pieces)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **small))
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[False, True], ids=["1.1", "2.0"])
def questions(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    for name, articles in (("train", 12), ("val", 9)):
        (folder / f"{name}.json").write_text(json.dumps(squad(articles, 40, unanswerable=request.param)))
    return folder


def flags_of(folder: Path, reader: Path, questions: Path, **flags: object) -> list[str]:
    chosen = {
        "config": "recipes/finetune_question_answering.yaml",
        "model.from": reader,
        "data.path": questions / "train.json",
        "data.val_path": questions / "val.json",
        "data.max_length": 60,
        "data.stride": 16,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_time": "null",
        "trainer.max_epochs": 1,
        "trainer.default_root_dir": folder,
    } | flags
    return [f"--{name}={value}" for name, value in chosen.items()]


def predictions(folder: Path, name: str = "predictions") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def by_hand(network, tokenizer, question: str, context: str, may_be_none: bool) -> str:
    """The best span over all windows by trying each of them."""
    windows = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=60,
        stride=16,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, none = (-1e9, ""), 1e9
    for i, ids in enumerate(windows["input_ids"]):
        types = torch.tensor([windows["token_type_ids"][i]])
        with torch.no_grad():
            out = network(torch.tensor([ids]), token_type_ids=types)
        starts, ends = out.start_logits[0], out.end_logits[0]
        none = min(none, float(starts[0] + ends[0]))
        inside = [place for place, part in enumerate(windows.sequence_ids(i)) if part == 1]
        offsets = windows["offset_mapping"][i]
        for a in inside:
            for b in inside:
                if a <= b < a + 30:
                    best = max(best, (float(starts[a] + ends[b]), context[offsets[a][0] : offsets[b][1]]))
    return "" if may_be_none and none > best[0] else best[1]


def test_an_answer_is_the_best_span_of_all_windows_as_plain_transformers_has_it(reader, questions, tmp_path):
    run("fit", *flags_of(tmp_path, reader, questions))
    may_be_none = json.loads((questions / "train.json").read_text())["version"] == "v2.0"
    network = BertForQuestionAnswering.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = predictions(tmp_path)
    assert len(rows) == 9 * (4 if may_be_none else 3)
    for row in rows:
        assert row["prediction"] == by_hand(network, tokenizer, row["question"], row["context"], may_be_none)
        assert (row["exact_match"], row["score"]) == pytest.approx(
            squad_scores(row["prediction"], row["references"]), abs=1e-6
        )
        assert sum(row["probabilities"].values()) <= 1.0001
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_f1"] == pytest.approx(100 * sum(row["score"] for row in rows) / len(rows))
    assert ("val_no_answer_accuracy" in summary) == may_be_none


def test_batches_and_ranks_find_the_same_answers(reader, questions, tmp_path):
    """Windows of one question lie in several batches, and on several ranks."""
    found = []
    for name, flags in (
        ("one", {"data.val_batch_size": 3, "trainer.accumulate_grad_batches": 2}),
        ("two", {"data.val_batch_size": 5, "trainer.devices": 2, "trainer.strategy": "ddp"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        flags |= {"trainer.max_steps": 3, "trainer.val_check_interval": 3 * (2 if name == "one" else 1)}
        assert as_command(folder, flags_of(folder, reader, questions, **flags)) == 0
        summary = json.loads((folder / "summary.json").read_text())
        found.append([row["prediction"] for row in predictions(folder)] + [round(summary["val_f1"], 6)])
        found[-1] += [round(summary["val_loss"], 5)]
    assert found[0] == found[1]


def test_questions_of_new_files_are_answered(reader, questions, tmp_path, monkeypatch):
    run("fit", *flags_of(tmp_path, reader, questions, **{"trainer.max_steps": 2, "trainer.val_check_interval": 2}))
    (tmp_path / "asked.jsonl").write_text('{"question": "Which?", "context": "red stone, green castle"}\n')
    monkeypatch.chdir(tmp_path)
    run("predict", "--config", "config.yaml", "--ckpt_path=last", "--data.predict_path=asked.jsonl")
    (row,) = predictions(tmp_path, "predictions_new")
    assert row["prediction"] in row["context"] and "score" not in row and row["question"] == "Which?"


def test_a_decoder_is_refused(decoder, questions, tmp_path, capsys):
    told = refused(capsys, *flags_of(tmp_path, decoder, questions))
    assert f"--model.from {decoder}: LlamaConfig is no encoder with an AutoModelForQuestionAnswering" in told
