"""Tables with goals beside their figures, on the terminal and as a page of docs/."""

import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from lightning_modules import hardware

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "transformers", "accelerate", "tokenizers", "tiktoken", "datasets")


@dataclass(frozen=True)
class Goal:
    """What a figure is meant to be: exactly one of the two limits."""

    text: str
    figure: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        if self.at_least is not None:
            return self.figure >= self.at_least
        assert self.at_most is not None, f"a goal without a limit: {self.text}"
        return self.figure <= self.at_most

    def cells(self) -> list[str]:
        limit = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return [self.text, limit, f"{self.figure:.3g}", "reached" if self.reached else "not reached"]


@dataclass(frozen=True)
class Table:
    """A measurement: `command` measures it again."""

    title: str
    command: str
    columns: list[str]
    rows: list[list[str]]
    notes: str = ""
    goals: list[Goal] = field(default_factory=list)

    def markdown(self, when: str) -> str:
        parts = [f"## {self.title}", f"`{self.command}`, {when}", _markdown_table(self.columns, self.rows)]
        if self.notes:
            parts.append(self.notes)
        if self.goals:
            parts.append(_markdown_table(["goal", "limit", "measured", ""], [goal.cells() for goal in self.goals]))
        return "\n\n".join(parts)

    def print(self) -> None:
        console = Console(highlight=False, width=None if Console().is_terminal else 160)
        table = RichTable(title=self.title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for goal in self.goals:
            text, limit, figure, verdict = goal.cells()
            console.print(f"  {verdict}: {text} {figure} ({limit})")
        console.print()


def _markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(file: Path, tables: list[Table], threads: int) -> None:
    """The page: machine, versions, goals, then each table with its day. A table that was measured before stays until
    it is measured again: `file` with .json for a suffix keeps them."""
    memory = file.with_suffix(".json")
    kept: dict[str, dict] = json.loads(memory.read_text()) if memory.exists() else {}
    machine = f"{hardware.describe().rpartition(', ')[0] or hardware.describe()}, {threads} cores, {platform.system()}"
    for table in tables:
        kept[table.title] = asdict(table) | {"day": date.today().isoformat(), "machine": machine}
    file.parent.mkdir(exist_ok=True)
    memory.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    known = []
    for fields in kept.values():
        day, where = fields.pop("day"), fields.pop("machine")
        table = Table(**(fields | {"goals": [Goal(**goal) for goal in fields["goals"]]}))
        known.append((table, day if where == machine else f"{day}, {where}"))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    head = f"""# Benchmarks

Written by `benchmarks/run.py`; do not edit.

Machine: {machine}.
Python {platform.python_version()}, {versions}.

Times are medians; in brackets the quartiles. Rows of one table that compares them were run in turns, a few steps each,
so that a change in the machine's speed meets all of them. Behind ± is where 95 % of means of so many seeds lie."""
    if not (file.parent / "benchmarks_gpu.md").exists():
        head += """

No CUDA device was at hand: the tables of `make bench-gpu` (speed, MFU and memory at 124M and 1B; precision × compile ×
loss) are still to be measured."""
    goals = [[*goal.cells(), f"[{table.title}](#{_anchor(table.title)})"] for table, _ in known for goal in table.goals]
    summary = "## Goals\n\n" + _markdown_table(["goal", "limit", "measured", "", "table"], goals) if goals else ""
    parts = [head, summary, *(table.markdown(when) for table, when in known)]
    file.write_text("\n\n".join(part for part in parts if part) + "\n")


def _anchor(title: str) -> str:
    """The fragment by which Markdown viewers name a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
