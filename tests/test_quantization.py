import copy
import importlib.util
import itertools
import json
from pathlib import Path

import compressed_tensors.quantization.utils.helpers
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
)

from lightning_modules.compression import grids
from lightning_modules.compression.calibration import calibration_batches, input_moments, windows
from lightning_modules.compression.grids import Grid, codes_of, from_minmax, minmax, nearest, passed_on
from lightning_modules.compression.opened import bytes_of_weights, open_model
from lightning_modules.compression.packed_folder import read_packed, save_packed
from lightning_modules.compression.quantization import (
    divergence,
    fitted,
    log_shares,
    mixed,
    put_in,
    quantizable,
    quantized,
    quantized_ends,
    scheme_named,
    sensitivities,
)
from recipes import compress

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "data" / "ckpt_stories260K"

SCHEMES = ("int8", "int8-dynamic", "int4", "int3", "int2", "8da4w", "float8")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"vocab_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}


def network(config, auto_class=AutoModelForCausalLM):
    torch.manual_seed(0)
    made = auto_class.from_config(config).eval()
    with torch.no_grad():  # far from zero, so that every token has another probability
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made


@pytest.fixture
def llama():
    return network(LlamaConfig(**SMALL, **LLAMA))


def ids() -> torch.Tensor:
    return torch.arange(24).view(2, 12) * 7 % 96


def layers_of(made, scheme: str, moments=None, group_size: int = 16):
    chosen, found = scheme_named(scheme), quantizable(made)
    packed = quantized(made, found, fitted(chosen.grid, found, group_size), chosen.activations, moments or {})
    return packed | quantized_ends(made, 8)


# A weight


def test_a_code_is_the_nearest_number_of_the_grid():
    weight_RC = torch.tensor([[-0.9, -0.26, -0.24, 0.0, 0.24, 0.26, 0.4, 0.9]])
    codes = codes_of(weight_RC, torch.tensor([[0.5]]), Grid(2))
    assert codes.codes_RC.tolist() == [[-2, -1, 0, 0, 0, 1, 1, 1]]
    assert codes.values().tolist() == [[-1.0, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]]


def test_eight_bits_reach_the_largest_weight_of_each_row():
    weight_RC = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    codes = nearest(weight_RC, Grid(8), dtype=torch.float32)
    assert codes.codes_RC.abs().amax(1).tolist() == [127] * 5
    assert (codes.values() - weight_RC).abs().amax() <= codes.scales_RG.amax() / 2 + 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_leave_less_error_than_those_of_the_largest_weight(bits):
    weight_RC = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits, 32)
    largest_RG = grids.grouped(weight_RC, grid).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    searched = nearest(weight_RC, grid, dtype=torch.float32)
    plain = codes_of(weight_RC, largest_RG, grid)
    assert (searched.values() - weight_RC).norm() < 0.95 * (plain.values() - weight_RC).norm()


