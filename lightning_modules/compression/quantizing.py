"""From a model and what is asked for to its layers in few bits, and what is said about it."""

from typing import Literal

from lightning_modules.compression.calibration import calibration_batches, input_moments
from lightning_modules.compression.grids import Grid
from lightning_modules.compression.opened import Opened
from lightning_modules.compression.packed_folder import Layers
from lightning_modules.compression.quantization import (
    Rounding,
    SchemeName,
    fitted,
    mixed,
    quantizable,
    quantized,
    quantized_ends,
    quantized_minmax,
    require_bits,
    scheme_named,
    sensitivities,
    some_of,
    words_of,
)
from lightning_modules.compression.words import left_of, named

SENSED = 2
"""Batches of calibration by which the sensitivity of layers is measured."""


def minmax_layers(source: Opened, bits: int, per: Literal["tensor", "channel"]) -> tuple[Layers, list[str]]:
    """The textbook's formula for every matrix, and rows that say so."""
    layers = quantized_minmax(source.network, bits, per)
    left = left_of(source.network, layers)
    told = [f"{bits} bits between the least and the largest of a {per}: {named(list(layers))}"]
    return layers, told + ([f"left: {left}"] if left else [])


def grid_layers(
    source: Opened,
    texts: list[str],
    scheme: SchemeName,
    group_size: int | None,
    rounding: Rounding,
    average_bits: float | None,
    ends: int,
    skip: tuple[str, ...],
    rows: int,
) -> tuple[Layers, list[str]]:
    """The layers of a scheme, and rows that say which they are; `texts` is empty where none is needed."""
    network = source.network
    found = quantizable(network, skip)
    chosen = scheme_named(scheme)
    grids = fitted(chosen.grid, found, group_size)
    if average_bits is not None:
        by_bits = [fitted(Grid(bits), found, group_size) for bits in (2, 3, 4, 8)]
        steps = {name: [of_bits[name] for of_bits in by_bits] for name in found}
        require_bits(found, steps, average_bits)
    batches = calibration_batches(network, source.tokenizer, texts, rows) if texts else []
    moments = input_moments(network, found, batches) if rounding == "gptq" else {}
    if average_bits is not None:
        lost = sensitivities(network, found, steps, moments, some_of(batches[:SENSED], words_of(network)))
        grids = mixed(found, steps, lost, average_bits)
    layers = quantized(network, found, grids, chosen.activations, moments)
    outer = quantized_ends(network, ends)
    told = []
    for grid in dict.fromkeys(grids.values()):
        told.append(f"{grid}, {rounding}: {named([name for name in layers if grids[name] == grid])}")
    if outer:
        told.append(f"int{ends}, a scale for each row: {named(list(outer))}")
    left = [name for name, p in network.named_parameters() if name.rpartition(".")[0] not in layers | outer]
    told.append(f"left in 16 bits: {named(left) if left else 'nothing'}")
    return layers | outer, told
