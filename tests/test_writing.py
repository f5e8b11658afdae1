"""Tasks whose answers are written: the same loss and the same answers however they are batched, scores as the field
computes them."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
    pipeline,
)

from datamodules.instructions import Instructions
from datamodules.pairs import Pairs
from lightning_modules.adapter import Adapter
from lightning_modules.completion import left_padded
from lightning_modules.finetune import starting_folder
from lightning_modules.summarization import Summarization
from lightning_modules.text_generation import TextGeneration, matches, short_answer
from lightning_modules.translation import Translation
from tests.faults import signal_at, state
from tests.finetuning import as_command, pretrained, refused, run

COLOURS = ("red", "green", "blue", "black", "white", "brown")
GERMAN = dict(zip(COLOURS, ("rot", "gruen", "blau", "schwarz", "weiss", "braun"), strict=True))


def sentence(rng: random.Random, most: int = 6) -> list[str]:
    return [rng.choice(COLOURS) for _ in range(rng.randrange(1, most))]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Colours in one language, and in another."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name, count in (("train", 600), ("val", 53)):
        found = [sentence(rng) for _ in range(count)]
        (folder / f"{name}.en").write_text("".join(" ".join(words) + "\n" for words in found))
        (folder / f"{name}.de").write_text("".join(" ".join(GERMAN[w] for w in words) + "\n" for words in found))
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """Which colour comes last, and all of them backwards."""
    folder, rng = tmp_path_factory.mktemp("questions"), random.Random(0)
    for name, count in (("train", 300), ("val", 41)):
        rows = []
        for i in range(count):
            words = sentence(rng)
            last = {"instruction": "Which is last?", "input": " ".join(words), "output": words[-1]}
            back = {"instruction": "Backwards:", "input": " ".join(words), "output": " and then ".join(words[::-1])}
            rows.append(last if i % 2 else back)
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


SMALL_BART = {
    f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))
}
SMALL_BART |= {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
SMALL_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}


def module_and_batch(module, data, stage: str = "fit"):
    """A module with its network, and a batch."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.datamodule = data
    data.trainer, trainer.strategy._lightning_module, module.trainer = trainer, module, trainer
    data.prepare_data()
    data.setup(stage)
    module.configure_model()
    module.network.eval()
    rows = np.arange(8)  # of several lengths
    return module, data.train_dataloader().dataset.__getitems__(np.stack([rows, rows]))


def instructed(decoder: Path, questions: Path, **settings: object):
    data = Instructions(path=str(questions / "train.json"), val_path=str(questions / "val.json"), batch_size=8)
    return module_and_batch(TextGeneration(from_=str(decoder), **settings), data)


def translated(pairs: Path, **settings: object):
    paths = [f"{pairs / name}.en,{pairs / name}.de" for name in ("train", "val")]
    data = Pairs(path=paths[0], val_path=paths[1], batch_size=8, vocab_size=300)
    start = {"from_": "new", "architecture": T5Config(**SMALL_T5)} | settings
    return module_and_batch(Translation(**start), data)


def flags_of(folder: Path, **flags: object) -> list[str]:
    chosen = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_time": "null",
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
    } | flags
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def fit(task: str, folder: Path, **flags: object) -> dict:
    run("fit", "--config", f"recipes/finetune_{task}.yaml", *flags_of(folder, **flags))
    return json.loads((folder / "summary.json").read_text())


def predictions(folder: Path, name: str = "predictions") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


TRANSLATION = {
    "model.from": "new",
    **{f"model.architecture.{name}": value for name, value in SMALL_BART.items()},
    "data.vocab_size": 300,
}


@pytest.fixture(scope="session")
def translator(pairs, tmp_path_factory) -> Path:
    """A run that has learnt the colours."""
    folder = tmp_path_factory.mktemp("translator")
    paths = {f"data.{n}": f"{pairs / p}.en,{pairs / p}.de" for n, p in (("path", "train"), ("val_path", "val"))}
    fit("translation", folder, **TRANSLATION, **paths, **{"trainer.max_epochs": 16, "trainer.val_check_interval": 1.0})
    return folder


