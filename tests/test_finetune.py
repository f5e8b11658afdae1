"""Fine-tuning to labels: the same step however it is cut, the same model wherever it is loaded."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    RobertaConfig,
    T5Config,
    pipeline,
)

from datamodules.labelled import Labelled
from lightning_modules import checkpoint_io
from lightning_modules.adapter import Adapter
from lightning_modules.classification import Classification
from lightning_modules.finetune import FineTune, starting_folder
from lightning_modules.model_folder import max_positions
from tests.faults import signal_at, state
from tests.finetuning import as_command, refused, run, sentences


def flags_of(folder: Path, reviews: Path, model: Path, **flags: object) -> list[str]:
    chosen = {
        "model.from": model,
        "model.optimizer.lr": 2e-3,
        "data.path": reviews / "train.csv",
        "data.val_path": reviews / "val.csv",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_time": "null",
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
    } | flags
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def fit(folder: Path, *arguments: object, **flags: object) -> dict:
    run("fit", *flags_of(folder, *arguments, **flags))
    return json.loads((folder / "summary.json").read_text())


# From a file to a model folder


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_run_learns_what_a_good_review_is_and_its_folder_says_it_in_a_plain_pipeline(
    kind, reviews, tmp_path, request, capsys
):
    summary = fit(tmp_path, reviews, request.getfixturevalue(kind), **{"trainer.max_epochs": 6})
    assert summary["val_accuracy"] > 0.9 and summary["steps"] == 150
    assert "labels" in capsys.readouterr().out
    classify = pipeline("text-classification", str(tmp_path / "model"))
    texts, labels = zip(*sentences(60, seed=1), strict=True)
    right = sum(answer["label"] == label for answer, label in zip(classify(list(texts)), labels, strict=True))
    assert right > 50
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 81 and [line["row"] for line in lines] == list(range(81))
    assert sum(line["score"] for line in lines) / 81 == pytest.approx(summary["val_accuracy"], abs=1e-6)
    assert all(line["score"] == (line["prediction"] == line["label"]) for line in lines)


def test_a_validation_leaves_what_it_found_where_it_is_told_to(reviews, encoder, tmp_path, monkeypatch):
    summary = fit(tmp_path / "run", reviews, encoder, **{"trainer.max_steps": 30, "trainer.val_check_interval": 30})
    monkeypatch.chdir(tmp_path)
    config = ["--config", str(tmp_path / "run" / "config.yaml"), "--model.from", str(tmp_path / "run")]
    before = {file.name for file in tmp_path.iterdir()}
    run("validate", *config, "--trainer.default_root_dir", str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == before  # nothing in the working folder
    for verb in ("validate", "test"):
        run(verb, *config, "--trainer.default_root_dir", str(tmp_path / verb))
        found = json.loads((tmp_path / verb / "metrics.json").read_text())
        assert found["by"] == "accuracy" and found["more_is_better"]
        expected = {name.removeprefix("val_"): v for name, v in summary.items() if name in ("val_accuracy", "val_loss")}
        assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-5)
        lines = [json.loads(line) for line in (tmp_path / verb / "predictions.jsonl").read_text().splitlines()]
        assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(summary["val_accuracy"], abs=1e-6)


def test_without_any_model_or_text_new_weights_learn_functions_of_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"model.architecture.hidden_size": 16, "model.architecture.intermediate_size": 32}
    small |= {"trainer.max_steps": 2, "trainer.max_epochs": None, "trainer.val_check_interval": 2}
    no_data = {"model.from": None, "data.path": None, "data.val_path": None}
    fit(tmp_path, tmp_path, tmp_path, **small, **no_data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    labels = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").config.id2label
    assert len(tokenizer) > 1000 and len(labels) == 6 and "asyncio" in labels.values()


def test_without_from_the_newest_run_with_such_a_head_is_taken(encoder, reviews, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model").symlink_to(encoder)
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "out", reviews, None, **{"trainer.max_steps": 2, "trainer.val_check_interval": 2})
    assert "from      runs/mine/model" in capsys.readouterr().out
    # What fine-tuning left is newer, and no beginning: the same command is the same run.
    (tmp_path / "runs" / "tuned").symlink_to(tmp_path / "out")
    (tmp_path / "runs" / "broken" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "model" / "config.json").write_text("{")
    assert starting_folder(None, Classification.auto_class_of) == "runs/mine/model"
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "from: null" in config and "from_:" not in config


@pytest.mark.parametrize("rank", [None, 4])
def test_a_yaml_says_from_as_the_command_line_does(rank, encoder, reviews, tmp_path):
    """And so does the config that a run leaves."""
    first = fit(tmp_path / "a", reviews, encoder, **{"model.adapter.rank": rank, "trainer.max_epochs": 1})
    run("fit", "--config", str(tmp_path / "a" / "config.yaml"), f"--trainer.default_root_dir={tmp_path / 'b'}")
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["val_loss"] == first["val_loss"]


# Adapters


def network_of(encoder: Path, reviews: Path, **settings: object):
    """A module with its network, and a batch."""
    from lightning.pytorch import Trainer

    from lightning_modules.classification import Classification

    data = Labelled(path=str(reviews / "train.csv"), val_path=str(reviews / "val.csv"), batch_size=16)
    module = Classification(from_=str(encoder), **settings)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = data
    data.trainer, trainer.strategy._lightning_module, module.trainer = trainer, module, trainer
    data.prepare_data()
    data.setup("fit")
    module.configure_model()
    module.network.eval()
    return module, next(iter(data.train_dataloader()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_begins_as_the_model_itself_and_is_merged_into_it(kind, encoder, reviews):
    from lightning_modules.adapter import Adapter

    plain, batch = network_of(encoder, reviews)
    adapted, _ = network_of(encoder, reviews, adapter=Adapter(kind, rank=4))
    with torch.no_grad():
        if kind == "lora":
            assert torch.equal(plain.logits(batch), adapted.logits(batch))
        torch.testing.assert_close(plain.logits(batch), adapted.logits(batch), rtol=0, atol=1e-5)
        trained = [name for name, p in adapted.network.named_parameters() if p.requires_grad]
        new = ("lora_", "classifier", "pooler")  # which a pretrained encoder lacks
        assert trained and all(any(part in name for part in new) for name in trained)
        for name, parameter in adapted.network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        merged = adapted.exported()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        moved = adapted.logits(batch)
        assert not torch.allclose(plain.logits(batch), moved, atol=1e-3)
        torch.testing.assert_close(merged(**inputs).logits, moved, rtol=0, atol=1e-5)


def test_a_run_with_an_adapter_leaves_an_ordinary_folder(encoder, reviews, tmp_path):
    flags = {"model.adapter.rank": 8, "model.optimizer.lr": 1e-2, "trainer.max_epochs": 6}
    summary = fit(tmp_path, reviews, encoder, **flags)
    assert summary["val_accuracy"] > 0.8
    classify = pipeline("text-classification", str(tmp_path / "model"))
    answers = classify(["lovely warm film", "dull grey film"])
    assert [answer["label"] for answer in answers] == ["good", "bad"]
    # The adapter alone, on the model it began with, whose new parts come at random: it has to bring its own.
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    inputs = AutoTokenizer.from_pretrained(encoder)("lovely warm film", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, classify.model(**inputs).logits, rtol=0, atol=1e-5)


def test_a_frozen_backbone_stays_as_it_was(encoder, reviews, tmp_path):
    fit(tmp_path, reviews, encoder, **{"model.freeze_backbone": True, "trainer.max_epochs": 1})
    before = BertForMaskedLM.from_pretrained(encoder).bert.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").bert.state_dict()
    same = [name for name in before if name in after]
    assert len(same) > 10 and all(torch.equal(before[name], after[name]) for name in same)


@pytest.mark.parametrize("settings", [{}, {"adapter": Adapter(rank=2)}])
def test_a_pooler_that_is_new_learns_beside_a_frozen_backbone(settings, encoder, reviews):
    """And beside an adapter, which leaves the backbone as it is, freezing it changes nothing."""
    frozen, _ = network_of(encoder, reviews, freeze_backbone=True, **settings)
    learnt = {name for name, weight in frozen.network.named_parameters() if weight.requires_grad}
    assert any("pooler" in name for name in learnt) and any("classifier" in name for name in learnt)
    assert all("pooler" in name or "classifier" in name or "lora" in name for name in learnt)
    if settings:
        free, _ = network_of(encoder, reviews, **settings)
        assert learnt == {name for name, weight in free.network.named_parameters() if weight.requires_grad}


def test_what_is_no_part_of_one_is_said_to_be_of_a_hundred():
    found = FineTune.results(None, {"val_f1": 71.94, "val_accuracy": 0.5, "val_loss_final": 2.0, "val_mcc": None})
    assert found == {"val f1": "71.94 of 100", "val accuracy": "0.5000"}


@pytest.mark.parametrize("epochs", [1, 2])
def test_lightnings_own_callback_thaws_the_backbone(epochs, encoder, reviews, tmp_path, capsys):
    thaw = {"class_path": "BackboneFinetuning", "init_args": {"unfreeze_backbone_at_epoch": 1}}
    flags = flags_of(tmp_path, reviews, encoder, **{"trainer.max_epochs": epochs})
    run("fit", *flags, f"--trainer.callbacks+={json.dumps(thaw)}")
    before = BertForMaskedLM.from_pretrained(encoder).bert.state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").bert.state_dict()
    same = [torch.equal(before[name], after[name]) for name in before if name in after and "weight" in name]
    assert all(same) if epochs == 1 else not any(same[:5])
    flags = flags_of(tmp_path / "low", reviews, encoder, **{"trainer.precision": "bf16-true"})
    assert "pass --trainer.precision bf16-mixed" in refused(capsys, *flags, f"--trainer.callbacks+={json.dumps(thaw)}")


# Exact


def test_the_loss_is_the_mean_of_cross_entropies_and_padding_changes_nothing(encoder, reviews):
    module, batch = network_of(encoder, reviews)
    _, nats, count = module.loss(batch)
    alone = []
    with torch.no_grad():
        for i in range(16):
            length = int(batch["attention_mask"][i].sum())
            logits = module.network(batch["input_ids"][i : i + 1, :length]).logits
            alone.append(F.cross_entropy(logits, batch["labels"][i : i + 1]))
    assert int(count) == 16
    torch.testing.assert_close(nats / count, torch.stack(alone).mean(), rtol=1e-5, atol=0)


def test_class_weights_weigh_as_torch_has_it(encoder, reviews):
    module, batch = network_of(encoder, reviews, class_weights={"good": 3.0}, label_smoothing=0.1)
    assert module.trainer.datamodule.label_names == ["bad", "good"]
    logits = module.logits(batch)
    weights = torch.tensor([1.0, 3.0])
    expected = F.cross_entropy(logits, batch["labels"], weights, label_smoothing=0.1)
    objective, nats, count = module.loss(batch)
    torch.testing.assert_close(objective / count, expected)
    torch.testing.assert_close(nats / count, F.cross_entropy(logits, batch["labels"], weights).detach())


def test_weights_of_classes_are_ratios(encoder, reviews, tmp_path):
    """Also where those of a step sum to less than one."""
    short = {"trainer.max_epochs": 1, "model.dropout": 0.0}
    plain = fit(tmp_path / "plain", reviews, encoder, **short)
    small = fit(tmp_path / "small", reviews, encoder, **short, **{"model.class_weights": '{"good": 0.01, "bad": 0.01}'})
    assert small["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)


def test_a_head_with_its_labels_in_another_order_says_what_it_said(encoder, reviews, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    network = AutoModelForSequenceClassification.from_pretrained(encoder, id2label={0: "good", 1: "bad"})
    network.classifier.weight.data.normal_(0, 1)
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "other")
    module, batch = network_of(tmp_path / "other", reviews)
    found = module.network.eval()
    assert found.config.id2label == {0: "bad", 1: "good"}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(found(**inputs).logits, network.eval()(**inputs).logits.flip(1))


@pytest.mark.parametrize("config", [RobertaConfig, T5Config, DistilBertConfig])
def test_only_what_says_the_labels_is_put_into_their_order(config, reviews):
    """Where the head has other matrices with as many rows as there are labels."""
    made = config(id2label=dict(enumerate("badc")), vocab_size=40, pad_token_id=1)
    for name, value in {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}.items():
        setattr(made, made.attribute_map.get(name, name), value)
    made.decoder_start_token_id, made.eos_token_id = 0, 2
    network = AutoModelForSequenceClassification.from_config(made).eval()
    module = Classification(from_="new", architecture=made)
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(label_names=list("abcd")))
    ids = torch.tensor([[5, 6, 7, 2, 1], [8, 9, 2, 1, 1]])
    with torch.no_grad():
        before = network(input_ids=ids).logits
        after = module.with_labels_of(made, network)(input_ids=ids).logits
    torch.testing.assert_close(after, before[:, [1, 0, 3, 2]])


def test_a_model_of_as_many_ids_as_positions_has_all_of_them():
    network = BertForMaskedLM(
        BertConfig(vocab_size=64, max_position_embeddings=64, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    )
    assert max_positions(network) == 64


def test_another_transformers_and_a_checkpoint_from_before_go_on(encoder, reviews, tmp_path):
    short = {"trainer.max_epochs": -1, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path, reviews, encoder, **short)
    path = checkpoint_io.newest(tmp_path / "checkpoints")
    for change in (lambda c: c["network"].update(transformers_version="5.0.0"), lambda c: c.pop("network")):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        for file in (tmp_path / "checkpoints").glob("*.ckpt"):
            torch.save(checkpoint, file)
        more = {"trainer.max_steps": 3, "trainer.val_check_interval": 3, "ckpt_path": path}
        assert fit(tmp_path / "again", reviews, encoder, **(short | more))["steps"] == 3
        shutil.rmtree(tmp_path / "again")


def test_another_seed_is_another_head(encoder, reviews, tmp_path):
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    losses = [
        fit(tmp_path / name, reviews, encoder, **short, seed_everything=seed)["val_loss"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert losses[0] == losses[1] != losses[2]


PAIR = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 8, "trainer.val_check_interval": 20}
ONE = {
    "trainer.accumulate_grad_batches": 2,
    "trainer.strategy": "ddp",
    "data.batch_size": 8,
    "trainer.val_check_interval": 40,
}
EXACT = {"trainer.max_steps": 40, "trainer.max_epochs": None, "ckpt_path": "last", "recovery.every_n_steps": 7}


def test_two_ranks_are_two_micro_batches_and_a_terminated_run_goes_on_as_either(encoder, reviews, tmp_path):
    states, validations = {}, {}
    for name, ranks, then in (("one", ONE, None), ("two", PAIR, None), ("both", PAIR, ONE)):
        folder = tmp_path / name
        folder.mkdir()
        first = flags_of(folder, reviews, encoder, **EXACT, **ranks)
        assert as_command(folder, first, *(signal_at(17) if then else [])) == (143 if then else 0)
        if then:
            assert as_command(folder, flags_of(folder, reviews, encoder, **EXACT, **then)) == 0
        states[name] = state(folder)
        summary = json.loads((folder / "summary.json").read_text())
        validations[name] = [summary[f"val_{figure}"] for figure in ("loss", "accuracy", "f1_macro", "mcc")]
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["row"] for line in lines] == list(range(81))
    assert len(set(states.values())) == 1
    assert validations["one"] == pytest.approx(validations["two"], rel=1e-6)
    assert validations["one"] == pytest.approx(validations["both"], rel=1e-6)


def test_a_checkpoint_of_other_labels_is_refused(encoder, reviews, tmp_path, capsys):
    fit(tmp_path, reviews, encoder, **{"trainer.max_epochs": 1})
    flags = flags_of(tmp_path, reviews, encoder, **{"ckpt_path": "last", "model.adapter.rank": 4})
    assert "the checkpoint has adapter none, this run lora of rank 4" in refused(capsys, *flags)


# Mistakes


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model.from": "no/such/folder/at/all"}, "no such folder: no/such/folder/at/all"),
        ({"data.label_column": "stars"}, "has no column 'stars'; pass --data.label_column, one of: review, sentiment"),
        ({"data.max_length": 0}, "--data.max_length is 0"),
        ({"model.class_weights": '{"fine": 2}'}, "--model.class_weights names 'fine'; the labels are bad, good"),
        ({"model.adapter.target_modules": '["nothing"]'}, "--model.adapter does not fit BertForSequenceClassification"),
        ({"model.adapter.rank": 0}, "--model.adapter.rank is 0"),
        ({"model.from": "no-such-model"}, "the tokenizer of --model.from no-such-model is none of"),
        ({"data.max_length": 600, "data.path": "LONG"}, "and the model 512 positions; pass --data.max_length 512"),
    ],
)
def test_a_mistake_is_one_line(flags, told, encoder, reviews, tmp_path, capsys):
    if flags.get("data.path") == "LONG":
        (tmp_path / "long.csv").write_text("text,label\n" + "film " * 900 + ",good\nfilm,bad\n")
        flags = flags | {"data.path": tmp_path / "long.csv"}
    assert told in refused(capsys, *flags_of(tmp_path, reviews, encoder, **flags))


def test_weights_that_are_damaged_or_not_all_there_are_told(encoder, reviews, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    weights = load_file(encoder / "model.safetensors")
    first = next(name for name in weights if "layer.1" in name)
    save_file({n: w for n, w in weights.items() if n != first}, broken / "model.safetensors", {"format": "pt"})
    assert f"lacks 1 weights ({first}" in refused(capsys, *flags_of(tmp_path / "a", reviews, broken))
    (broken / "model.safetensors").write_bytes((encoder / "model.safetensors").read_bytes()[:-100])
    assert f"--model.from {broken} gives no" in refused(capsys, *flags_of(tmp_path / "b", reviews, broken))


def test_validate_and_test_find_what_the_run_found_and_predict_writes_each_example(
    encoder, reviews, tmp_path, monkeypatch, capsys
):
    summary = fit(tmp_path, reviews, encoder, **{"trainer.max_epochs": 1, "trainer.val_check_interval": 1.0})
    monkeypatch.chdir(tmp_path)
    model = [
        f"--model.from={encoder}",
        f"--data.path={reviews / 'train.csv'}",
        f"--data.val_path={reviews / 'val.csv'}",
    ]
    model += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--ckpt_path", "checkpoints/last.ckpt"]
    for verb in ("validate", "test"):
        capsys.readouterr()
        run(verb, *model)
        assert f"{summary['val_accuracy']:.10f}"[:8] in capsys.readouterr().out
    run("predict", *model)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(81)) and set(lines[0]["probabilities"]) == {"good", "bad"}


def test_a_checkpoint_of_another_recipe_is_told(encoder, reviews, corpus, tmp_path, capsys):
    from tests.test_recipes import run as pretrain

    fit(tmp_path, reviews, encoder, **{"trainer.max_steps": 2, "trainer.val_check_interval": 2})
    with pytest.raises(SystemExit) as stop:
        pretrain(
            "fit",
            **{"data.path": corpus, "data.tokenizer": "bytes", "ckpt_path": tmp_path / "checkpoints" / "last.ckpt"},
        )
    assert stop.value.code == 2
    assert "the checkpoint is of another recipe" in capsys.readouterr().err.strip().splitlines()[-1]


def test_numbers_are_learnt_by_squared_error_and_judged_by_correlation(encoder, tmp_path, capsys):
    rows = [f"{text},{1.5 if label == 'good' else -0.5}" for text, label in sentences(200)]
    (tmp_path / "scores.csv").write_text("\n".join(["text,score", *rows, ""]))
    data = {"data.path": tmp_path / "scores.csv", "data.val_path": None, "trainer.max_epochs": 8}
    flags = flags_of(tmp_path / "run", tmp_path, encoder, **data)
    told = refused(capsys, *flags)
    assert "watches val/accuracy" in told and "val/pearson" in told
    run("fit", *flags, "--trainer.callbacks.monitor=val/pearson")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_pearson"] > 0.3 and summary["val_mse"] == pytest.approx(summary["val_loss"], rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert all(
        line["score"] == pytest.approx(-abs(line["prediction"] - float(line["label"])), abs=1e-5) for line in lines
    )


def test_several_labels_are_each_a_question_of_its_own(encoder, tmp_path):
    rows = []
    for text, label in sentences(200):
        rows.append({"text": text, "labels": [label] + ["long"] * (len(text.split()) > 15)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data.path": tmp_path / "rows.jsonl", "data.val_path": None, "trainer.max_epochs": 4}
    summary = fit(tmp_path / "run", tmp_path, encoder, **data)
    assert summary["val_f1_micro"] > 0.5
    answers = pipeline("text-classification", str(tmp_path / "run" / "model"), top_k=None)("lovely film")[0]
    assert {answer["label"] for answer in answers} == {"good", "bad", "long"}


def test_a_tokenizer_of_another_model_is_told(encoder, decoder, reviews, tmp_path, capsys):
    big = AutoTokenizer.from_pretrained(encoder)
    big.add_tokens([f"new{i}" for i in range(50)])
    big.save_pretrained(tmp_path / "big")
    flags = flags_of(tmp_path / "run", reviews, encoder, **{"data.tokenizer": tmp_path / "big"})
    assert "they do not belong together" in refused(capsys, *flags)
