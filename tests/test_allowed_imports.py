"""A configuration names classes of known packages only; nothing else is so much as imported."""

import sys

import jsonargparse
import pytest

from tests.test_recipes import run

EVIL = """
from pathlib import Path
Path({canary!r}).touch()
class Boom:
    pass
"""
SLOTS = {
    "model": "evil_package.Boom",
    "model.architecture": "evil_package.Boom",
    "model.optimizer": "evil_package.Boom",
    "model.schedule": "evil_package.Boom",
    "trainer.callbacks": "evil_package.Boom",
    "trainer.callbacks+": '{"class_path": "evil_package.Boom"}',
    "trainer.logger": "evil_package.Boom",
    "trainer.profiler": '{"class_path": "evil_package.Boom"}',
    "trainer.plugins": "evil_package.Boom",
    "trainer.strategy": '{"class_path": "evil_package.Boom"}',
    "trainer.accelerator": '{"class_path": "evil_package.Boom"}',
}
NAMES = (
    "os.system",
    "subprocess.call",
    "builtins.eval",
    "lightning.pytorch.callbacks.LambdaCallback",
    "LambdaCallback",
)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A package that leaves a canary when it is imported."""
    canary = tmp_path / "canary"
    (tmp_path / "evil_package.py").write_text(EVIL.format(canary=str(canary)))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = jsonargparse._common.parsing_settings
    monkeypatch.setitem(settings, "import_path_verdicts", dict(settings["import_path_verdicts"]))
    yield canary
    sys.modules.pop("evil_package", None)


def refused(capsys, **flags) -> str:
    with pytest.raises(SystemExit) as stop:
        run("fit", **{"data.path": "/no/such/text"}, **flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    return error[0]


@pytest.mark.parametrize("slot", SLOTS)
def test_no_slot_of_the_command_line_imports_an_unknown_package(slot, evil, capsys):
    refused(capsys, **{slot: SLOTS[slot]})
    assert not evil.exists() and "evil_package" not in sys.modules


@pytest.mark.parametrize("slot", ["trainer", "model", "data"])
def test_no_slot_of_a_yaml_does(slot, evil, tmp_path, capsys):
    content = {
        "trainer": "trainer: {callbacks: [{class_path: evil_package.Boom}]}",
        "model": "model: {class_path: evil_package.Boom}",
        "data": "data: {class_path: evil_package.Boom}",
    }
    (tmp_path / "evil.yaml").write_text(content[slot])
    refused(capsys, config=tmp_path / "evil.yaml")
    assert not evil.exists()


@pytest.mark.parametrize("name", NAMES)
def test_what_calls_or_runs_things_cannot_be_named(name, capsys):
    for slot in ("trainer.callbacks", "model.optimizer"):
        assert name.rpartition(".")[2] in refused(capsys, **{slot: name})


@pytest.mark.parametrize("content", ["model: !!python/object/apply:os.system ['true']", "!!python/name:os.system ''"])
def test_tags_of_yaml_make_no_objects(content, tmp_path, capsys):
    (tmp_path / "tag.yaml").write_text(content)
    refused(capsys, config=tmp_path / "tag.yaml")


def test_no_configuration_comes_from_the_network(capsys):
    refused(capsys, config="http://127.0.0.1:1/run.yaml")


def test_a_package_is_allowed_by_its_name(evil, capsys):
    (evil.parent / "evil_package.py").write_text("import torch\nclass Boom(torch.optim.SGD):\n    pass\n")
    flags = {"allow_import": "evil_package", "model.optimizer": "evil_package.Boom", "model.optimizer.lr": 0.1}
    assert "--allow_import evil_package" in refused(capsys, **flags | {"allow_import": "another"})
    assert "/no/such/text does not exist" in refused(capsys, **flags)
