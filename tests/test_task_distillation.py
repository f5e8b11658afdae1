"""A teacher for labels, spans and answers: what is matched by transformers alone, on each kind of data."""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from datamodules.instructions import Instructions
from datamodules.labelled import Labelled
from datamodules.pairs import Pairs
from datamodules.spans import Spans
from lightning_modules.adapter import Adapter
from lightning_modules.inner_signals import InnerSignals
from lightning_modules.losses import IGNORED
from lightning_modules.on_policy import OnPolicy
from lightning_modules.student import PartOfTeacher
from lightning_modules.task_distillation import (
    ClassificationDistillation,
    QuestionAnsweringDistillation,
    TextGenerationDistillation,
    TranslationDistillation,
)
from tests.distilling import SMALL, refused, run, started
from tests.finetuning import pretrained, sentences, squad

TINY_BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROOT = Path(__file__).parents[1]
YAMLS = {"one": "distill_sentiment", "spans": "distill_question_answering", "pairs": "distill_translation"}
ALL = InnerSignals(hidden=1.0, embeddings=1.0, cosine=1.0, attention=1.0, relations=1.0)


def labels_of(kind: str, text: str, label: str) -> object:
    return {"one": label, "several": [label, "long"], "number": len(text) / 100}[kind]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Texts with labels of each kind, spans, translations and answers."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    texts = sentences(80)
    for kind in ("one", "several", "number"):
        rows = [{"text": text, "label": labels_of(kind, text, label)} for text, label in texts]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "squad.json").write_text(json.dumps(squad(12, 40, unanswerable=True)))
    words = ("the", "film", "was", "and", "its", "end")
    pairs = [[rng.choice(words) for _ in range(rng.randrange(2, 8))] for _ in range(60)]
    rows = [{"source": " ".join(row), "target": " ".join(reversed(row))} for row in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"instruction": row["source"], "output": row["target"]} for row in rows]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, data, word_pieces) -> dict[str, Path]:
    """Of each task, with weights as large as trained ones."""
    found, folder = {}, tmp_path_factory.mktemp("teachers")
    encoder, decoder = pretrained(folder / "encoder", "masked"), pretrained(folder / "decoder", "causal")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    names = {"one": ["bad", "good"], "several": ["bad", "good", "long"], "number": ["LABEL_0"]}
    problems = ("single_label_classification", "multi_label_classification", "regression")
    for (kind, labels), problem in zip(names.items(), problems, strict=True):
        torch.manual_seed(0)
        config = BertConfig.from_pretrained(encoder, id2label=dict(enumerate(labels)), problem_type=problem)
        network = BertForSequenceClassification.from_pretrained(encoder, config=config)
        network.classifier.weight.data.normal_(0, 1)
        found[kind] = folder / kind
        network.save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    pieces = AutoTokenizer.from_pretrained(word_pieces)
    torch.manual_seed(0)
    network = BertForQuestionAnswering(
        BertConfig(vocab_size=len(pieces), initializer_range=0.3, **(TINY_BERT | {"num_hidden_layers": 2}))
    )
    found["spans"] = folder / "spans"
    for part in (network, pieces):
        part.save_pretrained(found["spans"])
    found["answers"] = decoder
    causal = AutoTokenizer.from_pretrained(decoder)
    start = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": causal.eos_token_id}
    torch.manual_seed(0)
    network = AutoModelForSeq2SeqLM.from_config(
        T5Config(
            vocab_size=len(causal), d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, dropout_rate=0.1, **start
        )
    )
    found["pairs"] = folder / "pairs"
    for part in (network, causal):
        part.save_pretrained(found["pairs"])
    return found


MODULES = {
    "one": ClassificationDistillation,
    "several": ClassificationDistillation,
    "number": ClassificationDistillation,
    "spans": QuestionAnsweringDistillation,
    "answers": TextGenerationDistillation,
    "pairs": TranslationDistillation,
}


def data_of(kind: str, data: Path):
    common = {"batch_size": 4, "val_fraction": 0.2}
    if kind == "spans":
        return Spans(path=str(data / "squad.json"), max_length=60, stride=16, **common)
    if kind == "pairs":
        return Pairs(path=str(data / "pairs.jsonl"), **common)
    if kind == "answers":
        return Instructions(path=str(data / "answers.jsonl"), **common)
    return Labelled(path=str(data / f"{kind}.jsonl"), **common)