def test_errors_that_are_passed_on_change_outputs_less():
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(32, 64, generator=generator)
    inputs_NC = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    errors = [
        ((codes.values() - weight_RC) @ inputs_NC.T).norm()
        for codes in (passed_on(weight_RC, inputs_NC.T @ inputs_NC, Grid(3, 16)), nearest(weight_RC, Grid(3, 16)))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_errors_of_a_wide_layer_reach_the_columns_of_later_blocks():
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(16, 320, generator=generator)  # 2.5 blocks
    inputs_NC = torch.randn(2048, 8, generator=generator) @ torch.randn(8, 320, generator=generator)
    inputs_NC += 0.05 * torch.randn(2048, 320, generator=generator)
    errors = [
        ((codes.values() - weight_RC) @ inputs_NC.T).norm()
        for codes in (passed_on(weight_RC, inputs_NC.T @ inputs_NC, Grid(4, 32)), nearest(weight_RC, Grid(4, 32)))
    ]
    assert errors[0] < 0.2 * errors[1]


def test_inputs_that_are_always_zero_do_not_stop_it():
    inputs_NC = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    inputs_NC[:, 5] = 0
    assert torch.isfinite(passed_on(torch.randn(8, 32), inputs_NC.T @ inputs_NC, Grid(4, 16)).values()).all()


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_minmax_is_the_textbooks_formula(bits, per):
    weight_RC = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    axes = (0, 1) if per == "tensor" else (1,)
    low, high = weight_RC.amin(axes, keepdim=True), weight_RC.amax(axes, keepdim=True)
    written_out = torch.round((weight_RC - low) / (high - low) * (2**bits - 1))
    codes_RC, *ends = minmax(weight_RC, bits, per)
    assert torch.equal(codes_RC.float(), written_out)
    values_RC = from_minmax(codes_RC, *ends, bits)
    assert (values_RC - weight_RC).abs().max() <= (high - low).max() / (2**bits - 1) / 2 + 1e-6
    assert values_RC.min() == weight_RC.min()


def test_a_row_of_one_number_is_kept_by_minmax():
    codes = minmax(torch.full((2, 4), 3.0), 4, "channel")
    assert torch.equal(from_minmax(*codes, 4), torch.full((2, 4), 3.0))


# A folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_is_read_back_equal_bit_by_bit_by_us_and_by_transformers(scheme, tied, tmp_path):
    made = network(LlamaConfig(**SMALL, **LLAMA, tie_word_embeddings=tied))
    layers = layers_of(made, scheme)
    save_packed(tmp_path, made, layers)
    ours = read_packed(AutoModelForCausalLM, str(tmp_path), torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(ours(ids()).logits, theirs(ids()).logits)
        for name, layer in layers.items():
            assert torch.equal(ours.get_submodule(name).weight, layer.weight.values())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_of_inputs_changes_what_comes_out(scheme, llama, tmp_path):
    layers = layers_of(llama, scheme)
    save_packed(tmp_path, llama, layers, torch.float32)
    put_in(llama, layers)
    with torch.no_grad():
        plain, rounded = llama(ids()).logits, read_packed(AutoModelForCausalLM, str(tmp_path))(ids()).logits
    assert torch.equal(plain, rounded) == (scheme in ("int8", "int4", "int3", "int2"))
    assert (plain - rounded).norm() < 0.1 * plain.norm()


@pytest.mark.parametrize(
    ("config", "auto_class"),
    [
        (NanoChatConfig(**SMALL, vocab_size=96, max_position_embeddings=64), AutoModelForCausalLM),
        (BertConfig(**SMALL, vocab_size=96, max_position_embeddings=64), AutoModelForMaskedLM),
    ],
)
def test_four_bits_are_four_bits_on_disk(config, auto_class, tmp_path):
    made = network(config, auto_class)
    layers = layers_of(made, "int4", group_size=32)
    save_packed(tmp_path, made, layers)
    of_layers = sum(m.weight.numel() for m in quantizable(made).values())
    of_ends = sum(
        p.numel()
        for p in {
            id(made.get_submodule(n).weight): made.get_submodule(n).weight for n in layers if layers[n].grid.bits == 8
        }.values()
    )
    rest = sum(p.numel() for p in made.parameters()) - of_layers - of_ends
    most = of_layers * (4 + 16 / 32) / 8 + of_ends * (1 + 2 / 32) + 2 * rest + 400 * (len(layers) + 20)
    assert bytes_of_weights(tmp_path) < most
    back = read_packed(auto_class, str(tmp_path), torch.float32).eval()
    put_in(made, layers)
    with torch.no_grad():
        assert torch.allclose(back(ids()).logits, made.bfloat16().float()(ids()).logits, atol=2e-2)


def test_minmax_is_stored_in_its_bits_and_read_back(tmp_path):
    from lightning_modules.compression.quantization import quantized_minmax

    made = network(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64))
    layers = quantized_minmax(made, 3, "channel")
    save_packed(tmp_path, made, layers, torch.float32)
    put_in(made, layers)
    back = read_packed(AutoModelForCausalLM, str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(back(ids()).logits, made(ids()).logits)
    assert bytes_of_weights(tmp_path) < 0.25 * 4 * sum(p.numel() for p in made.parameters())


# Layers


def test_layers_that_read_the_same_share_their_moments(llama):
    batches = [{"input_ids": ids()}]
    layers = quantizable(llama)
    moments = input_moments(llama, layers, batches)
    prefix = "model.layers.1"
    assert moments[f"{prefix}.self_attn.q_proj"] is moments[f"{prefix}.self_attn.v_proj"]
    assert moments[f"{prefix}.mlp.gate_proj"] is moments[f"{prefix}.mlp.up_proj"]
    seen = []
    llama.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        llama(ids())
    assert torch.allclose(moments[f"{prefix}.mlp.down_proj"], seen[0].T @ seen[0], rtol=1e-4, atol=1e-4)


def test_the_layers_that_lose_most_get_most_bits(llama):
    layers = quantizable(llama)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.mul_(6)  # what it rounds weighs more
    steps = dict.fromkeys(layers, [Grid(2, 16), Grid(3, 16), Grid(4, 16), Grid(8)])
    batches = [{"input_ids": ids()}]
    lost = sensitivities(llama, layers, steps, {}, batches)
    chosen = mixed(layers, steps, lost, 5.0)
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    used = sum(grid.bits_of(layers[name].weight.shape[1]) * sizes[name] for name, grid in chosen.items())
    assert 4.0 < used / sum(sizes.values()) <= 5.0
    of_its_size = [chosen[f"model.layers.{i}.mlp.{name}_proj"].bits for i in (0, 1) for name in ("gate", "up", "down")]
    assert chosen["model.layers.0.mlp.down_proj"].bits == max(of_its_size) > min(of_its_size)
    exact, before = log_shares(llama, batches), copy.deepcopy(llama.state_dict())
    put_in(llama, quantized(llama, layers, chosen, None, {}))
    as_mixed = divergence(llama, batches, exact)
    llama.load_state_dict(before)
    put_in(llama, quantized(llama, layers, dict.fromkeys(layers, Grid(4, 16)), None, {}))
    assert as_mixed < divergence(llama, batches, exact)


def test_fewer_bits_than_the_coarsest_grid_has_are_refused(llama):
    layers = quantizable(llama)
    with pytest.raises(ValueError, match="--average_bits 2 is less than the 3.00"):
        mixed(layers, dict.fromkeys(layers, [Grid(2, 16)]), {name: [0.0] for name in layers}, 2.0)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from datamodules.tokenization import byte_tokenizer

    made = network(LlamaConfig(**SMALL, **(LLAMA | {"vocab_size": 272})))
    place = tmp_path_factory.mktemp("model") / "tiny"
    made.save_pretrained(place)
    byte_tokenizer("causal").save_pretrained(place)
    return place


@pytest.fixture
def text(corpus) -> list[str]:
    return ["--data.path", str(corpus), "--data.val_fraction", "0.2", "--rows", "8"]


@pytest.mark.parametrize(
    "more",
    [
        ["--scheme", "int8"],
        ["--scheme", "int4"],
        ["--average_bits", "4"],
        ["--scheme", "minmax", "--bits", "4"],
        ["--scheme", "8da4w", "--rounding", "nearest"],
    ],
)
def test_quantize_writes_a_folder_and_says_what_it_did(more, folder, text, tmp_path, capsys):
    compress.main(["quantize", "--model", str(folder), "--output", str(tmp_path / "out"), *text, *more])
    said = capsys.readouterr().out
    assert "14 (self_attn.q_proj" in said or more[0] == "--average_bits" or "minmax" in more
    assert "nats/token" in said and "%" in said
    about = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert about["source"] == str(folder) and about["steps"][0]["verb"] == "quantize"
    opened = open_model(str(tmp_path / "out"))
    assert opened.network(ids()).logits.shape == (2, 12, 272)
    AutoTokenizer.from_pretrained(tmp_path / "out")


def failure(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        compress.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    return said


def test_mistakes_are_one_line_each(folder, text, tmp_path, capsys):
    quantize = ["quantize", "--model", str(folder), *text, "--output", str(tmp_path / "x")]
    assert "--group_size 24 does not divide" in failure([*quantize, "--scheme", "int4", "--group_size", "24"], capsys)
    assert "no linear layer left" in failure([*quantize, "--skip", "[layers]"], capsys)
    assert "no such folder" in failure(["quantize", "--model", "./nowhere"], capsys)
    assert "does not exist" in failure([*quantize, "--data.path", "nowhere.txt"], capsys)
    assert "--bits changes nothing with --scheme int4" in failure(
        [*quantize, "--scheme", "int4", "--bits", "2"], capsys
    )
    minmax = [*quantize, "--scheme", "minmax"]
    assert "--average_bits changes nothing with --scheme minmax" in failure([*minmax, "--average_bits", "3"], capsys)
    mixed = [*quantize, "--scheme", "8da4w", "--average_bits", "3"]
    assert "--average_bits is for weights alone" in failure(mixed, capsys)
    (tmp_path / "x").mkdir()
    assert "--overwrite" in failure(quantize, capsys)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_what_is_quantized_is_not_quantized_again(folder, text, tmp_path, capsys):
    compress.main(["quantize", "--model", str(folder), "--output", str(tmp_path / "x"), *text, "--rounding", "nearest"])
    again = ["quantize", "--model", str(tmp_path / "x"), "--output", str(tmp_path / "y"), *text]
    capsys.readouterr()
    assert "is quantized already" in failure(again, capsys)


@pytest.mark.parametrize("config", [GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96)])
def test_layers_that_the_format_has_no_place_for_are_refused(config):
    with pytest.raises(ValueError, match="Conv1D .* --scheme minmax"):
        quantizable(network(config))


def test_encoders_and_encoder_decoders_are_calibrated_on_what_they_read(encoder, denoiser, texts):
    documents = [file.read_text() for file in sorted(texts.glob("*.txt"))]
    for source in (encoder, denoiser):
        opened = open_model(str(source))
        batches = calibration_batches(opened.network, opened.tokenizer, documents, 4, 32)
        assert sum(len(batch["input_ids"]) for batch in batches) == 4
        layers = quantizable(opened.network)
        moments = input_moments(opened.network, layers, batches)
        assert set(moments) == set(layers)


@pytest.mark.parametrize(
    ("lengths", "count", "begins"),
    [
        ([10_000], 4, [1250, 3750, 6250, 8750]),  # one long document: from all of it
        ([50] * 100, 10, [250, 750, 1250, 1750, 2250, 2750, 3250, 3750, 4250, 4750]),  # short ones: some, whole
        ([10, 5000, 10, 20], 2, [1260, 3780]),
        ([100, 20], 2, [0, 100]),  # no more than is wanted: all
        ([300, 20, 20], 3, [56, 170, 200]),  # inside of a document, not over its end
    ],
)
def test_a_text_is_calibrated_on_from_all_over_it(lengths, count, begins):
    whole = "".join(chr(1000 + place) for place in range(sum(lengths)))
    ends = list(itertools.accumulate(lengths))
    documents = [whole[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    found = list(windows(documents, count, 100))
    assert [ord(text[0]) - 1000 for text, _ in found] == begins
    assert all(any(text in document for document in documents) for text, _ in found)
    assert [begin for _, begin in found] == [text[0] in [d[0] for d in documents] for text, _ in found]


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/data")
def test_four_bits_of_a_real_model_cost_less_by_gptq_than_by_rounding():
    opened = open_model(str(STORIES))
    stories = (STORIES.parent / "lm_tinystories" / "stories.txt").read_text().split("<|endoftext|>")
    batches = calibration_batches(opened.network, opened.tokenizer, stories[64:], 32, 256)
    held_out = calibration_batches(opened.network, opened.tokenizer, stories[:64], 8, 256)
    layers, before = quantizable(opened.network), copy.deepcopy(opened.network.state_dict())
    exact, moments = log_shares(opened.network, held_out), input_moments(opened.network, layers, batches)
    lost = []
    for known in (moments, {}):
        put_in(opened.network, quantized(opened.network, layers, dict.fromkeys(layers, Grid(4)), None, known))
        lost.append(divergence(opened.network, held_out, exact))
        opened.network.load_state_dict(before)
    assert lost[0] < 0.75 * lost[1]


def test_norms_and_biases_are_left_alone():
    names = set(layers_of(network(LlamaConfig(**SMALL, **LLAMA, attention_bias=True)), "int4"))
    assert len(names) == 16 and not any("norm" in name or "bias" in name for name in names)


def test_a_probe_says_what_works_here_and_what_does_not(capsys):
    compress.main(["probe"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-1] == "1.00" and lines[1].startswith("float32")
    assert len(lines) == 8 and all("does not work here" in line or line.split()[-1][0].isdigit() for line in lines[1:])


def test_a_model_of_a_task_is_judged_by_its_metric(reviews, encoder, tmp_path, capsys):
    from tests.finetuning import run as finetune

    data = ["--data.path", str(reviews / "train.csv"), "--data.val_path", str(reviews / "val.csv")]
    length = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.precision", "32-true"]
    finetune("fit", *data, *length, "--model.from", str(encoder), "--trainer.default_root_dir", str(tmp_path / "run"))
    model = ["--model", str(tmp_path / "run"), "--output", str(tmp_path / "small")]
    compress.main(["quantize", *model, "--scheme", "int8-dynamic", "--data.path", str(reviews / "train.csv"),
                   "--data.text_column", "review", "--rows", "8"])  # fmt: skip
    assert "accuracy" in capsys.readouterr().out  # the step itself says what it costs at the task
    models = [str(tmp_path / "run"), str(tmp_path / "small")]
    compress.main(["report", "--model", *models, "--output", str(tmp_path / "report")])
    whole, small = json.loads((tmp_path / "report" / "report.json").read_text()).values()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {name: whole[name] for name in ("accuracy", "f1_macro", "loss")} == pytest.approx(
        {name: summary[f"val_{name}"] for name in ("accuracy", "f1_macro", "loss")}, rel=1e-5
    )
    change = small["accuracy"] - whole["accuracy"]
    assert small["score_change_low"] <= change + 1e-6 and change - 1e-6 <= small["score_change_high"]
    assert abs(change) < 0.03 and "score_change_low" not in whole
    assert 0 < small["same_prediction"] <= 1 and 0 <= whole["calibration_error"] < 1
    assert (tmp_path / "report" / "report.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        finetune("fit", *data, *length, "--model.from", str(tmp_path / "small"))
    assert "has few bits; pass the model that it was made from" in capsys.readouterr().err


def test_layers_whose_inputs_do_not_divide_have_a_scale_for_each_row():
    made = network(LlamaConfig(**(SMALL | {"intermediate_size": 44}), **LLAMA))
    grids = fitted(Grid(4), quantizable(made), None)
    assert grids["model.layers.0.mlp.up_proj"] == Grid(4, 32)  # of 32 inputs
    assert grids["model.layers.0.mlp.down_proj"] == Grid(4)  # of 44
    assert fitted(Grid(8), quantizable(made), None)["model.layers.0.mlp.up_proj"] == Grid(8)


def test_the_small_head_of_labels_stays(encoder):
    from transformers import AutoModelForSequenceClassification

    made = AutoModelForSequenceClassification.from_pretrained(encoder)
    assert made.classifier not in quantizable(made).values() and made.bert.pooler.dense in quantizable(made).values()


@pytest.mark.parametrize("lost", ["weight_scale", "weight_packed"])
def test_a_folder_that_lacks_weights_is_one_line(lost, llama, tmp_path):
    from safetensors.torch import load_file, save_file

    save_packed(tmp_path, llama, layers_of(llama, "int4"))
    state = load_file(tmp_path / "model.safetensors")
    del state[f"model.layers.0.mlp.up_proj.{lost}"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*(up_proj.weight|weights)"):
        read_packed(AutoModelForCausalLM, str(tmp_path))


def test_a_folder_by_others_that_names_kinds_of_layers_is_left_to_transformers(llama, tmp_path):
    from transformers import AutoConfig

    from lightning_modules.compression.packed_folder import is_packed

    save_packed(tmp_path, llama, {k: v for k, v in layers_of(llama, "int8").items() if k not in ("lm_head",)})
    assert is_packed(AutoConfig.from_pretrained(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    config["quantization_config"]["ignore"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not is_packed(AutoConfig.from_pretrained(tmp_path))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids()).logits.isfinite().all()


def test_what_was_done_is_found_beside_a_runs_model_and_damage_is_said(tmp_path):
    from lightning_modules.compression.opened import done_so_far

    (tmp_path / "model").mkdir()
    assert done_so_far(str(tmp_path / "model")) == {"source": str(tmp_path / "model"), "steps": []}
    (tmp_path / "compression.json").write_text(json.dumps({"source": "whole", "steps": [{"verb": "prune"}]}))
    assert done_so_far(str(tmp_path / "model"))["source"] == "whole"
    (tmp_path / "model" / "compression.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged; remove it"):
        done_so_far(str(tmp_path / "model"))


def test_a_package_that_is_not_there_is_said_with_what_brings_it(folder, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else found(name))
    said = failure(["quantize", "--model", str(folder)], capsys)
    assert "needs compressed_tensors, which is not installed: pip install -e '.[compress" in said


def test_few_log_probabilities_are_kept_at_a_time(monkeypatch):
    from lightning_modules.compression import quantization

    batches = [{"input_ids": torch.zeros(8, 4, dtype=torch.long)} for _ in range(3)]
    monkeypatch.setattr(quantization, "MOST_SHARES", 10 * 4 * 100)
    assert [len(batch["input_ids"]) for batch in quantization.some_of(batches, 100)] == [8, 2]
    assert [len(batch["input_ids"]) for batch in quantization.some_of(batches, 10_000)] == [1]


def test_what_is_rounded_in_inference_mode_does_not_hinder_gradients(llama, tmp_path):
    save_packed(tmp_path, llama, layers_of(llama, "8da4w"))
    back = read_packed(AutoModelForCausalLM, str(tmp_path), torch.float32)
    calculated = compressed_tensors.quantization.utils.helpers._calculate_range
    calculated.cache_clear()
    with torch.inference_mode():
        before = back(ids()).logits.clone()
    assert torch.equal(back(ids()).logits.detach(), before)
