"""The benchmarks run at toy size and their page is written; what they find out is not tested."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import atlas
import data_tables
import distillation_loss
import finetune_recipe_row
import finetune_trainer_row
import finetuning
import fused_loss
import gpu
import ladder
import named_runs
import nanogpt_cpu
import precision
import raw_row
import recipe_row
import run
import side_by_side
import teaching
import tokens
import tournament
import trainer_row
from memory import peak_bytes
from page import Goal, Table, write
from sizes import SMALL, Job
from turns import NoMoreTurns, Row, interleave

from tests.finetuning import run as recipe
from tests.finetuning import squad

ROOT = Path(__file__).parents[1]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOY = replace(SMALL, fields={**SMALL.fields, **TINY, "num_key_value_heads": 2}, seq_len=16, batch_size=2)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        return tokens.prepare(TOY, folder, bf16=False)


def answers(train, job: Job, steps: list[int]) -> list[dict]:
    """What a row answers, in this process, to turns of so many steps, before the driver hangs up."""
    (commands, to_row), (from_row, replies) = os.pipe(), os.pipe()
    os.write(to_row, "".join(f"{count}\n" for count in steps).encode())
    os.close(to_row)
    with pytest.raises(NoMoreTurns):
        train(replace(job, commands=commands, answers=replies))
    os.close(replies)
    with os.fdopen(from_row) as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("best_settings", [False, True])
@pytest.mark.parametrize("row", [raw_row, recipe_row, trainer_row], ids=lambda row: row.__name__)
def test_a_row_does_the_steps_it_is_asked_for(row, best_settings, job):
    if best_settings:  # on a machine whose bf16 is fast; it must run on any
        job = replace(job, bf16=True, best_settings=True)
    turns = answers(row.train, job, [1, 3])
    assert [len(turn["seconds"]) for turn in turns] == [1, 3]
    parameters = sum(p.numel() for p in nanochat(job).parameters())
    assert all(turn["parameters"] == parameters and turn["peak_bytes"] > 0 for turn in turns)


def nanochat(job: Job) -> torch.nn.Module:
    from transformers import NanoChatForCausalLM

    return NanoChatForCausalLM(job.size.architecture(job.vocab_size))


def test_rows_are_processes_that_take_turns(job):
    with Row("matrix_row.py", job, threads=1) as first, Row("matrix_row.py", job, threads=1) as second:
        turns = interleave({"first": first, "second": second}, rounds=2, turn_seconds=0.01)
    assert [len(row_turns) for row_turns in turns.values()] == [2, 2]
    assert first.process.returncode == second.process.returncode == 0


def test_a_row_that_fails_says_why(job):
    with (
        pytest.raises(RuntimeError, match="no_such_file"),
        Row("matrix_row.py", replace(job, device="no_such_file"), threads=1) as row,
    ):
        row.turn(1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_all_ways_to_compute_the_loss_agree_with_float64():
    shape = fused_loss.Shape(256, 300, 32)
    truth = fused_loss.oracle(shape)
    for way in fused_loss.WAYS:
        assert fused_loss.measure_here(way, shape, repeats=1)["loss"] == pytest.approx(truth, abs=0.03), way


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_both_ways_to_compute_the_divergence_agree_with_float64():
    shape = distillation_loss.Shape(256, 300, 32)
    truth = distillation_loss.oracle(shape)
    for way in ("full", "ours"):
        assert distillation_loss.measure_here(way, shape, repeats=1)["loss"] == pytest.approx(truth, abs=0.03), way
    # Of all other words as one there is less to learn, never more.
    assert 0 < distillation_loss.measure_here("cached", shape, repeats=1)["loss"] < truth


def test_peak_memory_counts_what_was_freed_again():
    before = peak_bytes()
    torch.ones(64 * 2**20 // 4 + before // 4)
    assert peak_bytes() >= before + 64 * 2**20


def test_the_baseline_has_the_size_of_nanogpts_cpu_setting():
    model = nanogpt_cpu.GPT(vocab_size=65)
    assert sum(p.numel() for p in model.parameters()) == 804_096
    ids = torch.randint(65, (2, 64))
    changed = ids.clone()
    changed[:, 40] = (changed[:, 40] + 1) % 65
    difference = (model(ids) - model(changed)).abs().amax((0, 2))
    assert difference[:40].max() == 0 and difference[40] > 0


def test_the_baseline_learns_and_is_judged_on_the_whole_held_out_text():
    torch.manual_seed(0)
    model = nanogpt_cpu.GPT(vocab_size=5)
    text = torch.arange(5).repeat(100)
    at_first = nanogpt_cpu.loss_on(model, text)
    nanogpt_cpu.train(model, text, steps=20)
    assert nanogpt_cpu.loss_on(model, text) < at_first / 2
    short = text[: 64 + 21]
    with torch.no_grad():
        parts = [F.cross_entropy(model(short[None, :64])[0], short[1:65], reduction="sum")]
        parts.append(F.cross_entropy(model(short[None, 64:-1])[0], short[65:], reduction="sum"))
    assert nanogpt_cpu.loss_on(model, short) == pytest.approx(float(sum(parts)) / 84, rel=1e-5)


def test_what_the_data_scripts_print_is_read(corpus, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = ["--path", str(corpus), "--seq_len", "32", "--batch_size", "2", "--rounds", "1"]
    what, figures = data_tables.printed("loading.py", *flags)
    assert "2 x 32" in what
    assert len(figures) == 3 and min(figures.values()) > 0


def test_the_gpu_run_of_tinyshakespeare_is_a_config_of_the_recipe(tmp_path, capsys):
    from datamodules.text import Text
    from lightning_modules.cli import main
    from lightning_modules.language_module import LanguageModule
    from lightning_modules.pretrain import CausalLM

    file = tmp_path / "gpu.yaml"
    file.write_text(json.dumps(gpu.nanogpt_gpu_config()))
    with pytest.raises(SystemExit) as end:
        main(LanguageModule, CausalLM, Text, file, "", args=["fit", "--config", str(file), "--print_config"])
    assert not end.value.code
    assert "resid_pdrop: 0.2" in capsys.readouterr().out


@pytest.mark.parametrize("best_settings", [False, True])
@pytest.mark.parametrize("task", ["labels", "spans"])
@pytest.mark.parametrize("row", [finetune_recipe_row, finetune_trainer_row], ids=lambda row: row.__name__)
def test_a_row_of_fine_tuning_does_the_steps_it_is_asked_for(
    row, task, best_settings, encoder, reviews, tmp_path, monkeypatch
):
    if task == "labels":
        file = reviews / "train.csv"
    else:
        file = tmp_path / "squad.json"
        file.write_text(json.dumps(squad(20)))
    fields = {"task": task, "model": str(encoder), "data_file": str(file), "by_length": best_settings}
    job = Job(SMALL, str(tmp_path), None, 0, "", "", bf16=False, best_settings=best_settings, **fields)
    turns = answers(row.train, job, [1, 3])
    assert [len(turn["seconds"]) for turn in turns] == [1, 3]


def test_what_padding_costs_is_measured_at_equal_tokens():
    table = finetuning.padding(None, rounds=1, examples=64)
    assert len(table.rows) == 2 and table.rows[0][2] == "1.00"


def test_a_table_stays_on_the_page_until_it_is_measured_again(tmp_path):
    first, second = (Table(name, "command", [""], [[name]]) for name in ("one", "two"))
    write(tmp_path / "page.md", [first], threads=2)
    write(tmp_path / "page.md", [second, Table("one", "command", [""], [["again"]])], threads=2)
    text = (tmp_path / "page.md").read_text()
    assert text.index("## one") < text.index("| again |") < text.index("## two") and "| one |" not in text


def test_the_page_holds_tables_and_verdicts(tmp_path):
    goals = [Goal("fast", 0.98, at_least=0.97), Goal("small", 0.9, at_most=0.8)]
    table = Table("Speed, 4L/128", "python benchmarks/run.py", ["", "tokens/s"], [["ours", "1,000"]], "A note.", goals)
    table.print()
    write(tmp_path / "docs" / "page.md", [table], threads=2)
    lines = (tmp_path / "docs" / "page.md").read_text().splitlines()
    assert "| ours | 1,000 |" in lines and "A note." in lines
    assert "| fast | at least 0.97 | 0.98 | reached |" in lines
    assert "| small | at most 0.8 | 0.9 | not reached | [Speed, 4L/128](#speed-4l128) |" in lines


def test_what_is_missing_is_said_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--gpu"], ["--only", "time_to_loss", "--data.path", "no_such_file.txt"]):
        with pytest.raises(SystemExit) as end:
            run.main(arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_a_signal_is_judged_by_the_part_of_the_gap_that_it_closes():
    """The student without a teacher closes none of it, the teacher all; the best cache is set beside forward KL."""
    losses = {teaching.WITHOUT: 4.0, "teacher": 3.0, teaching.AT_HAND: 3.6}
    names = [signal.name for signal in teaching.STDLIB.signals]
    rows = {name: [{"nats": losses.get(name, 3.7), "parameters": 10}] * 2 for name in [*names, "teacher"]}
    made = teaching.table(teaching.STDLIB, rows, 2)
    shares = {row[0]: row[-1] for row in made.rows}
    assert [shares[name] for name in losses] == ["0.0 %", "100.0 %", "40.0 %"]
    assert [round(goal.figure, 2) for goal in made.goals] == [40.0, 0.75] and not made.goals[1].reached
    assert all(signal.flags in made.notes for signal in teaching.STDLIB.signals)


def test_a_student_of_a_task_is_judged_by_accuracy_size_and_speed():
    teacher = {"nats": 0.4, "accuracy": 0.9, "parameters": 100, "milliseconds": 4.0}
    student = {"nats": 0.5, "accuracy": 0.88, "parameters": 50, "milliseconds": 2.0, "teacher_milliseconds": 4.0}
    rows = {teaching.WITHOUT: [student | {"accuracy": 0.85}], teaching.AT_HAND: [student], "teacher": [teacher]}
    goals = teaching.table(teaching.SST2, rows, 1).goals
    assert [round(goal.figure, 3) for goal in goals] == [0.978, 0.5, 2.0] and all(goal.reached for goal in goals)


def test_precisions_are_compared_with_and_without_the_fused_loss(tmp_path):
    """Both losses are the same number; a precision that does not run here is said to be so."""
    toy = replace(TOY, bpe_ids=300)
    found = [precision.of_row(toy, "float32", False, loss, "cpu", 3, tmp_path / loss) for loss in ("fused", "plain")]
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-5)
    assert precision.of_row(toy, "fp8", False, "fused", "cpu", 3, tmp_path / "fp8") is None


# Side by side


def test_a_law_is_found_from_its_points_and_foretells_the_next():
    compute = np.array([1e12, 5e12, 2e13, 1e14])
    losses = 1.8 + 400 * compute**-0.2
    floor, scale, power = ladder.fitted(compute, losses)
    assert floor == pytest.approx(1.8, abs=0.05) and power == pytest.approx(0.2, abs=0.02)
    assert floor + scale * 5e14**-power == pytest.approx(1.8 + 400 * 5e14**-0.2, abs=0.02)


def rungs(scatter: float, seed: int = 0) -> dict[int, list[dict]]:
    """Of a law that is true, with a normal scatter of the seeds."""
    widths = {width: 3 * 10.0**place for place, width in enumerate((*ladder.WIDTHS, ladder.NEXT), 11)}
    noise = np.random.default_rng(seed).normal(0, scatter, (len(widths), len(side_by_side.SEEDS)))
    losses = {width: 1.8 + 400 * compute**-0.2 for width, compute in widths.items()}
    of = {w: {"planned": {"model_flops_per_token": compute}, "tokens": 1} for w, compute in widths.items()}
    return {w: [of[w] | {"val_loss": losses[w] + x} for x in row] for (w, row) in zip(widths, noise, strict=True)}


def test_a_forecast_has_the_interval_of_its_seeds(monkeypatch):
    """Which holds the truth about as often as it says."""
    monkeypatch.setattr(ladder, "DRAWS", 40)
    goal = ladder.flops(rungs(0.0)[ladder.NEXT][0])
    truth, held = 1.8 + 400 * goal**-0.2, 0
    assert ladder.laws(rungs(0.0))[0].loss(goal) == pytest.approx(truth, abs=0.02)
    for seed in range(8):
        drawn = [law.loss(goal) for law in ladder.laws(rungs(0.01, seed))[1]]
        low, high = map(float, ladder.interval(drawn, 4).split(" to "))
        held += low <= truth <= high
    assert held >= 6


def test_rates_between_two_widths_lie_on_a_power_law():
    assert ladder.rate_between((64, 0.04), (128, 0.02), 256) == pytest.approx(0.01)
    assert ladder.rate_between((64, 0.04), (128, 0.02), 64) == 0.04
    assert ladder.rate_between((64, 0.02), (128, 0.02), 96) == 0.02


def test_the_spread_of_three_seeds_is_students():
    assert side_by_side.spread([1.0, 2.0, 3.0], 3) == "2.000 ± 2.484" and side_by_side.spread([1.0]) == "1.0000"


def test_runs_that_came_to_nothing_are_told():
    runs = [{"val_loss": 1.0}, {"val_loss": 1.0}, None]
    assert side_by_side.told(runs, digits=2) == "1.00 ± 0.00, 1 of 3 diverged"
    assert side_by_side.told([{"val_loss": float("nan")}, None]) == "2 of 2 diverged"
    assert np.isnan(side_by_side.mean(runs)) and side_by_side.mean(runs[:2]) == 1.0


def test_runs_are_done_once_for_their_flags_and_those_that_fail_are_none(tmp_path, monkeypatch):
    script = (
        "import sys; a, file, rate = sys.argv; sys.exit(3) if rate == '-1' else open(file, 'a').write('{\"steps\": 2}')"
    )

    def command(self, folder: Path) -> list[str]:
        folder.mkdir(exist_ok=True)
        return [sys.executable, "-c", script, str(folder / "summary.json"), str(dict(self.flags)["lr"])]

    monkeypatch.setattr(side_by_side.Run, "command", command)
    good, same, bad = (
        side_by_side.run("0.01", {"lr": 0.01}),
        side_by_side.run("x", {"lr": 0.01}),
        side_by_side.run("b", {"lr": -1}),
    )
    for _ in range(2):  # twice in one file would be no JSON
        first, second, none = side_by_side.Runs(tmp_path, threads=side_by_side.WORKERS).done([good, same, bad])
        assert first == second == {"steps": 2, "folder": tmp_path / good.place} and none is None
    assert side_by_side.run("0.01", {"lr": 0.01}, seed=1).place != good.place


def test_an_interrupted_run_is_not_taken_for_one_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side.Run, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(143)"])
    with pytest.raises(KeyboardInterrupt):
        side_by_side.Runs(tmp_path).done([side_by_side.run("one", {})])
    assert not list(tmp_path.glob("*.failed"))


@pytest.mark.parametrize(("best", "found"), [(0.35, 0.4), (3.0, 3.2), (1e9, 12.8), (0.0, 0.0125)])
def test_what_is_best_at_an_end_is_looked_for_behind_it(best, found):
    class Fake:
        def done(self, runs: list[float]) -> list[dict]:
            return [{"val_loss": abs(value - best)} for value in runs]

    losses = side_by_side.tuned(lambda value: value, [0.2, 0.4, 0.8], Fake())
    assert side_by_side.best(losses) == pytest.approx(found) and len(losses) <= 3 + side_by_side.FURTHER


def test_what_was_tried_is_told_in_order():
    assert side_by_side.curve({0.2: 4.114, 0.1: 4.159, 0.8: float("inf")}) == "0.1 4.16, 0.2 4.11, 0.8 diverged"


def test_a_run_is_a_command_of_its_recipe(tmp_path):
    words = side_by_side.run("one", {"trainer.max_steps": 2}, 1, "distill").command(tmp_path)
    assert words[1].endswith("recipes/distill.py") and words[2:4] == ["fit", "--trainer.max_steps=2"]
    assert {"--seed_everything=1", "--data.seed=1", f"--trainer.default_root_dir={tmp_path}"} <= set(words)


def test_the_results_of_the_recipes_stand_in_the_readme(tmp_path):
    readme = ["| run | what | time |", "| `distill` | old | 1 s |", "| `distill_other` | kept | 2 s |", "after"]
    (tmp_path / "README.md").write_text("\n".join(readme) + "\n")
    named_runs.write_readme(tmp_path / "README.md", [["`distill`", "new", "3 s"]])
    assert (tmp_path / "README.md").read_text().splitlines() == [readme[0], "| `distill` | new | 3 s |", *readme[2:]]
    names = [named_runs.row(one, [{"hardware": "AMD, 2 threads", "process_seconds": 1}])[0] for one in WITHOUT_RESULTS]
    assert all(line in (ROOT / "README.md").read_text() for line in (f"| {name} | " for name in names))
    assert [named_runs.length(s) for s in (9.4, 54, 58, 107, 118, 1250)] == [
        *("9 s", "54 s", "1 min", "1 min 50", "2 min", "20 min")
    ]
    assert named_runs.range_of(1.461, 1.487) == "1.46 to 1.49" and named_runs.range_of(1.461, 1.462) == "1.46"


WITHOUT_RESULTS = [replace(one, words=lambda runs: "") for one in named_runs.NAMED]


SHOWN = [
    *(atlas.TASK | atlas.COSINE | flags | {atlas.RATE: usual} for flags, usual in atlas.OPTIMIZERS.values()),
    *(atlas.TASK | atlas.ADAMW | atlas.SCHEDULES[name] for name in ("steps, a half each 75", "exponential")),
    atlas.TASK | atlas.SMALL_TEXT | atlas.ADAMW | atlas.COSINE | {name: v[0] for name, v in atlas.STRENGTHS.values()},
    *(dict(tournament.contender(name, tournament.TIME, 0.02).flags) for name in tournament.CONTENDERS),
    ladder.flags_of(64, 0.02),
]
SETTINGS = {  # which are left from the recipe, where the new class has them too
    "torch.optim.RMSprop": "momentum: 0.0",
    "transformers.GPT2Config": "resid_pdrop: 0.0",
    "transformers.BertConfig": "hidden_dropout_prob: 0.0",
    "transformers.T5Config": "dropout_rate: 0.0",
}


@pytest.mark.parametrize("flags", SHOWN, ids=range(len(SHOWN)))
def test_flags_of_what_is_shown_side_by_side_are_flags(flags, capsys):
    if "pytorch_optimizer" in str(flags.get("model.optimizer")):
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises(SystemExit) as stop:
        words = [f"--{name}={value}" for name, value in flags.items()]
        recipe("fit", *words, "--print_config", script=ROOT / "recipes" / "pretrain.py")
    said = capsys.readouterr()
    assert not stop.value.code, said.err
    for name, setting in SETTINGS.items():
        assert name not in flags.values() or setting in said.out
