"""The same training under every strategy: one process, two and four ranks over gloo, and one strategy after another."""

import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import ApertusConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

from lightning_modules import checkpoint_io, sharded_checkpoints, simulation
from lightning_modules.pretrain import CausalLM
from lightning_modules.strategies import FSDP2, shard, split_layers
from tests.faults import SCRIPT, signal_at
from tests.test_ddp import ROOT, fit
from tests.test_recipes import TOY, run

EVERY = ("decoder", "normed_heads", "encoder", "encoder_decoder", "labels", "answers", "distilled")
WITH_PLAN = ("decoder", "normed_heads", "answers", "distilled")
"""Recipes on architectures that transformers has a plan of tensor parallel for."""
CASES = {
    1: [("auto", recipe) for recipe in EVERY],
    2: [(name, recipe) for name in ("ddp", "fsdp2") for recipe in (*EVERY, "muon")]
    + [("tp", recipe) for recipe in WITH_PLAN]
    + [("fsdp2_offload", "decoder")],
    4: [("fsdp2_tp", recipe) for recipe in WITH_PLAN] + [("fsdp2_groups", name) for name in ("decoder", "distilled")],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, texts, encoder, decoder, reviews) -> dict[str, dict]:
    """Losses and gradient norms of 50 steps of each case, and what its validation finds."""
    folder, rng = tmp_path_factory.mktemp("ranks"), random.Random(0)
    words = ("the", "film", "was", "and", "its", "end")
    pairs = [[rng.choice(words) for _ in range(rng.randrange(2, 8))] for _ in range(60)]
    rows = [{"instruction": " ".join(pair), "output": " ".join(reversed(pair))} for pair in pairs]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"texts": texts, "encoder": encoder, "decoder": decoder, "reviews": reviews}
    job = {name: str(path) for name, path in job.items()} | {"answers": str(folder / "answers.jsonl")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return {name: case for ranks in CASES for name, case in launched(folder, ranks, job).items()}


def launched(folder: Path, ranks: int, job: dict) -> dict[str, dict]:
    """What the ranks found, each a process as torchrun would start it."""
    file = folder / f"{ranks}.json"
    job = job | {"ranks": ranks, "cases": CASES[ranks], "file": str(file)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
        of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        names = {name: str(value) for name, value in of_rank.items()} if ranks > 1 else {}
        environment = os.environ | names | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / f"{ranks}-{rank}.log").open("w") as log:
            command = [sys.executable, str(ROOT / "tests" / "ranks.py"), json.dumps(job)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), (folder / f"{ranks}-0.log").read_text()[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("case", [" ".join(case) for n in (2, 4) for case in CASES[n] if case[1] != "muon"])
def test_every_strategy_trains_as_one_process_does(case, found):
    theirs, ours = found[f"auto {case.split()[1]}"], found[case]
    assert len(ours["steps"]) == len(theirs["steps"]) == 50
    for (loss, norm), (loss_of_one, norm_of_one) in zip(ours["steps"], theirs["steps"], strict=True):
        assert loss == pytest.approx(loss_of_one, rel=1e-6)
        assert norm == pytest.approx(norm_of_one, rel=1e-5)
    # Of a perplexity the relative error is the absolute one of the loss that it is made of.
    val = [{name: x for name, x in case["val"].items() if name != "val/perplexity"} for case in (ours, theirs)]
    assert val[0] == pytest.approx(val[1], rel=1e-6)
    # The folders that are left: but for biases of keys, whose gradient is zero and what is learnt is rounding.
    norms = [{name: x for name, x in case["norms"].items() if not name.endswith("key.bias")} for case in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_muon_makes_of_shards_what_it_makes_of_whole_matrices(found):
    """As long as it does: it lifts the smallest directions of a gradient, which are rounding, a thousandfold, and two
    runs part in the end. Of parts of matrices alone the second loss would be off by 2e-3."""
    runs = zip(found["fsdp2 muon"]["steps"][:10], found["ddp muon"]["steps"][:10], strict=True)
    for (loss, _), (loss_of_whole, _) in runs:
        assert loss == pytest.approx(loss_of_whole, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [("auto", [1, 1]), ("ddp", [1, 1]), ("fsdp2", [0.5, 0.5]), ("tp", [0.92, 0.5]), ("fsdp2_tp", [0.46, 0.25])]
    + [("fsdp2_groups", [0.5, 0.25])],
)
def test_each_rank_keeps_a_part_of_the_network_and_of_its_teacher(strategy, kept, found):
    """Tensor parallel leaves embeddings and head whole, which are most of a small model."""
    assert found[f"{strategy} distilled"]["kept"] == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("case", ["fsdp2 labels", "fsdp2 answers", "tp distilled", "fsdp2_tp distilled"])
def test_the_first_rank_alone_makes_a_network_and_its_teacher(case, found):
    first, *others = found[case]["made"]
    networks = 1 + case.endswith("distilled")
    assert first == [True] * networks and others and all(other == [False] * networks for other in others)


def test_weights_that_are_offloaded_stay_on_the_cpu(monkeypatch):
    """And nothing else does; another device stands in the place of a GPU."""
    monkeypatch.setattr(FSDP2, "root_device", torch.device("meta"))
    strategy, module = FSDP2(cpu_offload=True), CausalLM(LlamaConfig(num_attention_heads=3, vocab_size=9, **SIZES))
    module.network = AutoModelForCausalLM.from_config(module.architecture)
    strategy.model = strategy._lightning_module = module
    with simulation.ranks(2):
        shard(module.network, init_device_mesh("cpu", (2,)), offloads=True)
        strategy.model_to_device()
    assert {weight.device.type for weight in module.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"} and module.device.type == "meta"


# Checkpoints

SMALL = {
    "model.architecture.num_attention_heads": 4,
    "model.architecture.num_key_value_heads": 4,
    "model.architecture.hidden_size": 32,
    "model.optimizer": "torch.optim.AdamW",
    "model.optimizer.lr": 0.01,
    "model.schedule": "Constant",
    "data.batch_size": 4,
    "trainer.val_check_interval": 3,
    "trainer.log_every_n_steps": 1,
}
TWO = {"trainer.devices": 2, "data.batch_size": 2}
TOY_RUN = (
    SMALL
    | TWO
    | {
        "trainer.strategy": "fsdp2",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 6,
        "trainer.max_time": "null",
        "model.architecture.num_hidden_layers": 1,
        "data.tokenizer": "bytes",
        "data.seq_len": 50,
        "samples.max_new_tokens": 4,
    }
)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_goes_on_under_another_strategy_and_another_number_of_ranks(corpus, tmp_path, shared_cache):
    """Shards of two ranks, then one process, then tensor parallel: as one process from beginning to end."""
    _, expected = fit(tmp_path / "one", corpus, **SMALL, **{"trainer.max_steps": 9})
    turns = (
        TWO | {"trainer.strategy": "fsdp2", "trainer.max_steps": 3},
        {"trainer.max_steps": 6},
        {"trainer.strategy": "tp", "trainer.devices": 2, "trainer.max_steps": 9},
    )
    for turn in turns:
        summary, found = fit(tmp_path / "turns", corpus, **(SMALL | turn | {"ckpt_path": "last"}))
    assert summary["steps"] == 9 and sorted(found) == sorted(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-6)
    folders = [path for path in (tmp_path / "turns" / "checkpoints").glob("*.ckpt") if path.is_dir()]
    assert folders and all(sharded_checkpoints.fault(path) is None for path in folders)
    columns = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "turns")]
    steps = [[line.split(",")[columns[i][0].split(",").index("step")] for line in columns[i][1:]] for i in range(2)]
    assert steps[0] == steps[1]


QWEN3 = {"model.architecture": "transformers.Qwen3Config", "model.architecture.head_dim": 8}
"""Whose norms of heads are whole on every rank of tensor parallel, with a part of their gradient."""


@pytest.mark.parametrize(
    ("strategy", "rows", "more"), [("fsdp2", TWO, {}), ("tp", {"trainer.devices": 2}, QWEN3)], ids=["fsdp2", "tp"]
)
def test_a_step_is_taken_up_in_its_middle(strategy, rows, more, corpus, tmp_path, shared_cache):
    """A validation between two micro-batches of a step saves the gradients so far."""
    cut = {"trainer.accumulate_grad_batches": 2, "trainer.val_check_interval": 3, "trainer.max_steps": 3}
    best = {"every_n_train_steps": None, "save_top_k": -1, "monitor": None}
    keep = {"class_path": "ModelCheckpoint", "init_args": best}
    flags = SMALL | cut | more | {"trainer.callbacks+": json.dumps(keep)}
    _, expected = fit(tmp_path / "whole", corpus, **(flags | rows | {"trainer.strategy": strategy}))
    middle = [path for path in (tmp_path / "whole" / "checkpoints").glob("*.ckpt") if (path / "meta.pt").exists()]
    middle = [path for path in middle if "step_so_far" in sharded_checkpoints.rest_of(path)]
    assert middle
    others = {"one": {}, "two": rows | {"trainer.strategy": strategy}}
    for name, other in others.items() if strategy == "fsdp2" else [("two", others["two"])]:
        _, found = fit(tmp_path / name, corpus, **(flags | other | {"ckpt_path": middle[0]}))
        for weight in expected:
            torch.testing.assert_close(found[weight], expected[weight], rtol=0, atol=2e-6)


def run_of(folder: Path, corpus: Path, **flags: object) -> list[str]:
    chosen = TOY_RUN | {"data.path": corpus, "trainer.default_root_dir": folder, "ckpt_path": "last"} | flags
    return [f"--{name}={value}" for name, value in chosen.items()]


def test_a_terminated_run_goes_on_bit_by_bit(corpus, tmp_path, shared_cache):
    for name in ("whole", "cut"):
        flags = run_of(tmp_path / name, corpus)
        if name == "cut":
            assert command(tmp_path, *flags, "--allow_import=tests", *signal_at(4)).returncode == 143
        done = command(tmp_path, *flags)
        assert done.returncode == 0, done.stderr[-2000:]
    states = [state_of(tmp_path / name) for name in ("whole", "cut")]
    assert states[0] == states[1]


def state_of(run: Path) -> str:
    path = checkpoint_io.newest(run / "checkpoints")
    return checkpoint_io.digest(checkpoint_io.CheckpointFiles().load_checkpoint(path))


def command(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(SCRIPT), "fit", *flags]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)


def test_where_the_disk_is_full_training_goes_on_and_what_was_saved_stays(corpus, tmp_path, shared_cache):
    limits = {"class_path": "tests.faults.LimitsFiles", "init_args": {"first": 4, "last": 7, "size": 10_000}}
    flags = run_of(tmp_path / "run", corpus, **{"trainer.devices": 1, "trainer.max_steps": 9})
    done = command(tmp_path, "--allow_import=tests", *flags, f"--trainer.callbacks+={json.dumps(limits)}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "was not written: it needs about" in done.stderr
    assert "kept ['last.ckpt', 'step-3.ckpt']" in done.stdout  # though step 6 was better, and was not written
    kept = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert kept and all(sharded_checkpoints.fault(path) is None for path in kept)
    assert max(map(sharded_checkpoints.step_of, kept)) == 9


def test_a_rank_that_cannot_read_what_it_wrote_tells_the_others(monkeypatch, tmp_path):
    """Who would wait for it."""
    told = []

    def gather(found: list, own: object) -> None:
        told.append(own)
        found[:] = [own] * len(found)

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(sharded_checkpoints, "sums_of", Mock(side_effect=OSError("Input/output error")))
    with pytest.raises(RuntimeError, match="Input/output error"):
        FSDP2().save_checkpoint({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "last.ckpt")
    assert "Input/output error" in told[-1]


def test_ranks_of_torchrun_agree_on_a_folder_that_nobody_named(corpus, tmp_path, shared_cache):
    flags = [flag for flag in run_of(tmp_path, corpus) if "default_root_dir" not in flag and "ckpt_path" not in flag]
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), "fit"]
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*words, *flags], capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert "2 micro-batches" not in done.stdout and "× 2 ranks = " in done.stdout


