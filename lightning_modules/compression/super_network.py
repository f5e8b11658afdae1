"""Many sizes of a model in one set of weights: each is its leading part.

Shape suffixes as in taught.py.
"""

import itertools
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.stateless import _reparametrize_module
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules import cpu_kernels, hardware
from lightning_modules.activations import head_size
from lightning_modules.compression.sizes import (
    Sizes,
    has_own_head_size,
    part_of_size,
    sizes_of,
    smaller_config,
    width_must_divide,
)
from lightning_modules.distillation import CausalDistillation, DenoisingDistillation, MaskedDistillation
from lightning_modules.losses import IGNORED, Head
from lightning_modules.student import OF_FIRST, heads_of, leading_part
from lightning_modules.taught import Taught
from lightning_modules.token_loss import TokenLoss

REMEMBERED = 8
"""Parts that are kept for later steps, those used last; the smallest is in each."""
SPACE = "space.json"
"""Beside an ordered model: which sizes there are."""


@dataclass(frozen=True)
class Space:
    """The sizes that are tried in each dimension, largest first, and the layers that go first where some go."""

    layers: tuple[int, ...]
    width: tuple[int, ...]
    inner: tuple[int, ...]
    heads: tuple[int, ...]
    layers_least_first: tuple[int, ...]
    is_free: bool
    """Whether width and heads are chosen apart."""
    must_divide: bool = False
    """Whether the width has to divide by the heads."""

    def save(self, folder: Path) -> None:
        (folder / SPACE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> "Space":
        found = json.loads((Path(folder) / SPACE).read_text())
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})

    @property
    def largest(self) -> Sizes:
        return self.sizes(0, 0, 0, 0)

    @property
    def smallest(self) -> Sizes:
        return self.sizes(-1, -1, -1, -1)

    def sizes(self, layers: int, width: int, inner: int, heads: int) -> Sizes:
        """By the places in each dimension; where width follows from heads, it is theirs."""
        return Sizes(
            self.layers[layers], self.width[width if self.is_free else heads], self.inner[inner], self.heads[heads]
        )

    def all(self) -> list[Sizes]:
        places = [range(len(values)) for values in (self.layers, self.width, self.inner, self.heads)]
        if not self.is_free:
            places[1] = range(1)
        found = dict.fromkeys(self.sizes(*chosen) for chosen in itertools.product(*places))
        return [sizes for sizes in found if self.is_possible(sizes)]

    def neighbours(self, sizes: Sizes) -> list[Sizes]:
        """One place further in one dimension."""
        dimensions = (self.layers, self.width, self.inner, self.heads)
        values = (sizes.layers, sizes.width, sizes.inner, sizes.heads)
        places = [dimension.index(value) for dimension, value in zip(dimensions, values, strict=True)]
        found = []
        for number, step in itertools.product(range(len(places)), (-1, 1)):
            near = places.copy()
            near[number] += step
            if 0 <= near[number] < len(dimensions[number]):
                found.append(self.sizes(*near))
        return [one for one in dict.fromkeys(found) if one != sizes and self.is_possible(one)]

    def drawn(self, numbers: random.Random) -> Sizes:
        dimensions = (self.layers, self.width, self.inner, self.heads)
        while True:
            sizes = self.sizes(*(numbers.randrange(len(values)) for values in dimensions))
            if self.is_possible(sizes):
                return sizes

    def is_possible(self, sizes: Sizes) -> bool:
        return not self.must_divide or sizes.width % sizes.heads == 0

    def kept_layers(self, sizes: Sizes) -> list[int]:
        depth = self.layers[0]
        gone = self.layers_least_first[: depth - sizes.layers]
        return [number for number in range(depth) if number not in gone]


def space_of(config: PreTrainedConfig, shares: tuple[float, ...], layers_least_first: list[int]) -> Space:
    """Shares of each dimension, rounded to what there can be; of layers every number down to the least share."""
    now, (queries, shared) = sizes_of(config), heads_of(config)
    group, is_free = queries // shared, has_own_head_size(config)
    heads = list(dict.fromkeys(max(group, round(now.heads * share / group) * group) for share in shares))
    inner = list(dict.fromkeys(part_of_size(now.inner, share) for share in shares))
    width = list(dict.fromkeys(part_of_size(now.width, share) for share in shares))
    if not is_free:
        width = [count * head_size(config) for count in heads]
    least = max(1, round(now.layers * min(shares)))
    depths = range(now.layers, least - 1, -1)
    space = Space(
        *(tuple(depths), tuple(width), tuple(inner), tuple(heads), tuple(layers_least_first)),
        *(is_free, width_must_divide(config)),
    )
    if not space.is_possible(space.smallest):  # which every step trains
        raise ValueError(f"--shares: a width of {width[-1]} does not divide by {heads[-1]} heads; pass others")
    return space


