"""Versions that are known to be bad do not start."""

import importlib.metadata
import subprocess
import sys

import pytest

import before_torch
from tests.test_recipes import ROOT


def test_what_is_installed_is_not_refused():
    assert before_torch.refusal() is None


@pytest.mark.parametrize(
    ("package", "installed", "told"),
    [
        ("lightning", "2.6.2", "malicious"),
        ("lightning", "2.6.3", "malicious"),
        ("pytorch-lightning", "2.6.3", "malicious"),
        ("lightning", "2.6.4", "runs code"),
        ("torch", "2.9.1+cu128", "CVE-2026-24747"),
        ("transformers", "5.2.0", "CVE-2026-4372"),
    ],
)
def test_a_bad_version_is_named_with_the_mend(package, installed, told, monkeypatch):
    monkeypatch.setattr(before_torch, "version", lambda name: installed if name == package else "99.0")
    assert before_torch.refusal().startswith(f"{package} {installed}") and told in before_torch.refusal()


def test_a_recipe_with_a_bad_version_imports_nothing_of_it(tmp_path):
    """A package of the bad version that leaves a canary when it is imported."""
    canary = tmp_path / "canary"
    for name in ("lightning", "lightning-2.6.3.dist-info"):
        (tmp_path / name).mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (tmp_path / "lightning-2.6.3.dist-info" / "METADATA").write_text("Name: lightning\nVersion: 2.6.3\n")
    assert importlib.metadata.version("lightning") != "2.6.3"
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "fit"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 2 and done.stderr.startswith("error: lightning 2.6.3 is a malicious upload")
    assert not canary.exists()
