"""What compression costs and what wins it back: of a model that pretraining leaves after 20 minutes, and of real ones,
stories260K and MiniLM, where they and their data are here.

Run:
    python benchmarks/run.py --only compressing --keep runs/compressing --page docs/benchmarks.md      about 1.5 hours

`--keep` names a folder whose finished steps are not repeated, so that an interrupted measurement goes on.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from page import ROOT, Goal, Table
from tasks import models as models_here
from teaching import write_stories
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from turns import environment

from lightning_modules.architectures import build

ENVIRONMENT = environment(os.cpu_count() or 1)
PRETRAINING = "recipes/pretrain.py fit --config recipes/pretrain_stdlib_20min.yaml --trainer.max_time null"
STEPS = 250
"""A tenth of the pretraining's, with as many tokens each."""
SAME_BATCH = "--data.seq_len 512 --data.batch_size 6 --samples.max_new_tokens 0"
SHORT = 100
FLOAT32 = 4
QUANTIZED = {
    "int8": "--scheme int8",
    "int8, inputs too": "--scheme int8-dynamic",
    "float8, inputs too": "--scheme float8",
    "int4": "--scheme int4",
    "int4, to the nearest": "--scheme int4 --rounding nearest",
    "int4, inputs in 8 bits": "--scheme 8da4w",
    "int3": "--scheme int3",
    "int2": "--scheme int2",
    "int2, to the nearest": "--scheme int2 --rounding nearest",
    "2.8 bits on average": "--average_bits 2.8",
    "minmax, 8 bits a tensor": "--scheme minmax --bits 8 --per tensor",
    "minmax, 4 bits a tensor": "--scheme minmax --bits 4 --per tensor",
    "minmax, 4 bits a row": "--scheme minmax --bits 4 --per channel",
}
SPARSE = {
    "50 % by magnitude": "--method magnitude",
    "50 % by Wanda": "--method wanda",
    "2:4 by magnitude": "--method magnitude --pattern 2:4",
    "2:4 by Wanda": "--method wanda --pattern 2:4",
}


@dataclass
class Steps:
    """Commands, each with what it leaves in a folder; what is done is not done again."""

    folder: Path

    def do(self, name: str, command: str, where: str) -> Path:
        """`where` is the flag that names the folder."""
        place = self.folder / name
        done, log = self.folder / f"{name}.done", self.folder / f"{name}.log"
        if not done.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            words = [*shlex.split(command), f"{where}={place}"]
            print(shlex.join(words), file=sys.stderr, flush=True)
            with log.open("w") as stream:
                code = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=stream)
            if code.returncode:
                raise RuntimeError(f"it ended with {code.returncode}: {log.read_text()[-500:]}")
            done.touch()
        return place

    def train(self, name: str, command: str, flags: str = "") -> Path:
        return self.do(name, f"{command} {flags} {SAME_BATCH} --ckpt_path last", "--trainer.default_root_dir")

    def report(self, name: str, models: list[Path], more: str = "") -> dict[str, dict[str, float]]:
        """Figures by the models' folders, measured anew for each set of models."""
        words = " ".join(shlex.quote(str(model)) for model in models)
        place = self.do(name, f"recipes/compress.py report {more} --model {words}", "--output")
        return json.loads((place / "report.json").read_text())


def tables(keep: Path | None, data_folder: Path) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        steps = Steps((keep or Path(temporary)).absolute())
        source = steps.train("source", PRETRAINING) / "model"
        yield quantization(steps, source)
        yield pruning(steps, source)
        yield sparsity(steps, source)
        yield pipeline(steps, source)
        yield searched(steps, source)
        here = models_here(data_folder)
        if "stories" in here:
            yield of_stories(steps, Path(here["stories"]), data_folder / "lm_tinystories" / "stories.txt")
        if "minilm" in here and (data_folder / "sent_sst2").is_dir():
            yield of_labels(steps, here["minilm"], data_folder / "sent_sst2")