class Part:
    """A network of other sizes, that reads the leading parts of another's weights."""

    def __init__(self, whole: PreTrainedModel, sizes: Sizes, kept_layers: list[int], auto_class: type):
        config, self.part = smaller_config(whole, sizes, kept_layers)
        self.network: PreTrainedModel = auto_class.from_config(config, dtype=whole.dtype)
        self.whole = whole

    def weights(self) -> dict[str, Tensor]:
        """By name, with gradients that go on to the whole."""
        own = dict(self.whole.named_parameters(remove_duplicate=False))
        found = {}
        for name, parameter in self.network.named_parameters():  # of what is tied one
            where = name if OF_FIRST in name else self.part.layer_of(name)
            found[name] = leading_part(name, own[where], parameter.shape)
        return found

    @contextmanager
    def filled(self) -> Iterator[PreTrainedModel]:
        """Inside, it computes with the whole's weights."""
        with _reparametrize_module(self.network, self.weights(), tie_weights=True):
            yield self.network

    def cut_out(self) -> PreTrainedModel:
        """With weights of its own."""
        with torch.no_grad():
            state = {name: weight.detach().clone() for name, weight in self.weights().items()}
            self.network.load_state_dict(state, strict=False)
        return self.network


class SuperNetwork(Taught):
    """Each step trains the whole, the smallest, and some sizes between, of one set of weights: the sandwich rule,
    section 3.1 of https://arxiv.org/abs/1903.05134. All of them learn from the teacher.

    Args:
        between: Sizes drawn at each step, besides the whole and the smallest.
    """

    def __init__(self, *, between: int = 2, **settings: object):
        super().__init__(**settings)
        if self.inner is not None or self.on_policy is not None:
            raise ValueError("--model.inner and --model.on_policy are for one network, not for many; leave them out")
        self.between = between
        self.space: Space | None = None
        self._parts: dict[Sizes, TrainedPart] = {}

    def configure_model(self) -> None:
        super().configure_model()
        if self.space is None:
            folder = self.student_folder if self.student_folder is not None else self.student.folder
            self.space = Space.read(folder)

    def sampled(self) -> list[Sizes]:
        """Of this step, the same for all its micro-batches and on all ranks; the first is the whole."""
        numbers = random.Random(f"{self.seed} {self.trainer.global_step}")
        drawn = [self.space.drawn(numbers) for _ in range(self.between)]
        return list(dict.fromkeys([self.space.largest, self.space.smallest, *drawn]))

    def part(self, sizes: Sizes) -> "TrainedPart":
        if hardware.is_planning():  # whose tensors are none
            return TrainedPart(self, sizes)
        self._parts[sizes] = self._parts.pop(sizes, None) or TrainedPart(self, sizes)
        while len(self._parts) > REMEMBERED:
            self._parts.pop(next(iter(self._parts)))
        return self._parts[sizes]

    def training_loss(self, batch: dict[str, Tensor], divisor: float) -> tuple[Tensor, ...]:
        matching, target, labels_N = self.weights().matching, self.targets(batch), self.labels(batch)
        sampled = self.sampled()
        total, of_whole = 0.0, None
        for sizes in sampled:
            if sizes == self.space.largest:
                student = self.student_head(batch)
            else:
                student = self.head_of_part(self.part(sizes), batch)
            found = self.matched(student, target, labels_N, None, matching, divisor * len(sampled))
            total = total + found[0]
            of_whole = of_whole or found[1:]
        return total, of_whole[0], self.label_count(batch), of_whole[1]

    def head_of_part(self, part: "TrainedPart", batch: dict[str, Tensor]) -> Head:
        with part.filled() as network:
            forward = partial(network, **self.inputs_of(batch, network.config))
            head = part.token_loss.head(forward)
        return head.rows(batch["labels"].flatten() != IGNORED) if self.keep_only_labels else head

    def settings(self) -> dict[str, object]:
        return super().settings() | {"between": self.between}


class TrainedPart(Part):
    """With what makes its loss."""

    def __init__(self, module: SuperNetwork, sizes: Sizes):
        super().__init__(module.network, sizes, module.space.kept_layers(sizes), module.auto_class)
        self.network.to(module.device).train()
        self.token_loss = TokenLoss(self.network, keep_only_labels=module.keep_only_labels)
        if module.kernels:
            cpu_kernels.install(self.network)


class CausalSuperNetwork(SuperNetwork, CausalDistillation):
    """Of decoders."""


class MaskedSuperNetwork(SuperNetwork, MaskedDistillation):
    """Of encoders."""


class DenoisingSuperNetwork(SuperNetwork, DenoisingDistillation):
    """Of encoder-decoders."""
