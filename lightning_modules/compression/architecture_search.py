"""Which sizes of a model are worth their cost: tried in a super-network, without training each."""

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lightning_modules.architectures import parameter_count
from lightning_modules.compression.calibration import Batch
from lightning_modules.compression.sizes import Sizes
from lightning_modules.compression.super_network import Part, Space

TURNS, TURNS_AGAIN = 7, 30
"""Of a first look at the latency, and of what is told."""
COSTS = ("nats", "parameters", "latency")
UNIFORM = 5
"""Sizes of the baseline that scales all dimensions alike."""


@dataclass(frozen=True)
class Point:
    """Sizes, and what they cost of what the whole costs."""

    sizes: Sizes
    nats: float
    """Per token of held-out text."""
    parameters: float
    latency: float

    def costs(self, of: tuple[str, ...] = COSTS) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in of)

    def dominates(self, other: "Point", of: tuple[str, ...] = COSTS) -> bool:
        """No worse in anything, and better in something."""
        pairs = list(zip(self.costs(of), other.costs(of), strict=True))
        return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


class Trials:
    """Points of a space, each measured once.

    Args:
        network: A super-network.
        space: Its sizes.
        auto_class: Of its networks.
        batches: Held-out text.
        mask_id: Of encoders, what stands for a masked token.
        on_found: Called after each with how many there are.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        space: Space,
        auto_class: type,
        batches: list[Batch],
        mask_id: int | None = None,
        on_found: Callable[[int], None] | None = None,
    ):
        self.network, self.space, self.auto_class, self.batches = network, space, auto_class, batches
        self.mask_id = mask_id or 0
        self.found: dict[Sizes, Point] = {}
        self.on_found = on_found
        self._timed_again: set[Sizes] = set()
        self._whole = parameter_count(network)

    def part(self, sizes: Sizes) -> Part:
        made = Part(self.network, sizes, self.space.kept_layers(sizes), self.auto_class)
        made.network.to(self.network.device).eval()
        return made

    @torch.inference_mode()
    def __call__(self, sizes: Sizes) -> Point:
        if sizes not in self.found:
            part = self.part(sizes)
            with part.filled() as small:
                nats = nats_per_token(small, self.batches, self.mask_id)
                calls = (partial(small, **self._row), partial(self.network, **self._row))
                latency = 1.0 if sizes == self.space.largest else ratio_of_times(*calls, TURNS)
            share = parameter_count(part.network) / self._whole
            self.found[sizes] = Point(sizes, nats, share, latency)
            if self.on_found is not None:
                self.on_found(len(self.found))
        return self.found[sizes]

    @torch.inference_mode()
    def timed_again(self, point: Point) -> Point:
        """By so many turns that sizes which cost nearly the same can be told apart."""
        if point.sizes == self.space.largest or point.sizes in self._timed_again:
            return self.found[point.sizes]
        self._timed_again.add(point.sizes)
        with self.part(point.sizes).filled() as small:
            calls = (partial(small, **self._row), partial(self.network, **self._row))
            self.found[point.sizes] = replace(point, latency=ratio_of_times(*calls, TURNS_AGAIN))
        return self.found[point.sizes]

    @property
    def _row(self) -> Batch:
        return {name: value[:1] for name, value in self.batches[0].items()}


def nats_per_token(network: PreTrainedModel, batches: list[Batch], mask_id: int) -> float:
    """Of the next token; of encoder-decoders the decoder's; of encoders one of seven tokens, which are masked."""
    total, count = 0.0, 0
    for batch in batches:
        ids = batch.get("decoder_input_ids", batch["input_ids"])
        if network.can_generate():
            logits, labels = network(**batch).logits[:, :-1].float(), ids[:, 1:]
        else:
            hidden = torch.arange(ids.shape[1], device=ids.device) % 7 == 3
            read = batch | {"input_ids": ids.masked_fill(hidden, mask_id)}
            logits, labels = network(**read).logits[:, hidden].float(), ids[:, hidden]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += labels.numel()
    return total / count


