"""What a plan says is what a step takes; what it says of many devices follows from how they share the work."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import planned

from lightning_modules import hardware, planning, simulation
from lightning_modules.architectures import active_parameters, flops_per_token
from lightning_modules.callbacks.plan import Plan
from lightning_modules.pretrain import CausalLM
from tests import finetuning
from tests.test_recipes import SMALL, TOY, run

LLAMA = {"model.architecture": "transformers.LlamaConfig", "model.architecture.num_key_value_heads": 4} | {
    f"model.architecture.{name}": value for name, value in SMALL["LlamaConfig"].items()
}
WORDS = {"decoder": "architecture", "encoder": "architecture", "LSTM": "architecture", "distillation": "student"}


def flags_of(run: str, texts: Path, decoder: Path) -> list[str]:
    """Small data and a small model for a run of the benchmark."""
    if run == "LoRA":
        return [f"--model.from={decoder}", "--data.batch_size=16"]
    flags = [f"--data.path={texts}", "--data.vocab_size=400", "--data.seq_len=64", "--data.batch_size=8"]
    if run == "encoder-decoder":
        sizes = SMALL["T5Config"] | {"d_model": 64}
        return flags + [f"--model.architecture.{name}={value}" for name, value in sizes.items()]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2}
    sizes |= {} if run == "LSTM" else {"intermediate_size": 128, "num_attention_heads": 2}
    flags += [f"--model.{WORDS[run]}.{name}={value}" for name, value in sizes.items()]
    return flags + ([f"--model.teacher={decoder}", "--data.tokenizer=null"] if run == "distillation" else [])


@pytest.mark.parametrize("name", planned.RUNS)
def test_a_step_takes_what_was_planned(name, texts, decoder, tmp_path):
    """By torch's own profiler and counter, in a run of the recipe."""
    found = planned.of_run(name, tmp_path, *flags_of(name, texts, decoder))
    step, foreseen = found["step"], found["step"]["simulated"]
    assert step["peak_memory_bytes"] == pytest.approx(foreseen["peak_memory_bytes"], rel=0.15)
    assert step["flops_per_token"] == foreseen["flops_per_token"]
    # Of the longest rows, where this step may have had shorter ones.
    assert found["planned"]["peak_memory_bytes"] >= 0.95 * foreseen["peak_memory_bytes"]
    assert found["run"]["steps"] == found["planned"]["steps"] == 4


def plan(tmp_path: Path, corpus: Path, **flags: object) -> dict:
    file = tmp_path / "plan.json"
    run("plan", **(TOY | LLAMA | {"data.path": corpus, "output": file} | flags))
    return json.loads(file.read_text())


def test_each_rank_of_many_keeps_its_part(corpus, tmp_path):
    """Ranks that are not there: 64 machines' worth of them in one process."""
    on = partial(plan, tmp_path, corpus, hardware="h100")
    adamw = {"model.optimizer": "AdamW", "model.architecture.hidden_size": 64}
    one, many = (on(devices=n, **adamw, **{"trainer.strategy": "fsdp2"}) for n in (1, 64))
    assert one["memory"]["weights"] == pytest.approx(4 * one["parameters"], rel=1e-2)  # and frequencies
    assert one["memory"]["optimizer"] == pytest.approx(8 * one["parameters"], rel=1e-2)
    for part in ("weights", "optimizer"):
        # Vectors of 64 numbers are shared among 64 ranks, too; what is left over is padding.
        assert many["memory"][part] == pytest.approx(one["memory"][part] / 64, rel=0.2), part
    assert many["memory"]["activations"] > 0.8 * one["memory"]["activations"]

    copies = on(devices=8, **adamw, **{"trainer.strategy": "ddp"})
    assert copies["memory"]["buckets"] == 4 * one["parameters"]
    assert copies["memory"]["weights"] == one["memory"]["weights"]
    heads = on(devices=4, **adamw, **{"trainer.strategy": "tp"})
    assert heads["memory"]["activations"] < one["memory"]["activations"]
    assert many["memory"]["weights"] < heads["memory"]["weights"] < one["memory"]["weights"]


def test_what_is_offloaded_is_in_the_memory_of_the_host(corpus, tmp_path, capsys):
    adamw = {"model.optimizer": "AdamW", "trainer.strategy": "FSDP2"}
    on = partial(plan, tmp_path, corpus, hardware="h100", devices=2, **adamw)
    kept, offloaded = on(), on(**{"trainer.strategy.cpu_offload": "true"})
    assert {"weights", "optimizer"} < kept["memory"].keys() and kept["host_memory_bytes"] == 0
    assert offloaded["memory"].keys().isdisjoint({"weights", "optimizer", "gradients"})
    assert offloaded["host_memory_bytes"] >= 4 * 4 * kept["parameters"] / 2  # weight, gradient and two moments
    assert " in the memory of its host" in capsys.readouterr().out


