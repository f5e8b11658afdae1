"""Toy runs for the tests: offline, one thread, seconds."""

import csv
import os
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LIGHTNING_LM_ENERGY", "off")

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.text import Text
from lightning_modules.pretrain import CausalLM
from tests.finetuning import WORDS, pretrained, sentences

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden losses anew")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tests neither see nor fill the user's cache, but share one among themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LIGHTNING_LM_RUN_FOLDER", raising=False)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """Of the tests of a file, where fixtures of the file train, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Eight small files of Python-like text, 12 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        lines = [f"def f{i}_{j}(x, y={j * i}):\n    return x * {j} + y - {i}\n\n" for j in range(30)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


@pytest.fixture
def toy(corpus):
    """Builds (trainer, module, data) of a toy run; settings go to the one whose argument they are."""
    from transformers import LlamaConfig

    def make(*, module=CausalLM, architecture=None, trainer=None, data=None, **settings):
        architecture = architecture or LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        texts = {"path": str(corpus), "tokenizer": "bytes", "seq_len": 32, "batch_size": 4, "val_fraction": 0.2}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        runs = {"accelerator": "cpu", "max_steps": 3, "enable_progress_bar": False, "use_distributed_sampler": False}
        text = Text(objective=module.objective, **(texts | (data or {})))
        return Trainer(**(quiet | runs | (trainer or {}))), module(architecture, **settings), text

    return make


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train.csv", 400, 0), ("val.csv", 81, 1)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("review", "sentiment"), *sentences(count, seed)])
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(8):
        lines = [f"the film no{j} was {('lovely', 'dull')[(i + j) % 2]} and its end fine\n" for j in range(60)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("encoder"), "masked")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory) -> Path:
    return pretrained(tmp_path_factory.mktemp("decoder"), "causal")


@pytest.fixture(scope="session")
def denoiser(tmp_path_factory) -> Path:
    """A small T5 with the byte tokenizer."""
    from transformers import T5Config, T5ForConditionalGeneration

    from datamodules.tokenization import byte_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("denoiser"), byte_tokenizer("denoising")
    torch.manual_seed(0)
    small = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.1}
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    network = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **small, **start)
    )
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_pieces(tmp_path_factory) -> Path:
    """As BERT's: [CLS] question [SEP] context [SEP]."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("pieces")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder
