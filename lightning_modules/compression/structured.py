"""A smaller model of the same kind: fewer layers, heads and numbers inside, those that matter most.

The network is reordered first, which changes nothing of what it computes, so that in each of its dimensions what
matters most comes first; then the leading part is taken. What matters is measured while it reads a text, as in section
2 of https://arxiv.org/abs/2407.14679 (Minitron), and weighed by the weights that read it.

Shape suffixes: R outputs and C inputs of a layer, K groups of heads that share keys, S numbers of such a group.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_modules.activations import LAYER, head_size
from lightning_modules.architectures import parameter_count
from lightning_modules.compression.calibration import Batch, input_moments
from lightning_modules.compression.quantization import divergence, log_shares
from lightning_modules.student import IN_ONE, NARROWED, OF_HEADS, PartOfTeacher, axes_of_width, heads_of

INNER = ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim", "encoder_ffn_dim")
"""How configs call the width inside a layer."""
NEAR = 0.9
"""Of a share of the parameters that is asked for, what is taken for it."""
SHARED_BIAS = "relative_attention_bias"
"""Of T5, for the heads of all layers of a stack."""


@dataclass(frozen=True)
class Sizes:
    """Of a model; what is None stays."""

    layers: int | None = None
    width: int | None = None
    inner: int | None = None
    heads: int | None = None
    """Of queries; those of keys and values follow."""


def inner_field(config: PreTrainedConfig) -> str:
    return next(name for name in INNER if name in config.to_dict())


def sizes_of(config: PreTrainedConfig) -> Sizes:
    text = config.get_text_config()
    inner = getattr(text, inner_field(text)) or 4 * text.hidden_size  # GPT-2's, left out
    return Sizes(text.num_hidden_layers, text.hidden_size, inner, text.num_attention_heads)


def smaller_config(
    network: PreTrainedModel, sizes: Sizes, kept_layers: list[int]
) -> tuple[PreTrainedConfig, PartOfTeacher]:
    """Raises ValueError for sizes that are no part of the network's."""
    config, now = network.config, sizes_of(network.config)
    if sizes.width or sizes.inner or sizes.heads:
        require_parts(config)
    for name in ("layers", "width", "inner", "heads"):
        asked, there = getattr(sizes, name), getattr(now, name)
        if asked is not None and not 0 < asked <= there:
            raise ValueError(f"--{name} {asked}: the model has {there}; pass 1 to {there}")
    queries, shared = heads_of(config)
    heads = sizes.heads or queries
    if heads % (queries // shared):
        raise ValueError(f"--heads {heads}: {queries // shared} heads share their keys and values; pass a multiple")
    say_sizes(config)
    width = sizes.width or now.width
    if heads * head_size(config) != width and not has_own_head_size(config):
        raise ValueError(
            f"--width {width} with {heads} heads of {head_size(config)}: a {config.model_type} has them side by side "
            f"in its width; pass --width {heads * head_size(config)}, or --heads {width // head_size(config)}"
        )
    if width % heads and width_must_divide(config):
        raise ValueError(
            f"--width {width} with {heads} heads: a {config.model_type} wants its width to divide by its heads; pass "
            f"--width {width // heads * heads}"
        )
    fields = {"hidden_size": width, inner_field(config): sizes.inner or now.inner, "num_attention_heads": heads}
    if "num_key_value_heads" in config.to_dict():
        fields["num_key_value_heads"] = heads * shared // queries
    for name in ("embedding_size", "word_embed_proj_dim"):
        if getattr(config, name, None) == now.width:
            fields[name] = width
    part = PartOfTeacher(kept_layers, {config.attribute_map.get(name, name): value for name, value in fields.items()})
    return part.config(config), part


def require_parts(config: PreTrainedConfig) -> None:
    """Raises ValueError for a family of which a part of a weight is not known."""
    if config.model_type not in NARROWED:
        raise ValueError(
            f"what a part of a {config.model_type} is, is not known, but of {', '.join(NARROWED)}; prune --layers alone"
        )


def config_of(folder: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(folder)


def say_sizes(config: PreTrainedConfig) -> None:
    """Puts into a config what follows from its width, so that it does not follow from another one."""
    setattr(config, inner_field(config), sizes_of(config).inner)
    if has_own_head_size(config):
        config.head_dim = head_size(config)


def has_own_head_size(config: PreTrainedConfig) -> bool:
    """Whether heads may be of another size than their share of the width."""
    return config.model_type in ("llama", "mistral", "nanochat", "qwen2", "qwen3", "smollm3", "t5")


def width_must_divide(config: PreTrainedConfig) -> bool:
    """Whether a config refuses a width that does not divide by its heads, whatever size these have."""
    return has_own_head_size(config) and _refuses_to_divide(type(config))


@functools.cache
def _refuses_to_divide(kind: type[PreTrainedConfig]) -> bool:
    sizes = {"hidden_size": 17, "num_attention_heads": 2, "head_dim": 8}
    try:
        kind.from_dict(kind(hidden_size=16, num_attention_heads=4).to_dict() | sizes)
    except StrictDataclassError:
        return True
    return False


# What there is to reorder


@dataclass(frozen=True)
class Axis:
    """Of a weight: which of its axes, of which dimension, and in which layer or stack that is ordered."""

    axis: int
    dimension: str
    place: str


def axes_of(network: PreTrainedModel) -> dict[str, list[Axis]]:
    """For each weight, those of hidden states, of what is inside a layer, and of heads."""
    say_sizes(network.config)
    inner, width = axes_of_inner(network), axes_of_width(network)
    found: dict[str, list[Axis]] = {}
    for name in network.state_dict():
        axes = [Axis(axis, "width", "") for axis in width[name]]
        axes += [Axis(axis, "inner", layer_of(name)) for axis in inner[name]]
        for axis, pattern in enumerate(OF_HEADS):
            if pattern.search(name):
                axes.append(Axis(axis, "heads", attention_of(network, name)))
        if SHARED_BIAS in name:
            axes.append(Axis(1, "one a head", attention_of(network, name)))
        found[name] = axes
    return found


def axes_of_inner(network: PreTrainedModel) -> dict[str, list[int]]:
    """Those that are longer in a network that is wider inside its layers."""
    config, name = copy.deepcopy(network.config), inner_field(network.config)
    setattr(config, name, 2 * sizes_of(config).inner)
    with torch.device("meta"):
        wide = type(network)(config).state_dict()
    own = network.state_dict()
    return {
        name: [axis for axis in range(weight.ndim) if weight.shape[axis] != wide[name].shape[axis]]
        for name, weight in own.items()
    }


def layer_of(name: str) -> str:
    match = LAYER.search(name)
    return name[: match.end(2)] if match else ""


def attention_of(network: PreTrainedModel, name: str) -> str:
    """Where heads are ordered together: in one attention; in T5, whose layers share a bias of each head, in a stack."""
    layer = layer_of(name)
    if network.config.model_type == "t5" and "SelfAttention" in name:
        return name.split(".")[0]
    return layer + (".cross" if "EncDecAttention" in name or "encoder_attn" in name else "")


# What matters


def linear_layers(network: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)}


@torch.no_grad()
def orders(network: PreTrainedModel, batches: list[Batch]) -> dict[tuple[str, str], Tensor]:
    """For each dimension, and each place where it is ordered, numbers from what matters most to what matters least."""
    layers, axes = linear_layers(network), axes_of(network)
    moments = input_moments(network, layers, batches)
    queries, shared = heads_of(network.config)
    size = queries // shared * head_size(network.config)
    worth: dict[tuple[str, str], Tensor] = {}
    for name, moments_CC in moments.items():
        module = layers[name]
        read = 0 if isinstance(module, Conv1D) else 1
        axis = next((axis for axis in axes.get(f"{name}.weight", ()) if axis.axis == read), None)
        if axis is None:
            continue
        weight_RC = module.weight.T if read == 0 else module.weight
        if axis.dimension == "heads":  # what a group of heads adds, all its numbers together
            blocks_KRS = weight_RC.unflatten(1, (-1, size)).transpose(0, 1)
            own_KSS = torch.stack([rows.split(size, 1)[k] for k, rows in enumerate(moments_CC.split(size))])
            found = torch.einsum("krs,kst,krt->k", blocks_KRS, own_KSS, blocks_KRS)
        else:
            found = weight_RC.square().sum(0) * moments_CC.diagonal()
        key = axis.dimension, axis.place
        worth[key] = worth.get(key, 0.0) + found / found.sum()
    return {key: values.argsort(descending=True) for key, values in worth.items()}


@torch.no_grad()
def reorder(network: PreTrainedModel, by: dict[tuple[str, str], Tensor]) -> None:
    """In place; it computes what it did."""
    queries, shared = heads_of(network.config)
    done: set[int] = set()
    weights = network.state_dict()
    for name, axes in axes_of(network).items():
        weight = weights[name]
        if weight.data_ptr() in done:  # tied to another
            continue
        done.add(weight.data_ptr())
        for axis in axes:
            dimension = "heads" if axis.dimension == "one a head" else axis.dimension
            if (order := by.get((dimension, axis.place))) is None:
                continue
            length = weight.shape[axis.axis]
            if axis.dimension in ("heads", "one a head"):
                repeats = 3 if IN_ONE.search(name) else 1
                order = in_blocks(order, length // repeats // shared)
                order = torch.cat([order + part * length // repeats for part in range(repeats)])
            weight.copy_(weight.index_select(axis.axis, order.to(weight.device)))


def in_blocks(order_K: Tensor, size: int) -> Tensor:
    """Of blocks of `size` numbers each, whose order is given, the order of the numbers."""
    return (order_K[:, None] * size + torch.arange(size, device=order_K.device)).flatten()


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


def worth_of(network: PreTrainedModel, batches: list[Batch], depth: int) -> Worth:
    """With the layers of which some are to go, until `depth` are left."""
    return Worth(orders(network, batches), least_first(network, batches, sizes_of(network.config).layers - depth))


def pruned(network: PreTrainedModel, sizes: Sizes, worth: Worth, auto_class: type) -> tuple[PreTrainedModel, list[int]]:
    """A network of these sizes, and the layers that it has of the other, which is reordered, in place."""
    now = sizes_of(network.config).layers
    gone = worth.layers_least_first[: now - (sizes.layers or now)]
    kept = [number for number in range(now) if number not in gone]
    config, part = smaller_config(network, sizes, kept)
    reorder(network, worth.orders)
    small = auto_class.from_config(config, dtype=network.dtype).eval()
    part.fill(small, network)
    if small.can_generate():
        small.generation_config = copy.deepcopy(network.generation_config)
    return small, kept


def candidates(network: PreTrainedModel, share: float) -> list[Sizes]:
    """Sizes that leave about this share of the parameters: of layers, of width and of what is inside, in steps."""
    now, queries_shared = sizes_of(network.config), heads_of(network.config)
    group, size = queries_shared[0] // queries_shared[1], head_size(network.config)
    free = has_own_head_size(network.config)
    steps = [1.0, 0.875, 0.75, 0.625, 0.5]
    found: dict[Sizes, float] = {}
    depths = range(now.layers, max(0, now.layers // 2 - 1), -1)
    for depth, of_width, of_heads, of_inner in itertools.product(depths, steps, steps, steps):
        heads = max(group, round(now.heads * of_heads / group) * group)
        width = rounded(now.width * of_width) if free else heads * size
        inner = rounded(now.inner * of_inner)
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


def rounded(size: float) -> int:
    """To what later divides into groups of weights that share a scale, and what processors read at once."""
    step = 32 if size >= 128 else 8
    return max(step, round(size / step) * step)


def parameters_of(network: PreTrainedModel, sizes: Sizes) -> int:
    config, _ = smaller_config(network, sizes, list(range(sizes.layers)))
    with torch.device("meta"):
        return parameter_count(type(network)(config))


def best_sizes(network: PreTrainedModel, share: float, batches: list[Batch], auto_class: type) -> tuple[Sizes, float]:
    """Of the candidates the one whose network says least else than the whole one, and by how many nats."""
    sizes_tried = candidates(network, share)
    exact, worth = log_shares(network, batches), worth_of(network, batches, min(s.layers for s in sizes_tried))
    found = {}
    for sizes in sizes_tried:
        small, _ = pruned(copy.deepcopy(network), sizes, worth, auto_class)
        found[sizes] = divergence(small, batches, exact)
    best = min(found, key=found.get)
    return best, found[best]
