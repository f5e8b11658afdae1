"""Distillation of language models: what is learnt from whom, the same step however it is cut, honest comparison."""

import json
import runpy
import shutil
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BloomConfig,
    ElectraConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    Qwen2MoeConfig,
    SmolLM3Config,
)

from lightning_modules.callbacks import comparison
from lightning_modules.distillation import CausalDistillation, DenoisingDistillation, MaskedDistillation
from lightning_modules.losses import IGNORED
from lightning_modules.lstm import LSTMConfig
from lightning_modules.student import PartOfTeacher
from tests.distilling import SCRIPT, SMALL, as_command, fit, flags_of, opened, refused, run
from tests.faults import signal_at, state

Ended = namedtuple("Ended", "returncode")


# What is learnt


def test_the_divergence_is_that_of_the_two_models_at_the_tokens_that_count(texts, decoder):
    """Position by position, by transformers alone."""
    module, batch = opened(texts, decoder, temperature=2.0, hard_weight=0.25)
    batch["labels"][0, :20] = IGNORED
    objective, nats, count, divergence = module.training_loss(batch, divisor=3.0)
    teacher = AutoModelForCausalLM.from_pretrained(decoder)
    expected, hard = 0.0, 0.0
    with torch.no_grad():
        p, q = (net(batch["input_ids"]).logits / 2 for net in (teacher, module.network))
        p, q = p[..., : q.shape[-1]], q
    for row in range(4):
        for place in range(32):
            if (label := int(batch["labels"][row, place])) != IGNORED:
                expected += float(F.kl_div(q[row, place].log_softmax(-1), p[row, place].softmax(-1), reduction="sum"))
                hard += float(F.cross_entropy(2 * q[row, place], torch.tensor(label)))
    assert float(divergence) == pytest.approx(expected, rel=2e-2)  # the teacher may be in bf16
    assert float(nats) == pytest.approx(hard, rel=1e-4) and int(count) == int((batch["labels"] != IGNORED).sum())
    assert float(objective.detach()) == pytest.approx((0.75 * 4 * float(divergence) + 0.25 * float(nats)) / 3, rel=1e-5)


@pytest.mark.parametrize("kind", ["causal", "masked", "denoising"])
def test_a_student_with_all_layers_of_its_teacher_has_no_loss(kind, texts, decoder, encoder, denoiser):
    teacher, module = {
        "causal": (decoder, CausalDistillation),
        "masked": (encoder, MaskedDistillation),
        "denoising": (denoiser, DenoisingDistillation),
    }[kind]
    module, batch = opened(texts, teacher, module, student=PartOfTeacher([0, 1]))
    module.network.eval()
    module.teachers[0].network.float()
    objective, nats, count, divergence = module.training_loss(batch, divisor=1.0)
    assert float(nats) > 1 and int(count) > 0
    assert abs(float(divergence)) < 1e-3 * int(count) and abs(float(objective)) < 1e-3 * int(count)


def test_without_its_weight_a_teacher_changes_nothing(texts, decoder):
    module, batch = opened(texts, decoder, hard_weight=1.0)
    assert module.teachers[0].network is None  # it is not even read
    objective, nats, count, _ = module.training_loss(batch, 2.0)
    expected = module.loss(batch, 2.0)
    assert [float(x) for x in (objective, nats, count)] == [float(x) for x in expected]


def test_two_numbers_go_from_one_to_the_other_over_the_run(texts, decoder):
    module, _ = opened(texts, decoder, temperature=[4.0, 1.0], hard_weight=[0.0, 1.0])
    first = module.weights().matching
    assert first.temperature == pytest.approx(4 - 3 * 0.05) and first.hard_weight == pytest.approx(0.05)
    module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 9
    module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 9
    last = module.weights().matching
    assert last.temperature == pytest.approx(4 - 3 * 0.95) and last.hard_weight == pytest.approx(0.95)


def test_the_teacher_is_no_part_of_the_student(texts, decoder):
    module, batch = opened(texts, decoder)
    teacher = module.teachers[0].network
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    owned = {id(p) for p in module.parameters()}
    assert not any(id(p) in owned for p in teacher.parameters()) and not any(
        "teacher" in n for n in module.state_dict()
    )
    module.train()
    assert not teacher.training
    before = [p.clone() for p in teacher.parameters()]
    module.training_loss(batch, 1.0)[0].backward()
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))


