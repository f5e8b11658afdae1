"""Make a trained model smaller, and see what is left of it.

Run:
    python recipes/compress.py quantize --model runs/mine --scheme int4
    python recipes/compress.py prune --model runs/mine --parameters 0.67
    python recipes/compress.py prune --model runs/mine --method wanda --sparsity 0.5
    python recipes/compress.py report --model runs/mine runs/mine/model-int4 --data.path my_texts/
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from lightning_modules.command_line import OneLineParser, one_line_errors

if TYPE_CHECKING:
    from lightning_modules.compression.opened import Opened
    from lightning_modules.compression.packed_folder import Layers


@dataclass
class Texts:
    """What a model is calibrated on and, held out from it, judged by.

    Args:
        path: Files, folders or globs (txt, md, py, jsonl, json, csv, tsv, parquet; .gz .xz .zst of them), or a data
            set's name on the Hub. Left out: the Python standard library on this machine.
        val_path: Held-out text, like `path`. Left out: a part of `path`.
        val_fraction: Share of the files to hold out, by a hash of their content; of a single file its last part.
        text_column: Column of the text in files that have columns.
        separator: A string that parts the documents of a file.
        max_val_documents: Judge by so many documents, spread evenly.
    """

    path: list[str] | str | None = None
    val_path: list[str] | str | None = None
    val_fraction: float = 0.05
    text_column: str = "text"
    separator: str | None = None
    max_val_documents: PositiveInt = 64


def documents(data: Texts, split: Literal["train", "val"]) -> list[str]:
    """Of a split, whole; as pretraining with the same flags splits them. Of the training text the first 4,096."""
    from itertools import islice

    from datamodules.cache_folders import cache_root
    from datamodules.corpus import open_corpus
    from datamodules.sources import ContentHashes

    hashes = ContentHashes(cache_root(None) / "file_hashes.json")
    corpus = open_corpus(data.path, data.val_path, data.val_fraction, data.text_column, False, hashes)
    parts = (part for text in corpus.documents(split) for part in split_at(text, data.separator))
    if split == "train":
        return list(islice(parts, 4096))
    found = list(parts)
    step = max(1, -(-len(found) // data.max_val_documents))
    if not found:
        raise ValueError("the held-out text is empty; pass other files by --data.val_path")
    return found[::step]


def split_at(text: str, separator: str | None) -> list[str]:
    parts = [text] if separator is None else [part.strip() for part in text.split(separator)]
    return [part for part in parts if part]


def opened(model: str) -> "Opened":
    from datamodules import hub
    from lightning_modules.compression.opened import open_model

    return open_model(model, hub_is_within_reach=hub.is_within_reach)


def quantize(
    model: str,
    data: Texts,
    scheme: Literal["int8", "int8-dynamic", "int4", "int3", "int2", "8da4w", "float8", "minmax"] = "int8",
    group_size: PositiveInt = 32,
    rounding: Literal["gptq", "nearest"] = "gptq",
    average_bits: float | None = None,
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 4,
    per: Literal["tensor", "channel"] = "channel",
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
        group_size: Weights that share a scale, below 8 bits.
        rounding: gptq makes up for the error of each weight by those behind it, on text that is read; nearest reads
            none.
        average_bits: Of int4, int3, int2 or 8: as many bits for each layer as it needs, so that all together have so
            many a weight, scales included.
        bits: Of minmax.
        per: Of minmax: what shares a smallest and a largest weight.
        ends: Bits of embedding and output head.
        skip: Layers whose name holds one of these stay as they are.
        rows: Of calibration, 512 tokens each.
        output: Folder to write. Left out: beside the model's.
        overwrite: Whether that folder may exist.
    """
    from lightning_modules.compression import opened as folders
    from lightning_modules.compression.packed_folder import save_packed
    from lightning_modules.compression.quantization import put_in

    name = f"minmax{bits}" if scheme == "minmax" else scheme
    folder = folders.output_folder(output, model, name if average_bits is None else f"mixed{average_bits:g}", overwrite)
    source = opened(model)
    folders.require_dense(source)
    if scheme == "minmax":
        layers, told = minmax_layers(source, bits, per)
    else:
        layers, told = grid_layers(source, data, scheme, group_size, rounding, average_bits, ends, skip, rows)
    print("\n".join(told), flush=True)
    step = {"verb": "quantize", "scheme": name, "rounding": rounding, "average_bits": average_bits}
    put_in(source.network, layers)
    with folders.written_whole(folder, source, step) as temporary:
        save_packed(temporary, source.network, layers)
    finish({model: opened(model), str(folder): opened(str(folder))}, data)
    print(f"files  {folder}\nnext   python recipes/export.py --model {folder} --format onnx-int8")


