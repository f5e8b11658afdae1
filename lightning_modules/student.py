"""A student that begins as a part of its teacher: some of its layers, and of each weight as much as fits."""

import copy
import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules.activations import LAYER

DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Fields of configs that count layers; an encoder-decoder has two."""
FUSED = re.compile(r"\.(c_attn|query_key_value|Wqkv|qkv_proj|Wi|gate_up_proj)\.")
"""Several matrices in one, of which no leading part is a part of each."""


@dataclass
class PartOfTeacher:
    """As DistilBERT begins, https://arxiv.org/abs/1910.01108.

    Args:
        teacher_layers: Numbers of the teacher's layers that become the student's, in this order; of an encoder-decoder
            on both sides.
        fields: Fields of the config that are smaller than the teacher's, such as {intermediate_size: 384}.
    """

    teacher_layers: list[int]
    fields: dict[str, int] = field(default_factory=dict)

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
    def fill(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Copies weights, in place. Raises ValueError for a layout of which the layers or the parts are not known."""
        whole, copied_layers = teacher.state_dict(), False
        for name, part in student.state_dict().items():
            if match := LAYER.search(name):
                copied_layers = True
                layer = self.teacher_layers[int(match[2])]
                of_layer = f"{name[: match.start(2)]}{layer}{name[match.end(2) :]}"
                # What only the first layer has, such as T5's relative positions, stays the first layer's.
                name = of_layer if of_layer in whole else name
            if part.shape != whole[name].shape and FUSED.search(name):
                raise ValueError(f"--model.student.fields cuts {name}, which holds several matrices; leave fields out")
            part.copy_(whole[name][tuple(slice(size) for size in part.shape)])
        if not copied_layers:
            kind = type(teacher.config).__name__
            raise ValueError(f"--model.student.teacher_layers does not know the layers of {kind}; pass an architecture")