# The loss


def test_a_decoders_loss_is_that_of_each_answer_alone_by_transformers(decoder, questions):
    module, batch = instructed(decoder, questions)
    _, nats, count = module.loss(batch)
    alone, labels = 0.0, 0
    with torch.no_grad():
        for i in range(8):
            length, start = int(batch["attention_mask"][i].sum()), int(batch["prompt_lengths"][i])
            logits = module.network(batch["input_ids"][i : i + 1, :length]).logits[0]
            answer = batch["labels"][i, start - 1 : length]
            alone += float(F.cross_entropy(logits[start - 1 :], answer, reduction="sum"))
            labels += len(answer)
    assert int(count) == labels
    assert float(nats) == pytest.approx(alone, rel=1e-5)


def test_an_encoder_decoders_loss_is_that_of_each_pair_alone_by_transformers(pairs):
    module, batch = translated(pairs)
    _, nats, count = module.loss(batch)
    alone = 0.0
    with torch.no_grad():
        for i in range(8):
            labels = batch["labels"][i : i + 1][:, batch["labels"][i] >= 0]
            ids = batch["input_ids"][i : i + 1, : int(batch["attention_mask"][i].sum())]
            alone += float(module.network(input_ids=ids, labels=labels).loss) * labels.shape[1]
    assert float(nats) == pytest.approx(alone, rel=1e-5) and int(count) == int((batch["labels"] >= 0).sum())


def test_bits_per_byte_are_those_of_the_text_of_the_answers(decoder, questions):
    _, batch = instructed(decoder, questions)
    data = _.trainer.datamodule
    answers = {record["references"][0] for record in data.store.records("train")}
    for i in range(8):
        text = data.tokenizer.decode(batch["labels"][i][batch["labels"][i] >= 0], skip_special_tokens=True)
        assert text in answers and int(batch["label_bytes"][i]) == len(text.encode())


# Writing


def test_prompts_of_several_lengths_end_at_one_column():
    ids = torch.tensor([[1, 2, 3, 9], [4, 9, 9, 9]])
    padded, mask = left_padded(ids, torch.tensor([3, 1]), pad=0)
    assert padded.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_an_answer_is_the_same_in_a_batch_as_alone_and_as_by_transformers(
    kind, beams, decoder, questions, pairs, translator
):
    settings = {"num_beams": beams, "max_new_tokens": 12}
    if kind == "encoder-decoder":  # a trained one: new weights would write the same of everything
        settings["from_"] = str(translator / "model")
    made = instructed(decoder, questions, **settings) if kind == "decoder" else translated(pairs, **settings)
    module, batch = made
    together = module.write(batch)
    assert len({text for text, _ in together}) > 2
    for i in range(8):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        assert module.write(one)[0] == together[i]
        length = int(batch["prompt_lengths"][i] if kind == "decoder" else batch["attention_mask"][i].sum())
        ids = batch["input_ids"][i : i + 1, :length]
        plain = module.network.generate(ids, do_sample=False, num_beams=beams, max_new_tokens=12, pad_token_id=0)
        new = plain[0, length if kind == "decoder" else 1 :]
        text = module.trainer.datamodule.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert text == together[i][0]


def test_a_long_prompt_takes_no_room_from_the_answers_beside_it(decoder, questions):
    module, batch = instructed(decoder, questions, max_new_tokens=12)
    alone = [module.write({name: value[i : i + 1] for name, value in batch.items()})[0] for i in range(8)]
    longest = int(batch["prompt_lengths"].argmax())
    module.positions = int(batch["prompt_lengths"].max()) + 2  # so the longest leaves room for three tokens
    together = module.write(batch)
    with_room = [i for i in range(8) if batch["prompt_lengths"][i] <= module.positions - 11]
    assert with_room and all(together[i] == alone[i] for i in with_room)
    assert len(together[longest][0]) < len(alone[longest][0])


