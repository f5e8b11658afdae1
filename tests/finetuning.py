"""What the tests of fine-tuning share: small data, small pretrained models, and runs of the recipe."""

import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from datamodules.tokenization import bpe_tokenizer
from tests.faults import command, kill_group

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "finetune.py"
GOOD, BAD = ("fine", "lovely", "bright", "warm"), ("dull", "grey", "cold", "tired")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Of several lengths, and whether they are good."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        words = [rng.choice(("the", "film", "was", "and", "its", "end", f"no{i}")) for _ in range(rng.randrange(3, 30))]
        label = rng.choice(("good", "bad"))
        for _ in range(3):
            words.insert(rng.randrange(len(words)), rng.choice(GOOD if label == "good" else BAD))
        rows.append((" ".join(words), label))
    return rows


def pretrained(folder: Path, objective: str) -> Path:
    """A folder with a small language model and its tokenizer, as pretraining leaves it."""
    texts = [text for text, _ in sentences(200)]
    tokenizer = bpe_tokenizer(texts, sum(map(len, texts)), 400, objective)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"vocab_size": len(tokenizer), "initializer_range": 0.2}  # weights as large as trained ones
    torch.manual_seed(0)
    if objective == "masked":
        network = BertForMaskedLM(BertConfig(pad_token_id=tokenizer.pad_token_id, **small))
    else:
        network = LlamaForCausalLM(LlamaConfig(**small))
    for part in (network, tokenizer):
        part.save_pretrained(folder)
    return folder


def run(verb: str, *flags: str, script: Path = SCRIPT) -> None:
    old, sys.argv = sys.argv, [str(script), verb, *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = old


def refused(capsys, *flags: str, script: Path = SCRIPT) -> str:
    with pytest.raises(SystemExit) as stop:
        run("fit", *flags, script=script)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def as_command(folder: Path, flags: list[str], *more: str, script: Path = SCRIPT) -> int:
    process = command(["fit", "--allow_import=tests", *flags, *more], folder / "log", [sys.executable], script=script)
    try:
        code = process.wait(120)
    finally:
        kill_group(process)
    print((folder / "log").read_text()[-2000:])
    return code


WORDS = ("river", "stone", "green", "seven", "north", "castle", "winter", "copper", "lamp", "bread")


def context(seed: int, words: int = 30) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(words))


def squad(articles: int = 12, words: int = 30, unanswerable: bool = False, shift: int = 0) -> dict:
    """A document as SQuAD has it; the offsets may be wrong by `shift`."""
    data = []
    for i in range(articles):
        text = context(i, words)
        parts = text.split()
        answers = [parts[3], f"{parts[words // 2]} {parts[words // 2 + 1]}", parts[-1]]
        qas = []
        for j, answer in enumerate(answers):
            known = [{"text": answer, "answer_start": text.index(answer) + shift}]
            qas.append({"id": f"{i}-{j}", "question": f"Which word number {j}?", "answers": known})
            if unanswerable:
                qas[-1]["is_impossible"] = False
        if unanswerable:
            qas.append({"id": f"{i}-none", "question": "Which colour?", "answers": [], "is_impossible": True})
        data.append({"title": f"article {i}", "paragraphs": [{"context": text, "qas": qas}]})
    return {"version": "v2.0" if unanswerable else "1.1", "data": data}
