"""A smaller model of the same kind: fewer layers, heads and numbers inside, those that matter most.

The network is reordered first, so that in each of its dimensions what matters most comes first; then the leading part
is taken.
"""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.activations import LAYER, head_size
from lightning_modules.architectures import parameter_count
from lightning_modules.compression.calibration import Batch
from lightning_modules.compression.quantization import divergence, log_shares, some_of, words_of
from lightning_modules.compression.reordering import SHARED_BIAS, orders, reorder
from lightning_modules.compression.sizes import (
    Sizes,
    has_own_head_size,
    part_of_size,
    require_parts,
    sizes_of,
    smaller_config,
    width_must_divide,
)
from lightning_modules.student import heads_of

NEAR = 0.9
"""Of a share of the parameters that is asked for, what is taken for it."""


# Layers


def whole_layers(network: PreTrainedModel) -> dict[int, list[nn.Module]]:
    """By their number, of both stacks of an encoder-decoder."""
    found: dict[int, list[nn.Module]] = {}
    for name, module in network.named_modules():
        match = LAYER.search(f"{name}.")
        if match and match.end() == len(name) + 1:
            found.setdefault(int(match[2]), []).append(module)
    return found


@contextmanager
def without(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, layers hand on what they get."""

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handles = [layer.register_forward_hook(skip, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_first(network: PreTrainedModel, batches: list[Batch], count: int) -> list[int]:
    """Numbers of layers: one after the other that without which the network says least else."""
    batches = some_of(batches, words_of(network))
    exact, layers = log_shares(network, batches), whole_layers(network)
    first_stays = any(SHARED_BIAS in name for name in network.state_dict())
    gone: list[int] = []
    while len(gone) < count:
        lost = {}
        for number in layers:
            if number in gone or (number == 0 and first_stays):
                continue
            with without([layer for i in (*gone, number) for layer in layers[i]]):
                lost[number] = divergence(network, batches, exact)
        gone.append(min(lost, key=lost.get))
    return gone


# The smaller network


@dataclass(frozen=True)
class Worth:
    """What matters in a network."""

    orders: dict[tuple[str, str], Tensor]
    layers_least_first: list[int]


def worth_of(network: PreTrainedModel, batches: list[Batch], depth: int, only_layers: bool = False) -> Worth:
    """With the layers of which some are to go, until `depth` are left."""
    gone = least_first(network, batches, sizes_of(network.config).layers - depth)
    return Worth({} if only_layers else orders(network, batches), gone)


def pruned(network: PreTrainedModel, sizes: Sizes, worth: Worth, auto_class: type) -> tuple[PreTrainedModel, list[int]]:
    """A network of these sizes, and the layers that it has of the other, which is reordered, in place."""
    now = sizes_of(network.config).layers
    gone = worth.layers_least_first[: now - (sizes.layers or now)]
    kept = [number for number in range(now) if number not in gone]
    config, part = smaller_config(network, sizes, kept)
    if worth.orders:
        reorder(network, worth.orders)
    small = auto_class.from_config(config, dtype=network.dtype).eval()
    part.fill(small, network)
    if small.can_generate():
        small.generation_config = copy.deepcopy(network.generation_config)
    return small, kept


def candidates(network: PreTrainedModel, share: float) -> list[Sizes]:
    """Sizes that leave about this share of the parameters: of layers, of width and of what is inside, in steps."""
    require_parts(network.config)
    now, queries_shared = sizes_of(network.config), heads_of(network.config)
    group, size = queries_shared[0] // queries_shared[1], head_size(network.config)
    free = has_own_head_size(network.config)
    steps = [1.0, 0.875, 0.75, 0.625, 0.5]
    found: dict[Sizes, float] = {}
    depths = range(now.layers, max(0, now.layers // 2 - 1), -1)
    for depth, of_width, of_heads, of_inner in itertools.product(depths, steps, steps, steps):
        heads = max(group, round(now.heads * of_heads / group) * group)
        width = part_of_size(now.width, of_width) if free else heads * size
        inner = part_of_size(now.inner, of_inner)
        sizes = Sizes(depth, width, inner, heads)
        must_divide = width_must_divide(network.config)
        if sizes in found or (not free and of_width != of_heads) or (must_divide and width % heads):
            continue
        found[sizes] = parameters_of(network, sizes)
    whole = parameter_count(network)
    fitting = {sizes: count for sizes, count in found.items() if NEAR * share <= count / whole <= share}
    if not fitting:
        raise ValueError(
            f"--parameters {share:g}: no sizes in steps of an eighth come near it; say --layers, --inner …"
        )
    return list(fitting)


def parameters_of(network: PreTrainedModel, sizes: Sizes) -> int:
    config, _ = smaller_config(network, sizes, list(range(sizes.layers)))
    with torch.device("meta"):
        return parameter_count(type(network)(config))


def best_sizes(network: PreTrainedModel, share: float, batches: list[Batch], auto_class: type) -> tuple[Sizes, float]:
    """Of the candidates the one whose network says least else than the whole one, and by how many nats."""
    sizes_tried, batches = candidates(network, share), some_of(batches, words_of(network))
    exact, worth = log_shares(network, batches), worth_of(network, batches, min(s.layers for s in sizes_tried))
    found = {}
    for sizes in sizes_tried:
        small, _ = pruned(copy.deepcopy(network), sizes, worth, auto_class)
        found[sizes] = divergence(small, batches, exact)
    best = min(found, key=found.get)
    return best, found[best]
