"""Exports are opened by their own runtimes and asked what the model is asked in transformers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
)

from datamodules.tokenization import bpe_tokenizer, character_tokenizer
from lightning_modules.exports import parity
from lightning_modules.lstm import LSTMConfig, LSTMForCausalLM
from recipes import export
from tests.finetuning import sentences

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "ckpt_stories260K"

TEXTS = [text for text, _ in sentences(200)]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "initializer_range": 0.2}


def tokenizer(objective: str):
    return bpe_tokenizer(TEXTS, sum(map(len, TEXTS)), 380, objective)


def small(name: str, ids: int) -> PreTrainedModel:
    torch.manual_seed(0)
    match name:
        case "llama":
            return LlamaForCausalLM(
                LlamaConfig(vocab_size=ids, tie_word_embeddings=True, **GROUPED | {"num_hidden_layers": 2})
            )
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(vocab_size=ids, **GROUPED))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(vocab_size=ids, head_dim=16, **GROUPED))
        case "nanochat":
            return NanoChatForCausalLM(NanoChatConfig(vocab_size=ids, **GROUPED))
        case "gpt2":
            sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "initializer_range": 0.2}
            return GPT2LMHeadModel(GPT2Config(vocab_size=ids, **sizes))
        case "lstm":
            return LSTMForCausalLM(LSTMConfig(vocab_size=ids, hidden_size=32))
        case "labels":
            return BertForSequenceClassification(BertConfig(vocab_size=ids, num_labels=3, **SIZES))
        case "spans":
            return BertForQuestionAnswering(BertConfig(vocab_size=ids, initializer_range=0.2, **SIZES))
        case "t5":
            sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "initializer_factor": 2.0}
            return T5ForConditionalGeneration(T5Config(vocab_size=ids, decoder_start_token_id=0, **sizes))
    raise KeyError(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a model's folder by the name of its family, once."""
    objectives = {"labels": "masked", "spans": "masked", "t5": "denoising"}

    def make(name: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"export-{name}"
        if not path.exists():
            own = tokenizer(objectives.get(name, "causal"))
            small(name, len(own)).save_pretrained(path)
            own.save_pretrained(path)
        return path

    return make


@pytest.fixture(autouse=True)
def _few_turns(monkeypatch):
    monkeypatch.setattr(parity, "TURNS", 1)


def exported(capsys, model: Path, format: str, output: Path, *flags: str) -> dict:
    export.main(["--model", str(model), "--format", format, "--output", str(output), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def ended(capsys, code: int, *flags: object) -> str:
    """What a run that ends with this exit code says."""
    with pytest.raises(SystemExit) as stop:
        export.main([str(flag) for flag in flags])
    captured = capsys.readouterr()
    assert stop.value.code == code, captured.err
    return captured.err.removeprefix("error: ") if code == 2 else captured.out


def refused(capsys, *flags: object) -> str:
    (line,) = ended(capsys, 2, *flags).splitlines()
    return line


# ONNX


def session(file: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_onnxruntime_writes_with_a_cache_what_transformers_writes(capsys, folder, tmp_path: Path):
    found = exported(capsys, folder("llama"), "onnx", tmp_path / "out")
    assert (
        found["holds"] and found["max_logit_difference"] < 1e-4 and found["greedy_same"] == found["greedy_tokens"] > 0
    )
    model, run = AutoModelForCausalLM.from_pretrained(folder("llama")), session(tmp_path / "out" / "model.onnx")
    shapes = {value.name: value.shape for value in run.get_inputs()}
    assert shapes["input_ids"] == ["batch", "tokens"] and shapes["attention_mask"] == ["batch", "past + tokens"]
    assert shapes["past_key_values.1.value"] == ["batch", 2, "past", 8]

    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the film was", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    past = {name: np.zeros((1, 2, 0, 8), np.float32) for name in shapes if name.startswith("past_key")}
    tokens, read, written = ids.numpy(), 0, []
    while len(written) < 20:
        read += tokens.shape[1]
        places = np.arange(read - tokens.shape[1], read)[None]
        mask = np.ones((1, read), np.int64)
        logits, *present = run.run(None, {"input_ids": tokens, "attention_mask": mask, "position_ids": places} | past)
        past = dict(zip(past, present, strict=True))
        written.append(int(logits[0, -1].argmax()))
        tokens = np.array([[written[-1]]])
    assert written == expected


@pytest.mark.parametrize("name", ["nanochat", "lstm", "labels", "spans"])
def test_every_family_answers_alike_in_onnxruntime(capsys, folder, tmp_path: Path, name: str):
    found = exported(capsys, folder(name), "onnx", tmp_path / "out")
    assert found["holds"] and found["max_logit_difference"] < 1e-4 and found["same_top"] == 1
    assert found["greedy_same"] == found["greedy_tokens"] == (0 if name in ("labels", "spans") else 64)


def test_an_encoder_decoder_is_two_graphs_of_which_the_decoder_keeps_its_own_past(capsys, folder, tmp_path: Path):
    found = exported(capsys, folder("t5"), "onnx", tmp_path / "out", "--prompt", "the film was fine", "and its end")
    assert found["holds"] and found["greedy_same"] == found["greedy_tokens"] == 32
    encoder, decoder = (session(tmp_path / "out" / f"{part}.onnx") for part in ("encoder", "decoder"))
    source = np.array([[5, 6, 7, 8, 9]])
    cross = encoder.run(None, {"input_ids": source, "attention_mask": np.ones_like(source)})
    inputs = {value.name: value.shape for value in decoder.get_inputs()}
    assert inputs["past_key_values.0.decoder.key"] == ["batch", 4, "past", 8]
    fixed = dict(zip([value.name for value in encoder.get_outputs()], cross, strict=True))
    fixed |= {"input_ids": np.array([[0, 11, 12]]), "encoder_attention_mask": np.ones_like(source)}
    fixed |= {name: np.zeros((1, 4, 0, 8), np.float32) for name in inputs if ".decoder." in name}
    logits = decoder.run(["logits"], fixed)[0]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder("t5"))
    with torch.no_grad():
        expected = model(torch.tensor(source), decoder_input_ids=torch.tensor([[0, 11, 12]])).logits
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_int8_is_smaller_and_is_judged_by_its_divergence(capsys, folder, tmp_path: Path):
    found = exported(capsys, folder("llama"), "onnx-int8", tmp_path / "out")
    assert found["tolerance"]["measure"] == "kl" and 1e-7 < found["kl"] < 0.05
    assert found["export_bytes"] < 0.75 * found["source_bytes"]
    kinds = {node.op_type for node in pytest.importorskip("onnx").load(tmp_path / "out" / "model.onnx").graph.node}
    assert "MatMulInteger" in kinds
    flags = ["--model", folder("lstm"), "--format", "onnx-int8", "--tolerance", 1e-12]
    assert "FAILS" in ended(capsys, 1, *flags, "--output", tmp_path / "strict")


# torch.export and ExecuTorch


def test_a_pt2_file_needs_torch_alone(capsys, folder, tmp_path: Path):
    found = exported(capsys, folder("gpt2"), "pt2", tmp_path / "model.pt2")
    assert found["holds"] and found["max_logit_difference"] < 1e-4 and found["greedy_same"] == 64
    script = f"""
import json, sys, torch
extra = {{"signature.json": ""}}
program = torch.export.load({str(tmp_path / "model.pt2")!r}, extra_files=extra).module()
names = json.loads(extra["signature.json"])
ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
past = [torch.zeros(2, 4, 0, 8)] * (len(names["inputs"]) - 3)
print(json.dumps(program(ids, torch.ones_like(ids), torch.arange(3).repeat(2, 1), *past)[0].tolist()))
assert "transformers" not in sys.modules and "lightning_modules" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    model = AutoModelForCausalLM.from_pretrained(folder("gpt2"))
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7], [8, 9, 10]])).logits
    torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), expected, rtol=0, atol=1e-4)


def test_executorch_answers_alike(capsys, folder, tmp_path: Path):
    pytest.importorskip("executorch.runtime")
    pytest.importorskip("torchao")
    found = exported(capsys, folder("lstm"), "pte", tmp_path / "model.pte")
    assert found["holds"] and found["max_logit_difference"] < 1e-4 and found["greedy_same"] == 64


# GGUF


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_gguf_holds_the_weights_and_the_tokenizer(capsys, folder, tmp_path: Path, name: str):
    gguf = pytest.importorskip("gguf")
    found = exported(capsys, folder(name), "gguf", tmp_path / "model.gguf", "--gguf_type", "F32")
    assert found["max_logit_difference"] == 0 and found["same_ids"] and found["greedy_same"] == 64
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = load_file(folder(name) / "model.safetensors")
    assert len(read) == len(weights)  # a tied head is in neither
    norm = "transformer.ln_f.weight" if name == "gpt2" else "model.norm.weight"
    np.testing.assert_array_equal(read["output_norm.weight"].data, weights[norm].numpy())


def test_gguf_with_fewer_bits_is_smaller_and_further_from_its_source(capsys, folder, tmp_path: Path):
    found = {
        kind: exported(capsys, folder("llama"), "gguf", tmp_path / f"{kind}.gguf", "--gguf_type", kind)
        for kind in ("F16", "Q8_0", "Q4_0")
    }
    sizes, nats = ([one[key] for one in found.values()] for key in ("export_bytes", "kl"))
    assert sizes == sorted(sizes, reverse=True) and nats == sorted(nats) and nats[0] > 0


def test_heads_that_were_not_reordered_are_found(capsys, folder, tmp_path: Path, monkeypatch):
    to_gguf = pytest.importorskip("lightning_modules.exports.to_gguf")
    monkeypatch.setattr(to_gguf, "interleaved", lambda weight, heads: weight)
    out = ended(capsys, 1, "--model", folder("llama"), "--format", "gguf", "--output", tmp_path / "model.gguf")
    assert "FAILS" in out and "model.gguf.rejected" in out
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf.rejected"]


def test_a_tokenizer_that_cuts_otherwise_is_found(capsys, folder, tmp_path: Path, monkeypatch):
    words = pytest.importorskip("lightning_modules.exports.gguf_tokenizer")
    monkeypatch.setattr(words, "words_rule", lambda *_: "llama-bpe")
    flags = ["--model", folder("llama"), "--format", "gguf", "--gguf_type", "F32", "--output", tmp_path / "model.gguf"]
    assert "other ids" in ended(capsys, 1, *flags)


def test_gguf_refuses_what_llama_cpp_does_not_know(capsys, folder, tmp_path: Path):
    pytest.importorskip("gguf")
    output = ["--output", tmp_path / "model.gguf", "--format", "gguf", "--model"]
    for name in ("nanochat", "lstm", "t5", "labels"):
        assert "gguf is for Llama, Qwen2, Qwen3 and GPT-2, not for" in refused(capsys, *output, folder(name))
    by_characters = character_tokenizer(TEXTS, "causal")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(by_characters), **GROUPED)).save_pretrained(tmp_path / "chars")
    by_characters.save_pretrained(tmp_path / "chars")
    assert "writes tokenizers of bytes" in refused(capsys, *output, tmp_path / "chars")
    assert [path.name for path in tmp_path.iterdir()] == ["chars"]


# Folders and weights


def test_a_folder_has_its_precision_its_shards_and_the_same_answers(capsys, folder, tmp_path: Path):
    found = exported(capsys, folder("llama"), "hf", tmp_path / "same")
    assert found["max_logit_difference"] == 0 and found["same_ids"]
    found = exported(capsys, folder("llama"), "hf", tmp_path / "half", "--dtype", "bfloat16", "--shard_size", "20KB")
    assert found["tolerance"]["measure"] == "kl" and 0 < found["kl"] < 0.01
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_safetensors_is_one_file_of_the_weights_by_their_names(capsys, folder, tmp_path: Path):
    assert exported(capsys, folder("lstm"), "safetensors", tmp_path / "w.safetensors")["max_logit_difference"] == 0
    written, source = (load_file(file) for file in (tmp_path / "w.safetensors", folder("lstm") / "model.safetensors"))
    assert written.keys() == source.keys() and all(torch.equal(written[name], source[name]) for name in source)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_quantized_folder_goes_out_as_the_numbers_its_codes_stand_for(capsys, folder, tmp_path: Path):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=config).save_pretrained(tmp_path / "int8")
    tokenizer("causal").save_pretrained(tmp_path / "int8")
    found = exported(capsys, tmp_path / "int8", "hf", tmp_path / "out")
    assert found["max_logit_difference"] == 0 and found["export_bytes"] > 1.5 * found["source_bytes"]
    name = "model.layers.0.mlp.up_proj.weight"
    written, before = (load_file(path / "model.safetensors")[name] for path in (tmp_path / "out", folder("llama")))
    assert 0 < (written - before).abs().max() < before.abs().max() / 100


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_one_perturbed_weight_fails_the_check(capsys, folder, tmp_path: Path, monkeypatch, format: str):
    from lightning_modules.exports import convert

    write_and_open = convert.write_and_open

    def perturbed(loaded, settings, path):
        weight = loaded.model.get_output_embeddings().weight
        with torch.no_grad():
            weight[7] += 0.05
            try:
                return write_and_open(loaded, settings, path)
            finally:
                weight[7] -= 0.05

    monkeypatch.setattr(convert, "write_and_open", perturbed)
    out = ended(capsys, 1, "--model", folder("lstm"), "--format", format, "--output", tmp_path / "out")
    assert "FAILS" in out and not (tmp_path / "out").exists() and (tmp_path / "out.rejected").exists()


def test_logits_that_are_no_numbers_fail_the_check(capsys, tmp_path: Path):
    own = tokenizer("causal")
    model = small("llama", len(own))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e5)  # beyond what float16 holds
    model.save_pretrained(tmp_path / "huge")
    own.save_pretrained(tmp_path / "huge")
    flags = ["--model", tmp_path / "huge", "--format", "hf", "--dtype", "float16"]
    assert "FAILS" in ended(capsys, 1, *flags, "--output", tmp_path / "out")


# Where it goes


def test_an_export_is_whole_or_not_there(capsys, folder, tmp_path: Path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "compare", stopped)
    with pytest.raises(KeyboardInterrupt):
        exported(capsys, folder("lstm"), "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_output_it_lies_beside_the_model(capsys, folder, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folder("lstm"))
    export.main(["--model", str(tmp_path / "run"), "--format", "safetensors", "--json"])
    written = Path(json.loads(capsys.readouterr().out)["written"])
    assert (
        written.name.endswith(".safetensors")
        and written.is_file()
        and written.parent
        in (
            tmp_path / "run",
            folder("lstm").parent,
        )
    )
    written.unlink()


def test_what_is_there_is_replaced_only_when_asked(capsys, folder, tmp_path: Path):
    model, out = folder("lstm"), tmp_path / "out"
    flags = ["--model", model, "--format", "hf", "--output", out]
    exported(capsys, model, "hf", out)
    assert "exists; pass --overwrite" in refused(capsys, *flags)
    exported(capsys, model, "hf", out, "--overwrite")
    (out / "config.json").unlink()
    assert "a folder with other things" in refused(capsys, *flags, "--overwrite")
    assert "would replace the model itself" in refused(
        capsys, "--model", model, "--format", "hf", "--output", model, "--overwrite"
    )
    weights = ["--model", model, "--format", "safetensors", "--overwrite", "--output"]
    assert "would replace the model itself" in refused(capsys, *weights, model / "model.safetensors")
    assert "is a folder, and safetensors is a file" in refused(capsys, *weights, tmp_path)
    assert "nothing can be written" in refused(capsys, *weights, model / "config.json" / "w.safetensors")


# Bad input


def test_what_is_not_installed_is_named_with_its_extra(capsys, folder, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--model", folder("lstm"), "--output", tmp_path / "out", "--format"]
    assert "needs onnx, which is not installed: pip install -e '.[export]'" in refused(capsys, *flags, "onnx-int8")
    assert "needs executorch, which is not installed: pip install -e '.[pte]'" in refused(capsys, *flags, "pte")


def test_a_wrong_flag_is_named(capsys, folder, tmp_path: Path):
    flags = ["--model", folder("lstm"), "--output", tmp_path / "out", "--format"]
    assert "--format does not take tflite; it takes hf, safetensors, onnx" in refused(capsys, *flags, "tflite")
    assert "--dtype is for hf and safetensors" in refused(capsys, *flags, "onnx", "--dtype", "float16")
    assert "there is no --overwrit" in refused(capsys, *flags, "hf", "--overwrit")
    assert "--tolerance does not take 0" in refused(capsys, *flags, "hf", "--tolerance", "0")


def test_a_folder_that_cannot_be_exported_is_refused(capsys, tmp_path: Path):
    flags = ["--format", "onnx", "--output", tmp_path / "out", "--model"]
    assert "no such folder" in refused(capsys, *flags, tmp_path / "nowhere")
    own = tokenizer("masked")
    BertModel(BertConfig(vocab_size=len(own), **SIZES)).save_pretrained(tmp_path / "bare")
    own.save_pretrained(tmp_path / "bare")
    assert "BertModel, which has no language-model head" in refused(capsys, *flags, tmp_path / "bare")
    assert not (tmp_path / "out").exists()


def test_help_comes_without_torch():
    script = "import sys, export\ntry: export.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "recipes", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--gguf_type" in run.stdout


# At their true size


@pytest.mark.skipif(not STORIES.exists(), reason="needs the stories260K checkpoint")
def test_a_real_llama_with_sentencepiece_is_the_same_in_gguf(capsys, tmp_path: Path):
    pytest.importorskip("gguf")
    found = exported(capsys, STORIES, "gguf", tmp_path / "model.gguf", "--gguf_type", "Q8_0")
    assert found["same_ids"] and found["kl"] < 2e-3 and found["export_bytes"] < 0.35 * found["source_bytes"]