def small(kind: str):
    if kind == "answers":
        return LlamaConfig(**SMALL)
    if kind == "pairs":
        return T5Config(d_model=16, d_ff=32, d_kv=8, num_heads=2, num_layers=1)
    return BertConfig(**TINY_BERT)


def opened(kind: str, data: Path, teachers: dict[str, Path], **settings: object):
    settings = {"student": small(kind), "teacher": str(teachers[kind])} | settings
    module, batch = started(MODULES[kind](**settings), data_of(kind, data))
    module.network.eval()
    for teacher in module.teachers:
        if teacher.network is not None:
            teacher.network.float()
    return module, batch


@pytest.mark.parametrize("kind", MODULES)
def test_a_student_that_is_its_teacher_has_no_loss(kind, data, teachers):
    module, batch = opened(kind, data, teachers, student=str(teachers[kind]), teacher="self", inner=ALL)
    objective, nats, count, divergence, inner = module.training_loss(batch, 1.0)
    assert float(nats) > 0 and int(count) > 0
    assert abs(float(divergence)) < 2e-3 * int(count) and abs(float(inner)) < 2e-3 * int(count)
    assert abs(float(objective)) < 4e-3 * int(count)


@pytest.mark.parametrize("kind", MODULES)
def test_without_its_weight_it_is_fine_tuning(kind, data, teachers):
    module, batch = opened(kind, data, teachers, hard_weight=1.0)
    objective, nats, count, _ = module.training_loss(batch, 2.0)
    assert [float(x) for x in (objective, nats, count)] == [float(x) for x in module.loss(batch, 2.0)]
    assert module.teachers[0].network is None


@pytest.mark.parametrize("kind", MODULES)
def test_what_is_matched_is_what_transformers_gives(kind, data, teachers):
    """Example by example; and the labels' own loss is that of fine-tuning."""
    module, batch = opened(kind, data, teachers, temperature=2.0, hard_weight=0.25)
    objective, nats, count, divergence = module.training_loss(batch, 1.0)
    _, expected_nats, expected_count = module.loss(batch)
    assert float(nats) == pytest.approx(float(expected_nats), rel=1e-4) and int(count) == int(expected_count)
    teacher, student = module.teachers[0].network, module.network
    with torch.no_grad():
        expected = sum(direct(kind, {n: v[i : i + 1] for n, v in batch.items()}, teacher, student) for i in range(4))
    assert float(divergence) == pytest.approx(float(expected), rel=2e-3)
    squared = 1.0 if kind == "number" else 4.0
    assert float(objective) == pytest.approx(0.75 * squared * float(divergence) + 0.25 * float(nats), rel=1e-4)


def direct(kind: str, row: dict, teacher, student) -> torch.Tensor:
    """KL at temperature 2 of one example, by transformers and torch alone."""
    length = int(row["attention_mask"].sum())
    inputs = {name: row[name][:, :length] for name in ("input_ids", "attention_mask")}
    if kind == "answers":
        p, q = (model(row["input_ids"]).logits[0] for model in (teacher, student))
        keep = row["labels"][0] != IGNORED
        return kl(p[keep], q[keep])
    if kind == "pairs":
        labels = row["labels"][:, : int((row["labels"] != IGNORED).sum())]
        p, q = (model(**inputs, labels=labels).logits[0] for model in (teacher, student))
        return kl(p, q)
    if "token_type_ids" in row:
        inputs["token_type_ids"] = row["token_type_ids"][:, :length]
    found = [model(**inputs) for model in (teacher, student)]
    if kind == "spans":
        begin, end = row["contexts"][0].tolist()
        places = [0, *range(begin, end)]
        return sum(kl(*(model[name][:, places] for model in found)) for name in ("start_logits", "end_logits"))
    p, q = (model.logits for model in found)
    if kind == "number":
        return (p - q).square().sum()
    if kind == "several":
        return kl(*(torch.stack([torch.zeros_like(x), x], -1).flatten(0, 1) for x in (p, q)))
    return kl(p, q)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div((q / 2).log_softmax(-1), (p / 2).softmax(-1), reduction="sum")