def of_stories(steps: Steps, source: Path, stories: Path) -> Table:
    """260,032 parameters, trained on more of these stories than are here."""
    text = f"--data.path {write_stories(stories, steps.folder / 'stories.jsonl')}"
    short = f"{text} --data.cross_document_attention false --trainer.max_steps 200 --trainer.val_check_interval 200"
    quantize = {
        "int8": "--scheme int8",
        "int4": "--scheme int4",
        "int4, to the nearest": "--scheme int4 --rounding nearest",
    }
    models = {"as it is, float32": source}
    for name, flags in quantize.items():
        place = "stories-" + name.replace(" ", "-").replace(",", "")
        models[name] = steps.do(place, compress("quantize", source, f"{flags} {text}"), "--output")
    for name, flags in SPARSE.items():
        place = "stories-" + name.replace(" ", "-").replace("%", "").replace(":", "")
        models[name] = steps.do(place, compress("prune", source, f"{flags} {text}"), "--output")
    pruned = steps.do("stories-pruned", compress("prune", source, f"--parameters 0.67 {text}"), "--output")
    models["two thirds of the parameters"] = pruned
    trained = steps.train("stories-taught", compress("train", pruned, short))
    models["two thirds, 200 steps of distillation"] = trained / "model"
    figures = steps.report("of-stories", list(models.values()), f"{text} --data.max_val_documents 256")
    return Table(
        "Compression of stories260K",
        "python benchmarks/run.py --only compressing",
        COLUMNS,
        [row(name, figures, model, source) for name, model in models.items()],
        "Held-out stories, each from its beginning.",
    )


def of_labels(steps: Steps, minilm: str, data: Path) -> Table:
    text = f"--data.path {data}/train.tsv"
    both = f"{text} --data.val_path {data}/dev.tsv"
    fit = "recipes/finetune.py fit --config recipes/finetune_sentiment.yaml --trainer.max_time null"
    flags = f"--model.from {minilm} {both} --model.optimizer.lr 5e-5 --trainer.max_epochs 3 --ckpt_path last"
    run = steps.do("labels", f"{fit} {flags}", "--trainer.default_root_dir")
    source, rows = run / "model", "--rows 256"
    models = {"as it was tuned, bf16": source}
    for name, flags in {"int8": "--scheme int8", "int4": "--scheme int4", "int2": "--scheme int2"}.items():
        models[name] = steps.do(f"labels-{name}", compress("quantize", source, f"{flags} {text} {rows}"), "--output")
    pruned = steps.do("labels-pruned", compress("prune", source, f"--parameters 0.67 {text} {rows}"), "--output")
    models["two thirds of the parameters"] = pruned
    for name, flags in list(SPARSE.items())[:2]:
        place = "labels-" + name.replace(" ", "-").replace("%", "")
        models[name] = steps.do(place, compress("prune", source, f"{flags} {text} {rows}"), "--output")
    epoch = f"{both} --trainer.max_epochs 1 --ckpt_path last"
    for name, of, more in (("int2, trained for an epoch", source, "--qat int2"), ("two thirds, an epoch", pruned, "")):
        place = "labels-qat" if more else "labels-taught"
        trained = steps.do(place, compress("train", of, f"{more} {epoch}"), "--trainer.default_root_dir")
        models[name] = trained / ("model-int2" if more else "model")
    figures = steps.report("of-labels", list(models.values()))
    whole, shown = figures[str(source)], []
    for name, model in models.items():
        found = figures[str(model)]
        size, ms = of_float32(figures, model, source), found["prompt_ms"] / whole["prompt_ms"]
        low, high = (f"{100 * found[end]:+.1f}" if end in found else "" for end in CHANGES)
        change = "" if model == source else f"{100 * (found['accuracy'] - whole['accuracy']):+.1f} ({low} to {high})"
        shown.append(
            [name, f"{found['bytes']:,}", f"{size:.3f}", f"{100 * found['accuracy']:.1f} %", change, f"{ms:.2f}"]
        )
    return Table(
        "Compression of MiniLM, fine-tuned on SST-2",
        "python benchmarks/run.py --only compressing",
        ["", "bytes", "of float32", "accuracy", "points more (95 % of examples drawn anew)", "time of a text"],
        shown,
        "872 held-out sentences; half of its parameters are embeddings, in 8 bits.",
    )


