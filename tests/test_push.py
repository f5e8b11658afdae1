"""A model goes to the Hub where it is told to, and nowhere else."""

import pytest
from huggingface_hub import HfApi

from lightning_modules.callbacks import push
from tests.finetuning import refused
from tests.test_recipes import ROOT, fit


class Hub:
    def __init__(self, fails_at: str | None = None):
        self.fails_at, self.calls = fails_at, []

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", name, private))
        if self.fails_at == "create":
            raise OSError("no token\nmore")

    def upload_folder(self, repo_id: str, folder_path, commit_message: str) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))
        if self.fails_at == "upload":
            raise OSError("the network is down")


@pytest.fixture
def hub(monkeypatch):
    def made(fails_at: str | None = None) -> Hub:
        one = Hub(fails_at)
        monkeypatch.setattr(push, "HfApi", one)
        return one

    return made


def test_nothing_is_pushed_unless_it_is_told_where_to(corpus, tmp_path, hub):
    one = hub()
    fit(tmp_path, corpus)
    assert one.calls == []


def test_the_whole_folder_is_pushed_once_the_run_is_over(corpus, tmp_path, hub, capsys):
    one = hub()
    fit(tmp_path, corpus, **{"push.to": "me/small"})
    assert one.calls[0] == ("create", "me/small", True)
    assert {"config.json", "README.md", "tokenizer.json"} <= set(one.calls[1][2]) and len(one.calls) == 2
    assert "me/small" in capsys.readouterr().out


def test_a_hub_that_refuses_is_told_before_anything_is_trained(corpus, tmp_path, hub, capsys):
    one = hub("create")
    words = [f"--data.path={corpus}", "--push.to=me/small", f"--trainer.default_root_dir={tmp_path}"]
    error = refused(capsys, *words, script=ROOT / "recipes" / "pretrain.py")
    assert "--push.to me/small: the Hub did not take it (no token)" in error and len(one.calls) == 1


def test_without_a_network_it_is_told_in_one_line(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(push, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_" + "x" * 30))
    words = [f"--data.path={corpus}", "--push.to=me/small", f"--trainer.default_root_dir={tmp_path}"]
    error = refused(capsys, *words, script=ROOT / "recipes" / "pretrain.py")
    assert "--push.to me/small: the Hub did not take it" in error


def test_a_hub_that_is_gone_at_the_end_costs_no_model(corpus, tmp_path, hub, capsys):
    hub("upload")
    fit(tmp_path, corpus, **{"push.to": "me/small"})
    assert "not pushed (the network is down); hf upload me/small" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").is_file()