@pytest.mark.parametrize("kind", MODULES)
def test_a_batch_is_the_sum_of_its_rows(kind, data, teachers):
    module, batch = opened(kind, data, teachers, inner=ALL, hard_weight=0.5)
    whole = [float(x) for x in module.training_loss(batch, 1.0)]
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(4)]
    parts = [[float(x) for x in module.training_loss(row, 1.0)] for row in rows]
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("kind", MODULES)
def test_a_row_that_only_evens_out_the_ranks_counts_for_nothing(kind, data, teachers):
    module, batch = opened(kind, data, teachers, inner=ALL)
    before = [float(x) for x in module.training_loss({n: v[:3] for n, v in batch.items()}, 1.0)]
    batch["rows"][3] = -1
    if batch["labels"].ndim > 1 and kind != "several":
        batch["labels"][3] = IGNORED
    assert [float(x) for x in module.training_loss(batch, 1.0)] == pytest.approx(before, rel=1e-4)


def test_a_teachers_labels_may_stand_in_another_order(data, teachers, tmp_path):
    plain, batch = opened("one", data, teachers)
    expected = float(plain.training_loss(batch, 1.0)[3])
    shutil.copytree(teachers["one"], tmp_path / "other")
    network = AutoModelForSequenceClassification.from_pretrained(teachers["one"])
    for part in (network.classifier.weight, network.classifier.bias):
        part.data.copy_(part.data.flip(0))
    network.config.id2label, network.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    network.save_pretrained(tmp_path / "other")
    other, _ = opened("one", data, teachers | {"one": tmp_path / "other"})
    assert float(other.training_loss(batch, 1.0)[3]) == pytest.approx(expected, rel=1e-4)
    ours, theirs = (module.logits(batch, module.teachers[0].network) for module in (other, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # as validation reads it for the table
    for student in (PartOfTeacher([0, 1]), str(tmp_path / "other")):
        begun, _ = opened("one", data, teachers | {"one": tmp_path / "other"}, student=student)
        assert abs(float(begun.training_loss(batch, 1.0)[3])) < 2e-3 * 4  # its head has the data's order


def test_a_student_folder_with_another_tokenizer_is_refused(data, teachers, tmp_path):
    shutil.copytree(teachers["one"], tmp_path / "other")
    pretrained(tmp_path / "words", "causal")
    for file in (tmp_path / "words").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    with pytest.raises(ValueError, match="has another tokenizer than its teacher"):
        opened("one", data, teachers, student=str(tmp_path / "other"))


def test_a_student_with_an_adapter_stands_in_the_table(data, teachers, tmp_path):
    flags = {"model.student": teachers["one"], "model.adapter.rank": 2, "comparison.control": False}
    run("fit", *flags_of("one", tmp_path, data, teachers, **flags))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["comparison"]["student"]["accuracy"] == pytest.approx(summary["val_accuracy"])


def test_two_equal_teachers_are_one(data, teachers):
    one, batch = opened("one", data, teachers)
    two, _ = opened("one", data, teachers, teacher=[str(teachers["one"])] * 2)
    found = [float(module.training_loss(batch, 1.0)[3]) for module in (one, two)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["one", "spans", "answers", "pairs"])
def test_layers_of_the_teacher_bring_its_head(kind, data, teachers):
    module, batch = opened(kind, data, teachers, student=PartOfTeacher([0, 1]))
    whole = module.teachers[0].read().state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in module.network.state_dict().items())
    assert abs(float(module.training_loss(batch, 1.0)[3])) < 2e-3 * int(module.label_count(batch))


@pytest.mark.parametrize("kind", ["one", "answers"])
def test_an_adapter_learns_from_the_inside_of_a_teacher(kind, data, teachers):
    adapter = Adapter(rank=2, target_modules="all-linear")
    module, batch = opened(kind, data, teachers, student=str(teachers[kind]), adapter=adapter, inner=ALL)
    objective, *_, inner = module.training_loss(batch, 1.0)
    assert float(inner) < 2e-3 * int(module.label_count(batch))  # it begins as its teacher
    objective.backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in trained) and not any("teacher" in name for name in trained)


# What a student writes


