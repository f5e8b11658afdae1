"""Which layers of a model get how few bits, and what they lose by it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_modules.compression.calibration import Batch
from lightning_modules.compression.grids import Grid, minmax, nearest, passed_on
from lightning_modules.compression.packed_folder import Activations, Layers, Minmax, PackedLayer

MOST_SHARES = 2**28
"""Log-probabilities that are kept while a network is changed: 1 GiB."""
GROUPS = (32, 16)
"""Weights that share a scale, where nothing else is asked for."""
SchemeName = Literal["int8", "int8-dynamic", "int4", "int3", "int2", "8da4w", "float8", "minmax"]
Rounding = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Scheme:
    grid: Grid
    activations: Activations | None = None


def scheme_named(name: SchemeName) -> Scheme:
    """With a scale for each row, until layers are known."""
    if name == "float8":
        return Scheme(Grid(8, None, "float"), "float8")
    if name.startswith("int8"):
        return Scheme(Grid(8), "int8" if name == "int8-dynamic" else None)
    if name == "8da4w":
        return Scheme(Grid(4), "int8-asymmetric")
    return Scheme(Grid(int(name.removeprefix("int"))))


def quantizable(network: PreTrainedModel, skip: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Linear layers by name, but those whose name holds one of `skip`; without the head that makes logits of words.

    Raises ValueError where there are none, or they are of a kind that the format has no place for.
    """
    if gpt2 := [name for name, module in network.named_modules() if isinstance(module, Conv1D)]:
        raise ValueError(
            f"{type(network).__name__} keeps its weights in Conv1D ({gpt2[0]}), for which the format has no place; "
            "take --scheme minmax, or recipes/export.py --format onnx-int8 or gguf"
        )
    ends = {id(module) for module in ends_of(network).values()}
    inside = "" if network.get_output_embeddings() is not None else f"{network.base_model_prefix}."
    found = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in ends
        and name.startswith(inside)  # of a model of labels its small head stays
        and not any(part in name for part in skip)
    }
    if not found:
        raise ValueError(f"{type(network).__name__} has no linear layer left to quantize; pass another --skip")
    return found


def ends_of(network: PreTrainedModel) -> dict[str, nn.Module]:
    """The table of words, and the head that makes their logits, by name; those of other tables stay as they are."""
    ends = [network.get_input_embeddings(), network.get_output_embeddings()]
    names = {id(module): name for name, module in network.named_modules()}
    return {names[id(end)]: end for end in ends if isinstance(end, nn.Linear | nn.Embedding)}


def fitted(grid: Grid, layers: dict[str, nn.Module], group_size: int | None) -> dict[str, Grid]:
    """For each layer the grid in groups of as many weights as asked for; else of 32, of 16 where these do not divide
    its inputs, or of a row. Raises ValueError for what was asked for and does not divide."""
    found = {}
    for name, layer in layers.items():
        inputs = layer.weight.shape[1]
        if group_size is not None and inputs % group_size:
            raise ValueError(
                f"--group_size {group_size} does not divide the {inputs} inputs of {name}; pass one that does, or "
                "leave it out"
            )
        fitting = group_size or next((size for size in GROUPS if inputs % size == 0), None)
        found[name] = grid if grid.bits == 8 else replace(grid, group_size=fitting)
    return found


@torch.no_grad()
def quantized(
    network: PreTrainedModel,
    layers: dict[str, nn.Module],
    grids: dict[str, Grid],
    activations: Activations | None,
    moments: dict[str, Tensor],
) -> Layers:
    """The layers on their grids; by GPTQ where `moments` has what a layer reads, else each weight by itself."""
    found = {}
    for name, layer in layers.items():
        weight_RC, grid = layer.weight.detach(), grids[name]
        moments_CC = moments.get(name)
        codes = nearest(weight_RC, grid) if moments_CC is None else passed_on(weight_RC, moments_CC, grid)
        found[name] = PackedLayer(codes, grid, activations)
    return found


@torch.no_grad()
def quantized_ends(network: PreTrainedModel, bits: int) -> Layers:
    """Embedding and head, each row with a scale; a matrix that they share once."""
    if bits == 16:
        return {}
    found: Layers = {}
    for name, module in ends_of(network).items():
        same = next((other for other in found if network.get_submodule(other).weight is module.weight), None)
        found[name] = found[same] if same else PackedLayer(nearest(module.weight.detach(), Grid(bits)), Grid(bits))
    return found