def minmax_layers(source: "Opened", bits: int, per: Literal["tensor", "channel"]) -> tuple["Layers", list[str]]:
    from lightning_modules.compression.quantization import quantized_minmax

    layers = quantized_minmax(source.network, bits, per)
    return layers, [f"{bits} bits between the least and the largest of a {per}: {named(list(layers))}"]


def grid_layers(
    source: "Opened",
    data: Texts,
    scheme: str,
    group_size: int,
    rounding: str,
    average_bits: float | None,
    ends: int,
    skip: tuple[str, ...],
    rows: int,
) -> tuple["Layers", list[str]]:
    from lightning_modules.compression import quantization
    from lightning_modules.compression.calibration import calibration_batches, input_moments
    from lightning_modules.compression.grids import Grid

    network = source.network
    chosen = quantization.scheme_named(scheme, group_size)
    found = quantization.quantizable(network, skip)
    quantization.require_groups(found, chosen.grid)
    batches, moments = [], {}
    if rounding == "gptq" or average_bits is not None:
        batches = calibration_batches(network, source.tokenizer, documents(data, "train"), rows)
    if rounding == "gptq":
        moments = input_moments(network, found, batches)
    grids = dict.fromkeys(found, chosen.grid)
    if average_bits is not None:
        steps = [Grid(2, group_size), Grid(3, group_size), Grid(4, group_size), Grid(8)]
        lost = quantization.sensitivities(network, found, steps, moments, batches[:2])
        grids = quantization.mixed(found, steps, lost, average_bits)
    layers = quantization.quantized(network, found, grids, chosen.activations, moments)
    outer = quantization.quantized_ends(network, ends)
    told = []
    for grid in dict.fromkeys(grids.values()):
        those = [name for name in layers if grids[name] == grid]
        told.append(f"{grid}, {rounding}: {named(those)}")
    if outer:
        told.append(f"int{ends}, a scale for each row: {named(list(outer))}")
    left = [name for name, p in network.named_parameters() if name.rpartition(".")[0] not in layers | outer]
    told.append(f"left in 16 bits: {named(left) if left else 'nothing'}")
    return layers | outer, told


def named(names: list[str]) -> str:
    """How many, and which; those of layers by the part that they share."""
    from lightning_modules.activations import LAYER

    kinds = dict.fromkeys(name[match.end(2) + 1 :] if (match := LAYER.search(name)) else name for name in names)
    return f"{len(names)} ({', '.join(kinds)})"


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

    asked = {"layers": layers, "width": width, "inner": inner, "heads": heads}
    sizes = {name: size for name, size in asked.items() if size is not None}
    require_one_way(method, parameters, sizes, vocabulary, sparsity, pattern)
    folder = folders.output_folder(output, model, "pruned" if method == "structured" else method, overwrite)
    source = opened(model)
    folders.require_dense(source)
    from lightning_modules.compression.calibration import calibration_batches

    texts = documents(data, "train")
    step: dict[str, object] = {"verb": "prune", "method": method}
    if vocabulary is not None:
        step["words"] = fewer_words(source, vocabulary, texts)
    batches = calibration_batches(source.network, source.tokenizer, texts, rows)
    if method == "structured":
        if parameters is not None or sizes:
            step |= smaller(source, batches, parameters, sizes)
    else:
        step |= sparser(source, batches, method, 0.5 if sparsity is None else sparsity, pattern, skip)
    with folders.written_whole(folder, source, step) as temporary:
        source.network.to(source.stored).save_pretrained(temporary)
    finish({model: opened(model), str(folder): opened(str(folder))}, data)
    print(f"files  {folder}\nnext   python recipes/compress.py train --model {folder}")


def require_one_way(
    method: str, parameters: float | None, sizes: dict, vocabulary: int | None, sparsity: float | None, pattern: str
) -> None:
    """Raises ValueError for flags that do not go together."""
    if method == "structured":
        if sparsity is not None or pattern != "unstructured":
            raise ValueError(
                "--sparsity and --pattern are for --method wanda or magnitude; pass --parameters, --layers …"
            )
        if parameters is not None and sizes:
            raise ValueError(f"--parameters finds the sizes itself; leave it out, or --{next(iter(sizes))}")
        if parameters is None and not sizes and vocabulary is None:
            raise ValueError(
                "nothing to prune: pass --parameters 0.67, or --layers, --width, --inner, --heads, --vocabulary"
            )
        if parameters is not None and not 0 < parameters < 1:
            raise ValueError(f"--parameters {parameters:g}: pass a share between 0 and 1 that is left")
        return
    if parameters is not None or sizes:
        given = "parameters" if parameters is not None else next(iter(sizes))
        raise ValueError(f"--{given} is for --method structured; pass --sparsity 0.5")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"--sparsity {sparsity:g}: pass a share between 0 and 1 that is zero")
    if pattern == "2:4" and sparsity not in (None, 0.5):
        raise ValueError(f"--pattern 2:4 is --sparsity 0.5, not {sparsity:g}; leave one of them out")


