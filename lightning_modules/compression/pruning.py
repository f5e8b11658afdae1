"""From a model and what is asked for to one that is smaller or sparser, and what is said about it."""

from lightning_modules.compression import structured, vocabulary
from lightning_modules.compression.calibration import Batch, input_moments
from lightning_modules.compression.opened import Opened
from lightning_modules.compression.quantization import ends_of
from lightning_modules.compression.reordering import linear_layers
from lightning_modules.compression.sizes import Sizes, sizes_of, smaller_config
from lightning_modules.compression.sparsity import Pattern, require_fours, sparsify
from lightning_modules.compression.words import left_of, named

TRIED = 2
"""Batches of calibration by which sizes are tried."""


def require_one_way(
    method: str,
    parameters: float | None,
    sizes: dict[str, int],
    words: int | None,
    sparsity: float | None,
    pattern: Pattern,
    skip: tuple[str, ...] = (),
) -> None:
    """Raises ValueError for flags that do not go together."""
    if method == "structured":
        if sparsity is not None or pattern != "unstructured":
            raise ValueError("--sparsity and --pattern are for --method wanda or magnitude; pass --parameters 0.67")
        if skip:
            raise ValueError("--skip is for --method wanda or magnitude; leave it out")
        if parameters is not None and sizes:
            raise ValueError(f"--parameters finds the sizes itself; leave it out, or --{next(iter(sizes))}")
        if parameters is None and not sizes and words is None:
            raise ValueError("nothing to prune: pass --parameters 0.67, or --layers, --width, --inner, --heads …")
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


def fewer_words(source: Opened, size: int, texts: list[str]) -> dict[str, object]:
    """In place; what it is now."""
    tokenizer, network = source.tokenizer, source.network
    counts, named_ids = vocabulary.counted(tokenizer, texts), vocabulary.ids_named_by(network)
    kept = vocabulary.kept_ids(tokenizer, counts, size, named_ids)
    before = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
    source.tokenizer = vocabulary.smaller_tokenizer(tokenizer, kept)
    source.network = vocabulary.smaller_network(network, kept, source.auto_class)
    after = sum(len(source.tokenizer(text, verbose=False)["input_ids"]) for text in texts)
    print(f"words  {len(tokenizer):,} → {len(kept):,}; the text is {100 * (after / before - 1):.2f} % more tokens")
    return {"words": len(kept)}


def smaller(source: Opened, batches: list[Batch], parameters: float | None, sizes: dict[str, int]) -> dict[str, object]:
    """In place; what it is now."""
    network, before = source.network, sizes_of(source.network.config)
    chosen = Sizes(**sizes)
    if parameters is not None:
        chosen, nats = structured.best_sizes(network, parameters, batches[:TRIED], source.auto_class)
        print(f"tried  the sizes that leave {parameters:.0%}: these move it by {nats:.3f} nats a token, the least")
    depth = chosen.layers or before.layers
    smaller_config(network, chosen, list(range(depth)))  # what cannot be is told at once
    worth = structured.worth_of(network, batches, depth, chosen.only_layers)
    source.network, kept = structured.pruned(network, chosen, worth, source.auto_class)
    after = sizes_of(source.network.config)
    for name, one in vars(before).items():
        if (other := getattr(after, name)) is None:
            continue
        more = f" (numbers {', '.join(map(str, kept))})" if name == "layers" and one != other else ""
        print(f"{name:<7}{one:,} → {other:,}{more}" if one != other else f"{name:<7}{one:,}")
    return {"sizes": vars(after), "layers": kept}


def sparser(
    source: Opened, batches: list[Batch], method: str, sparsity: float, pattern: Pattern, skip: tuple[str, ...]
) -> dict[str, object]:
    """In place; what it is now."""
    ends = {id(module) for module in ends_of(source.network).values()}
    layers = {
        name: module
        for name, module in linear_layers(source.network).items()
        if id(module) not in ends and not any(part in name for part in skip)
    }
    if not layers:
        raise ValueError(f"{type(source.network).__name__} has no linear layer left to prune; pass another --skip")
    if pattern == "2:4":
        require_fours(layers)
    moments = input_moments(source.network, layers, batches) if method == "wanda" else {}
    zero, of = sparsify(layers, sparsity, pattern, moments)
    print(f"zero   {zero:,} of {of:,} weights ({100 * zero / of:.2f} %) in {named(list(layers))}")
    if left := left_of(source.network, layers):
        print(f"left   {left}")
    return {"sparsity": zero / of, "pattern": pattern, "sparse": list(layers)}
