"""Training of what is compressed: weights that are stored are those that were trained, zeros stay, what was lost is won
back."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_modules.callbacks.changed_weights import ChangedWeights
from lightning_modules.callbacks.sparse_weights import SparseWeights
from lightning_modules.compression import training
from lightning_modules.compression.opened import open_model
from lightning_modules.compression.packed_folder import read_packed
from recipes import compress
from tests.distilling import as_command, fit, flags_of
from tests.faults import signal_at, state
from tests.test_quantization import failure

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"

QAT = "lightning_modules.callbacks.fake_quantization.FakeQuantization"
SPARSE = "lightning_modules.callbacks.sparse_weights.SparseWeights"
ONE_MODEL = {
    **{f"model.student.{name}": None for name in ("hidden_size", "intermediate_size")},
    **{f"model.student.{name}": None for name in ("num_hidden_layers", "num_attention_heads")},
    "comparison.control": False,
}


def callback(name: str, **settings: object) -> dict[str, str]:
    return {"trainer.callbacks+": json.dumps({"class_path": name, "init_args": settings})}


def trained(folder: Path, texts: Path, decoder: Path, **flags: object) -> dict:
    return fit(folder, texts, decoder, **(ONE_MODEL | {"model.student": decoder} | flags))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("scheme", ["int2", "8da4w", "int8-dynamic", "float8"])
def test_what_is_stored_is_what_was_trained_bit_by_bit(scheme, precision, texts, decoder, tmp_path, capsys):
    qat = callback(QAT, scheme=scheme, group_size=16)
    trained(tmp_path, texts, decoder, **qat, **{"trainer.precision": precision})
    said = capsys.readouterr().out
    assert f"model-{scheme}: trained and stored are equal bit by bit" in said
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    stored = read_packed(AutoModelForCausalLM, str(tmp_path / f"model-{scheme}"), dense.config.dtype).float()
    start, dense = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32), dense.float()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dense.get_parameter(name), stored.get_parameter(name))
    assert not torch.equal(dense.get_parameter(name), start.get_parameter(name))
    if scheme == "int2":
        assert all(len(group.unique()) <= 4 for group in dense.get_parameter(name).view(-1, 16))


class InWholes(ChangedWeights):
    """Weights that a network reads as whole numbers."""

    def names(self, network):
        return ["weight"]

    def put_in(self, module, exact):
        module.network.weight.copy_(exact["weight"].round())

    def adapt(self, module, exact):
        pass


def test_changes_of_less_than_a_step_of_the_grid_add_up():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 3.0)
    optimizer, callback = torch.optim.SGD(network.parameters(), lr=0.2), InWholes()
    trainer = SimpleNamespace(callbacks=[callback], optimizers=[optimizer])
    module, read = SimpleNamespace(network=network), []
    callback.on_train_start(trainer, module)
    for _ in range(8):
        network.weight.grad = torch.ones(1, 1)
        callback.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
        read.append(float(network.weight))
    assert float(callback.exact["weight"]) == pytest.approx(3 - 8 * 0.2)
    assert read == [3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]


def test_training_wins_back_what_few_bits_lost(texts, decoder, tmp_path, capsys):
    qat = callback(QAT, scheme="int2", group_size=16)
    trained(tmp_path, texts, decoder, **qat, **{"trainer.max_steps": 40, "trainer.val_check_interval": 20})
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    after = next(float(row[3]) for row in table if row[:1] == ["student"])
    as_it_is = ["--scheme", "int2", "--group_size", "16", "--rounding", "nearest", "--data.path", str(texts)]
    compress.main(["quantize", "--model", str(decoder), "--output", str(tmp_path / "ptq"), *as_it_is])
    exact, ptq = open_model(str(decoder)), open_model(str(tmp_path / "ptq"))
    ids = torch.arange(64)[None] % exact.network.config.vocab_size
    with torch.no_grad():
        p, q = (opened.network(ids).logits.log_softmax(-1) for opened in (exact, ptq))
    before = float((p.exp() * (p - q)).sum(-1).mean())
    assert after < 0.5 * before


def test_a_run_with_few_bits_goes_on_bit_by_bit(texts, decoder, tmp_path):
    settings = ONE_MODEL | {"model.student": decoder, "ckpt_path": "last"} | callback(QAT, scheme="int4", group_size=16)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        flags = flags_of(tmp_path / name, texts, decoder, **settings)
        if name == "cut":
            assert as_command(tmp_path / name, [*flags, *signal_at(7)]) == 143
        assert as_command(tmp_path / name, flags) == 0
    assert state(tmp_path / "whole") == state(tmp_path / "cut")
    weights = [(tmp_path / name / "model-int4" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_half_asked_for_is_half_at_the_end(precision, texts, decoder, tmp_path, capsys):
    more = callback(SPARSE, sparsity=0.5, every=1) | {"trainer.val_check_interval": 3, "trainer.precision": precision}
    more |= {"model.optimizer.lr": 0.0}  # so that the first validation, of few zeros, has the best loss
    summary = trained(tmp_path, texts, decoder, **more)
    assert "(50.0" in capsys.readouterr().out
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shares = {n: float((p == 0).float().mean()) for n, p in network.named_parameters()}
    of_layers = [share for name, share in shares.items() if "_proj" in name]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in of_layers)
    assert all(share < 0.01 for name, share in shares.items() if "_proj" not in name)
    assert len(list((tmp_path / "checkpoints").glob("step-*.ckpt"))) == 1
    assert summary["val_loss"] == pytest.approx(summary["val_loss_final"], abs=0.5)


def test_zeros_stay_zero_and_on_every_grid(texts, decoder, tmp_path):
    pruned = tmp_path / "pruned"
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--rows", "4"]
    compress.main(["prune", "--model", str(decoder), "--output", str(pruned), "--method", "wanda", *read])
    before = AutoModelForCausalLM.from_pretrained(pruned)
    for name, qat in (("plain", {}), ("grid", callback(QAT, scheme="int4", group_size=16))):
        both = json.dumps([json.loads(c["trainer.callbacks+"]) for c in (qat, callback(SPARSE)) if c])
        more = {"model.student": pruned, "trainer.callbacks": both}
        trained(tmp_path / name, texts, decoder, **more)
        after = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model")
        for weight, (where, now) in zip(before.parameters(), after.named_parameters(), strict=True):
            assert not now[weight == 0].any(), where
            assert torch.equal(now, weight) is False


def test_a_model_without_zeros_has_none_to_keep(texts, decoder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        trained(tmp_path, texts, decoder, **callback(SPARSE))
    assert "the model has no zeros to keep" in capsys.readouterr().err
    with pytest.raises(ValueError, match="0 <= begin <= end <= 0.9"):
        SparseWeights(0.5, end=1.0)


# The command


def words_of(model: Path, *rest: str, **methods: object) -> list[str]:
    return training.command(RECIPES, str(model), training.Methods(**methods), list(rest))


def test_a_task_is_trained_by_its_own_recipe(decoder, encoder):
    assert "--model=CausalDistillation" in words_of(decoder, qat="int4")
    assert "--model=MaskedDistillation" in words_of(encoder, qat="int4")
    words = words_of(decoder, "--trainer.max_steps", "7", qat="int4", sparsity=0.5)
    assert words[-2:] == ["--trainer.max_steps", "7"]
    assert f"--model.student={decoder}" in words and f"--model.teacher={decoder}" in words
    assert any("SparseWeights" in word for word in words) and "--trainer.callbacks.scheme=int4" in words
    assert not any("optimizer" in word for word in words)


def test_a_trained_model_of_labels_is_not_trained_at_the_rate_of_new_weights(encoder, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(encoder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path)
    words = words_of(tmp_path, qat="int4")
    assert "--model=ClassificationDistillation" in words and "--model.optimizer.lr=0.0001" in words
    own = ["--model.optimizer.lr=0.5"]
    assert [word for word in words_of(tmp_path, *own, qat="int4") if "optimizer" in word] == own


def test_a_model_is_trained_by_the_one_that_it_was_made_of(decoder, texts, tmp_path):
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--rows", "4"]
    flags = ["--layers", "1", "--vocabulary", "320"]
    compress.main(["prune", "--model", str(decoder), "--output", str(tmp_path / "small"), *flags, *read])
    teacher = next(w for w in words_of(tmp_path / "small") if w.startswith("--model.teacher=")).partition("=")[2]
    made, source = open_model(teacher), open_model(str(decoder))
    assert made.tokenizer.get_vocab() == open_model(str(tmp_path / "small")).tokenizer.get_vocab()
    text = "the film was fine and lovely"
    with torch.no_grad():
        new, old = (o.network(o.tokenizer(text, return_tensors="pt")["input_ids"]).logits for o in (made, source))
    kept = [
        source.tokenizer.get_vocab()[w] for w in sorted(made.tokenizer.get_vocab(), key=made.tokenizer.get_vocab().get)
    ]
    assert torch.equal(new, old[..., kept])


def test_mistakes_are_told_before_anything_is_trained(decoder, texts, tmp_path, capsys, monkeypatch):
    assert "nothing was done to" in failure(["train", "--model", str(decoder)], capsys)
    assert "--rounds prunes and trains" in failure(["train", "--model", str(decoder), "--rounds", "2"], capsys)
    read = ["--data.path", str(texts), "--rows", "4", "--rounding", "nearest"]
    compress.main(["quantize", "--model", str(decoder), "--output", str(tmp_path / "q"), *read])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert "has few bits already" in failure(["train", "--model", str(tmp_path / "q"), "--qat", "int4"], capsys)
    assert not (tmp_path / "runs").exists()


def test_rounds_prune_and_train_in_turns_and_go_on_where_they_were(decoder, texts, tmp_path, monkeypatch):
    from tests.faults import command as started

    flags = flags_of(tmp_path, texts, decoder, **(ONE_MODEL | {"model.student": None, "model.teacher": None}))
    flags = [flag for flag in flags if "default_root_dir" not in flag]
    own = ["train", f"--model={decoder}", "--parameters=0.5", "--rounds=2", f"--trainer.default_root_dir={tmp_path}"]
    process = started([*own, *flags], tmp_path / "log", [sys.executable], script=RECIPES / "compress.py")
    assert process.wait(180) == 0, (tmp_path / "log").read_text()[-2000:]
    sizes = [sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
             for folder in (decoder, tmp_path / "pruned-1", tmp_path / "trained-1" / "model", tmp_path / "pruned-2",
                            tmp_path / "trained-2" / "model")]  # fmt: skip
    assert sizes[1] == sizes[2] < 0.72 * sizes[0] and sizes[3] == sizes[4] < 0.72 * sizes[1]
    about = json.loads((tmp_path / "pruned-2" / "compression.json").read_text())
    assert about["source"] == str(decoder) and [step["verb"] for step in about["steps"]] == ["prune", "train", "prune"]


def test_zeros_stay_where_more_are_asked_for_and_fewer_are_refused(texts, decoder, tmp_path, capsys):
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--rows", "4"]
    compress.main(["prune", "--model", str(decoder), "--output", str(tmp_path / "half"), "--method", "wanda", *read])
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    trained(
        tmp_path / "run",
        texts,
        decoder,
        **{"model.student": tmp_path / "half"},
        **callback(SPARSE, sparsity=0.75, every=2),
    )
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for weight, (name, now) in zip(before.parameters(), after.named_parameters(), strict=True):
        assert not now[weight == 0].any(), name
        if "_proj" in name:
            assert float((now == 0).float().mean()) == pytest.approx(0.75, abs=0.01), name
    with pytest.raises(SystemExit):
        more = callback(SPARSE, sparsity=0.3)
        trained(tmp_path / "less", texts, decoder, **{"model.student": tmp_path / "half"}, **more)
    assert "is zero already; pass a sparsity above" in capsys.readouterr().err


def test_a_short_run_is_as_sparse_as_asked_for(texts, decoder, tmp_path, capsys):
    trained(tmp_path, texts, decoder, **callback(SPARSE, sparsity=0.5, every=1000))
    assert "(50.0" in capsys.readouterr().out


def test_what_a_run_began_from_is_known_to_the_next(texts, decoder, tmp_path):
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--rows", "4"]
    compress.main(["prune", "--model", str(decoder), "--output", str(tmp_path / "half"), "--method", "wanda", *read])
    run = tmp_path / "run"
    assert training.history_flags(str(tmp_path / "half"), [f"--trainer.default_root_dir={run}"], None) == []
    trained(run, texts, decoder, **{"model.student": tmp_path / "half"}, **callback(SPARSE))
    words = words_of(run, qat="int4")
    assert f"--model.teacher={decoder}" in words and any("SparseWeights" in word for word in words)
    assert not any("SparseWeights" in word for word in words_of(decoder, qat="int4"))


def test_what_a_checkpoint_had_is_taken_back_in_the_middle_of_a_run():
    network = torch.nn.Linear(1, 1, bias=False)
    optimizer, callback = torch.optim.SGD(network.parameters(), lr=0.2), InWholes()
    torch.nn.init.constant_(network.weight, 3.4)
    trainer = SimpleNamespace(callbacks=[callback], optimizers=[optimizer])
    module = SimpleNamespace(network=network, device=torch.device("cpu"))
    callback.on_train_start(trainer, module)
    had = {name: tensor.clone() for name, tensor in callback.state_dict()["exact"].items()}
    for _ in range(8):
        network.weight.grad = torch.ones(1, 1)
        callback.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()
    assert float(network.weight) == 2.0
    callback.load_state_dict({"exact": had})
    callback.take_back(trainer, module)
    assert float(network.weight) == 3.0 and float(callback.exact["weight"]) == pytest.approx(3.4)
