"""Smaller and sparser models: what goes is what matters least, and what is left is an ordinary model."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    NanoChatConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from lightning_modules.compression import vocabulary
from lightning_modules.compression.opened import open_model
from lightning_modules.compression.quantization import divergence, log_shares
from lightning_modules.compression.reordering import linear_layers, orders, reorder
from lightning_modules.compression.sizes import Sizes, sizes_of, smaller_config
from lightning_modules.compression.sparsity import kept, sparsify
from lightning_modules.compression.structured import Worth, best_sizes, pruned, worth_of
from recipes import compress
from tests.test_quantization import failure, network

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"vocab_size": 96, "max_position_embeddings": 64}
T5 = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 3, "vocab_size": 96}
T5 |= {"decoder_start_token_id": 0}
FAMILIES = {
    "llama": (LlamaConfig(**SIZES, num_key_value_heads=2), AutoModelForCausalLM),
    "llama tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), AutoModelForCausalLM),
    "nanochat": (NanoChatConfig(**SIZES, num_key_value_heads=2), AutoModelForCausalLM),
    "qwen2": (Qwen2Config(**SIZES, num_key_value_heads=2), AutoModelForCausalLM),
    "qwen3": (Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16), AutoModelForCausalLM),
    "gpt2": (GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=96, n_positions=64), AutoModelForCausalLM),
    "bert": (BertConfig(**SIZES), AutoModelForMaskedLM),
    "t5": (T5Config(**T5), AutoModelForSeq2SeqLM),
    "t5 gated": (T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), AutoModelForSeq2SeqLM),
}


def made(family: str):
    config, auto_class = FAMILIES[family]
    whole = network(copy.deepcopy(config), auto_class)
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    return whole, [inputs], auto_class


@pytest.mark.parametrize("family", FAMILIES)
def test_reordering_moves_every_matrix_and_changes_nothing(family):
    whole, batches, _ = made(family)
    before, weights = log_shares(whole, batches)[0], copy.deepcopy(whole.state_dict())
    reorder(whole, orders(whole, batches))
    matrices = [name for name, weight in weights.items() if weight.ndim == 2 and "relative" not in name]
    assert all(not torch.equal(whole.state_dict()[name], weights[name]) for name in matrices)
    assert torch.allclose(log_shares(whole, batches)[0], before, atol=2e-3 if "gated" in family else 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_is_read_back_and_keeps_what_matters(family, tmp_path):
    whole, batches, auto_class = made(family)
    exact, worth = log_shares(whole, batches), worth_of(whole, batches, 2)
    sizes = Sizes(2, 48, 64, 3 if family in ("gpt2", "bert") else 2)
    small, layers = pruned(copy.deepcopy(whole), sizes, worth, auto_class)
    assert sizes_of(small.config) == sizes and len(layers) == 2
    least = Worth({key: order.flip(0) for key, order in worth.orders.items()}, worth.layers_least_first)
    worst, _ = pruned(copy.deepcopy(whole), sizes, least, auto_class)
    assert divergence(small, batches, exact) < divergence(worst, batches, exact)
    small.save_pretrained(tmp_path)
    back = auto_class.from_pretrained(tmp_path).eval()
    assert torch.equal(log_shares(back, batches)[0], log_shares(small, batches)[0])
    assert back.config.tie_word_embeddings == whole.config.tie_word_embeddings
    if small.can_generate():
        assert back.generate(batches[0]["input_ids"][:1, :4], max_new_tokens=3, do_sample=False).shape[1] > 1


def test_all_of_a_model_is_the_model():
    whole, batches, auto_class = made("llama")
    same, layers = pruned(copy.deepcopy(whole), Sizes(), worth_of(whole, batches, 3), auto_class)
    assert layers == [0, 1, 2]
    assert torch.allclose(log_shares(same, batches)[0], log_shares(whole, batches)[0], atol=1e-4)


def test_heads_that_share_their_keys_go_together():
    whole, batches, auto_class = made("llama")
    with torch.no_grad():  # the second group of two heads adds nothing
        for layer in whole.model.layers:
            layer.self_attn.o_proj.weight[:, 32:] = 0
    before = log_shares(whole, batches)
    small, _ = pruned(whole, Sizes(heads=2), worth_of(whole, batches, 3), auto_class)
    assert small.config.num_key_value_heads == 1
    assert divergence(small, batches, before) < 1e-6


def test_numbers_inside_a_layer_that_nothing_reads_go_first():
    whole, batches, auto_class = made("gpt2")
    with torch.no_grad():
        for number, block in enumerate(whole.transformer.h):
            block.mlp.c_proj.weight[number : 64 + number] = 0  # of 256
    before = log_shares(whole, batches)
    small, _ = pruned(whole, Sizes(inner=192), worth_of(whole, batches, 3), auto_class)
    assert divergence(small, batches, before) < 1e-6


def test_a_layer_that_changes_nothing_goes_first():
    whole, batches, auto_class = made("qwen2")
    with torch.no_grad():
        whole.model.layers[1].mlp.down_proj.weight.zero_()
        whole.model.layers[1].self_attn.o_proj.weight.zero_()
    before = log_shares(whole, batches)
    small, layers = pruned(whole, Sizes(layers=2), worth_of(whole, batches, 2), auto_class)
    assert layers == [0, 2]
    assert divergence(small, batches, before) < 1e-6


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sizes_for_a_share_of_the_parameters_are_found_by_trying(family):
    whole, batches, auto_class = made(family)
    exact = log_shares(whole, batches)
    sizes, nats = best_sizes(whole, 0.6, batches, auto_class)
    small, _ = pruned(copy.deepcopy(whole), sizes, worth_of(whole, batches, sizes.layers), auto_class)
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in whole.parameters())
    assert 0.9 * 0.6 <= share <= 0.6
    assert divergence(small, batches, exact) == pytest.approx(nats, rel=1e-3)


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("llama", Sizes(heads=3), "2 heads share their keys and values; pass a multiple"),
        ("llama", Sizes(layers=4), "--layers 4: the model has 3"),
        ("bert", Sizes(width=48), "side by side in its width; pass --width 64, or --heads 3"),
    ],
)
def test_sizes_that_are_no_part_are_refused(family, sizes, said):
    with pytest.raises(ValueError, match=said):
        smaller_config(made(family)[0], sizes, [0, 1, 2])


# Single weights


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_as_many_weights_are_zero_as_asked_for(sparsity):
    weight_RC = torch.randn(32, 40, generator=torch.Generator().manual_seed(0))
    moments_CC = torch.rand(40, generator=torch.Generator().manual_seed(1)).diag()
    by_row = kept(weight_RC, sparsity, "unstructured", moments_CC)
    assert (~by_row).sum(1).tolist() == [round(sparsity * 40)] * 32
    assert (~kept(weight_RC, sparsity, "unstructured")).float().mean() == pytest.approx(sparsity, abs=0.01)
    fours = kept(weight_RC, 0.5, "2:4", moments_CC).view(32, 10, 4)
    assert (fours.sum(-1) == 2).all()


def test_wanda_weighs_by_what_is_read_and_magnitude_does_not():
    weight_RC = torch.tensor([[1.0, 0.5, 0.4, 0.1]])
    moments_CC = torch.tensor([0.01, 1.0, 1.0, 100.0]).diag()  # ‖x‖ is 0.1, 1, 1, 10
    assert kept(weight_RC, 0.5, "unstructured", moments_CC).tolist() == [[False, True, False, True]]
    assert kept(weight_RC, 0.5, "unstructured").tolist() == [[True, True, False, False]]


def test_norms_biases_and_ends_are_not_pruned():
    whole, _, _ = made("qwen2")
    before = copy.deepcopy(whole.state_dict())
    layers = {name: layer for name, layer in linear_layers(whole).items() if name != "lm_head"}
    zero, of = sparsify(layers, 0.5, "unstructured", {})
    assert zero / of == pytest.approx(0.5, abs=0.01)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, before[name]) == (name.rpartition(".")[0] not in layers or name.endswith("bias"))


# Words


@pytest.fixture(scope="module")
def stdlib_words(decoder, texts):
    opened = open_model(str(decoder))
    documents = [file.read_text() for file in sorted(texts.glob("*.txt"))]
    return opened, documents


def test_a_text_of_the_words_that_are_left_is_cut_and_read_as_before(stdlib_words):
    opened, documents = stdlib_words
    counts = vocabulary.counted(opened.tokenizer, documents)
    ids = vocabulary.kept_ids(opened.tokenizer, counts, len(opened.tokenizer))
    assert len(ids) < len(opened.tokenizer)  # of the others none is used
    tokenizer = vocabulary.smaller_tokenizer(opened.tokenizer, ids)
    small = vocabulary.smaller_network(opened.network, ids, opened.auto_class)
    assert small.config.vocab_size == len(tokenizer) == len(ids)
    for text in documents:
        before, after = (words(text)["input_ids"] for words in (opened.tokenizer, tokenizer))
        assert [ids[number] for number in after] == before
    with torch.no_grad():
        logits = opened.network(torch.tensor([before[:40]])).logits[..., ids]
        assert torch.equal(small(torch.tensor([after[:40]])).logits, logits)


def test_fewer_words_still_read_any_text(stdlib_words, tmp_path):
    opened, documents = stdlib_words
    counts = vocabulary.counted(opened.tokenizer, documents)
    ids = vocabulary.kept_ids(opened.tokenizer, counts, 300)
    assert len(ids) <= 300
    vocabulary.smaller_tokenizer(opened.tokenizer, ids).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = documents[0] + " Ünïcode 東京 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.eos_token == opened.tokenizer.eos_token and tokenizer.eos_token_id < 300
    with pytest.raises(ValueError, match="--vocabulary 100: special tokens and single characters are 2"):
        vocabulary.kept_ids(opened.tokenizer, counts, 100)


def test_word_pieces_keep_what_stands_around_a_text(word_pieces):
    tokenizer = AutoTokenizer.from_pretrained(word_pieces)
    texts = ["river stone 7?", "green castle"]
    ids = vocabulary.kept_ids(tokenizer, vocabulary.counted(tokenizer, texts), len(tokenizer) - 4)
    smaller = vocabulary.smaller_tokenizer(tokenizer, ids)
    for text in texts:
        assert smaller(text)["input_ids"] == [ids.index(number) for number in tokenizer(text)["input_ids"]]
    assert smaller.convert_ids_to_tokens(smaller("river")["input_ids"]) == ["[CLS]", "river", "[SEP]"]


# The command


def prune(decoder: Path, texts: Path, out: Path, *flags: str) -> dict:
    read = ["--data.path", str(texts), "--data.val_fraction", "0.3", "--rows", "4"]
    compress.main(["prune", "--model", str(decoder), "--output", str(out), *read, *flags])
    return json.loads((out / "compression.json").read_text())["steps"][-1]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parameters", "0.7"], "tried  the sizes that leave 70%"),
        (["--layers", "1", "--inner", "32"], "layers 2 → 1 (numbers"),
        (["--vocabulary", "320"], "words  400 → 3"),
        (["--method", "wanda"], "50.00 %"),
        (["--method", "magnitude", "--sparsity", "0.3"], "(29.98 %)"),
        (["--method", "wanda", "--pattern", "2:4"], "50.00 %"),
    ],
)
def test_prune_writes_a_folder_and_says_what_it_did(flags, told, decoder, texts, tmp_path, capsys):
    step = prune(decoder, texts, tmp_path / "out", *flags)
    assert step["verb"] == "prune"
    assert told in capsys.readouterr().out
    opened = open_model(str(tmp_path / "out"))
    assert opened.stored == open_model(str(decoder)).stored
    ids = opened.tokenizer("the film was fine", return_tensors="pt")["input_ids"]
    assert opened.network(ids).logits.shape[-1] == opened.network.config.vocab_size


def test_flags_that_do_not_go_together_are_one_line(decoder, capsys):
    model = ["prune", "--model", str(decoder)]
    assert "nothing to prune" in failure(model, capsys)
    assert "leave it out, or --layers" in failure([*model, "--parameters", "0.5", "--layers", "1"], capsys)
    assert "--parameters is for --method structured" in failure(
        [*model, "--method", "wanda", "--parameters", "0.5"], capsys
    )
    assert "--sparsity and --pattern are for" in failure([*model, "--layers", "1", "--sparsity", "0.5"], capsys)
    assert "--pattern 2:4 is --sparsity 0.5" in failure(
        [*model, "--method", "wanda", "--pattern", "2:4", "--sparsity", "0.7"], capsys
    )
    assert "pass a share between 0 and 1" in failure([*model, "--parameters", "1.5"], capsys)
    assert "--skip is for" in failure([*model, "--layers", "1", "--skip", "[mlp]"], capsys)
    assert "twice" in failure(["report", "--model", str(decoder), str(decoder)], capsys)


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_what_matters_to_a_real_model_is_found(tmp_path):
    from lightning_modules.compression.calibration import calibration_batches

    opened = open_model(str(DATA / "ckpt_stories260K"))
    stories = (DATA / "lm_tinystories" / "stories.txt").read_text().split("<|endoftext|>")
    batches = calibration_batches(opened.network, opened.tokenizer, stories[:32], 16, 256)
    exact, worth = log_shares(opened.network, batches), worth_of(opened.network, batches, 5)
    sizes = Sizes(inner=116)
    by_worth, _ = pruned(copy.deepcopy(opened.network), sizes, worth, opened.auto_class)
    leading, _ = pruned(copy.deepcopy(opened.network), sizes, Worth({}, []), opened.auto_class)
    assert divergence(by_worth, batches, exact) < 0.6 * divergence(leading, batches, exact)


@pytest.mark.parametrize("kind", ["gpt_neox", "bloom", "falcon"])
def test_layers_alone_go_of_any_family(kind, tmp_path):
    from transformers import BloomConfig, FalconConfig, GPTNeoXConfig

    config = {
        "gpt_neox": GPTNeoXConfig(**SIZES),
        "bloom": BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=96),
        "falcon": FalconConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=96),
    }[kind]
    whole, batches = network(config), [{"input_ids": torch.arange(24).view(2, 12) % 96}]
    small, layers = pruned(whole, Sizes(layers=2), worth_of(whole, batches, 2, only_layers=True), AutoModelForCausalLM)
    small.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(log_shares(back, batches)[0], log_shares(small, batches)[0]) and len(layers) == 2
    with pytest.raises(ValueError, match="prune --layers alone"):
        smaller_config(whole, Sizes(inner=32), [0, 1])


def test_of_gpt2_two_of_four_inputs_stay():
    from lightning_modules.compression.calibration import input_moments
    from lightning_modules.compression.sparsity import by_outputs

    whole, batches, _ = made("gpt2")
    layers = {name: layer for name, layer in linear_layers(whole).items() if name != "lm_head"}
    moments = input_moments(whole, layers, batches)
    zero, of = sparsify(layers, 0.5, "2:4", moments)
    assert zero == of / 2
    for name, layer in layers.items():
        assert ((by_outputs(layer) != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
    before = by_outputs(layers["transformer.h.0.mlp.c_fc"]).clone()
    sparsify(layers, 0.75, "unstructured", moments)
    assert ((by_outputs(layers["transformer.h.0.mlp.c_fc"]) != 0).sum(1) == 16).all()
    assert not torch.equal(before, by_outputs(layers["transformer.h.0.mlp.c_fc"]))


def test_words_that_a_config_names_stay(stdlib_words):
    opened, documents = stdlib_words
    rare = len(opened.tokenizer) - 1
    whole = copy.deepcopy(opened.network)
    whole.config.eos_token_id = [opened.tokenizer.eos_token_id, rare]
    named = vocabulary.ids_named_by(whole)
    assert rare in named
    counts = vocabulary.counted(opened.tokenizer, documents[:1])
    ids = vocabulary.kept_ids(opened.tokenizer, counts, 300, named)
    small = vocabulary.smaller_network(whole, ids, opened.auto_class)
    assert small.config.eos_token_id == [ids.index(opened.tokenizer.eos_token_id), ids.index(rare)]
    with pytest.raises(ValueError, match="the tokenizer gives id 9999"):
        vocabulary.smaller_network(whole, [0, 9999], opened.auto_class)


def test_the_folder_of_the_model_is_no_place_for_the_result(decoder, capsys):
    words = ["prune", "--model", str(decoder), "--layers", "1", "--overwrite", "true", "--output"]
    assert "holds the model itself" in failure([*words, str(decoder)], capsys)
    assert "holds the model itself" in failure([*words, str(decoder.parent)], capsys)
