"""A student that begins as a part of its teacher: some of its layers, and of each weight as much as fits."""

import copy
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules.activations import LAYER, Activations
from lightning_modules.model_folder import max_positions

DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Fields of configs that count layers; an encoder-decoder has two."""
FUSED = re.compile(r"\.(c_attn|query_key_value|Wqkv|qkv_proj|Wi|gate_up_proj)\.")
"""Several matrices in one, of which no leading part is a part of each."""
OF_HEADS = (
    re.compile(r"\.(q_proj|k_proj|v_proj|query|key|value|q_lin|k_lin|v_lin|q|k|v)\.(weight|bias)$"),
    re.compile(r"\.(o_proj|out_proj|out_lin|o|attention\.output\.dense)\.weight$"),
)
"""Weights whose first, and whose second axis is of heads."""
NORM = re.compile(r"(norm|ln_\w+)\.weight$", re.IGNORECASE)


@dataclass
class PartOfTeacher:
    """As DistilBERT begins, https://arxiv.org/abs/1910.01108.

    Args:
        teacher_layers: Numbers of the teacher's layers that become the student's, in this order; of an encoder-decoder
            on both sides.
        fields: Fields of the config that are smaller than the teacher's, such as {intermediate_size: 384}.
        narrow: How weights become narrower: slice takes the leading part of all; project takes the hidden states along
            the directions in which the teacher's are largest, https://arxiv.org/abs/2401.15024, and slices heads and
            inner layers.
    """

    teacher_layers: list[int]
    fields: dict[str, int] = field(default_factory=dict)
    narrow: Literal["slice", "project"] = "slice"

    def config(self, teacher: PreTrainedConfig) -> PreTrainedConfig:
        config = copy.deepcopy(teacher)
        for name in DEPTHS:
            if (depth := getattr(teacher, name, None)) is None:
                continue
            outside = [layer for layer in self.teacher_layers if not 0 <= layer < depth]
            if outside or not self.teacher_layers:
                wrong = f"layer {outside[0]}" if outside else "no layer"
                raise ValueError(f"--model.student.teacher_layers names {wrong}; the teacher has 0 to {depth - 1}")
            setattr(config, name, len(self.teacher_layers))
        if getattr(config, "layer_types", None):
            config.layer_types = [teacher.layer_types[layer] for layer in self.teacher_layers]
        for name, value in self.fields.items():
            if teacher.attribute_map.get(name, name) in {teacher.attribute_map.get(depth, depth) for depth in DEPTHS}:
                raise ValueError(f"--model.student.fields {name}: the layers follow from teacher_layers; leave it out")
            if not isinstance(getattr(teacher, name, None), int) or not 0 < value <= getattr(teacher, name):
                here = getattr(teacher, name, "no such field")
                raise ValueError(f"--model.student.fields {name}={value} is no part of the teacher, which has {here}")
            setattr(config, name, value)
        return config

    @torch.no_grad()
    def fill(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
        """Copies weights, in place; returns (c, C) the directions of the teacher's hidden states that the student's
        are. Raises ValueError for a layout of which the layers or the parts are not known."""
        whole, copied_layers = teacher.state_dict(), False
        widths = [network.config.get_text_config().hidden_size for network in (student, teacher)]
        is_projected = self.narrow == "project" and widths[0] < widths[1]
        directions_cC = (principal_directions(teacher) if is_projected else torch.eye(widths[1]))[: widths[0]]
        for name, part in student.state_dict().items():
            if match := LAYER.search(name):
                copied_layers = True
                layer = self.teacher_layers[int(match[2])]
                of_layer = f"{name[: match.start(2)]}{layer}{name[match.end(2) :]}"
                # What only the first layer has, such as T5's relative positions, stays the first layer's.
                name = of_layer if of_layer in whole else name
            if part.shape != whole[name].shape and FUSED.search(name):
                raise ValueError(f"--model.student.fields cuts {name}, which holds several matrices; leave fields out")
            weight = whole[name]
            if is_projected:
                weight = projected(name, weight, part.shape, directions_cC)
            part.copy_(weight[tuple(slice(size) for size in part.shape)])
        if not copied_layers:
            kind = type(teacher.config).__name__
            raise ValueError(f"--model.student.teacher_layers does not know the layers of {kind}; pass an architecture")
        return directions_cC


def projected(name: str, weight: Tensor, shape: torch.Size, directions_cC: Tensor) -> Tensor:
    """A teacher's weight with its axes of hidden states in fewer directions; those of heads and inner layers stay."""
    c, C = directions_cC.shape
    if NORM.search(name):  # one factor a place: the mean of those that go into a direction
        return directions_cC.square() @ weight if shape == (c,) else weight
    for axis in range(weight.ndim):
        is_of_heads = OF_HEADS[min(axis, 1)].search(name) is not None
        if weight.shape[axis] == C and shape[axis] == c and not is_of_heads:
            weight = torch.tensordot(weight, directions_cC, ([axis], [1])).movedim(-1, axis)
    return weight


def principal_directions(network: PreTrainedModel, rows: int = 16, tokens: int = 64) -> Tensor:
    """(C, C) orthonormal rows, the one along which hidden states are largest first; each layer counts alike. What is
    read are random words, which have the layers' own directions, too."""
    positions = max_positions(network)
    generator = torch.Generator().manual_seed(0)
    shape = rows, min(tokens, positions or tokens)
    ids = torch.randint(network.config.get_text_config().vocab_size, shape, generator=generator)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if network.config.is_encoder_decoder else {})
    moments_CC = 0.0
    with Activations(network).taken() as stacks:
        network.eval()(**inputs)
        for stack in stacks.values():
            for hidden_BTC in stack.hidden.values():
                hidden_NC = hidden_BTC.flatten(0, 1).double()
                moments_CC = moments_CC + hidden_NC.T @ hidden_NC / hidden_NC.square().mean()
    return torch.linalg.eigh(moments_CC).eigenvectors.T.flip(0).float()
