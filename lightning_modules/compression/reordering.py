"""A network whose heads, hidden states and numbers inside are ordered by what they matter; it computes what it did.

What matters is measured while it reads a text, as in section 2 of https://arxiv.org/abs/2407.14679 (Minitron), and
weighed by the weights that read it.

Shape suffixes: R outputs and C inputs of a layer, K groups of heads that share keys, S numbers of such a group.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightning_modules.activations import LAYER, head_size
from lightning_modules.compression.calibration import Batch, input_moments
from lightning_modules.compression.sizes import inner_field, say_sizes, sizes_of
from lightning_modules.student import IN_ONE, OF_HEADS, axes_of_width, heads_of

SHARED_BIAS = "relative_attention_bias"
"""Of T5, for the heads of all layers of a stack."""


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
