"""Make a trained model smaller, and see what is left of it.

Run:
    python recipes/compress.py quantize --model runs/mine --scheme int4
    python recipes/compress.py prune --model runs/mine --parameters 0.67
    python recipes/compress.py prune --model runs/mine --method wanda --sparsity 0.5
    python recipes/compress.py train --model runs/mine/model-pruned
    python recipes/compress.py train --model runs/mine --qat int2 --trainer.max_steps 500
    python recipes/compress.py search --model runs/mine --target latency=0.5 --trainer.max_steps 500
    python recipes/compress.py run --model runs/mine
    python recipes/compress.py probe
    python recipes/compress.py report --model runs/mine runs/mine/model-int4 --data.path my_texts/
"""

import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from datamodules.held_out import Texts, documents
from lightning_modules.command_line import OneLineParser, fail, one_line_errors, take_flag

if TYPE_CHECKING:
    from lightning_modules.compression.opened import Opened
    from lightning_modules.evaluation.judging import Judged


def opened(model: str) -> "Opened":
    from datamodules import hub
    from lightning_modules.compression.onnx_decoder import is_onnx, open_any

    if is_onnx(model):
        require_package("onnxruntime")
    return open_any(model, hub.is_within_reach)


def require_package(name: str) -> None:
    """Raises ValueError with what brings a package that is not installed."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise ValueError(f"this needs {name}, which is not installed: pip install -e '.[compress,export]'")


def quantize(
    model: str,
    data: Texts,
    scheme: Literal["int8", "int8-dynamic", "int4", "int3", "int2", "8da4w", "float8", "minmax"] = "int8",
    group_size: PositiveInt | None = None,
    rounding: Literal["gptq", "nearest"] = "gptq",
    average_bits: float | None = None,
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] | None = None,
    per: Literal["tensor", "channel"] | None = None,
    ends: Literal[8, 16] = 8,
    skip: tuple[str, ...] = (),
    rows: PositiveInt = 64,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Store a model's weights in few bits.

    Args:
        model: A run's folder, a transformers folder, or a name on the Hub.
        data: Where the text is.
        scheme: int8, int4, int3, int2: the weights alone; int8-dynamic, 8da4w, float8: what layers read is rounded,
            too, to 8 bits a token; minmax: the textbook's linear formula, for study.
        group_size: Weights that share a scale, below 8 bits. Left out: 32, 16 where these do not divide a layer's
            inputs, or a row.
        rounding: gptq makes up for the error of each weight by those behind it, on text that is read; nearest reads
            none.
        average_bits: Of int4, int3, int2 or 8: as many bits for each layer as it needs, so that all together have so
            many a weight, scales included.
        bits: Of minmax. Left out: 4.
        per: Of minmax: what shares a smallest and a largest weight. Left out: channel.
        ends: Bits of embedding and output head.
        skip: Layers whose name holds one of these stay as they are.
        rows: Of calibration, 512 tokens each.
        output: Folder to write. Left out: beside the model's.
        overwrite: Whether that folder may exist.
    """
    from lightning_modules.compression import opened as folders
    from lightning_modules.compression.packed_folder import save_packed
    from lightning_modules.compression.quantization import put_in
    from lightning_modules.compression.quantizing import grid_layers, minmax_layers

    require_package("compressed_tensors")
    require_used(scheme, {"bits": bits, "per": per}, {"group_size": group_size, "skip": skip or None}, average_bits)
    bits, per = bits or 4, per or "channel"
    name = f"minmax{bits}" if scheme == "minmax" else scheme
    folder = folders.output_folder(output, model, name if average_bits is None else f"mixed{average_bits:g}", overwrite)
    source = opened(model)
    folders.require_dense(source)
    if scheme == "minmax":
        layers, told = minmax_layers(source, bits, per)
    else:
        texts = documents(data, "train") if rounding == "gptq" or average_bits is not None else []
        layers, told = grid_layers(source, texts, scheme, group_size, rounding, average_bits, ends, skip, rows)
    print("\n".join(told), flush=True)
    step = {"verb": "quantize", "scheme": name, "rounding": rounding, "average_bits": average_bits}
    put_in(source.network, layers)
    with folders.written_whole(folder, source, step) as temporary:
        save_packed(temporary, source.network, layers)
    finish({model: opened(model), str(folder): opened(str(folder))}, data)
    print(f"files  {folder}\nnext   python recipes/export.py --model {shlex.quote(str(folder))} --format onnx-int8")