CHANGES = ("score_change_low", "score_change_high")


def compress(verb: str, source: Path, flags: str) -> str:
    return f"recipes/compress.py {verb} --model {shlex.quote(str(source))} {flags}"


def excess(figures: dict[str, dict[str, float]], model: Path, source: Path) -> float:
    """Percent of nats more than the source's."""
    return 100 * (figures[str(model)]["nats_per_token"] / figures[str(source)]["nats_per_token"] - 1)


def of_float32(figures: dict[str, dict[str, float]], model: Path, source: Path) -> float:
    """Bytes, of the source's in float32."""
    return figures[str(model)]["bytes"] / (FLOAT32 * figures[str(source)]["parameters"])


def row(name: str, figures: dict[str, dict[str, float]], model: Path, source: Path) -> list[str]:
    found = figures[str(model)]
    more = "" if model == source else f"{excess(figures, model, source):+.2f} %"
    if model != source:
        more += f" ({found['excess_low']:+.2f} to {found['excess_high']:+.2f})"
    return [
        name,
        f"{found['bytes']:,}",
        f"{of_float32(figures, model, source):.3f}",
        f"{found['bits_per_byte']:.4f}",
        more,
    ]


COLUMNS = ["", "bytes", "of float32", "bits per byte", "more nats (95 % of documents drawn anew)"]


def quantization(steps: Steps, source: Path) -> Table:
    models = {"as it was trained, bf16": source}
    for name, flags in QUANTIZED.items():
        place = "quantized-" + name.replace(" ", "-").replace(",", "").replace("%", "")
        models[name] = steps.do(place, compress("quantize", source, f"{flags} --overwrite true"), "--output")
    short = f"--trainer.max_steps {STEPS} --trainer.val_check_interval {STEPS}"
    for scheme in ("int4", "int2"):
        trained = steps.train(f"qat-{scheme}", compress("train", source, f"--qat {scheme} {short}"))
        models[f"{scheme}, trained for {STEPS} steps"] = trained / f"model-{scheme}"
    figures = steps.report("quantized", list(models.values()))
    lost = {name: excess(figures, model, source) for name, model in models.items()}
    lost_by_nearest = lost["int2, to the nearest"]
    recovered = 100 * (1 - lost[f"int2, trained for {STEPS} steps"] / lost_by_nearest)
    return Table(
        "Few bits",
        "python benchmarks/run.py --only compressing",
        COLUMNS,
        [row(name, figures, model, source) for name, model in models.items()],
        "`compress.py quantize` of a decoder of 10 M on the standard library, held-out files; embedding and head have "
        "8 bits. Trained: `compress.py train --qat`, from the model itself.",
        [
            Goal("int8: percent more nats", lost["int8"], at_most=0.5),
            Goal("int8: of the bytes in float32", of_float32(figures, models["int8"], source), at_most=0.30),
            Goal("int4: percent more nats", lost["int4"], at_most=3),
            Goal("int4, trained: percent more nats", lost[f"int4, trained for {STEPS} steps"], at_most=1.5),
            Goal("int2, trained: percent won back of what rounding to the nearest lost", recovered, at_least=60),
        ],
    )