def test_two_equal_teachers_are_one(texts, decoder):
    one, batch = opened(texts, decoder)
    two, _ = opened(texts, [decoder, decoder])
    found = [float(module.training_loss(batch, 1.0)[0]) for module in (one, two)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_rows_behind_the_tokenizers_ids_count_for_nothing(texts, decoder, tmp_path):
    padded = AutoModelForCausalLM.from_pretrained(decoder)
    ids = padded.config.vocab_size
    padded.resize_token_embeddings(ids + 7, mean_resizing=False)
    padded.get_output_embeddings().weight.data[ids:] = 0.0  # logits of 0, as large as any
    shutil.copytree(decoder, tmp_path / "padded")
    padded.save_pretrained(tmp_path / "padded")
    plain, batch = opened(texts, decoder)
    other, _ = opened(texts, tmp_path / "padded")
    found = [float(module.training_loss(batch, 1.0)[3]) for module in (plain, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    student, _ = opened(texts, tmp_path / "padded", student=LlamaConfig(vocab_size=ids + 9, **SMALL))
    student.training_loss(batch, 1.0)[0].backward()
    gradient = student.network.get_output_embeddings().weight.grad
    assert gradient[:ids].any() and not gradient[ids:].any()


# A student's beginning


def test_a_part_of_the_teacher_has_its_weights(texts, decoder):
    module, _ = opened(texts, decoder, student=PartOfTeacher([1], {"intermediate_size": 48}))
    ours, whole = module.network.state_dict(), AutoModelForCausalLM.from_pretrained(decoder).state_dict()
    assert module.network.config.num_hidden_layers == 1
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(ours[name.format(0)], whole[name.format(1)][:48])
    assert torch.equal(ours["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])


def test_a_teacher_that_was_saved_in_bf16_has_a_student_in_float32(texts, decoder, tmp_path):
    """Its config says bf16, by which the student would be made."""
    for auto_class in (AutoModelForCausalLM, AutoTokenizer):
        part = auto_class.from_pretrained(decoder)
        (part.bfloat16() if auto_class is AutoModelForCausalLM else part).save_pretrained(tmp_path)
    module, _ = opened(texts, tmp_path, student=PartOfTeacher([0, 1]))
    assert {parameter.dtype for parameter in module.network.parameters()} == {torch.float32}


def test_what_the_first_layer_alone_has_stays(texts, denoiser):
    """T5's relative positions, whichever layers are taken."""
    module, _ = opened(texts, denoiser, DenoisingDistillation, student=PartOfTeacher([1]))
    name = "encoder.block.0.layer.0.SelfAttention.{}.weight"
    ours, whole = module.network.state_dict(), AutoModelForSeq2SeqLM.from_pretrained(denoiser).state_dict()
    bias = name.format("relative_attention_bias")
    assert torch.equal(ours[bias], whole[bias])
    assert torch.equal(ours[name.format("q")], whole[name.format("q").replace("block.0", "block.1")])


def test_a_layout_that_is_not_known_is_refused():
    """Rather than cut in the wrong place: three matrices in one, and an LSTM, whose layers have other names."""
    half = {"hidden_size": 4, "num_attention_heads": 1}
    llama = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 9}
    electra = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    moe = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "moe_intermediate_size": 4}
    for config, part, told in (
        (
            BloomConfig(hidden_size=8, n_head=2, n_layer=2, vocab_size=9),
            PartOfTeacher([0], {"hidden_size": 4}),
            "what a part of a bloom is, is not known",
        ),
        (LSTMConfig(hidden_size=8, num_hidden_layers=2, vocab_size=9), PartOfTeacher([1]), "does not know the layers"),
        (ElectraConfig(embedding_size=8, **electra), PartOfTeacher([0], half), "the teacher has no"),
        (ElectraConfig(embedding_size=4, **electra), PartOfTeacher([0], half), "leave no place for"),
        (ElectraConfig(embedding_size=4, **electra), PartOfTeacher([0], half, "project"), "leave no place for"),
        (ElectraConfig(embedding_size=8, **electra), PartOfTeacher([0], {"hidden_size": 4}), "heads of 2 numbers of"),
        (LlamaConfig(**llama), PartOfTeacher([0], {"num_attention_heads": 2}), "share their keys and values"),
        (
            GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=9, scale_attn_by_inverse_layer_idx=True),
            PartOfTeacher([1]),
            "scales attention by places",
        ),
        (
            Qwen2MoeConfig(num_hidden_layers=4, decoder_sparse_step=2, num_experts=2, vocab_size=9, **moe),
            PartOfTeacher([1, 3]),
            "layers.0.mlp gets the class Qwen2MoeMLP",
        ),
    ):
        auto_class = AutoModelForMaskedLM if config.model_type == "electra" else AutoModelForCausalLM
        with pytest.raises(ValueError, match=told):
            teacher, student = (auto_class.from_config(c) for c in (config, part.config(config)))
            part.fill(student, teacher)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (
            SmolLM3Config(pad_token_id=0, num_key_value_heads=2),
            {"no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2},
        ),
        (
            Qwen2MoeConfig(mlp_only_layers=[2], num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4),
            {"mlp_only_layers": [0]},
        ),
        (
            GPTNeoConfig(num_layers=4, attention_types=[[["global", "local"], 2]]),
            {"attention_layers": ["global", "local"], "attention_types": [[["global"], 1], [["local"], 1]]},
        ),
    ],
)
def test_what_a_config_says_of_each_layer_goes_with_it(config, fields, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 40}
    if config.model_type == "qwen2_moe":
        config.num_key_value_heads = 2
    for name, value in sizes.items():
        setattr(config, config.attribute_map.get(name, name), value)
    for name, values in vars(config).items():
        if isinstance(values, list) and len(values) > 4:  # made for the depth that is the default
            setattr(config, name, values[:4])
    part = PartOfTeacher([2, 3])
    teacher, student = (AutoModelForCausalLM.from_config(c).eval() for c in (config, part.config(config)))
    part.fill(student, teacher)
    assert {name: getattr(student.config, name) for name in fields} == fields
    student.save_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, student(ids).logits)
    layers = teacher.base_model.h if config.model_type == "gpt_neo" else teacher.base_model.layers
    del layers[:2]  # what is left of the teacher says the same
    for network in (teacher, teacher.base_model):
        network.config = student.config
    torch.testing.assert_close(teacher(ids, use_cache=False).logits, student(ids, use_cache=False).logits)


