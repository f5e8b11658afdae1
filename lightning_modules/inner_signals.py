"""What a student learns from the inside of its teacher: hidden states, attention, relations of queries, keys, values.

Shape suffixes: B rows, T positions, C width of a network, A heads that are compared, D size of one, W = A · D.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_modules.activations import Activations, Heads, Stack
from lightning_modules.losses import IGNORED

Relation = Literal["qk", "qq", "kk", "vv"]


@dataclass
class InnerSignals:
    """Weights of what is added to the objective; each is a mean over the tokens of a row, and a row counts by its
    labels.

    Args:
        hidden: Of the squared distance of the hidden states behind each layer, relative to the teacher's size, through
            a projection where the widths differ, https://arxiv.org/abs/1909.10351.
        embeddings: The same of what the first layer reads.
        cosine: Of 1 - cos of the hidden states behind the last layer, https://arxiv.org/abs/1910.01108.
        attention: Of the squared distance of the scores of attention, mean over heads and what a token sees.
        relations: Of KL between the relations of one layer's heads, https://arxiv.org/abs/2012.15828.
        kinds: Which relations: queries with keys is attention itself, the others are of queries, keys and values among
            themselves.
        relation_layer: Of the teacher, the last being -1; the student's is its last.
        relation_heads: Into how many heads both models' are divided anew. Left out: the most that fit, up to the
            teacher's.
        layer_map: For each of the student's layers the number of the teacher's that it is compared with. Left out:
            evenly spaced, the last with the last.
        first: Part of the run, 0 to 1, in which these signals are all that is minimised, after which they are none of
            it: TinyBERT's two stages. 0: both at once from beginning to end.
    """

    hidden: float = 0.0
    embeddings: float = 0.0
    cosine: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    kinds: tuple[Relation, ...] = ("qq", "kk", "vv")
    relation_layer: int = -1
    relation_heads: int | None = None
    layer_map: list[int] | None = None
    first: float = 0.0

    def require_range(self) -> None:
        """Raises ValueError for weights that mean nothing."""
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(f"--model.inner has weights {self.weights}; pass one or more above zero, none below")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"--model.inner.relation_heads is {self.relation_heads}; pass 1 or more, or leave it out")
        if not 0 <= self.first < 1 or not self.kinds:
            raise ValueError(
                f"--model.inner.first {self.first}, .kinds {self.kinds}: pass a part of the run, and a kind"
            )

    @property
    def weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("hidden", "embeddings", "cosine", "attention", "relations")}

    def describe(self) -> str:
        used = [f"{name} {weight:g}" for name, weight in self.weights.items() if weight]
        alone = f", alone in the first {100 * self.first:.0f} % of the run" if self.first else ""
        return ", ".join(used) + alone


class Seen(NamedTuple):
    """Of a batch, for one stack of layers."""

    weights_BT: Tensor
    """What a position counts, in labels; zero for padding."""
    pairs_BTT: Tensor
    """Whether a position sees another."""


def up_to_last_label(labels_BT: Tensor) -> Tensor:
    """(B, T) whether a label comes at a position or behind it: what stands behind all is padding."""
    return up_to_last(labels_BT != IGNORED)


def up_to_last(is_there_BT: Tensor) -> Tensor:
    """(B, T) whether something is there at a position or behind it."""
    return is_there_BT.flip(-1).cumsum(-1).flip(-1) > 0


def seen_by(
    is_real_BT: Tensor, labels_of_row_B: Tensor, is_causal: bool, position_ids_BT: Tensor | None = None
) -> Seen:
    """Where padding is not seen, and neither is another document where positions restart."""
    weights_BT = is_real_BT * (labels_of_row_B / is_real_BT.sum(-1).clamp(min=1))[:, None]
    T = is_real_BT.shape[1]
    pairs_BTT = is_real_BT[:, None, :].expand(-1, T, -1)
    if is_causal:
        pairs_BTT = pairs_BTT & torch.ones(T, T, dtype=torch.bool, device=pairs_BTT.device).tril()
    if position_ids_BT is not None:
        documents_BT = (position_ids_BT == 0).cumsum(-1)
        pairs_BTT = pairs_BTT & (documents_BT[:, :, None] == documents_BT[:, None, :])
    return Seen(weights_BT.float(), pairs_BTT)


class InnerLoss(nn.Module):
    """Of a student and its teacher; its projections are trained beside the student, and are no part of it."""

    def __init__(
        self,
        signals: InnerSignals,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        directions_cC: Tensor | None = None,
    ):
        """`directions_cC` are those of the teacher's hidden states that the student's begin as."""
        super().__init__()
        self.signals = signals
        self.of_student, self.of_teacher = Activations(student), Activations(teacher)
        self.maps: dict[str, list[int]] = {}
        if sorted(self.of_student.stacks) != sorted(self.of_teacher.stacks):
            raise ValueError("--model.inner compares layers, and one of the models has an encoder and a decoder")
        for key, stack in self.of_student.stacks.items():
            depths = stack.depth, self.of_teacher.stacks[key].depth
            self.maps[key] = even_map(*depths) if signals.layer_map is None else signals.layer_map
            require_map(self.maps[key], *depths)
            if not -depths[1] <= signals.relation_layer < depths[1]:
                raise ValueError(
                    f"--model.inner.relation_layer is {signals.relation_layer}; the teacher has 0 to {depths[1] - 1}"
                )
        self._require_known(student, teacher)
        widths = [network.config.get_text_config().hidden_size for network in (student, teacher)]
        projected = self._projected() if widths[0] != widths[1] else []
        self.projections = nn.ModuleDict({name: nn.Linear(*widths, bias=False) for name in projected})
        if directions_cC is not None:
            for projection in self.projections.values():
                projection.weight.data.copy_(directions_cC.T)

    @torch.no_grad()
    def _require_known(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Raises ValueError for what is not found inside, and for heads that cannot be divided alike, by reading two
        tokens."""
        kinds = (*self.signals.kinds,) if self.signals.relations else ()
        kinds += ("qk",) if self.signals.attention else ()
        with self.of_student.taken() as ours, self.of_teacher.taken() as theirs:
            for network in (student, teacher):
                ids = torch.zeros(1, 2, dtype=torch.long, device=network.device)
                network(input_ids=ids, **({"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}))
            for key, stack in ours.items():
                for side, network in ((stack, student), (theirs[key], teacher)):
                    if sorted(side.hidden) != list(range(side.depth + 1)):
                        kind = type(network.config).__name__
                        raise ValueError(f"the hidden states of {kind} are not known by name; leave --model.inner out")
                for layers in self._compared_heads(key):
                    pair = []
                    for side, network, i in zip((stack, theirs[key]), (student, teacher), layers, strict=True):
                        pair.append(side.heads.get(i))
                        if pair[-1] is None or pair[-1].queries_BTW.shape[:2] != (1, 2):
                            raise ValueError(
                                "--model.inner.attention and .relations do not know the queries, keys and values of "
                                f"layer {i} of {type(network.config).__name__}; leave them out"
                            )
                    for kind in kinds:
                        both(kind, *pair, self.signals.relation_heads)

    def _compared_heads(self, key: str) -> list[tuple[int, int]]:
        """Layers of the student and of the teacher."""
        found = list(enumerate(self.maps[key])) if self.signals.attention else []
        if self.signals.relations:
            depths = self.of_student.stacks[key].depth, self.of_teacher.stacks[key].depth
            found.append((depths[0] - 1, self.signals.relation_layer % depths[1]))
        return found

    def _projected(self) -> list[str]:
        """Places whose hidden states are compared: the stack and how many layers are before."""
        found = set()
        for key, layers in self.maps.items():
            found |= {(key, i + 1) for i in range(len(layers)) if self.signals.hidden}
            found |= {(key, 0)} if self.signals.embeddings else set()
            found |= {(key, len(layers))} if self.signals.cosine else set()
        return [f"{key}_{place}" for key, place in sorted(found)]

    def forward(
        self, read_student: Callable[[], object], read_teacher: Callable[[], object], seen: dict[str, Seen]
    ) -> tuple[object, object, Tensor]:
        """What both make of a batch, and the signals' weighted sum, in labels."""
        with self.of_student.taken() as student, self.of_teacher.taken() as teacher:
            found, taught = read_student(), read_teacher()
            with torch.autocast(next(iter(seen.values())).weights_BT.device.type, enabled=False):
                total = sum(self._of_stack(key, student[key], teacher[key], seen[key]) for key in student)
        return found, taught, total

    def _of_stack(self, key: str, student: Stack, teacher: Stack, seen: Seen) -> Tensor:
        signals, layers, total = self.signals, self.maps[key], seen.weights_BT.new_zeros(())
        weights_BT = seen.weights_BT
        places = [(0, 0, signals.embeddings)] + [(i + 1, j + 1, signals.hidden) for i, j in enumerate(layers)]
        for i, j, weight in places:
            if weight:
                apart_BT = relative_distance(self._projection(key, i, student.hidden[i]), teacher.hidden[j].float())
                total = total + weight * (apart_BT * weights_BT).sum()
        if signals.cosine:
            last = self._projection(key, student.depth, student.hidden[student.depth])
            cosine_BT = torch.cosine_similarity(last, teacher.hidden[teacher.depth].float(), -1)
            total = total + signals.cosine * ((1 - cosine_BT) * weights_BT).sum()
        if signals.attention:
            for i, j in enumerate(layers):
                apart_BT = attention_distance(
                    student.heads[i], teacher.heads[j], signals.relation_heads, seen.pairs_BTT
                )
                total = total + signals.attention * (apart_BT * weights_BT).sum()
        if signals.relations:
            ours, theirs = student.heads[student.depth - 1], teacher.heads[signals.relation_layer % teacher.depth]
            for kind in signals.kinds:
                kl_BT = relation_kl(kind, ours, theirs, signals.relation_heads, seen.pairs_BTT)
                total = total + signals.relations / len(signals.kinds) * (kl_BT * weights_BT).sum()
        return total

    def _projection(self, key: str, place: int, hidden_BTC: Tensor) -> Tensor:
        name = f"{key}_{place}"
        if name not in self.projections:
            return hidden_BTC.float()
        return nn.functional.linear(hidden_BTC.float(), self.projections[name].weight.float())


def even_map(student: int, teacher: int) -> list[int]:
    """Teacher's layers for the student's, evenly spaced, the last with the last; of a deeper student some twice."""
    return [max(0, round((i + 1) * teacher / student) - 1) for i in range(student)]


def require_map(layers: list[int], student: int, teacher: int) -> None:
    if len(layers) != student:
        raise ValueError(f"--model.inner.layer_map has {len(layers)} numbers; the student has {student} layers")
    if outside := [layer for layer in layers if not 0 <= layer < teacher]:
        raise ValueError(f"--model.inner.layer_map names layer {outside[0]}; the teacher has 0 to {teacher - 1}")


def relative_distance(student_BTC: Tensor, teacher_BTC: Tensor) -> Tensor:
    """(B, T) squared distance over the square of the teacher's length, so that 1 is that of a student that says
    nothing, at each layer of each model."""
    return (student_BTC - teacher_BTC).square().sum(-1) / teacher_BTC.square().sum(-1).clamp(min=1e-12)


def attention_distance(student: Heads, teacher: Heads, heads: int | None, pairs_BTT: Tensor) -> Tensor:
    """(B, T) mean squared difference of the scores of queries and keys, over what a position sees."""
    apart_BATT = (
        torch.sub(*(scores(*pair) for pair in both("qk", student, teacher, heads)))
        .square()
        .masked_fill(~pairs_BTT[:, None], 0)
    )
    return apart_BATT.mean(1).sum(-1) / pairs_BTT.sum(-1).clamp(min=1)


def relation_kl(kind: Relation, student: Heads, teacher: Heads, heads: int | None, pairs_BTT: Tensor) -> Tensor:
    """(B, T) KL from the teacher's softmax(xyᵀ/√D) to the student's, a mean over the heads."""
    unseen_B1TT = ~(pairs_BTT | torch.eye(pairs_BTT.shape[-1], dtype=torch.bool, device=pairs_BTT.device))[:, None]
    ours, theirs = (scores(*pair).masked_fill(unseen_B1TT, -1e9) for pair in both(kind, student, teacher, heads))
    log_p_BATT = theirs.log_softmax(-1)
    return torch.linalg.vecdot(log_p_BATT.exp(), log_p_BATT - ours.log_softmax(-1)).mean(1)


def both(kind: Relation, student: Heads, teacher: Heads, heads: int | None) -> list[tuple[Tensor, Tensor]]:
    """Of both models the two things that are related, (B, A, T, D) float32, divided into the same number of heads."""
    pairs = [[_named(name, model, kind) for name in kind] for model in (student, teacher)]
    widths = [part.shape[-1] for pair in pairs for part in pair]
    A = heads or most_heads(widths, teacher.queries_BTW.shape[-1] // teacher.size)
    if any(width % A for width in widths):
        raise ValueError(f"--model.inner.relation_heads {A} does not divide the widths {sorted(set(widths))}")
    return [tuple(part.float().unflatten(-1, (A, -1)).transpose(1, 2) for part in pair) for pair in pairs]


def most_heads(widths: list[int], limit: int) -> int:
    common = math.gcd(*widths)
    return max(heads for heads in range(1, limit + 1) if common % heads == 0)


def _named(name: str, heads: Heads, kind: Relation) -> Tensor:
    part_BTW = dict(zip("qkv", heads[:3], strict=True))[name]
    width = heads.queries_BTW.shape[-1]
    if kind != "qk" or part_BTW.shape[-1] == width:
        return part_BTW
    by_head_BTGD = part_BTW.unflatten(-1, (-1, heads.size))  # each for the queries that share it
    return by_head_BTGD.repeat_interleave(width // part_BTW.shape[-1], 2).flatten(2)


def scores(x_BATD: Tensor, y_BATD: Tensor) -> Tensor:
    return x_BATD @ y_BATD.mT / math.sqrt(x_BATD.shape[-1])