def require_used(scheme: str, of_minmax: dict, of_others: dict, average_bits: float | None) -> None:
    """Raises ValueError for flags that the scheme would pass over."""
    given = of_others | {"average_bits": average_bits} if scheme == "minmax" else of_minmax
    if idle := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--{idle[0]} changes nothing with --scheme {scheme}; leave one of them out")
    if average_bits is not None and scheme in ("int8-dynamic", "8da4w", "float8"):
        raise ValueError(f"--average_bits is for weights alone, not --scheme {scheme}; leave one of them out")


def prune(
    model: str,
    data: Texts,
    method: Literal["structured", "wanda", "magnitude"] = "structured",
    parameters: float | None = None,
    layers: PositiveInt | None = None,
    width: PositiveInt | None = None,
    inner: PositiveInt | None = None,
    heads: PositiveInt | None = None,
    vocabulary: PositiveInt | None = None,
    sparsity: float | None = None,
    pattern: Literal["unstructured", "2:4"] = "unstructured",
    skip: tuple[str, ...] = (),
    rows: PositiveInt = 64,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Take away what matters least: whole layers, heads, numbers inside and words, or single weights.

    Args:
        model: A run's folder, a transformers folder, or a name on the Hub.
        data: Where the text is.
        method: structured: a smaller model of the same kind; wanda and magnitude: weights set to zero, those of the
            least |w| · ‖what it reads‖ in each row, or of the least |w| in each matrix.
        parameters: Structured: share of the parameters that is left; in which dimensions, is tried out.
        layers: Structured: layers that are left.
        width: Structured: numbers of a hidden state.
        inner: Structured: numbers inside a layer, between its two linear maps.
        heads: Structured: heads of queries; those of keys and values follow.
        vocabulary: Words that are left, the most frequent ones of the text; beside any method.
        sparsity: Wanda and magnitude: share of the weights that is zero afterwards.
        pattern: Wanda and magnitude: "2:4" is two of each four weights in a row.
        skip: Wanda and magnitude: layers whose name holds one of these stay as they are.
        rows: Of calibration, 512 tokens each.
        output: Folder to write. Left out: beside the model's.
        overwrite: Whether that folder may exist.
    """
    from lightning_modules.compression import opened as folders
    from lightning_modules.compression import pruning
    from lightning_modules.compression.calibration import calibration_batches

    asked = {"layers": layers, "width": width, "inner": inner, "heads": heads}
    sizes = {name: size for name, size in asked.items() if size is not None}
    pruning.require_one_way(method, parameters, sizes, vocabulary, sparsity, pattern, skip)
    folder = folders.output_folder(output, model, "pruned" if method == "structured" else method, overwrite)
    source = opened(model)
    folders.require_dense(source)
    texts = documents(data, "train")
    step: dict[str, object] = {"verb": "prune", "method": method}
    if vocabulary is not None:
        step |= pruning.fewer_words(source, vocabulary, texts)
    batches = calibration_batches(source.network, source.tokenizer, texts, rows)
    if method == "structured":
        if parameters is not None or sizes:
            step |= pruning.smaller(source, batches, parameters, sizes)
    else:
        step |= pruning.sparser(source, batches, method, 0.5 if sparsity is None else sparsity, pattern, skip)
    with folders.written_whole(folder, source, step) as temporary:
        source.network.to(source.stored).save_pretrained(temporary)
    finish({model: opened(model), str(folder): opened(str(folder))}, data)
    print(f"files  {folder}\nnext   python recipes/compress.py train --model {shlex.quote(str(folder))}")


def train(
    model: str,
    rest: list[str],
    qat: Literal["int8", "int8-dynamic", "int4", "int3", "int2", "8da4w", "float8"] | None = None,
    group_size: PositiveInt | None = None,
    ends: Literal[8, 16] = 8,
    sparsity: float | None = None,
    parameters: float | None = None,
    rounds: PositiveInt = 1,
) -> None:
    """Win back what was lost, from the model that it was made of; every flag of recipes/distill.py goes on to it.

    Args:
        model: A pruned model's folder; with --qat, --sparsity or --parameters, any.
        rest: Flags of recipes/distill.py, such as --trainer.max_steps 500 --data.path my_texts/.
        qat: Trains the weights as they will be stored, and stores them so, beside the run's model.
        group_size: Of qat: as of quantize.
        ends: Of qat: bits of embedding and output head.
        sparsity: More and more of the weights become zero, until half-way so many are. Zeros that are there stay.
        parameters: Prunes first, to this share of the parameters.
        rounds: Prunes and trains in turns so many times, until this share is reached.
    """
    import os

    from lightning_modules.compression import training

    if qat is not None:
        require_package("compressed_tensors")
    if rounds > 1 and parameters is None:
        raise ValueError("--rounds prunes and trains in turns; say to which share by --parameters 0.5")
    recipes = Path(__file__).parent
    if parameters is not None:
        model, rest = training.pruned_in_rounds(recipes, model, parameters, rounds, rest)
    for flag in training.OF_DOCUMENTS:
        rest, _ = take_flag(flag, rest)
    command = training.command(recipes, model, training.Methods(qat, group_size, ends, sparsity), rest)
    command += training.history_flags(model, rest, qat)
    print(shlex.join(["python", *command[1:]]), flush=True)
    os.execv(command[0], command)  # which is the run: its signals, ranks and exit code


def search(
    model: str,
    data: Texts,
    rest: list[str],
    target: str = "latency=0.5",
    shares: tuple[float, ...] = (1.0, 0.875, 0.75, 0.625, 0.5),
    trials: PositiveInt = 120,
    rows: PositiveInt = 32,
    output: str | None = None,
) -> None:
    """Find the best sizes for a cost: train all of them in one, and try many; the same command goes on where it was.

    Args:
        model: A run's folder, a transformers folder, or a name on the Hub.
        data: Where the text is.
        rest: Flags of recipes/distill.py, by which the super-network is trained, such as --trainer.max_steps 500.
        target: What the model may cost of what the whole one does: latency=0.5, parameters=0.6, or both,
            latency=0.5,parameters=0.6.
        shares: Of width, of what is inside, and of heads, which are tried; of layers all numbers down to the least.
        trials: Sizes that are tried: all, if they are no more, else those that NSGA-II chooses.
        rows: Of text by which they are measured, 512 tokens each.
        output: Folder of all that comes of it. Left out: beside the model's.
    """
    import subprocess

    from lightning_modules.compression import architecture_search as tried
    from lightning_modules.compression import searching
    from lightning_modules.compression.training import note_asked, require_same
    from lightning_modules.model_folder import find_folder

    wanted, source = searching.parsed_target(target), find_folder(model)
    folder = Path(output or f"{source}-search")
    require_package("optuna")
    asked = {"model": source, "shares": list(shares), "rows": rows}
    require_same(folder, asked)
    if not (folder / "ordered" / "config.json").is_file():
        searching.write_ordered(opened(model), folder / "ordered", documents(data, "train"), rows, tuple(shares))
        note_asked(folder, asked)
    if not (folder / "super" / "model" / "config.json").is_file():
        command = searching.command(Path(__file__).parent, folder, rest)
        print(shlex.join(["python", *command[1:]]), flush=True)
        if code := subprocess.run(command).returncode:
            fail(f"the training of the super-network ended with {code}", code)
    measured = searching.measured(folder, documents(data, "val"), rows)
    found = searching.findings(measured, tried.search(measured, trials))
    searching.tell(measured, found, trials)
    tried.save(found.points, folder / "points.json")
    tried.save(found.uniform, folder / "uniform.json")
    searching.write_points(measured, found.uniform, folder / "uniform")
    searching.write_chosen(searching.write_points(measured, found.best, folder / "points"), wanted, folder)


def run(
    data: Texts,
    config: Path | None = None,
    model: str | None = None,
    output: str | None = None,
) -> None:
    """Do several steps one after the other; the same command goes on where it was.

    Args:
        config: A YAML with nodes: each has a verb, the node or nodes whose model it takes, and flags of that verb. Left
            out: recipes/compress_pipeline.yaml.
        model: What all begins with. Left out: the newest pretraining in runs/.
        data: Where the text is, for all nodes that read some.
        output: Folder with one in it for each node. Left out: beside the model's run.
    """
    from lightning_modules.compression.pipeline import Pipeline, read_nodes
    from lightning_modules.model_folder import find_folder, newest_pretraining

    config = config or Path(__file__).with_name("compress_pipeline.yaml")
    content, nodes = read_nodes(config)
    model = model or content.get("model") or newest_pretraining(lambda found: True, distilled=False)
    if model is None:
        raise ValueError("there is no pretraining in runs/; name a model by --model, or run recipes/pretrain.py fit")
    folder = Path(output or content.get("output") or f"{find_folder(model)}-{config.stem}")
    given = {field.name: getattr(data, field.name) for field in fields(Texts)}
    texts = {name: value for name, value in given.items() if value != getattr(Texts(), name)}
    Pipeline(Path(__file__).parent, model, folder, texts).run(nodes)


def report(model: list[str], data: Texts, output: str | None = None) -> None:
    """Put models beside each other.

    Args:
        model: Runs' folders, transformers folders, names on the Hub, or decoders that export.py wrote for onnxruntime;
            the first is what the others are measured against.
        data: Where the text is, by whose held-out part they are judged.
        output: A folder for the table, the same as JSON, and a picture of bits per byte against bytes and time.
    """
    from lightning_modules import energy as meters
    from lightning_modules.evaluation.judged_table import save

    if output is not None:
        require_package("matplotlib")
    if twice := [name for place, name in enumerate(model) if name in model[:place]]:
        raise ValueError(f"--model has {twice[0]} twice; name it once")
    found = finish({name: opened(name) for name in model}, data, energy=meters.is_wanted())
    if output is not None:
        save(found, Path(output))
        print(f"files  {output}: report.txt, report.json, report.png")


def finish(models: "dict[str, Opened]", data: Texts, energy: bool = False) -> "list[Judged]":
    from lightning_modules.evaluation.judged_table import table
    from lightning_modules.evaluation.judging import Wanted, judge, validated

    scored = next(iter(models.values())).scores_text
    tasks = validated(models)
    found = judge(models, documents(data, "val") if scored else [], tasks, Wanted(energy=energy))
    print(table(found), flush=True)
    return found


def probe() -> None:
    """Say what computes with few bits on this machine, and how fast."""
    import contextlib
    import io
    import logging

    from lightning_modules.compression import probing
    from lightning_modules.model_folder import pick_device

    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what the libraries say besides
            lines = probing.probe(pick_device("auto"))
    finally:
        logging.disable(logging.NOTSET)
    print("\n".join(lines))


VERBS: dict[str, Callable] = {verb.__name__: verb for verb in (quantize, prune, train, search, run, report, probe)}


def main(arguments: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subcommands(dest="verb")
    for name, verb in VERBS.items():
        of_verb = OneLineParser(description=verb.__doc__.splitlines()[0], allow_abbrev=False)
        several = {"model"} if name == "report" else set()
        if several:
            of_verb.add_argument("--model", nargs="+", required=True, help="Several; the first is the measure.")
        of_verb.add_function_arguments(verb, as_group=False, skip={"rest"} | several)
        verbs.add_subcommand(name, of_verb, help=verb.__doc__.splitlines()[0])
    own, rest = parted(words) if words[:1] in (["train"], ["search"]) else (words, None)
    options = parser.instantiate(parser.parse_args(own))
    with one_line_errors():
        VERBS[options.verb](**options[options.verb], **({} if rest is None else {"rest": rest}))


def parted(words: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a verb that trains, and those of its training; both get those of the text that both know."""
    verb = VERBS[words[0]]
    names = set(inspect.signature(verb).parameters) - {"rest", "data"} | {"help"}
    of_both = (
        {f"data.{field.name}" for field in fields(Texts)} if "data" in inspect.signature(verb).parameters else set()
    )
    own, rest, places = [], [], []
    for word in words:
        if word.startswith("-") or not places:
            name = word.partition("=")[0].lstrip("-")
            places = [own] if not word.startswith("-") or name in names else [own, rest] if name in of_both else [rest]
            if name in ("data.separator", "data.max_val_documents") and name in of_both:
                places = [own]
        for place in places:
            place.append(word)
    return own, rest


if __name__ == "__main__":
    main()