def test_what_another_task_left_in_the_generation_config_is_not_used(decoder, questions, tmp_path):
    shutil.copytree(decoder, tmp_path / "other")
    GenerationConfig(repetition_penalty=3.0, min_length=40, no_repeat_ngram_size=1).save_pretrained(tmp_path / "other")
    plain, batch = instructed(decoder, questions, max_new_tokens=12)
    other, _ = instructed(tmp_path / "other", questions, max_new_tokens=12)
    assert other.write(batch) == plain.write(batch)
    assert other.exported().generation_config.repetition_penalty is None


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_an_adapter_begins_as_the_model_itself(kind, decoder, questions, pairs):
    made = (instructed, (decoder, questions)) if kind == "decoder" else (translated, (pairs,))
    plain, batch = made[0](*made[1])
    adapted, _ = made[0](*made[1], adapter=Adapter(rank=4))
    with torch.no_grad():
        assert torch.equal(plain.logits(batch), adapted.logits(batch))
        assert float(plain.loss(batch)[1]) == float(adapted.loss(batch)[1])
        for name, parameter in adapted.network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        moved = adapted.logits(batch)
        assert not torch.allclose(plain.logits(batch), moved, atol=1e-3)
        torch.testing.assert_close(adapted.logits(batch, adapted.exported()), moved, rtol=0, atol=1e-5)