@torch.no_grad()
def quantized_minmax(network: PreTrainedModel, bits: int, per: Literal["tensor", "channel"]) -> Layers:
    """Every matrix by the textbook's formula, whatever kind of layer it is in; one that two layers share once."""
    found: Layers = {}
    done: set[int] = set()
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | nn.Embedding | Conv1D) or id(weight) in done:
            continue
        done.add(id(weight))
        of_rows = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
        codes_RC, low, high = minmax(of_rows, bits, per)
        if isinstance(module, Conv1D):
            codes_RC, low, high = codes_RC.T, low.T, high.T
        found[name] = PackedLayer(Minmax(codes_RC, low, high, bits))
    return found


@torch.no_grad()
def put_in(network: PreTrainedModel, layers: Layers) -> None:
    """Gives a network the values of its packed layers, in place."""
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight
        weight.copy_(layer.weight.values())


# How much each layer loses


def words_of(network: PreTrainedModel) -> int:
    """How many numbers a network says of each place, or at most that many."""
    return network.config.get_text_config().vocab_size


def some_of(batches: list[Batch], words: int) -> list[Batch]:
    """As many rows of the first batches as have MOST_SHARES log-probabilities, at least one."""
    found, left = [], MOST_SHARES
    for batch in batches:
        rows, length = batch["input_ids"].shape
        fitting = min(rows, left // (length * words)) if found else max(1, min(rows, left // (length * words)))
        if fitting < 1:
            break
        found.append({name: value[:fitting] for name, value in batch.items()})
        left -= fitting * length * words
    return found


@torch.no_grad()
def log_shares(network: PreTrainedModel, batches: list[Batch]) -> list[Tensor]:
    """Of each batch the log-probabilities that a network gives."""
    return [network(**batch)[0].float().log_softmax(-1) for batch in batches]


@torch.no_grad()
def divergence(network: PreTrainedModel, batches: list[Batch], exact: list[Tensor]) -> float:
    """Nats: KL from what a network gave before to what it gives now, a mean over all places."""
    total, count = 0.0, 0
    for before, now in zip(exact, log_shares(network, batches), strict=True):
        total += float((before.exp() * (before - now)).sum())
        count += before[..., 0].numel()
    return total / count


def require_bits(layers: dict[str, nn.Module], grids: dict[str, list[Grid]], average_bits: float) -> None:
    """Raises ValueError for fewer bits than the coarsest grids have."""
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    coarsest = (size * grids[name][0].bits_of(layers[name].weight.shape[1]) for name, size in sizes.items())
    if average_bits < (least := sum(coarsest) / sum(sizes.values())):
        raise ValueError(
            f"--average_bits {average_bits:g} is less than the {least:.2f} of the coarsest grid; pass more"
        )


@torch.no_grad()
def sensitivities(
    network: PreTrainedModel,
    layers: dict[str, nn.Module],
    grids: dict[str, list[Grid]],
    moments: dict[str, Tensor],
    batches: list[Batch],
) -> dict[str, list[float]]:
    """For each layer, and each grid, the divergence that comes of it alone."""
    exact, found = log_shares(network, batches), {}
    for name, layer in layers.items():
        before, found[name] = layer.weight.detach().clone(), []
        for grid in grids[name]:
            put_in(network, quantized(network, {name: layer}, {name: grid}, None, moments))
            found[name].append(divergence(network, batches, exact))
            layer.weight.copy_(before)
    return found


def mixed(
    layers: dict[str, nn.Module], grids: dict[str, list[Grid]], lost: dict[str, list[float]], average_bits: float
) -> dict[str, Grid]:
    """A grid for each layer, with the least sum of divergences at so many bits a weight: from the fewest bits, the
    step up that gains most for its bits, until no further one fits. `grids` go from few bits to many."""
    require_bits(layers, grids, average_bits)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    bits = {name: [grid.bits_of(layer.weight.shape[1]) for grid in grids[name]] for name, layer in layers.items()}
    chosen = dict.fromkeys(layers, 0)
    left = average_bits * sum(sizes.values()) - sum(sizes[name] * bits[name][0] for name in layers)
    while True:
        steps = []
        for name, now in chosen.items():
            for to in range(now + 1, len(grids[name])):
                cost = sizes[name] * (bits[name][to] - bits[name][now])
                if cost <= left:
                    steps.append(((lost[name][now] - lost[name][to]) / cost, name, to, cost))
        if not steps or max(steps)[0] <= 0:
            return {name: grids[name][place] for name, place in chosen.items()}
        _, name, to, cost = max(steps)
        chosen[name], left = to, left - cost
