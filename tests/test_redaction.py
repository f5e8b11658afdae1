"""Canaries by every way in, looked for in everything that a run leaves."""

import json
from types import SimpleNamespace

import pytest

from lightning_modules.callbacks.report import model_card
from lightning_modules.redaction import HIDDEN, redacted, redacted_prose
from tests.test_recipes import ROOT, fit

CANARY = "c4n4ry-Zx81q0rTmW"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{CANARY}@host/path",
        f"s3://key:{CANARY}@bucket",
        f"--trainer.logger.init_args.api_key {CANARY}",
        f"--hub_token={CANARY}",
        f"api_key: {CANARY}",
        f'{{"access_key": "{CANARY}"}}',
        f"password: '{CANARY}'",
        f"AWS_SECRET_ACCESS_KEY={CANARY}",
        f"see hf_{CANARY.replace('-', '')}",
        f"sk-{CANARY}",
        f"https://{CANARY}@host/path",
        f"https://me:a/{CANARY}@host",
        f"https://host/path?X-Amz-Signature={CANARY}&x=1",
        f"https://host/path?sig={CANARY}",
        f"Authorization: Bearer {CANARY}",
    ],
)
def test_a_secret_is_hidden_by_its_place_or_its_form(text):
    assert CANARY not in redacted(text) and CANARY.replace("-", "") not in redacted(text) and HIDDEN in redacted(text)


def test_what_is_no_secret_stays():
    text = "tokenizer: byte_level\nmax_tokens: 123456789\neos_token: <|endoftext|>\npath: https://host/a.txt\n"
    assert redacted(text) == text


def test_prose_stays_as_it_was_written():
    text = "the key argument is a secret function: token embeddings, key=itemgetter(1), password: required\nsome_key:\n"
    assert redacted_prose(text) == text
    assert redacted("some_key:\n  another_one: 1\n") == "some_key:\n  another_one: 1\n"
    for hidden in (f"--hub_token {CANARY}", f"API_KEY={CANARY}", f"https://me:{CANARY}@host"):
        assert CANARY not in redacted_prose(hidden)


def test_the_environment_is_searched_for_names_of_secrets(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", CANARY)
    monkeypatch.setenv("ORDINARY", "ordinary-value")
    assert redacted(f"x {CANARY} y ordinary-value") == f"x {HIDDEN} y ordinary-value"


def test_a_model_card_has_no_password_of_where_its_text_was():
    summary = dict.fromkeys(("tokens", "steps", "seconds", "parameters", "precision", "hardware"), 1)
    module = SimpleNamespace(made_from=lambda data: f"trained on https://me:{CANARY}@host/shards", units="")
    trainer = SimpleNamespace(default_root_dir="run", datamodule=None)
    card = model_card(summary, trainer, module)
    assert CANARY not in card and "host/shards" in card


def test_no_file_of_a_run_holds_a_secret(corpus, tmp_path, monkeypatch):
    """By environment, flag, YAML and URL, with W&B on."""
    secrets = {name: f"{name}-{CANARY}" for name in ("env", "wandb", "flag", "yaml", "url")}
    monkeypatch.setenv("MY_API_KEY", secrets["env"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", secrets["wandb"])
    prompts = [f"https://me:{secrets['yaml']}@host", f"this one is {secrets['env']}"]
    config = tmp_path / "run.yaml"
    config.write_text(f"{(ROOT / 'recipes' / 'pretrain.yaml').read_text()}samples:\n  prompts: {json.dumps(prompts)}\n")
    flags = {"samples.prompts+": f"https://you:{secrets['url']}@host --token {secrets['flag']}"}
    fit(tmp_path / "run", corpus, config, **flags)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    for path in files:
        found = [name for name, secret in secrets.items() if secret.encode() in path.read_bytes()]
        assert not found, (path, found)
    assert (tmp_path / "run" / "config.yaml").stat().st_mode & 0o077 == 0
