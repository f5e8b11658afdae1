"""A student that begins as a part of its teacher: some of its layers, and of each weight as much as fits."""

import copy
import re
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules.activations import LAYER, Activations, head_size
from lightning_modules.model_folder import max_positions

DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
"""Fields of configs that count layers; an encoder-decoder has two."""
WIDTHS = ("embedding_size", "word_embed_proj_dim")
"""Fields that are the hidden states' width where there is no projection between."""
INDICES = ("full_attn_idxs", "mlp_only_layers", "moe_layers")
"""Fields that list numbers of layers."""
BY_LAYER = re.compile(r"layer|_types$|_pattern$|^intermediate_size$")
"""Fields that, where they are lists as long as the model is deep, have a value for each layer."""
OF_FIRST = "relative_attention_bias"
"""What the first layer of T5 has for all of them."""
NARROWED = (
    *("bart", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "mistral", "nanochat", "opt"),
    *("qwen2", "qwen3", "roberta", "smollm3", "t5"),
)
"""Kinds of models of whose every weight is known, and tested, what a part of it means."""
OF_HEADS = (
    re.compile(
        r"\.(q_proj|k_proj|v_proj|(pos_)?(query|key|value)(_proj)?|q_lin|k_lin|v_lin|q|k|v)\.(weight|bias)$|"
        r"\.attn\.c_(attn\.bias|proj\.weight)$"
    ),
    re.compile(r"\.(o_proj|out_proj|out_lin|o|attention\.output\.dense|attn\.c_attn)\.weight$"),
)
"""Weights whose first, and whose second axis is of heads."""
IN_ONE = re.compile(r"\.attn\.c_attn\.(weight|bias)$")
"""Queries, keys and values one behind the other, in GPT-2."""
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
        config, depths = copy.deepcopy(teacher), set()
        for name in DEPTHS:
            if (depth := getattr(teacher, name, None)) is None:
                continue
            depths.add(depth)
            outside = [layer for layer in self.teacher_layers if not 0 <= layer < depth]
            if outside or not self.teacher_layers:
                wrong = f"layer {outside[0]}" if outside else "no layer"
                raise ValueError(f"--model.student.teacher_layers names {wrong}; the teacher has 0 to {depth - 1}")
            setattr(config, name, len(self.teacher_layers))
        for name, value in vars(teacher).items():
            if name in INDICES:
                setattr(config, name, [i for i, layer in enumerate(self.teacher_layers) if layer in (value or ())])
            elif isinstance(value, list | tuple) and len(value) in depths and BY_LAYER.search(name):
                setattr(config, name, [value[layer] for layer in self.teacher_layers])
        if hasattr(config, "attention_types"):  # of GPT-Neo, from which a loaded config makes its attention_layers
            config.attention_types = [[[kind], 1] for kind in config.attention_layers]
        for name, value in self.fields.items():
            if teacher.attribute_map.get(name, name) in {teacher.attribute_map.get(depth, depth) for depth in DEPTHS}:
                raise ValueError(f"--model.student.fields {name}: the layers follow from teacher_layers; leave it out")
            if not isinstance(getattr(teacher, name, None), int) or not 0 < value <= getattr(teacher, name):
                here = getattr(teacher, name, "no such field")
                raise ValueError(f"--model.student.fields {name}={value} is no part of the teacher, which has {here}")
            setattr(config, name, value)
        self._require_known(config, teacher)
        return config

    def _require_known(self, config: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
        """Raises ValueError for what would not be a part of the teacher, though it has the shapes of one."""
        are_first = self.teacher_layers == list(range(len(self.teacher_layers)))
        if getattr(teacher, "scale_attn_by_inverse_layer_idx", False) and not are_first:
            raise ValueError("--model.student.teacher_layers: this GPT-2 scales attention by places; take [0, 1]")
        if not self.fields:
            return
        if teacher.model_type not in NARROWED:
            raise ValueError(
                f"--model.student.fields: what a part of a {teacher.model_type} is, is not known, but of "
                f"{', '.join(NARROWED)}; leave fields out"
            )
        sizes, heads = [head_size(c) for c in (config, teacher)], [heads_of(c) for c in (config, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"--model.student.fields make heads of {sizes[0]} numbers of those of {sizes[1]}; pass "
                "num_attention_heads and hidden_size in the same proportion"
            )
        if heads[0][0] * heads[1][1] != heads[1][0] * heads[0][1]:
            raise ValueError(
                "--model.student.fields change how many heads share their keys and values; pass num_attention_heads "
                "and num_key_value_heads in the same proportion"
            )

    def layer_of(self, name: str) -> str:
        """The name in the teacher of a weight of the student, or of a module."""
        match = LAYER.search(name)
        return f"{name[: match.start(2)]}{self.teacher_layers[int(match[2])]}{name[match.end(2) :]}" if match else name

    def require_same_layers(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raises ValueError where a layer works in another way than the one that it begins as: with another kind of
        attention, or with experts."""
        theirs = dict(teacher.named_modules())
        for name, module in student.named_modules():
            other = theirs.get(self.layer_of(f"{name}.")[:-1])
            if not LAYER.search(f"{name}.") or name.endswith(OF_FIRST):
                continue
            ours, there = way_of(module), {} if other is None else way_of(other)
            if differing := [key for key in ours if ours[key] != there.get(key)]:
                key = differing[0]
                raise ValueError(
                    f"--model.student.teacher_layers {self.teacher_layers}: by its place {name} gets the {key} "
                    f"{ours[key]}, and what it would begin as has {there.get(key)}; take layers of the same kind"
                )

    @torch.no_grad()
    def fill(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
        """Copies weights, in place; returns (c, C) the directions of the teacher's hidden states that the student's
        are. Raises ValueError for a layout of which the layers or the parts are not known."""
        self.require_same_layers(student, teacher)
        whole, parts = teacher.state_dict(), student.state_dict()
        if not any(map(LAYER.search, parts)):
            kind = type(teacher.config).__name__
            raise ValueError(f"--model.student.teacher_layers does not know the layers of {kind}; pass an architecture")
        if lost := [name for name in whole if not LAYER.search(name) and name not in parts]:
            raise ValueError(f"--model.student.fields leave no place for the teacher's {lost[0]}; pass other sizes")
        widths = [network.config.get_text_config().hidden_size for network in (student, teacher)]
        is_projected = self.narrow == "project" and widths[0] < widths[1]
        axes = axes_of_width(student) if is_projected else {}
        directions_cC = (principal_directions(teacher) if is_projected else torch.eye(widths[1]))[: widths[0]]
        for ours, part in parts.items():
            name = ours if OF_FIRST in ours else self.layer_of(ours)
            if name not in whole or whole[name].ndim != part.ndim:
                raise ValueError(
                    f"--model.student: the teacher has no {name} that the student's could be a part of; name the "
                    "fields that it follows from, such as embedding_size beside hidden_size, or leave fields out"
                )
            if any(mine > its for mine, its in zip(part.shape, whole[name].shape, strict=True)):
                raise ValueError(f"--model.student.fields make {name} larger than the teacher's; pass other sizes")
            weight = whole[name]
            if is_projected:
                weight = projected(name, weight, axes[ours], directions_cC)
            part.copy_(leading_part(name, weight, part.shape))
        return directions_cC


def leading_part(name: str, weight: Tensor, shape: torch.Size) -> Tensor:
    """What a smaller weight begins as: of queries, keys and values in one matrix the leading part of each."""
    if IN_ONE.search(name):
        narrow = shape[-1] // 3
        thirds = weight.unflatten(-1, (3, -1))[..., :narrow]
        return thirds[tuple(slice(size) for size in shape[:-1])].flatten(-2)
    return weight[tuple(slice(size) for size in shape)]


def heads_of(config: PreTrainedConfig) -> tuple[int, int]:
    """How many there are, and how many of keys and values."""
    return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def way_of(module: nn.Module) -> dict[str, object]:
    """What a module does, but for its place and its sizes."""
    kinds = {key: value for key, value in vars(module).items() if isinstance(value, bool | str)}
    return {"class": type(module).__name__} | {
        key: value for key, value in kinds.items() if key != "training" and OF_FIRST not in key
    }


def axes_of_width(network: PreTrainedModel) -> dict[str, list[int]]:
    """For each weight the axes of hidden states: those that are longer in a network that is wider."""
    own = network.state_dict()
    for factor in (2, 3, 5):
        config = copy.deepcopy(network.config)
        text = config.get_text_config()
        width = text.hidden_size
        for field_name in ("hidden_size", *WIDTHS):
            if getattr(text, field_name, None) == width:
                setattr(text, field_name, factor * width)
        with torch.device("meta"):
            wide = type(network)(config).state_dict()
        if wide.keys() == own.keys():  # a width that happens to be that of the embeddings has other weights
            break
    found = {}
    for name, weight in own.items():
        longer = [axis for axis in range(weight.ndim) if weight.shape[axis] != wide[name].shape[axis]]
        found[name] = [axis for axis in longer if OF_HEADS[min(axis, 1)].search(name) is None]
    return found


def projected(name: str, weight: Tensor, axes: list[int], directions_cC: Tensor) -> Tensor:
    """A teacher's weight with its axes of hidden states in fewer directions."""
    for axis in axes:
        if NORM.search(name):  # one factor a place: the mean of those that go into a direction
            weight = directions_cC.square() @ weight
        else:
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
