"""Folders are layers: recipes know both sides, the two sides know neither recipes nor each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"lightning_modules": {"recipes", "datamodules"}, "datamodules": {"recipes", "lightning_modules"}}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_a_layer_does_not_import_its_neighbours(layer):
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    assert {path.name: found for path in files if (found := imports(path) & FORBIDDEN[layer])} == {}


def test_the_two_sides_mean_the_same_by_a_label_without_loss():
    from datamodules.base import IGNORED as in_the_batch
    from lightning_modules.losses import IGNORED as in_the_loss

    assert in_the_batch == in_the_loss