def pruning(steps: Steps, source: Path) -> Table:
    pruned = steps.do("pruned", compress("prune", source, "--parameters 0.67 --overwrite true"), "--output")
    length = f"--trainer.max_steps {STEPS} --trainer.val_check_interval {STEPS}"
    taught = steps.train("taught", compress("train", pruned, length)) / "model"
    alone = steps.train("alone", compress("train", pruned, f"{length} --model.hard_weight 1")) / "model"
    unlearned = new_weights(pruned, steps.folder / "unlearned")
    as_pretrained = "--model.optimizer.lr 0.02 --model.optimizer.adamw_lr 0.006 --model.hard_weight 1"
    again = f"recipes/distill.py fit --config recipes/distill_compressed.yaml --model.teacher {source}"
    new = steps.train("new", f"{again} --model.student {unlearned} {as_pretrained} {length}") / "model"
    models = {
        "whole": source,
        "pruned": pruned,
        f"pruned, {STEPS} steps of distillation": taught,
        f"pruned, {STEPS} steps of the text's own loss": alone,
        f"new weights of that size, {STEPS} steps": new,
    }
    figures = steps.report("pruning", list(models.values()))
    nats = {name: figures[str(model)]["nats_per_token"] for name, model in models.items()}
    whole, bare, by_teacher, by_text, anew = nats.values()
    share = figures[str(pruned)]["parameters"] / figures[str(source)]["parameters"]
    return Table(
        "A third of the parameters less",
        "python benchmarks/run.py --only compressing",
        [*COLUMNS, "of the loss won back"],
        [
            [*row(name, figures, model, source), f"{100 * (bare - nats[name]) / (bare - whole):.1f} %"]
            for name, model in models.items()
        ],
        f"`compress.py prune --parameters 0.67` left {share:.3f} of the parameters; `compress.py train` with a tenth "
        "of the pretraining's tokens. New weights have the pretraining's optimizer and rates.",
        [
            Goal(
                "percent of the loss won back by distillation", 100 * (bare - by_teacher) / (bare - whole), at_least=80
            ),
            Goal("nats behind the same steps by the text's own loss", by_teacher - by_text, at_most=0),
            Goal("nats behind new weights on the same tokens", by_teacher - anew, at_most=0),
        ],
    )