def test_a_size_that_each_layer_has_for_itself_goes_with_it():
    sizes = [64 + i for i in range(8)]
    teacher = Gemma3nTextConfig(num_hidden_layers=8, intermediate_size=sizes, activation_sparsity_pattern=[0.0] * 8)
    found = PartOfTeacher([3, 6]).config(teacher)
    assert found.intermediate_size == [67, 70] and len(found.activation_sparsity_pattern) == 2


def test_a_trained_folder_goes_on(texts, decoder):
    module, _ = opened(texts, decoder, student=str(decoder))
    whole = AutoModelForCausalLM.from_pretrained(decoder).state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in module.network.state_dict().items())


# Runs


def test_a_run_ends_with_teacher_control_and_student(texts, decoder, tmp_path, capsys):
    summary = fit(tmp_path, texts, decoder, **{"trainer.max_steps": 30, "trainer.val_check_interval": 30})
    control = json.loads((tmp_path / "control" / "summary.json").read_text())
    assert control["tokens"] == summary["tokens"] and control["steps"] == summary["steps"]
    found = summary["comparison"]
    assert found["student"]["nats"] == pytest.approx(summary["val_loss"], rel=1e-4)
    assert found["without teacher"]["nats"] == pytest.approx(control["val_loss"], rel=1e-4)
    assert found["student"]["kl_to_teacher"] < found["without teacher"]["kl_to_teacher"]
    assert found[str(decoder)]["kl_to_teacher"] == pytest.approx(0, abs=1e-5)
    nats = [found[name]["nats"] for name in ("without teacher", "student", str(decoder))]
    assert summary["gap_recovered"] == (
        None if nats[0] <= nats[2] else pytest.approx(100 * (nats[0] - nats[1]) / (nats[0] - nats[2]))
    )
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("gap recovered: "))
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Teacher and student</h2>" in page and told in page and f"<td>{nats[1]:.4f}</td>" in page
    assert "train/divergence" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 16


