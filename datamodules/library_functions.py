"""The functions of the Python standard library on this machine, read by its own parser: labels that are true."""

import ast
import re
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
    """With its docstring."""
    body: str
    """Without it."""
    defaults: dict[str, str | None]
    """Of its parameters; None of one that has no default."""


class DefaultValue(NamedTuple):
    """A question about a signature."""

    question: str
    context: str
    answer: str | None
    """None where the parameter has no default."""
    start: int
    """Of the answer in the context, in characters."""


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
                yield Function(package, node.name, _signature(node), docstring, source, _body(node), _defaults(node))


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    statements = node.body[1:] if ast.get_docstring(node) else node.body
    return "\n".join(
        [f"{_signature(node)}:", *(f"    {line}" for s in statements for line in ast.unparse(s).splitlines())]
    )


def _defaults(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    by_place = [*node.args.posonlyargs, *node.args.args]
    values = [None] * (len(by_place) - len(node.args.defaults)) + node.args.defaults + node.args.kw_defaults
    parameters = zip([*by_place, *node.args.kwonlyargs], values, strict=True)
    return {parameter.arg: value and ast.unparse(value) for parameter, value in parameters}


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


def described(most_characters: int = 160) -> list[Function]:
    """Functions with a docstring of some words, each docstring once."""
    found = {f.docstring: f for f in functions() if f.docstring.count(" ") >= 3 and len(f.docstring) <= most_characters}
    return list(found.values())


def default_values(most_each: int = 2) -> Iterator[DefaultValue]:
    """Questions about the default values of parameters; the answer stands in the signature once."""
    for function in functions():
        context = f"{function.signature}: {function.docstring}".rstrip(": ")
        found = 0
        given = {name: value for name, value in function.defaults.items() if value is not None}
        for name, value in given.items():
            question = f"What is the default value of {name}?"
            places = list(re.finditer(rf"(?<![\w*]){re.escape(name)}(?:: [^=]*)?=(?={re.escape(value)})", context))
            is_word = any(character.isalnum() for character in value)  # SQuAD's score leaves punctuation out
            if len(places) == 1 and found < most_each and is_word:
                found += 1
                yield DefaultValue(question, context, value, places[0].end())
        without = [name for name in function.defaults if name not in given and name not in ("self", "cls")]
        if found and without:
            yield DefaultValue(f"What is the default value of {without[0]}?", context, None, -1)


def questions() -> Iterator[tuple[str, str]]:
    """(question, answer) about functions: short answers that stand in the question, and longer ones that do not."""
    for asked in default_values(most_each=1):
        yield f"{asked.question}\n\n{asked.context}", asked.answer or "It has none."
    for function in described():
        yield f"Write the signature of a Python function.\n\n{function.docstring}", function.signature