@pytest.mark.parametrize("kind", ["answers", "pairs"])
def test_a_student_answers_up_to_the_end(kind, data, teachers):
    module, batch = opened(kind, data, teachers, on_policy=OnPolicy(share=1.0))
    ends = set(range(0, module.vocabulary, 4))  # so that some end early
    module.network.generation_config.eos_token_id = sorted(ends)
    written, is_own_N = module.written(batch)
    labels = written["labels"]
    assert is_own_N.all() and len(is_own_N) == int((labels != IGNORED).sum())
    lengths = (labels != IGNORED).sum(-1)
    assert (lengths > 0).all()
    longest, ended = module.trainer.datamodule.longest_answer, []
    for i in range(4):
        answer = labels[i][labels[i] != IGNORED].tolist()
        ended.append(answer[-1] in ends)
        assert not ends & set(answer[:-1]) and (ended[-1] or len(answer) == longest)
        if kind == "answers":
            length = int(batch["prompt_lengths"][i])
            whole = written["input_ids"][i, : length + len(answer) - 1].tolist()
            assert whole == batch["input_ids"][i, :length].tolist() + answer[:-1]
            assert (labels[i, : length - 1] == IGNORED).all() and labels[i, length - 1] == answer[0]
    assert any(ended) and len(set(lengths.tolist())) > 1
    filler = {name: value[2:3] for name, value in batch.items()} | {"rows": torch.tensor([-1])}  # evens out the ranks
    assert module.written(filler)[1] is None
    one, _ = module.written({name: value[1:2] for name, value in batch.items()})
    assert one["labels"][0][one["labels"][0] != IGNORED].tolist() == labels[1][labels[1] != IGNORED].tolist()
    objective, _, count, divergence = module.training_loss(batch, 1.0)
    assert int(count) == len(is_own_N) and float(objective) == pytest.approx(float(divergence), rel=1e-5)


def test_the_room_for_an_answer_is_a_rows_own_and_that_of_both_models(data, teachers):
    """Prompts of several lengths before a student of few positions: alone as together."""
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=256)
    module, _ = opened("answers", data, teachers, student=config, on_policy=OnPolicy(share=1.0))
    batch = next(iter(module.trainer.datamodule.batches_in_order(0, 4)))
    longest, lengths_B = module.trainer.datamodule.longest_answer, batch["prompt_lengths"]
    module.positions = int(lengths_B.max()) + 1  # two new tokens behind the longest prompt
    for limit in ("student", "teacher"):
        if limit == "teacher":
            module.positions, module.teachers[0].positions = None, module.positions
        whole, _ = module.written(batch)
        room_B = (int(lengths_B.max()) + 2 - lengths_B).clamp(max=longest)
        assert len(room_B.unique()) > 1 and whole["input_ids"].shape[1] >= int(lengths_B.max())
        for i in range(4):
            answer = whole["labels"][i][whole["labels"][i] != IGNORED].tolist()
            one, _ = module.written({name: value[i : i + 1] for name, value in batch.items()})
            assert one["labels"][0][one["labels"][0] != IGNORED].tolist() == answer and 0 < len(answer) <= room_B[i]


# Runs


def flags_of(kind: str, folder: Path, data: Path, teachers: dict[str, Path], **flags: object) -> list[str]:
    file = {"spans": "squad.json", "pairs": "pairs.jsonl", "answers": "answers.jsonl"}.get(kind, f"{kind}.jsonl")
    chosen = {
        "config": ROOT / "recipes" / f"{YAMLS[kind]}.yaml",
        "model": MODULES[kind].__name__,
        "model.teacher": teachers[kind],
        "data.path": data / file,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_epochs": 1,
        "trainer.val_check_interval": 1.0,
        "trainer.default_root_dir": folder,
    } | flags
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def test_a_run_of_labels_ends_with_teacher_control_and_student(data, teachers, tmp_path, capsys):
    student = {f"model.student.{name}": value for name, value in TINY_BERT.items()}
    run("fit", *flags_of("one", tmp_path, data, teachers, **student, **{"model.inner.hidden": 1}))
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["comparison"]
    assert list(found) == [str(teachers["one"]), "student", "without teacher"]
    assert found["student"]["accuracy"] == pytest.approx(summary["val_accuracy"]) and summary["inner"] != "none"
    assert found["student"]["nats"] == pytest.approx(summary["val_loss"], rel=1e-5)
    control = json.loads((tmp_path / "control" / "summary.json").read_text())
    assert found["without teacher"]["accuracy"] == pytest.approx(control["val_accuracy"])
    assert "gap recovered" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["data"]["init_args"]["val_fraction"] == 0.1  # its own default, not another kind of data's
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert network.config.hidden_size == 16 and network.config.id2label == {0: "bad", 1: "good"}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(summary["val_accuracy"])