def new_weights(model: Path, folder: Path) -> Path:
    """A model of the same sizes that has learnt nothing."""
    config = AutoConfig.from_pretrained(model)
    build(config, AutoModelForCausalLM, seed=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def sparsity(steps: Steps, source: Path) -> Table:
    models = {"dense": source}
    for name, flags in SPARSE.items():
        place = "sparse-" + name.replace(" ", "-").replace("%", "").replace(":", "")
        models[name] = steps.do(place, compress("prune", source, f"{flags} --overwrite true"), "--output")
    figures = steps.report("sparse", list(models.values()))
    lost = {name: excess(figures, model, source) for name, model in models.items()}
    return Table(
        "Single weights set to zero",
        "python benchmarks/run.py --only compressing",
        COLUMNS,
        [row(name, figures, model, source) for name, model in models.items()],
        "Nothing trained afterwards. LLaMA-2-7B's published perplexities at 50 %: 5.12 dense, 6.42 Wanda, 14.89 "
        "magnitude (https://arxiv.org/abs/2306.11695).",
        [
            Goal("Wanda's loss at 50 %, of magnitude's", lost["50 % by Wanda"] / lost["50 % by magnitude"], at_most=1),
            Goal("Wanda's loss at 2:4, of magnitude's", lost["2:4 by Wanda"] / lost["2:4 by magnitude"], at_most=1),
        ],
    )


def pipeline(steps: Steps, source: Path) -> Table:
    folder = steps.do("pipeline", f"recipes/compress.py run --model {shlex.quote(str(source))}", "--output")
    models = {
        "whole": source,
        "pruned": folder / "pruned",
        "distilled": folder / "distilled" / "model",
        "int4, trained": folder / "int4" / "model-int4",
        "for onnxruntime, int8": folder / "onnx",
    }
    figures = steps.report("of-pipeline", list(models.values()))
    whole = figures[str(source)]
    rows = []
    for name, model in models.items():
        ms = figures[str(model)]["token_ms"]
        rows.append([*row(name, figures, model, source), f"{ms:.2f}", f"{ms / whole['token_ms']:.2f}"])
    last = models["for onnxruntime, int8"]
    return Table(
        "The whole pipeline",
        "python benchmarks/run.py --only compressing",
        [*COLUMNS, "ms a new token", "of it"],
        rows,
        "`python recipes/compress.py run` with `recipes/compress_pipeline.yaml`; one new token behind 128, in turns.",
        [
            Goal("for onnxruntime: of the bytes in float32", of_float32(figures, last, source), at_most=0.25),
            Goal("for onnxruntime: of the time", figures[str(last)]["token_ms"] / whole["token_ms"], at_most=0.6),
            Goal("for onnxruntime: percent more nats", excess(figures, last, source), at_most=3),
        ],
    )


def searched(steps: Steps, source: Path) -> Table:
    """Sizes that shrink all dimensions alike beside what is found, in the super-network and taught alone."""
    flags = f"--trainer.max_steps {STEPS} --trainer.val_check_interval {STEPS} {SAME_BATCH}"
    shares = "--shares '[1.0, 0.9, 0.8, 0.7, 0.6, 0.5]'"
    folder = steps.do("search", compress("search", source, f"{flags} {shares} --trials 240"), "--output")
    found = json.loads((folder / "points.json").read_text())
    uniform = json.loads((folder / "uniform.json").read_text())

    def best(point: dict, *costs: str) -> dict:
        """The least loss of those that cost no more, the point itself among them."""
        some = [other for other in found if all(other[cost] <= point[cost] for cost in costs)]
        return min([point, *some], key=lambda other: other["nats"])

    def alone(point: dict, place: str) -> float:
        name, short = f"search-{shape(point)}", f"--trainer.max_steps {SHORT} --trainer.val_check_interval {SHORT}"
        run = steps.train(name, compress("train", folder / place / shape(point).replace("×", "x"), short))
        return json.loads((run / "summary.json").read_text())["val_loss"]

    rows, taught = [], 0
    counts = {("parameters",): 0, ("latency",): 0, ("parameters", "latency"): 0}
    for point in uniform:
        for costs in counts:
            counts[costs] += best(point, *costs)["nats"] < point["nats"]
        loss, other = alone(point, "uniform"), best(point, "latency")
        rows.append(["alike " + shape(point), *figures(point, loss)])
        if other is not point:
            its = alone(other, "points")
            taught += its < loss
            rows.append(["found " + shape(other), *figures(other, its)])
    together = counts.pop(("parameters", "latency"))
    of = f"of {len(uniform)} sizes that shrink alike, another is better in"
    return Table(
        "Search among sizes",
        "python benchmarks/run.py --only compressing",
        ["", "nats per token", "parameters", "latency", f"nats, {SHORT} steps of its own later"],
        rows,
        f"`compress.py search` of {len(found)} sizes in one super-network, trained for {STEPS} steps; layers × width × "
        "inside × heads; shares of the whole model's. Alike: one share of each. Found: the least loss of those that "
        f"take no longer. In loss, parameters and latency together, another is better than {together}.",
        [
            *(Goal(f"{of} loss and {costs[0]}", count, at_least=3) for costs, count in counts.items()),
            Goal(f"{of} loss after {SHORT} steps of its own, and latency", taught, at_least=3),
        ],
    )


def figures(point: dict, later: float) -> list[str]:
    return [f"{point['nats']:.4f}", f"{point['parameters']:.3f}", f"{point['latency']:.3f}", f"{later:.4f}"]


def shape(point: dict) -> str:
    return "×".join(str(point["sizes"][name]) for name in ("layers", "width", "inner", "heads"))