def test_the_gap_is_of_the_loss_where_the_best_is_by_something_else(texts, decoder, tmp_path):
    best = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/perplexity", "save_last": True}}
    fit(tmp_path, texts, decoder, **{"trainer.callbacks": json.dumps([best])})
    assert json.loads((tmp_path / "summary.json").read_text())["gap_by"] == "loss"


def test_two_ranks_are_two_micro_batches_and_a_terminated_run_goes_on_as_either(texts, decoder, tmp_path):
    common = {"comparison.control": False, "ckpt_path": "last"}
    one = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 12}  # in micro-batches
    fit(tmp_path / "one", texts, decoder, **common, **one)
    two = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    (tmp_path / "two").mkdir()
    flags = flags_of(tmp_path / "two", texts, decoder, **common, **two)
    assert as_command(tmp_path / "two", [*flags, *signal_at(5)]) == 143
    assert as_command(tmp_path / "two", flags) == 0
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5)
    # The best weights, not the last, are in the table, on both ranks.
    found = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert found["val_loss"] < found["val_loss_final"] - 1e-3
    assert found["comparison"]["student"]["nats"] == pytest.approx(found["val_loss"], rel=1e-6)


def test_a_killed_run_goes_on_bit_by_bit(texts, decoder, tmp_path):
    common = {"comparison.control": False, "ckpt_path": "last", "model.temperature": "[4,1]"}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        flags = flags_of(tmp_path / name, texts, decoder, **common)
        if name == "cut":
            assert as_command(tmp_path / name, [*flags, *signal_at(7)]) == 143
        assert as_command(tmp_path / name, flags) == 0
    assert state(tmp_path / "whole") == state(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["temperature"] == [4, 1]


def test_a_float32_teacher_stays_one_under_autocast(texts, decoder):
    module, batch = opened(texts, decoder)
    teacher = module.teachers[0]
    teacher.network.float()
    exact = teacher.head(partial(module.read, batch)).hidden_NC
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.head(partial(module.read, batch)).hidden_NC, exact)


def test_a_control_that_fails_leaves_the_table_of_the_others(texts, decoder, tmp_path, capsys, monkeypatch):
    """And it gets what the command line allowed to import, and nothing of this run's ranks."""
    given = {}

    class Failing:
        def __init__(self, command, env, **_):
            given.update(command=command, env=env)

        def wait(self):
            return 7

        def terminate(self):
            given["terminated"] = True

    monkeypatch.setattr(comparison.subprocess, "Popen", Failing)
    monkeypatch.setenv("MASTER_PORT", "1")
    run("fit", "--allow_import=tests", *flags_of(tmp_path, texts, decoder, **{"trainer.max_steps": 6}))
    out, err = capsys.readouterr()
    assert "KL to teacher" in out and "ended with 7" in err and given["terminated"]
    assert "--allow_import=tests" in given["command"] and "MASTER_PORT" not in given["env"]
    assert "without teacher" not in json.loads((tmp_path / "summary.json").read_text())["comparison"]