@pytest.mark.parametrize("kind", ["one", "spans", "pairs"])
def test_every_named_run_trains_beside_its_teacher_and_on_what_is_inside_it(kind, data, teachers, tmp_path, capsys):
    few = {"trainer.max_epochs": -1, "trainer.max_steps": 3, "trainer.val_check_interval": 3, "data.val_fraction": 0.2}
    more = {"one": {f"model.student.{name}": value for name, value in TINY_BERT.items()}}
    more["spans"] = more["one"] | {"data.max_length": 60, "data.stride": 16}
    more["pairs"] = {"model.student.teacher_layers": "[1]", "model.on_policy.share": 0.5}
    flags = {"model.inner.hidden": 1, "model.inner.relations": 1, "comparison.control": False} | few | more[kind]
    run("fit", *flags_of(kind, tmp_path, data, teachers, **flags))
    summary = json.loads((tmp_path / "summary.json").read_text())
    metric = {"one": "accuracy", "spans": "f1", "pairs": "bleu"}[kind]
    assert summary["steps"] == 3 and summary["comparison"]["student"][metric] == summary[f"val_{metric}"]
    assert (ROOT / "recipes" / f"{YAMLS[kind]}.yaml").read_text().startswith("# ")
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("from layers 1 of its teacher" in card) == (kind == "pairs") != ("from new weights" in card)
    if kind == "spans":  # the one whose last line is a command of ours
        (command,) = re.findall(r"python recipes/(distill.py .*) …", capsys.readouterr().out)
        script, *words = shlex.split(command)
        run(*words, str(data / "squad.json"), script=ROOT / "recipes" / script)
        assert "48 rows in" in capsys.readouterr().out


def test_a_teacher_of_other_labels_or_without_them_is_one_line(data, teachers, tmp_path, capsys):
    assert "has the labels bad, good, long, the data bad, good" in refused(
        capsys, *flags_of("one", tmp_path / "a", data, teachers, **{"model.teacher": teachers["several"]})
    )
    encoder = teachers["one"].parent / "encoder"
    assert "is a BertForMaskedLM, no AutoModelForSequenceClassification" in refused(
        capsys, *flags_of("one", tmp_path / "b", data, teachers, **{"model.teacher": encoder})
    )


def test_a_teacher_of_another_kind_of_labels_is_refused(data, teachers, tmp_path):
    """Whose outputs mean something else, however many they are."""
    with pytest.raises(ValueError, match="is of single_label_classification, and the data are of regression"):
        opened("number", data, teachers, teacher=str(teachers["one"]))
    network = AutoModelForSequenceClassification.from_pretrained(teachers["one"], problem_type=None)
    shutil.copytree(teachers["one"], tmp_path / "two")
    network.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="is of 2 labels, and the data are of regression"):
        opened("number", data, teachers, teacher=str(tmp_path / "two"))
    network.config.problem_type = "multi_label_classification"
    network.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="is of multi_label_classification, and the data are of single_label"):
        opened("one", data, teachers, teacher=str(tmp_path / "two"))


def test_a_teacher_with_fewer_positions_than_padded_examples_is_refused(data, teachers, tmp_path):
    config = BertConfig.from_pretrained(teachers["one"], max_position_embeddings=30)
    for part in (BertForSequenceClassification(config), AutoTokenizer.from_pretrained(teachers["one"])):
        part.save_pretrained(tmp_path)
    labelled = Labelled(path=str(data / "one.jsonl"), max_length=28, batch_size=4, val_fraction=0.2)
    with pytest.raises(ValueError, match="28 tokens, 32 when it is padded, and --model.teacher .* 30 positions"):
        started(ClassificationDistillation(student=small("one"), teacher=str(tmp_path)), labelled)


def test_a_run_goes_on_with_the_student_that_it_began_with(data, teachers, tmp_path, capsys):
    student = {f"model.student.{name}": value for name, value in TINY_BERT.items()}
    short = {"trainer.max_epochs": -1, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    more = {"comparison.control": False, "ckpt_path": "last"}
    run("fit", *flags_of("one", tmp_path, data, teachers, **student, **short, **more))
    other = student | short | more | {"model.student.hidden_size": 8, "trainer.max_steps": 4}
    assert "the checkpoint has hidden_size 16, this run 8" in refused(
        capsys, *flags_of("one", tmp_path, data, teachers, **other)
    )


def test_without_a_teacher_it_says_so(data, teachers, tmp_path, capsys, monkeypatch):
    flags = flags_of("one", tmp_path, data, teachers, **{"model.teacher": None})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "damaged").mkdir(parents=True)
    (tmp_path / "runs" / "damaged" / "summary.json").write_text("{")
    assert "no run in runs/ could be the teacher" in refused(capsys, *flags)