def fewer_words(source: "Opened", size: int, texts: list[str]) -> int:
    """In place; how many are left."""
    from lightning_modules.compression import vocabulary

    tokenizer, network = source.tokenizer, source.network
    kept = vocabulary.kept_ids(tokenizer, vocabulary.counted(tokenizer, texts), size)
    before = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    source.tokenizer = vocabulary.smaller_tokenizer(tokenizer, kept)
    source.network = vocabulary.smaller_network(network, kept, source.auto_class)
    after = sum(len(source.tokenizer(text)["input_ids"]) for text in texts)
    print(f"words  {len(tokenizer):,} → {len(kept):,}; the text is {100 * (after / before - 1):.2f} % more tokens")
    return len(kept)


def smaller(source: "Opened", batches: list, parameters: float | None, sizes: dict[str, int]) -> dict[str, object]:
    """In place; what it is now."""
    from lightning_modules.compression import structured

    network, before = source.network, structured.sizes_of(source.network.config)
    chosen = structured.Sizes(**sizes)
    if parameters is not None:
        chosen, nats = structured.best_sizes(network, parameters, batches[:2], source.auto_class)
        print(f"tried  the sizes that leave {parameters:.0%}: these move it by {nats:.3f} nats a token, the least")
    structured.smaller_config(network, chosen, list(range(chosen.layers or before.layers)))  # or told at once
    worth = structured.worth_of(network, batches, chosen.layers or before.layers)
    source.network, kept = structured.pruned(network, chosen, worth, source.auto_class)
    after = structured.sizes_of(source.network.config)
    for name in ("layers", "width", "inner", "heads"):
        one, other = getattr(before, name), getattr(after, name)
        more = f" (numbers {', '.join(map(str, kept))})" if name == "layers" and one != other else ""
        print(f"{name:<7}{one:,} → {other:,}{more}" if one != other else f"{name:<7}{one:,}")
    return {"sizes": vars(after), "layers": kept}


def sparser(
    source: "Opened", batches: list, method: str, sparsity: float, pattern: str, skip: tuple[str, ...]
) -> dict[str, object]:
    """In place; what it is now."""
    from lightning_modules.compression.calibration import input_moments
    from lightning_modules.compression.quantization import ends_of
    from lightning_modules.compression.sparsity import require_fours, sparsify
    from lightning_modules.compression.structured import linear_layers

    ends = {id(module) for module in ends_of(source.network).values()}
    layers = {
        name: module
        for name, module in linear_layers(source.network).items()
        if id(module) not in ends and not any(part in name for part in skip)
    }
    if pattern == "2:4":
        require_fours(layers)
    moments = input_moments(source.network, layers, batches) if method == "wanda" else {}
    zero, of = sparsify(layers, sparsity, pattern, moments)
    print(f"zero   {zero:,} of {of:,} weights ({100 * zero / of:.2f} %) in {named(list(layers))}")
    return {"sparsity": zero / of, "pattern": pattern, "sparse": list(layers)}


def report(model: list[str], data: Texts) -> None:
    """Put models beside each other.

    Args:
        model: Runs' folders, transformers folders or names on the Hub; the first is what the others are measured
            against.
        data: Where the text is, by whose held-out part they are judged.
    """
    finish({name: opened(name) for name in model}, data)


def finish(models: "dict[str, Opened]", data: Texts) -> None:
    from lightning_modules.compression.judging import judge, table

    scored = next(iter(models.values())).scores_text
    print(table(judge(models, documents(data, "val") if scored else [])), flush=True)


VERBS: dict[str, Callable] = {"quantize": quantize, "prune": prune, "report": report}


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    verbs = parser.add_subcommands(dest="verb")
    for name, verb in VERBS.items():
        of_verb = OneLineParser(description=verb.__doc__.splitlines()[0], allow_abbrev=False)
        of_verb.add_function_arguments(verb, as_group=False)
        verbs.add_subcommand(name, of_verb, help=verb.__doc__.splitlines()[0])
    options = parser.parse_args(arguments)
    with one_line_errors():
        VERBS[options.verb](**parser.instantiate(options)[options.verb])


if __name__ == "__main__":
    main(sys.argv[1:])