def test_a_saved_config_names_the_teacher_that_was_found(texts, decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model").symlink_to(decoder)
    quick = {"comparison.control": False, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path / "run", texts, None, **quick)
    assert "teacher: runs/mine/model" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_teacher_that_is_trained_first_reads_the_same_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe, started = runpy.run_path(str(SCRIPT)), []
    monkeypatch.setattr(recipe["subprocess"], "run", lambda command: started.append(command) or Ended(0))
    layers = ["fit", "--model.student", "{teacher_layers: [0, 1]}", "--data.path", "a", "b", "--trainer.max_steps=2"]
    recipe["train_teacher"](layers)
    assert started[0][-3:] == ["--data.path", "a", "b"]
    recipe["train_teacher"](["fit", "--data.seed=3", "--data.teacher_cache", "words", "--data.path", "a"])
    assert started.pop()[-3:] == ["--data.seed=3", "--data.path", "a"]
    for words in (["--model.teacher=x"], ["--config=x"], ["--model", "MaskedDistillation"], ["--help"]):
        recipe["train_teacher"](["fit", *words])
    assert len(started) == 1


# What cannot be


def test_a_run_goes_on_with_what_it_began_with(texts, decoder, tmp_path, capsys):
    quick = {"comparison.control": False, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path, texts, decoder, **quick)
    common, config = {**quick, "trainer.max_steps": 4, "ckpt_path": "last"}, (tmp_path / "config.yaml").read_text()
    other = refused(capsys, *flags_of(tmp_path, texts, decoder, **common, **{"model.divergence": "jsd"}))
    assert "the checkpoint has divergence forward_kl, this run jsd" in other
    assert (tmp_path / "config.yaml").read_text() == config  # what was refused changes nothing
    other = refused(capsys, *flags_of(tmp_path, texts, decoder, **common, **{"model.student.hidden_size": 8}))
    assert "the checkpoint has head_dim 8, this run 4" in other
    shutil.copytree(decoder, tmp_path / "moved")
    fit(tmp_path, texts, tmp_path / "moved", **common)
    other = AutoModelForCausalLM.from_pretrained(decoder)
    other.get_output_embeddings().weight.data.mul_(2)
    other.save_pretrained(tmp_path / "moved")
    assert "has weights of the teachers" in refused(capsys, *flags_of(tmp_path, texts, tmp_path / "moved", **common))


def test_a_run_that_was_over_is_whole_in_a_new_folder(texts, decoder, tmp_path):
    short = {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path / "first", texts, decoder, **short, **{"comparison.control": False})
    again = short | {"ckpt_path": tmp_path / "first" / "checkpoints" / "last.ckpt"}
    summary = fit(tmp_path / "second", texts, decoder, **again)
    assert "without teacher" in summary["comparison"]  # which is trained by the second's config.yaml


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model.divergence": "cosine"}, "divergence"),
        ({"model.temperature": 0}, "--model.temperature is 0"),
        ({"model.hard_weight": 1.5}, "--model.hard_weight is 1.5"),
        ({"model.hard_weight": "[0,0.5,1]"}, "or two to go between"),
        ({"model.label_smoothing": 0.1}, "--model.label_smoothing"),
        ({"model.student.teacher_layers": "[0,7]"}, "names layer 7; the teacher has 0 to 1"),
        ({"model.student": "{teacher_layers: [0], fields: {num_hidden_layers: 1}}"}, "follow from teacher_layers"),
        ({"model.student": "{teacher_layers: [0], fields: {vocab: 3}}"}, "is no part of the teacher"),
        ({"model.student": "{teacher_layers: [0, 1"}, "--model.student"),
        ({"model.teacher": "nowhere/at/all"}, "no such folder"),
        ({"model.teacher": "[]"}, "is an empty list"),
        ({"data.tokenizer": "bytes"}, "has another tokenizer"),
        ({"data.seq_len": 2400}, "tokens at once"),
    ],
)
def test_what_cannot_be_is_one_line(flags, told, texts, decoder, tmp_path, capsys):
    given = flags_of(tmp_path, texts, decoder)
    if any(name.startswith("model.student") for name in flags):
        given = [flag for flag in given if not flag.startswith("--model.student")]
    assert told in refused(capsys, *given, *(f"--{name}={value}" for name, value in flags.items()))


def test_an_encoder_teaches_no_decoder(texts, encoder, tmp_path, capsys):
    assert "is a BertForMaskedLM, no AutoModelForCausalLM" in refused(capsys, *flags_of(tmp_path, texts, encoder))


def test_a_teacher_without_weights_is_refused(texts, decoder, tmp_path, capsys):
    shutil.copytree(decoder, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    assert "gives no AutoModelForCausalLM" in refused(capsys, *flags_of(tmp_path / "run", texts, tmp_path / "empty"))


def test_without_a_teacher_the_newest_pretraining_is_one(texts, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model").symlink_to(decoder)
    quick = {"comparison.control": False, "trainer.max_steps": 2, "trainer.val_check_interval": 2}
    fit(tmp_path / "runs" / "taught", texts, None, **quick)
    assert "teacher" in capsys.readouterr().out
    # Its own student is newer, and no teacher by default: the same command is the same run.
    summary = fit(tmp_path / "again", texts, None, **quick)
    assert summary["teachers"] == ["runs/mine/model"]
