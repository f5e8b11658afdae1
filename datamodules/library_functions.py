"""The functions of the Python standard library on this machine, read by its own parser: labels that are true."""

import ast
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from datamodules.sources import standard_library


class Function(NamedTuple):
    package: str
    """The first part of the module's name."""
    name: str
    signature: str
    """As in `def name(a, b=1) -> int`, without the colon."""
    docstring: str
    """Its first paragraph in one line; empty where there is none."""
    source: str


def functions() -> Iterator[Function]:
    """Functions and methods of all modules, in a fixed order."""
    files = standard_library()
    root = min((file.parent for file in files), key=lambda folder: len(folder.parts))
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, or a file of another version
            continue
        lines, package = text.splitlines(keepends=True), file.relative_to(root).with_suffix("").parts[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                source = "".join(lines[node.lineno - 1 : node.end_lineno])
                yield Function(package, node.name, _signature(node), docstring, source)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{'async ' * isinstance(node, ast.AsyncFunctionDef)}def {node.name}({ast.unparse(node.args)}){returns}"


def by_package(packages: int = 6, most: int = 400) -> Iterator[tuple[str, str]]:
    """(source, package) of functions of the packages that have most of them, as many of each."""
    all_functions = [f for f in functions() if 60 <= len(f.source) <= 2000]
    largest = Counter(f.package for f in all_functions).most_common(packages)
    count = min([most, *(count for _, count in largest)])
    for package, _ in largest:
        chosen = [f.source for f in all_functions if f.package == package]
        for i in range(count):  # spread evenly over the package
            yield chosen[i * len(chosen) // count], package