def ratio_of_times(small: Callable[[], object], whole: Callable[[], object], turns: int) -> float:
    """Of medians, in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for place, call in enumerate((small, whole)):
            start = time.perf_counter()
            call()
            if turn:
                seconds[place].append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


def front(points: list[Point]) -> list[Point]:
    """Those that no other dominates, by their nats."""
    best = [point for point in points if not any(other.dominates(point) for other in points)]
    return sorted(best, key=lambda point: point.nats)


def search(trials: Trials, budget: int, seed: int = 0) -> list[Point]:
    """All points where there are no more than `budget`; else as many: half as NSGA-II chooses, then, while there are
    any, neighbours of the front."""
    space = trials.space
    if len(sizes := space.all()) <= budget:
        return [trials(one) for one in sizes]
    evolved(trials, budget // 2, seed)
    numbers = random.Random(seed)
    while len(trials.found) < budget:
        best = front(list(trials.found.values()))
        if not (
            near := [sizes for point in best for sizes in space.neighbours(point.sizes) if sizes not in trials.found]
        ):
            evolved(trials, budget, seed + 1)
            break
        trials(numbers.choice(near))
    return list(trials.found.values())


def evolved(trials: Trials, budget: int, seed: int) -> None:
    """Tries sizes by NSGA-II, the ends first, until `budget` are found."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = trials.space
    dimensions = {"layers": space.layers, "width": space.width, "inner": space.inner, "heads": space.heads}

    def tried(trial: optuna.Trial) -> tuple[float, float, float]:
        places = {name: trial.suggest_int(name, 0, len(values) - 1) for name, values in dimensions.items()}
        if not space.is_possible(sizes := space.sizes(**places)):
            raise optuna.TrialPruned
        return trials(sizes).costs()

    sampler = optuna.samplers.NSGAIISampler(population_size=max(8, budget // 6), seed=seed)
    study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
    ends = ({name: 0 for name in dimensions}, {name: len(values) - 1 for name, values in dimensions.items()})
    for places in ends:
        study.enqueue_trial(places)
    while len(trials.found) < budget and len(study.trials) < 4 * budget:
        study.optimize(tried, n_trials=1)


def uniform(space: Space) -> list[Sizes]:
    """All dimensions by one share, in equal steps between the whole and the smallest, which nothing can be better than;
    each by what is nearest to it in the space."""
    dimensions = (space.layers, space.width, space.inner, space.heads)
    least, found = max((v[-1] / v[0] for v in dimensions if len(v) > 1), default=1.0), []
    for step in range(1, UNIFORM + 1):
        share = 1 - (1 - least) * step / (UNIFORM + 1)
        places = [nearest(values, share * values[0]) for values in dimensions]
        found.append(nearest_possible(space, *places))
    return list(dict.fromkeys(found))


def nearest(values: tuple[int, ...], wanted: float) -> int:
    """Its place; of two as near the smaller's."""
    return min(range(len(values)), key=lambda place: (round(abs(values[place] - wanted), 6), values[place]))


def nearest_possible(space: Space, layers: int, width: int, inner: int, heads: int) -> Sizes:
    """By the places in each dimension, with other heads where the width does not divide by these."""
    some = (space.sizes(layers, width, inner, place) for place in range(len(space.heads)))
    return min(filter(space.is_possible, some), key=lambda sizes: abs(sizes.heads - space.heads[heads]))


def at_random(space: Space, count: int, seed: int) -> list[Sizes]:
    numbers, found = random.Random(seed), {space.largest: None, space.smallest: None}
    for _ in range(20 * count):
        if len(found) < count:
            found[space.drawn(numbers)] = None
    return list(found)


def hypervolume(points: list[Point], worst: tuple[float, float]) -> float:
    """Of (nats, latency), what lies between the front and the worst of both: more is better."""
    best = sorted({(p.latency, p.nats) for p in points if p.latency <= worst[1] and p.nats <= worst[0]})
    area, lowest = 0.0, worst[0]
    for (latency, nats), (following, _) in itertools.pairwise([*best, (worst[1], 0.0)]):
        lowest = min(lowest, nats)
        area += (following - latency) * (worst[0] - lowest)
    return area


def chosen(points: list[Point], target: dict[str, float]) -> Point | None:
    """The least nats among those that cost no more than the target."""
    fitting = [p for p in points if all(getattr(p, name) <= most for name, most in target.items())]
    return min(fitting, key=lambda point: point.nats, default=None)


def save(points: list[Point], file: Path) -> None:
    file.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")


def rows(points: list[Point]) -> list[str]:
    """A table."""
    lines = ["layers  width  inner  heads  nats/token  parameters  latency"]
    for point in points:
        s = point.sizes
        lines.append(
            f"{s.layers:>6}  {s.width:>5}  {s.inner:>5}  {s.heads:>5}  {point.nats:>10.4f}  {point.parameters:>10.3f}  "
            f"{point.latency:>7.2f}"
        )
    return lines
