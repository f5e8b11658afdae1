"""What is counted over documents, questions or pairs: figures of its means, their intervals, and the same by group.

Shape suffixes: D documents, questions or pairs, S draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lightning_modules.bootstrap import DRAWS, FEWEST, Interval, interval, sums

Means = dict[str, np.ndarray]


@dataclass
class Measures:
    """Of one file or text.

    Args:
        each: By its name what every one of them counts, (D,).
        groups: The group of each, "" where there is none.
        figures_of: Figures by name, from the means of what is counted. Left out: these means. The first is what is
            judged by. What is not defined, such as a share of none, is left out.
        chance: What would come of guessing, of figures by name.
        fixed: Figures of all together that are no means, and have no interval.
    """

    each: dict[str, np.ndarray]
    groups: list[str]
    figures_of: dict[str, Callable[[Means], np.ndarray]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def figures(self) -> dict[str, float]:
        found = {name: float(value) for name, value in self._figures(self.means()).items()}
        return self.fixed | {name: value for name, value in found.items() if not math.isnan(value)}

    def intervals(self) -> dict[str, Interval]:
        """{} of too few; of the draws in which a figure is defined, where it is in most."""
        if len(self) < FEWEST:
            return {}
        means_S = dict(zip(self.each, (s / len(self) for s in sums(*self.each.values())), strict=True))
        drawn = {name: values_S[~np.isnan(values_S)] for name, values_S in self._figures(means_S).items()}
        return {name: interval(values_S) for name, values_S in drawn.items() if len(values_S) > DRAWS / 2}

    def means(self) -> Means:
        return {name: values_D.mean() for name, values_D in self.each.items()}

    def by_group(self) -> dict[str, "Measures"]:
        """{} where all are of one."""
        names, of_D = sorted(set(self.groups)), np.array(self.groups)
        if len(names) < 2:
            return {}
        return {name: self.of(of_D == name) for name in names}

    def of(self, which_D: np.ndarray) -> "Measures":
        each = {name: values_D[which_D] for name, values_D in self.each.items()}
        groups = [group for group, is_in in zip(self.groups, which_D, strict=True) if is_in]
        return Measures(each, groups, self.figures_of, self.chance)

    def _figures(self, means: Means) -> Means:
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: figure(means) for name, figure in self.figures_of.items()} if self.figures_of else means

    def summary(self) -> dict[str, object]:
        """All of it, for JSON."""
        intervals = {name: list(ends) for name, ends in self.intervals().items()}
        found: dict[str, object] = {"count": len(self)} | self.figures() | {"intervals": intervals}
        groups = {name: part.summary() for name, part in self.by_group().items()}
        return found | ({"chance": self.chance} if self.chance else {}) | ({"groups": groups} if groups else {})

    def lines(self) -> list[str]:
        """A line for each figure, and for the first of each group."""
        chance = {name: f"   by chance {value:.4g}" for name, value in self.chance.items()}
        lines = [
            f"  {name.replace('_', ' '):<22}{words}{chance.get(name, '')}" for name, words in self._in_words().items()
        ]
        groups = self.by_group()
        width = max(map(len, groups), default=0)
        first = next(iter(self.figures()), "")
        for name, part in groups.items():
            lines.append(f"    {name:<{width}}  {len(part):>6,}  {part._in_words().get(first, '')}".rstrip())
        return lines

    def _in_words(self) -> dict[str, str]:
        intervals = self.intervals()
        ends = {name: f"({low:.4g} to {high:.4g})" for name, (low, high) in intervals.items()}
        figures = {name: f"{x:.4f}" if abs(x) < 1e6 else f"{x:.4g}" for name, x in self.figures().items()}
        return {name: f"{value:>10}  {ends.get(name, ''):<22}".rstrip() for name, value in figures.items()}