# A prompt


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_prompt_is_read_as_pefts_and_leaves_the_model_as_it_is(kind, decoder, questions, pairs, translator, tmp_path):
    settings = {"prompt_tokens": 5, "max_new_tokens": 6}
    is_decoder = kind == "decoder"
    if is_decoder:
        module, batch = instructed(decoder, questions, **settings)
    else:
        module, batch = translated(pairs, from_=str(translator / "model"), **settings)
    learning = {name: p for name, p in module.network.named_parameters() if p.requires_grad}
    assert [name.endswith("prompt.weight") for name in learning] == [True]
    with torch.no_grad():
        next(iter(learning.values())).normal_()
    module.exported().save_pretrained(tmp_path)
    peft = module.opened(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = module.logits(batch), module.logits(batch, peft)
        assert ours.shape == batch["labels"].shape + (module.trainer.datamodule.vocab_size,)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        expected = F.cross_entropy(theirs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        objective, nats, count = module.loss(batch)
    assert float(nats) == pytest.approx(float(expected), rel=1e-5) and int(count) == int((batch["labels"] >= 0).sum())
    module.loss(batch)[0].backward()
    assert next(iter(learning.values())).grad.abs().sum() > 0
    written = module.write(batch)
    for i in range(8):
        length = int(batch["prompt_lengths"][i] if is_decoder else batch["attention_mask"][i].sum())
        tokens = peft.generate(input_ids=batch["input_ids"][i : i + 1, :length], max_new_tokens=6, do_sample=False)
        new = tokens[0, length if is_decoder else 1 :]
        text = module.trainer.datamodule.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert text == written[i][0]


def test_a_prompt_begins_as_a_text(decoder, questions):
    module, _ = instructed(decoder, questions, prompt_tokens="the film was fine")
    embedding = module.network.get_input_embeddings()
    ids = module.trainer.datamodule.tokenizer("the film was fine")["input_ids"]
    assert torch.equal(embedding.prompt.weight, embedding.own.weight[ids])


def test_a_run_with_a_prompt_learns_goes_on_and_predicts(decoder, questions, tmp_path, capsys):
    flags = {"data.path": questions / "train.json", "data.val_path": questions / "val.json", "model.from": decoder}
    flags |= {"model.prompt_tokens": 8, "trainer.val_check_interval": 1.0, "model.optimizer.lr": 0.1}
    short = fit("text_generation", tmp_path / "run", **flags, **{"trainer.max_epochs": 1})
    more = fit("text_generation", tmp_path / "run", **flags, **{"trainer.max_epochs": 6, "ckpt_path": "last"})
    assert more["val_loss"] < 0.95 * short["val_loss"] and more["steps"] > short["steps"]
    assert not (tmp_path / "run" / "model" / "config.json").exists()  # peft's folder, without the model
    row = {"instruction": "Which is last?", "input": "red green"}
    (tmp_path / "new.json").write_text(json.dumps([row]))
    run(
        "predict",
        "--config",
        str(tmp_path / "run" / "config.yaml"),
        "--ckpt_path=last",
        f"--data.predict_path={tmp_path / 'new.json'}",
    )
    assert len(predictions(tmp_path / "run", "predictions_new")) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model.prompt_tokens": 0}, "--model.prompt_tokens is 0"),
        ({"model.prompt_tokens": 4, "model.adapter.rank": 4}, "not with --model.adapter"),
        ({"model.prompt_tokens": 2000}, "positions; pass --data.max_length"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(flags, told, decoder, questions, tmp_path, capsys):
    common = {"data.path": questions / "train.json", "model.from": decoder}
    config = ["--config", "recipes/finetune_text_generation.yaml"]
    assert told in refused(capsys, *config, *flags_of(tmp_path, **common, **flags))


# Scores


REFERENCES = [["the cat sat on the mat", "a cat is on the mat"], ["there is a dog"], ["birds fly high today"]]
WRITTEN = ["the cat is on the mat", "there is one dog", "fish"]


def test_translations_are_scored_as_by_sacrebleu():
    import sacrebleu

    module = Translation(from_="new", architecture=T5Config())
    streams = [[right[0] for right in REFERENCES], [REFERENCES[0][1], None, None]]
    found = module.scores(WRITTEN, REFERENCES)
    assert found == {
        "bleu": sacrebleu.corpus_bleu(WRITTEN, streams).score,
        "chrf": sacrebleu.corpus_chrf(WRITTEN, streams).score,
    }
    assert found["bleu"] > 20 and "tok:13a" in module.units and "nrefs:var" in module.units


def test_summaries_are_scored_as_by_rouge_score_with_the_best_reference():
    from rouge_score.rouge_scorer import RougeScorer

    module = Summarization(from_="new", architecture=T5Config())
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = module.scores(WRITTEN, REFERENCES)
    for name, value in found.items():
        best = [
            max(scorer.score(reference, text)[name].fmeasure for reference in right)
            for text, right in zip(WRITTEN, REFERENCES, strict=True)
        ]
        assert value == pytest.approx(100 * sum(best) / 3)
    assert found["rouge1"] > 40


def test_what_can_be_right_or_wrong_of_an_answer():
    assert short_answer("She has 1,000 eggs.\n#### 1,000") == "1000" and short_answer("Yes.") == "yes"
    assert short_answer("a long answer of many words that cannot be right or wrong as such") is None
    assert matches("so 1000\n#### 1000", "#### 1,000") and not matches("#### 999", "#### 1,000")
    assert not matches("1000", "#### 1,000")  # as GSM8K's own scorer has it
    assert matches(" yes ", "Yes.") and not matches("yes and no", "yes")


# Whole runs


def test_a_translation_is_learnt_and_the_folder_writes_it_in_plain_transformers(translator):
    summary = json.loads((translator / "summary.json").read_text())
    assert summary["val_bleu"] > 60 and summary["val_stopped"] == 1
    rows = predictions(translator)
    assert [row["row"] for row in rows] == list(range(53)) and {"source", "references", "score"} <= set(rows[0])
    right = sum(row["prediction"] in row["references"] for row in rows)
    assert right > 30
    network = AutoModelForSeq2SeqLM.from_pretrained(translator / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(translator / "model")
    for row in rows[:8]:
        tokens = network.generate(**tokenizer(row["source"], return_tensors="pt"))
        assert tokenizer.decode(tokens[0], skip_special_tokens=True).strip() == row["prediction"]


def test_a_decoder_learns_to_answer_and_a_plain_pipeline_asks_it(decoder, questions, tmp_path, capsys):
    flags = {"data.path": questions / "train.json", "data.val_path": questions / "val.json", "model.from": decoder}
    flags |= {"model.optimizer.lr": 3e-3, "trainer.max_epochs": 18, "trainer.val_check_interval": 1.0}
    summary = fit("text_generation", tmp_path, **flags)
    assert summary["val_exact_match"] > 60 and summary["val_stopped"] > 0.95
    assert "### Assistant:⏎⟦" in capsys.readouterr().out  # the plan shows what is learnt
    ask = pipeline("text-generation", str(tmp_path / "model"))
    for row in predictions(tmp_path)[:6]:
        (answer,) = ask([{"role": "user", "content": row["input"]}])
        assert answer["generated_text"][-1]["content"].strip() == row["prediction"]


@pytest.mark.parametrize("task", ["text_generation", "translation", "summarization", "question_answering"])
def test_a_task_runs_from_its_yaml_without_any_data_and_goes_on(task, tmp_path, monkeypatch):
    """As `--ckpt_path last` goes on after two steps: equal to a run of four."""
    root = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(root / "recipes")
    sizes = {
        "text_generation": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1},
        "question_answering": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    }.get(task, {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16})
    flags = {f"model.architecture.{name}": size for name, size in sizes.items()} | {
        "trainer.max_epochs": None,
        "trainer.val_check_interval": 4,
        "trainer.limit_val_batches": 1,
        "data.max_val_examples": 8,
        "data.batch_size": 4,
        "model.schedule": "Constant",
    }
    if task != "question_answering":
        flags["model.max_new_tokens"] = 4
    fit(task, tmp_path / "whole", **flags, **{"trainer.max_steps": 4})
    fit(task, tmp_path / "two", **flags, **{"trainer.max_steps": 2})
    fit(task, tmp_path / "two", **flags, **{"trainer.max_steps": 4, "ckpt_path": "last"})
    assert state(tmp_path / "two") == state(tmp_path / "whole")


def test_two_ranks_write_as_one_and_a_terminated_run_goes_on_as_either(pairs, tmp_path):
    paths = {f"data.{n}": f"{pairs / p}.en,{pairs / p}.de" for n, p in (("path", "train"), ("val_path", "val"))}
    # In step 38, the last of an epoch, the second rank has no row.
    exact = {"trainer.max_steps": 40, "trainer.max_epochs": None, "ckpt_path": "last", "recovery.every_n_steps": 7}
    one = {"trainer.accumulate_grad_batches": 2, "trainer.strategy": "ddp", "trainer.val_check_interval": 75}
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.val_check_interval": 38}
    states, found = {}, {}
    for name, ranks, then in (("one", one, None), ("two", two, None), ("both", two, one)):
        folder = tmp_path / name
        folder.mkdir()
        shared = TRANSLATION | paths | exact | {"data.batch_size": 8}
        config = ["--config", "recipes/finetune_translation.yaml"]
        first = flags_of(folder, **shared, **ranks)
        assert as_command(folder, [*config, *first], *(signal_at(17) if then else [])) == (143 if then else 0)
        if then:
            assert as_command(folder, [*config, *flags_of(folder, **shared, **then)]) == 0
        states[name] = state(folder)
        summary = json.loads((folder / "summary.json").read_text())
        found[name] = [summary[f"val_{figure}"] for figure in ("loss", "bits_per_byte", "bleu", "chrf", "stopped")]
        assert len(predictions(folder)) == 53
    assert len(set(states.values())) == 1
    assert found["one"] == pytest.approx(found["two"], rel=1e-6) and found["one"] == pytest.approx(
        found["both"], rel=1e-6
    )


# New examples


def test_predict_writes_answers_to_files_without_any(decoder, questions, tmp_path, monkeypatch):
    flags = {"data.path": questions / "train.json", "data.val_path": questions / "val.json", "model.from": decoder}
    fit("text_generation", tmp_path, **flags, **{"trainer.max_steps": 4, "trainer.val_check_interval": 4})
    (tmp_path / "asked.jsonl").write_text('{"instruction": "Which is last?", "input": "red blue"}\n' * 3)
    config = str(tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)
    run("predict", "--config", config, "--ckpt_path=last", "--data.predict_path=asked.jsonl")
    rows = predictions(tmp_path, "predictions_new")
    assert [row["row"] for row in rows] == [0, 1, 2] and "score" not in rows[0]
    assert rows[0]["input"] == "Which is last?\n\nred blue" and len({row["prediction"] for row in rows}) == 1


def test_a_run_begins_with_pretraining_and_not_with_what_fine_tuning_left(decoder, questions, tmp_path, monkeypatch):
    fit(
        "text_generation",
        tmp_path / "runs" / "tuned",
        **{"data.path": questions / "train.json", "model.from": decoder},
        **{"trainer.max_steps": 1, "trainer.val_check_interval": 1},
    )
    (tmp_path / "runs" / "first").mkdir()
    (tmp_path / "runs" / "first" / "model").symlink_to(decoder)
    os.utime(tmp_path / "runs" / "tuned" / "model" / "config.json", (2**31, 2**31))  # the newest
    monkeypatch.chdir(tmp_path)
    assert starting_folder(None, TextGeneration.auto_class_of) == "runs/first/model"


# Mistakes


def test_a_model_that_does_not_write_is_told(tmp_path, questions, capsys):
    encoder = pretrained(tmp_path / "encoder", "masked")
    flags = flags_of(tmp_path / "run", **{"model.from": encoder, "data.path": questions / "train.json"})
    told = refused(capsys, "--config", "recipes/finetune_text_generation.yaml", *flags)
    assert f"--model.from {encoder}: BertConfig does not write; take a decoder" in told


def test_data_of_another_task_are_told(decoder, tmp_path, capsys):
    flags = flags_of(tmp_path / "run", **{"model.from": decoder})
    told = refused(capsys, "--config", "recipes/finetune_text_generation.yaml", *flags, "--data", "Spans")
    assert "--model TextGeneration trains on completions, and --data Spans has spans" in told


def test_a_checkpoint_of_another_task_is_told(decoder, questions, tmp_path, capsys):
    flags = {"data.path": questions / "train.json", "model.from": decoder, "trainer.val_check_interval": 2}
    fit("text_generation", tmp_path, **flags, **{"trainer.max_steps": 2})
    again = flags_of(tmp_path, **flags, **{"ckpt_path": "last", "trainer.max_steps": 4})
    told = refused(capsys, "--config", "recipes/finetune_text_generation.yaml", *again, "--model", "Summarization")
    assert "the checkpoint has task TextGeneration, this run Summarization" in told


def test_a_checkpoint_of_another_tokenizer_is_told(pairs, tmp_path, capsys, monkeypatch):
    for side in ("en", "de"):
        shutil.copy(pairs / f"val.{side}", tmp_path / f"a.{side}")
    data = {"data.path": f"{tmp_path}/a.en,{tmp_path}/a.de", "trainer.max_steps": 1, "trainer.val_check_interval": 1}
    fit("translation", tmp_path / "run", **TRANSLATION, **data, **{"trainer.max_epochs": None})
    (tmp_path / "a.en").write_text((tmp_path / "a.en").read_text().replace("white", "amber"))  # as many ids, others
    flags = ["--config", str(tmp_path / "run" / "config.yaml"), "--ckpt_path=last"]
    with pytest.raises(SystemExit) as stop:
        run("predict", *flags, f"--data.predict_path={tmp_path}/a.en")
    assert stop.value.code == 2 and "the checkpoint has tokenizer" in capsys.readouterr().err


def test_the_merged_model_and_the_adapter_are_both_left(decoder, questions, tmp_path):
    from peft import PeftModel

    flags = {"data.path": questions / "train.json", "model.from": decoder, "trainer.max_steps": 3}
    fit("text_generation", tmp_path, **flags, **{"trainer.val_check_interval": 3, "model.adapter.rank": 4})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(decoder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        alone = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert not torch.allclose(adapted(ids).logits, alone, atol=1e-6)
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=0, atol=1e-5)
