"""One self-contained HTML page: sections, tables and charts in one file, light or dark, wide or on a phone."""

import re
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --line: #e3e6ec; --ground: #fff; --card: #f7f8fa;
  --a: #3b6fd4; --b: #d9622b; --c: #2f9e6e; --d: #a04fc4; --e: #b58a00; --f: #00899c; --g: #c63c6b; --h: #7a7f8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #98a1b0; --line: #333943; --ground: #15181d;
  --card: #1d2127; --a: #7ea6f5; --b: #f0935f; --c: #5fc99a; --d: #c98be6; --e: #dcb640; --f: #4fc3d4; --g: #ee7fa4;
  --h: #a3a8b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.25rem 1rem 4rem; color: var(--ink); background: var(--ground);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
.about { color: var(--soft); margin: .2rem 0 1.2rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; }
.figure { background: var(--card); border-radius: .6rem; padding: .6rem .8rem; }
.figure b { display: block; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .2rem; }
figure > svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
@media (max-width: 40rem) { figure > svg { font-size: 17px; } }
svg text { fill: var(--soft); } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .35rem; }
.read { font-size: .85rem; color: var(--soft); min-height: 1.4em; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
th { color: var(--soft); font-weight: 500; }
pre, code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .4rem 0; }
details > summary { cursor: pointer; color: var(--soft); } .new { color: var(--a); }
"""
MOST_COLUMNS = 6
SCRIPT = """
for (const figure of document.querySelectorAll("figure[data-points]")) {
  const svg = figure.querySelector("svg"), read = figure.querySelector(".read"), mark = svg.querySelector(".mark");
  const { left, right, width, x0, x1, logX, label, series } = JSON.parse(figure.dataset.points);
  const at = x => logX ? Math.log10(x) : x;
  const show = event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    const x = x0 + (place - left) / (right - left) * (x1 - x0);
    const rows = series.map(one => [one.name, one.points.reduce((best, point) =>
      Math.abs(at(point[0]) - x) < Math.abs(at(best[0]) - x) ? point : best)]);
    const near = rows[0][1];
    const px = left + (at(near[0]) - x0) / (x1 - x0) * (right - left);
    mark.setAttribute("x1", px); mark.setAttribute("x2", px); mark.style.visibility = "visible";
    read.textContent = label + " " + near[0].toLocaleString() + ":  " +
      rows.map(([name, point]) => name + " " + point[1].toPrecision(5)).join("   ");
  };
  svg.addEventListener("pointermove", show); svg.addEventListener("pointerdown", show);
}
"""


def page(title: str, about: str, sections: Sequence[str]) -> str:
    """Sections are HTML already; title and about are not."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_small(STYLE)}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="about">{escape(about)}</p>\n'
        + "\n".join(section for section in sections if section)
        + f"\n<script>{SCRIPT.strip()}</script>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """ "" where there is nothing in it."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{inside}\n</section>" if inside else ""


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Large figures, each above what it is."""
    cells = "".join(
        f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in pairs
    )
    return f'<div class="figures">{cells}</div>' if cells else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def upright(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and rows of a table that has a row for each thing: a column for each, where a screen has room for them."""
    header, *rest = list(zip(*rows, strict=True)) if len(rows) - 1 <= MOST_COLUMNS else rows
    return header, rest


def folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>" if inside else ""


def preformatted(text: str, begins: str = "") -> str:
    """A text after what it goes on from."""
    return f'<pre>{escape(begins)}<span class="new">{escape(text)}</span></pre>'


def _small(style: str) -> str:
    return re.sub(r"\s+", " ", style).strip()