@pytest.mark.parametrize("layers", [True, False])
def test_a_teacher_that_is_not_there_is_told_by_its_flag(layers, data, teachers, tmp_path, capsys):
    flags = {"model.teacher": "none-of-that-name", "model.student.teacher_layers": "[0]" if layers else None}
    told = refused(capsys, *flags_of("one", tmp_path, data, teachers, **flags))
    assert "--model.teacher none-of-that-name is no model's folder" in told


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("spans", {"divergence": "mse"}, "take forward_kl"),
        ("one", {"label_smoothing": 0.1}, "--model.label_smoothing is not for"),
        ("pairs", {"label_smoothing": 0.1}, "--model.label_smoothing is not for"),
        ("one", {"class_weights": {"bad": 2.0}}, "--model.class_weights is not for"),
        ("one", {"teacher": "self"}, "the student is no folder"),
        ("one", {"on_policy": OnPolicy()}, "is for what is written"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, settings, told, data, teachers):
    with pytest.raises(ValueError, match=told):
        opened(kind, data, teachers, **settings)


# What a teacher writes


@pytest.mark.parametrize("kind", ["answers", "pairs"])
def test_a_teacher_writes_its_answers_and_goes_on_where_it_was_cut(kind, data, teachers, tmp_path, capsys):
    name = {"answers": "answers", "pairs": "pairs"}[kind]
    common = [
        f"--model={MODULES[kind].__name__}",
        f"--model.teacher={teachers[kind]}",
        f"--model.student={teachers[kind]}",
    ]
    common += [f"--data={'Pairs' if kind == 'pairs' else 'Instructions'}", f"--data.path={data / f'{name}.jsonl'}"]
    common += [
        "--data.val_fraction=0.2",
        "--data.batch_size=8",
        "--model.max_new_tokens=6",
        "--trainer.accelerator=cpu",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("write", f"--folder={whole}", *common)
    shutil.copytree(whole, cut)
    lines = (whole / "train.jsonl").read_text()
    place = len("".join(lines.splitlines(keepends=True)[:16]).encode())
    (cut / "progress.json").write_text(json.dumps({"rows": 16, "bytes": place}))
    (cut / "train.jsonl").write_text(lines[: place + 60])  # in the middle of a line
    run("write", f"--folder={cut}", *common)
    assert (cut / "train.jsonl").read_text() == lines
    rows = [json.loads(line) for line in lines.splitlines()]
    held_out = [json.loads(line) for line in (whole / "val.jsonl").read_text().splitlines()]
    assert len(rows) + len(held_out) == 60
    module, _ = opened(kind, data, teachers, max_new_tokens=6)
    stored = module.trainer.datamodule.store.records("train")
    with module.with_network(module.teachers[0].network):
        batch = next(iter(module.trainer.datamodule.batches_in_order(5, 6)))
        answer = module.write(batch)[0][0]
    if kind == "pairs":
        assert rows[5] == {"source": stored[5]["source"], "target": [answer]}
        assert held_out[0]["target"] == [" ".join(reversed(held_out[0]["source"].split()))]
    else:
        assert rows[5]["messages"][-1] == {"role": "assistant", "content": answer}
    for flags, told in (
        ("--rows=3", "another rows"),
        ("--model.num_beams=2", "another num_beams"),
        ("--rows=99", "99;"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("write", f"--folder={cut}", *common, flags)
        assert stop.value.code == 2 and told in capsys.readouterr().err


def test_what_does_not_write_is_one_line(data, teachers, tmp_path, capsys):
    flags = ["--config=recipes/distill_sentiment.yaml", f"--model.teacher={teachers['one']}"]
    with pytest.raises(SystemExit) as stop:
        run("write", f"--folder={tmp_path / 'w'}", *flags, f"--data.path={data / 'one.jsonl'}")
    assert stop.value.code == 2 and "does not write" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run("cache", f"--folder={tmp_path / 'w'}", *flags, f"--data.path={data / 'one.jsonl'}")
    assert stop.value.code == 2 and "a cache is of the words of a text" in capsys.readouterr().err