def test_a_group_that_is_too_small_for_a_copy_is_made_larger(corpus, tmp_path, capsys, monkeypatch):
    groups = {"trainer.strategy": "FSDP2", "trainer.strategy.group_size": 2, "model.optimizer": "AdamW"}
    on = partial(plan, tmp_path, corpus, devices=8, **groups | {"model.architecture.hidden_size": 64})
    found = on(hardware="h100")["memory"]
    kept = found["weights"] + found["optimizer"]
    for part_of_room, told in ((0.9, "--trainer.strategy.group_size 4"), (2.9, "fsdp2 on 10 devices or more")):
        monkeypatch.setitem(hardware.GPUS, "L4", (121e12, kept / part_of_room / planning.USABLE, 72))
        assert not on(hardware="l4", **{"data.batch_size": 1})["fits"]
        assert told in capsys.readouterr().out


def test_it_says_what_to_change_and_that_helps(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(hardware.GPUS, "L4", (121e12, 4e6, 72))
    on = partial(plan, tmp_path, corpus, hardware="l4", **{"model.optimizer": "AdamW", "data.seq_len": 64})
    too_large = on(**{"data.batch_size": 64})
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fits"))
    rows, micro_batches = (
        int(said.split(f"{flag} ")[1].split()[0]) for flag in ("batch_size", "accumulate_grad_batches")
    )
    assert not too_large["fits"] and rows * micro_batches == 64 and rows <= too_large["most_rows"]
    assert on(**{"data.batch_size": too_large["most_rows"]})["fits"]
    assert not on(**{"data.batch_size": too_large["most_rows"] + max(1, too_large["most_rows"] // 20)})["fits"]

    monkeypatch.setitem(hardware.GPUS, "L4", (121e12, 2e5, 72))
    assert on(**{"data.batch_size": 1})["most_rows"] == 0
    assert "--trainer.strategy fsdp2 on" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_most_rows_that_fit_are_looked_at_and_one_more_does_not(rows):
    """Where a row takes more from the twelfth on: another part of the step is the peak then."""
    looked_at = []

    def foresee(count: int) -> tuple[simulation.Footprint, int]:
        looked_at.append(count)
        return simulation.Footprint({"activations": 100 + max(10 * count, 30 * count - 240)}, {"weights": 100}, 0, 0), 0

    plan = SimpleNamespace(footprint=foresee(rows)[0], room=550)
    assert planning.most_rows(foresee, plan, rows) == 23 and {23, 24} <= set(looked_at)
    assert len(looked_at) < 10
    plan.room = 30 * 10**6 - 140
    assert planning.most_rows(foresee, plan, rows) == 10**6 and max(looked_at) < 1000 * rows  # which would take long


def test_time_energy_and_money_follow_from_what_is_stated(corpus, tmp_path, capsys):
    found = plan(tmp_path, corpus, hardware="H100-PCIe", devices=8, mfu=0.5, price=3, **{"trainer.max_steps": 100})
    assert found["tokens"] == 100 * 8 * 4 * 32
    assert found["seconds"] == pytest.approx(found["tokens"] * found["model_flops_per_token"] / (8 * 0.5 * 756e12))
    assert found["kilowatt_hours"] == pytest.approx(8 * 0.350 * found["seconds"] / 3600)
    assert found["usd"] == pytest.approx(8 * 3 * found["seconds"] / 3600)
    assert f"{20 * found['active_parameters']:.2g} tokens, 20 a parameter" in capsys.readouterr().out


def test_the_plan_that_is_printed_is_that_of_the_verb_and_stands_beside_what_was_measured(corpus, tmp_path):
    settings = {"trainer.strategy": "auto", "trainer.precision": "32-true"}
    run("fit", **(TOY | LLAMA | settings | {"data.path": corpus, "trainer.default_root_dir": tmp_path / "run"}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = plan(tmp_path, corpus, **settings)
    same = ("parameters", "flops_per_token", "peak_memory_bytes", "memory", "steps", "tokens")
    assert {name: found[name] for name in same} == {name: summary["planned"][name] for name in same}
    assert summary["measured"]["tokens"] == summary["tokens"] == found["tokens"]
    assert summary["measured"]["peak_memory_bytes"] > 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert summary["measured"]["memory_of"] == "process" and "the whole process grew by" in page


def test_memory_is_measured_of_the_steps_before_the_first_validation(monkeypatch):
    """Which the plan does not foresee, nor the samples that follow it."""
    plan, peaks = Plan(), iter([500, 900])
    plan.memory_besides = 100
    monkeypatch.setattr(hardware, "peak_memory", lambda kind: next(peaks))
    module = SimpleNamespace(device=torch.device("cpu"))
    for sanity_checking in (True, False, False):
        plan.on_validation_start(SimpleNamespace(sanity_checking=sanity_checking), module)
    assert plan.measured_memory("cpu") == 400
    assert next(peaks) == 900
    plan.memory_held = 450  # of a process that had freed memory to give to the steps
    assert plan.measured_memory("cpu") == 450


def test_blocks_are_those_of_torchs_own_tracker():
    """Which takes ten times as long."""
    found = []
    for own in (True, False):
        with simulation.simulated("cpu") as live:
            network = AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=200))
            optimizer = torch.optim.AdamW(network.parameters(), fused=True)
            ids = torch.zeros(4, 32, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(network, optimizer)
            for _ in range(2):
                live.start_peak()
                tracker.reset_mod_stats()
                with tracker if not own else torch.enable_grad():
                    network(input_ids=ids, labels=ids).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            peak = tracker.get_tracker_snapshot("peak") if not own else {}
            found.append(sum(live.peak.values()) if own else next(iter(peak.values()))["Total"])
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_recomputed_layers_give_the_same_gradient_and_keep_less(toy):
    """Dropout is drawn again as it was."""
    gradients, sizes = [], []
    for recomputed in (False, True):
        architecture = GPT2Config(n_embd=32, n_layer=6, n_head=2)
        trainer, module, data = toy(architecture=architecture, activation_checkpointing=recomputed)
        trainer.fit(module, data)
        gradients.append({name: weight.detach().clone() for name, weight in module.named_parameters()})
        sizes.append(planning.simulate(trainer, module, hardware.here("cpu", 1e9, 1))[0].peak["activations"])
    for name, weight in gradients[0].items():
        assert torch.equal(weight, gradients[1][name]), name
    assert sizes[1] < 0.6 * sizes[0]


def test_experts_count_as_many_as_a_token_meets():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(num_local_experts=4, num_experts_per_tok=1, num_key_value_heads=2, vocab_size=50, **sizes)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    experts = 4 * 3 * 16 * 32
    assert active_parameters(network) == sum(p.numel() for p in network.parameters()) - experts * 3 // 4
    dense = flops_per_token(network, 8)
    config.num_experts_per_tok = 4
    assert flops_per_token(network, 8) - dense == 6 * experts * 3 // 4


def test_a_run_that_cannot_be_foreseen_is_run(toy, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise NotImplementedError("this operation has no shape")

    monkeypatch.setattr(simulation, "footprint", fail)
    trainer, module, data = toy(trainer={"callbacks": [Plan()]})
    trainer.datamodule = data
    assert Plan.foreseen(trainer, module, hardware.here("cpu", 1e9, 1)) == (None, 1)
    assert "cannot foresee the memory of this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hardware": "h1000"}, "--hardware h1000 is not known; pass one of a100, a10040gb, a10g"),
        ({"mfu": 45}, "--mfu is 45.0"),
        ({"price": -1}, "--price is -1.0"),
        ({"devices": 0}, "--devices is 0"),
        ({"output": "nowhere/plan.json"}, "there is no folder nowhere"),
        ({"output": "."}, "--output . is a folder; name a file in it"),
        ({"devices": 8, "trainer.strategy": "deepspeed"}, "--trainer.strategy deepspeed cannot be planned"),
        ({"devices": 16, "trainer.strategy": "tp"}, "num_attention_heads=4, which 16 ranks of tensor parallel"),
    ],
)
def test_a_mistake_is_one_line(flags, said, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        plan(tmp_path, corpus, **flags)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said in error and error.count("\n") == 0


def test_what_has_no_shape_is_one_line(corpus, tmp_path, capsys):
    """Experts, of which torch's fake kernel knows bf16 alone."""
    sizes = {f"model.architecture.{name}": value for name, value in SMALL["LlamaConfig"].items()}
    with pytest.raises(SystemExit) as stop:
        plan(tmp_path, corpus, **({"model.architecture": "transformers.MixtralConfig"} | sizes))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: this run cannot be planned: ") and "\n" not in error


def test_other_recipes_are_planned_too(reviews, encoder, decoder, tmp_path, capsys):
    file = tmp_path / "plan.json"
    flags = [f"--data.path={reviews}/train.csv", f"--model.from={encoder}", "--model.adapter.rank=2"]
    finetuning.run("plan", *flags, "--hardware=a100", f"--output={file}")
    found = json.loads(file.read_text())
    assert 0 < found["memory"].get("optimizer", 0) < found["memory"]["weights"]
    script = finetuning.ROOT / "recipes" / "distill.py"
    finetuning.run("plan", f"--model.teacher={decoder}", "--data.tokenizer=null", f"--output={file}", script=script)
    assert json.loads(file.read_text())["memory"]["teacher"] > 0


def test_planning_leaves_nothing_behind(toy):
    """Neither modes nor the methods that it replaces."""
    before = torch.UntypedStorage.resize_, torch.nn.Module._apply
    trainer, module, data = toy(module=CausalLM, architecture=LlamaConfig(**SMALL["LlamaConfig"]))
    trainer.fit(module, data)
    weights = [weight.clone() for weight in module.parameters()]
    planning.simulate(trainer, module, hardware.here("cpu", 1e9, 1))
    assert (torch.UntypedStorage.resize_, torch.nn.Module._apply) == before
    assert not hardware.is_planning() and type(torch.ones(1)) is torch.Tensor
    assert all(torch.equal(*pair) for pair in zip(weights, module.parameters(), strict=True))
