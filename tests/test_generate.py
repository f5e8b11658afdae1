import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_modules.lstm import LSTMConfig, LSTMForCausalLM

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "ckpt_stories260K"
sys.path.insert(0, str(ROOT / "recipes"))

import generate  # noqa: E402

END = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, in the order of GPT-2's printable characters, and one that ends a text."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>", pad_token="<pad>")


def save(folder: Path, model: torch.nn.Module) -> Path:
    # Weights far from zero: what is probable differs from place to place.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))) / 2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    ends = {"bos_token_id": None, "eos_token_id": None}
    return save(
        folder, GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=32, n_embd=16, n_layer=1, n_head=2, **ends))
    )


def lstm(folder: Path) -> Path:
    return save(folder, LSTMForCausalLM(LSTMConfig(vocab_size=258, hidden_size=16)))


def t5(folder: Path) -> Path:
    tokens = {"decoder_start_token_id": 257, "pad_token_id": 257, "eos_token_id": 256}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return save(folder, T5ForConditionalGeneration(T5Config(vocab_size=258, **sizes, **tokens)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = {"gpt2": gpt2, "lstm": lstm, "t5": t5}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


def written(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    generate.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        generate.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize("name", ["gpt2", "lstm", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_seed_writes_the_same_text(capsys, folders, name: str, beams: int):
    flags = ["--model", folders[name], "--prompt", "def ", "--max_new_tokens", 16, "--num_beams", beams]
    first = written(capsys, *flags, "--seed", 1)
    assert written(capsys, *flags, "--seed", 1) == first
    assert (written(capsys, *flags, "--seed", 2) == first) == (beams > 1)
    assert first.startswith("def ") == (name != "t5")


def test_temperature_zero_takes_the_most_probable_token(capsys, folders):
    model = GPT2LMHeadModel.from_pretrained(folders["gpt2"])
    tokenizer = byte_tokenizer()
    ids = tokenizer("abc")["input_ids"]
    for _ in range(8):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    flags = ["--model", folders["gpt2"], "--prompt", "abc", "--max_new_tokens", 8, "--temperature", 0]
    assert written(capsys, *flags) == tokenizer.decode(ids) + "\n"
    assert written(capsys, *flags[:-1], 1e-5) == tokenizer.decode(ids) + "\n"
    assert written(capsys, *flags[:-1], 2, "--top_k", 1) == tokenizer.decode(ids) + "\n"
    assert written(capsys, *flags[:-1], 2, "--top_p", 1e-6) == tokenizer.decode(ids) + "\n"


def test_several_prompts_are_continued_as_each_alone(capsys, folders):
    flags = ["--model", folders["lstm"], "--max_new_tokens", 6, "--seed", 3, "--prompt"]
    alone = [written(capsys, *flags, prompt) for prompt in ("ab", "xyz ")]
    assert written(capsys, *flags, "ab", "xyz ") == "\n".join(alone)


def test_without_a_prompt_standard_input_is_continued(capsys, folders, monkeypatch):
    flags = ["--model", folders["gpt2"], "--max_new_tokens", 6, "--seed", 3]
    expected = written(capsys, *flags, "--prompt", "two\nlines")
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert written(capsys, *flags) == expected


def test_the_folder_of_a_run_stands_for_the_model_in_it(capsys, folders, tmp_path: Path):
    (tmp_path / "model").symlink_to(folders["lstm"])
    flags = ["--prompt", "a", "--max_new_tokens", 4, "--seed", 1]
    assert written(capsys, "--model", tmp_path, *flags) == written(capsys, "--model", folders["lstm"], *flags)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_what_streams_is_what_decodes_at_once(capsys, step: int):
    tokenizer = byte_tokenizer()
    ids = tokenizer("naïve 😀 grüße, 語")["input_ids"] + [END]
    printer = generate.Printer(tokenizer, ids[:3])
    printer.put(torch.tensor([ids[:3]]))
    for begin in range(3, len(ids), step):
        printer.put(torch.tensor(ids[begin : begin + step]))
        assert "\N{REPLACEMENT CHARACTER}" not in (out := capsys.readouterr().out)
        print(out, end="")
    printer.end()
    assert capsys.readouterr().out == "ve 😀 grüße, 語\n"


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260K checkpoint")
def test_a_real_model_streams_its_published_sample(capsys):
    text = written(capsys, "--model", STORIES, "--prompt", "", "--max_new_tokens", 60, "--temperature", 0)
    sample = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day"
    assert text.strip().startswith(sample)


def test_writing_stops_where_the_positions_end_and_says_so(capsys, folders):
    generate.main(["--model", str(folders["gpt2"]), "--prompt", "a" * 30, "--seed", "1"])
    captured = capsys.readouterr()
    assert "note: stops after 3 new tokens: the model has 32 positions" in captured.err
    assert "[3 tokens" in captured.err


def test_the_recurrent_model_has_no_last_position(capsys, folders):
    generate.main(["--model", str(folders["lstm"]), "--prompt", "a" * 600, "--max_new_tokens", "5", "--seed", "1"])
    assert re.fullmatch(r"\[5 tokens, \d+ tokens/s, seed 1\]\n", capsys.readouterr().err)


def test_a_prompt_longer_than_the_positions_is_refused(capsys, folders):
    assert "the prompt has 33 tokens" in error(capsys, "--model", folders["gpt2"], "--prompt", "a" * 33)


def test_a_folder_that_is_no_model_is_refused(capsys, folders, tmp_path: Path):
    prompt = ["--prompt", "a"]
    assert "no such folder" in error(capsys, "--model", tmp_path / "nowhere", *prompt)
    assert "no config.json in" in error(capsys, "--model", tmp_path, *prompt)
    GPT2LMHeadModel.from_pretrained(folders["gpt2"]).save_pretrained(tmp_path)
    assert "holds no tokenizer" in error(capsys, "--model", tmp_path, *prompt)
    byte_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "cannot be read" in error(capsys, "--model", tmp_path, *prompt)
    (tmp_path / "config.json").write_text("{}")
    assert "is no model's folder" in error(capsys, "--model", tmp_path, *prompt)


def test_a_model_that_cannot_write_is_refused(capsys, tmp_path: Path):
    config = BertConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    masked, bare = save(tmp_path / "masked", BertForMaskedLM(config)), save(tmp_path / "bare", BertModel(config))
    assert "masked language model" in error(capsys, "--model", masked, "--prompt", "a")
    assert "BertModel, which has no language-model head" in error(capsys, "--model", bare, "--prompt", "a")


def test_missing_weights_are_not_made_up(capsys, folders, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = lstm(tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.lstm.bias_ih_l0"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "lacks 1 weights of a causal model (model.lstm.bias_ih_l0" in error(
        capsys, "--model", model, "--prompt", "a"
    )


def test_a_tokenizer_larger_than_the_model_is_refused(capsys, tmp_path: Path):
    model = save(tmp_path, LSTMForCausalLM(LSTMConfig(vocab_size=80, hidden_size=16)))
    assert "gives id 127, the model knows 80 ids" in error(capsys, "--model", model, "--prompt", "é")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tempratur", "1"], "there is no --tempratur; did you mean --temperature?"),
        (["--top_k", "-3"], "--top_k"),
        (["--max_new_tokens", "many"], "--max_new_tokens"),
        (["--top_p", "2"], "--top_p 2.0"),
        (["--seed", "1.5"], "--seed does not take 1.5"),
    ],
)
def test_a_wrong_flag_is_named(capsys, folders, flags: list[str], message: str):
    assert message in error(capsys, "--model", folders["gpt2"], "--prompt", "a", *flags)


def test_help_comes_without_torch():
    script = (
        "import sys, generate\ntry: generate.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "recipes", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--max_new_tokens" in run.stdout