def test_an_adapter_of_a_sharded_model_is_merged_and_left_as_of_one_that_is_not(decoder, tmp_path, shared_cache):
    rows = [{"instruction": f"say {word} {i}", "output": f"{word} it is"} for i in range(20) for word in ("no", "yes")]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"model.from": decoder, "data.path": tmp_path / "answers.jsonl", "data.val_fraction": 0.2}
    flags |= {"model.adapter.rank": 2, "model.adapter.target_modules": "all-linear", "model.max_new_tokens": 3}
    flags |= {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_time": "null"}
    flags |= {"trainer.max_epochs": -1, "trainer.max_steps": 4, "trainer.val_check_interval": 4}
    found = {}
    for name, more in (("one", {"data.batch_size": 4}), ("two", TWO | {"trainer.strategy": "fsdp2"})):
        command = ["finetune.py", "fit", "--config", str(ROOT / "recipes" / "finetune_text_generation.yaml")]
        command += [f"--{key}={value}" for key, value in (flags | more).items()]
        command += [f"--trainer.default_root_dir={tmp_path / name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command[0] = str(ROOT / "recipes" / command[0])
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        files = (tmp_path / name / part for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"))
        found[name] = {name: weight for file in files for name, weight in load_file(file).items()}
    assert sorted(found["one"]) == sorted(found["two"])
    for weight, expected in found["one"].items():
        torch.testing.assert_close(found["two"][weight], expected, rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, corpus, shared_cache) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fit(folder, corpus, **(SMALL | TWO | {"trainer.strategy": "fsdp2", "trainer.max_steps": 3}))
    return checkpoint_io.newest(folder / "checkpoints")


def test_a_damaged_part_is_found_and_passed_over(shards, tmp_path):
    for name in ("good.ckpt", "flipped.ckpt", "unsealed.ckpt"):
        shutil.copytree(shards, tmp_path / name)
    part = next((tmp_path / "flipped.ckpt").glob("__0_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (tmp_path / "unsealed.ckpt" / "sealed.json").unlink()
    assert checkpoint_io.newest(tmp_path) == tmp_path / "good.ckpt"
    for name in ("flipped.ckpt", "unsealed.ckpt"):
        with pytest.raises(checkpoint_io.DamagedCheckpoint):
            checkpoint_io.CheckpointFiles().load_checkpoint(tmp_path / name)


class Harmful:
    """Also by a function of torch that unpickles in its turn."""

    def __init__(self, call: Callable, argument: object):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


@pytest.mark.parametrize(("call", "argument"), [(os.system, "true"), (torch.storage._load_from_bytes, b"")])
def test_code_in_a_shards_description_is_never_run(call, argument, shards, tmp_path):
    shutil.copytree(shards, tmp_path / "harmful.ckpt")
    (tmp_path / "harmful.ckpt" / ".metadata").write_bytes(pickle.dumps(Harmful(call, argument)))
    with pytest.raises(ValueError, match="code is never run"):
        sharded_checkpoints.contents(tmp_path / "harmful.ckpt")


def test_masters_of_one_process_are_the_shards_of_two(corpus, tmp_path, shared_cache):
    """In bf16, from one to the other: what goes on in tiny steps is what there was, to more than bf16's digits."""
    sgd = {"model.optimizer": "torch.optim.SGD", "model.optimizer.momentum": 0.0}  # whose state has a None in it
    flags = SMALL | {"trainer.precision": "bf16-true"} | sgd
    one, two = {}, TWO | {"trainer.strategy": "fsdp2"}
    for name, first, then in (("shards", two, one), ("masters", one, two)):
        fit(tmp_path / name, corpus, **(flags | first | {"trainer.max_steps": 3}))
        before = checkpoint_io.newest(tmp_path / name / "checkpoints")
        held = {weight: t.clone() for weight, t in float32_weights(before).items()}
        still = {"trainer.gradient_clip_val": 1e-9, "trainer.max_steps": 4, "ckpt_path": before}
        fit(tmp_path / f"{name}_next", corpus, **(flags | then | still))
        after = float32_weights(checkpoint_io.newest(tmp_path / f"{name}_next" / "checkpoints"))
        assert sorted(held) == sorted(after)
        far = max(float((after[weight] - held[weight]).abs().max()) for weight in held)
        rounding = max(float((held[weight].bfloat16().float() - held[weight]).abs().max()) for weight in held)
        assert rounding > 1e-4 and far < 1e-6


def float32_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint goes on from."""
    checkpoint = checkpoint_io.CheckpointFiles().load_checkpoint(path)
    found = {name: weight for name, weight in checkpoint["state_dict"].items() if weight.is_floating_point()}
    if path.is_file():
        found |= dict(zip(checkpoint["optimizer_names"], checkpoint["optimizer_states"][0]["masters"], strict=True))
    return found


def test_shards_in_bf16_are_masters_in_float32(corpus, tmp_path, shared_cache):
    flags = SMALL | TWO | {"trainer.precision": "bf16-true", "trainer.max_steps": 6}
    ddp, _ = fit(tmp_path / "ddp", corpus, **flags, **{"trainer.strategy": "ddp"})
    fsdp2, weights = fit(tmp_path / "fsdp2", corpus, **flags, **{"trainer.strategy": "fsdp2"})
    assert fsdp2["val_loss"] == pytest.approx(ddp["val_loss"], rel=2e-3)
    assert torch.tensor(fsdp2["val_loss"]).bfloat16().double() != fsdp2["val_loss"]  # metrics are not rounded
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    path = checkpoint_io.newest(tmp_path / "fsdp2" / "checkpoints")
    assert {dtype for _, dtype in sharded_checkpoints.contents(path).values()} == {torch.float32}


# What cannot be

SIZES = {"hidden_size": 24, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            LlamaConfig(num_attention_heads=3, num_key_value_heads=3, vocab_size=9, **SIZES),
            "num_attention_heads=3, which 2",
        ),
        (GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=9), "has no plan for tensor parallel of GPT2Config"),
        (
            Phi3Config(num_attention_heads=2, vocab_size=9, pad_token_id=0, **SIZES),
            "Phi3Config has colwise_gather_output",
        ),
        (
            ApertusConfig(num_attention_heads=2, num_key_value_heads=2, vocab_size=9, pad_token_id=0, **SIZES),
            "ApertusConfig leaves out layers.*.mlp.act_fn.alpha_p",
        ),
    ],
)
def test_layers_that_cannot_be_split_are_refused(config, told):
    network = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=told):
        split_layers(network, SimpleNamespace(size=lambda: 2))


@pytest.mark.parametrize("fields", [{"l1": 0.1}, {}])
def test_what_takes_whole_weights_is_refused(fields):
    module = CausalLM(LlamaConfig(num_attention_heads=3, **SIZES), **fields)
    strategy = Mock(spec=FSDP2, parallelize=Mock(), root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy)
    with pytest.raises(ValueError, match="--model.l1 sums whole weights") if fields else nullcontext():
        module.make_fast(torch.nn.Linear(2, 2))
    assert strategy.parallelize.called != bool(fields)


def test_ranks_that_do_not_divide_are_one_line(corpus, tmp_path, shared_cache):
    more = {"trainer.strategy": "FSDP2TensorParallel", "trainer.strategy.tensor_parallel_size": 3}
    done = command(tmp_path, *run_of(tmp_path / "run", corpus, **more))
    assert done.returncode == 2
    assert "error: 2 ranks do not divide into groups of 3 of tensor parallel; pass another size" in done.stderr


@pytest.mark.parametrize("strategy", ["tp", "fsdp2_tp", "FSDP2TensorParallel"])
def test_the_scale_of_float16_is_not_for_tensor_parallel(strategy, corpus, capsys):
    """torch's scaler takes either sharded or whole gradients."""
    with pytest.raises(SystemExit) as stop:
        run("fit", **(TOY | {"data.path": corpus, "trainer.strategy": strategy, "trainer.precision": "16-mixed"}))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error == f"error: --trainer.precision 16-mixed does not go with {strategy}; pass bf16-mixed\n"
