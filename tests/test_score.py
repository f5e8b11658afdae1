import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_modules.likelihood import Likelihood, Scorer, batches_by_length, causal_rows, masked_rows, token_nats
from lightning_modules.lstm import LSTMConfig, LSTMForCausalLM
from lightning_modules.span_likelihood import SpanScorer, filled_rows

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "recipes"))

import score  # noqa: E402

SPECIAL = ["<end>", "<pad>", "<mask>", "<cls>", "<sep>"]
VOCAB = 256 + len(SPECIAL)
TEXTS = ["a naïve text", "b", "the last one is longer than the others are", "xyz" * 9]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer(template: bool = False, **named: str) -> PreTrainedTokenizerFast:
    """A token for each byte; `template` puts <cls> and <sep> around a text, as BERT's tokenizer does."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(SPECIAL)
    if template:
        around = [("<cls>", 259), ("<sep>", 260)]
        backend.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


CAUSAL = {"eos_token": "<end>"}
MASKED = {"mask_token": "<mask>", "pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>"}


def with_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from zero, so that every token has another probability."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


def gpt2() -> GPT2LMHeadModel:
    return with_weights(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2)))


def lstm() -> LSTMForCausalLM:
    return with_weights(LSTMForCausalLM(LSTMConfig(vocab_size=VOCAB, hidden_size=16)))


def gemma2() -> Gemma2ForCausalLM:
    """A head that is more than a matrix: its logits are squashed."""
    heads = {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 2.0, "max_position_embeddings": 16}
    return with_weights(Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, **TINY, **heads)))


def bert() -> BertForMaskedLM:
    return with_weights(BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **TINY)))


def roberta() -> RobertaForMaskedLM:
    positions = {"max_position_embeddings": 18, "pad_token_id": 1}
    return with_weights(RobertaForMaskedLM(RobertaConfig(vocab_size=VOCAB, **positions, **TINY)))


def scorer(model, masked: bool = False, seq_len: int | None = 16, stride: int | None = None) -> Scorer:
    names = tokenizer(template=True, **MASKED) if masked else tokenizer(**CAUSAL)
    return Scorer(model, names, masked, None, seq_len, stride, "sample")


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("start_id", [None, 99])
def test_causal_windows_score_every_token_once_from_all_that_fits_before_it(length, stride, start_id):
    ids = list(range(length))
    text = ids if start_id is None else [start_id, *ids]
    rows = list(causal_rows(ids, start_id, seq_len=8, stride=stride))
    assert [target for row in rows for target in row.targets] == text[1:]
    for row in rows:
        assert len(row.input_ids) <= 8
        for column, target in zip(row.columns, row.targets, strict=True):
            read = list(row.input_ids[: column + 1])
            end = text.index(target)
            assert read == text[end - len(read) : end]
            assert len(read) >= min(end, 8 - stride + 1)


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 40])
@pytest.mark.parametrize("stride", [1, 3, 5])
def test_masked_rows_mask_every_token_once_in_the_middle_of_what_fits(length, stride):
    ids = list(range(length))
    rows = list(masked_rows(ids, -1, [-2, -3], [-4], seq_len=8, stride=stride))
    assert [target for row in rows for target in row.targets] == ids
    for row in rows:
        (column,), (target,) = row.columns, row.targets
        assert row.input_ids[:2] == [-2, -3] and row.input_ids[-1] == -4 and row.input_ids[column] == -1
        begin = target - (column - 2)
        expected = ids[begin : begin + 5]
        expected[column - 2] = -1
        assert row.input_ids[2:-1] == expected
        margin = (5 - stride) // 2
        assert column - 2 >= min(target, margin)
        assert len(row.input_ids) - 2 - column >= min(length - 1 - target, margin)


@pytest.mark.parametrize("make", [gpt2, lstm, gemma2])
def test_the_score_of_a_short_text_is_the_loss_of_transformers(make):
    model, text = make(), "fourteen bytes"
    ids = torch.tensor([[256, *tokenizer()(text)["input_ids"]]])
    total = scorer(model).score([text])
    assert total.tokens == total.bytes == 14
    assert total.nats_per_token == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)
    assert total.perplexity == pytest.approx(math.exp(total.nats / 14))
    assert total.bits_per_byte == pytest.approx(total.nats / 14 / math.log(2))


@pytest.mark.parametrize("make", [bert, roberta])
def test_pseudo_likelihood_is_that_of_masking_the_tokens_one_by_one(make):
    model, text = make(), "eleven only"
    ids = torch.tensor([tokenizer(template=True)(text)["input_ids"]])
    expected = 0.0
    for position in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, position] = 258
        expected -= F.log_softmax(model(masked).logits[0, position], -1)[ids[0, position]].item()
    total = scorer(model, masked=True).score([text])
    assert total.tokens == 11
    assert total.nats == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("make", [gpt2, lstm, gemma2, bert, roberta])
@pytest.mark.parametrize("stride", [None, 1])
def test_the_batch_size_changes_nothing(make, stride):
    model = make()
    masked = make in (bert, roberta)
    one = scorer(model, masked, stride=stride).score(TEXTS, batch_size=1)
    for batch_size in (2, 7, None):
        many = scorer(model, masked, stride=stride).score(TEXTS, batch_size)
        assert (many.tokens, many.bytes) == (one.tokens, one.bytes)
        assert many.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-6)


def test_documents_do_not_see_each_other():
    model = gpt2()
    together = scorer(model).score(TEXTS)
    alone = [scorer(model).score([text]) for text in TEXTS]
    assert together.nats == pytest.approx(sum(one.nats for one in alone), rel=1e-6)
    assert together.tokens == sum(one.tokens for one in alone)


def test_a_model_without_an_inner_base_model_is_scored_too():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.device = gpt2(), torch.device("cpu")
            self.base_model = self

        def forward(self, input_ids):
            return self.inner(input_ids)

    rows = list(causal_rows(list(range(30)), 256, 16, 8))
    assert torch.allclose(token_nats(Bare(), rows, mask_padding=False), token_nats(gpt2(), rows, mask_padding=False))


def test_the_head_runs_where_a_token_is_scored_and_nowhere_else():
    model = bert()
    seen = []
    model.cls.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[:2]))
    rows = list(masked_rows(list(range(12)), 258, [259], [260], 16, 8))
    token_nats(model, rows, mask_padding=True)
    assert seen == [(1, 12)]


def test_batches_hold_every_row_once_and_rows_of_similar_length():
    rows = [row for length in (3, 30, 7, 16) for row in causal_rows(list(range(length)), 99, 16, 8)]
    for batch_size, max_tokens in ((None, 32), (2, 1), (None, 1)):
        batches = list(batches_by_length(rows, batch_size, max_tokens))
        assert sorted(map(repr, rows)) == sorted(repr(row) for batch in batches for row in batch)
        lengths = [len(row.input_ids) for batch in batches for row in batch]
        assert lengths == sorted(lengths, reverse=True)
        if batch_size is None:
            assert all(len(batch) == 1 or len(batch) * len(batch[0].input_ids) <= max_tokens for batch in batches)


def test_without_bos_and_eos_the_first_token_is_not_counted():
    bare = Scorer(gpt2(), tokenizer(), False, None, 16, None, "sample")
    total = bare.score(["abcd", "éx"])
    # é has two bytes and two tokens, the second of which completes the character.
    assert (bare.not_counted, total.tokens, total.bytes) == (2, 3 + 2, 3 + 3)


def test_what_looks_like_a_special_token_is_text():
    assert scorer(lstm()).score(["a<end>b"]).tokens == 7


def test_bits_per_byte_counts_bytes_and_not_characters():
    assert Likelihood(nats=math.log(2) * 6, tokens=1, bytes=len("é€a".encode())).bits_per_byte == pytest.approx(1.0)


def save(folder: Path, model, **named: str) -> Path:
    model.save_pretrained(folder)
    tokenizer(template="cls_token" in named, **named).save_pretrained(folder)
    return folder


def figures(capsys, *arguments: object) -> dict:
    score.main([str(argument) for argument in arguments] + ["--json"])
    return json.loads(capsys.readouterr().out)


def error(capsys, *arguments: object) -> str:
    """The one line of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        score.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (exit.value.code, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.parametrize("make", [gpt2, lstm, bert])
def test_a_folder_is_scored_on_files(capsys, tmp_path: Path, make):
    masked = make is bert
    folder = save(tmp_path / "model", make(), **(MASKED if masked else CAUSAL))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    flags = ["--data.path", tmp_path / "texts.jsonl", "--data.text_column", "body"]
    result = figures(capsys, "--model", tmp_path, *flags, "--seq_len", 16)
    expected = scorer(make(), masked).score(TEXTS)
    assert result["documents"] == 4
    assert (result["tokens"], result["bytes"]) == (expected.tokens, expected.bytes)
    assert result["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert result["kind"] == ("masked" if masked else "causal")
    score.main(["--model", str(folder), *map(str, flags), "--seq_len", "16"])
    assert f"bits per byte{result['bits_per_byte']:>17.4f}" in capsys.readouterr().out


def test_a_separator_parts_the_documents_of_a_file(capsys, tmp_path: Path):
    folder = save(tmp_path / "model", lstm(), **CAUSAL)
    (tmp_path / "one.txt").write_text("<end>\nfirst\n<end>\n second\n<end>\n")
    result = figures(capsys, "--model", folder, "--data.path", tmp_path / "one.txt", "--data.separator", "<end>")
    expected = scorer(lstm()).score(["first", "second"])
    assert (result["documents"], result["bytes"]) == (2, 11)
    assert result["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)


def test_the_window_is_what_the_positions_allow(capsys, tmp_path: Path):
    (tmp_path / "long.txt").write_text("a long text, " * 9)
    text = ["--data.path", tmp_path / "long.txt"]
    for make, named, positions in ((gpt2, CAUSAL, 16), (roberta, MASKED, 16), (lstm, CAUSAL, 4096)):
        folder = save(tmp_path / make.__name__, make(), **named)
        assert figures(capsys, "--model", folder, *text)["seq_len"] == positions
    assert "the model has 16 positions" in error(capsys, "--model", tmp_path / "gpt2", *text, "--seq_len", 17)
    assert "--stride 17 would pass over tokens" in error(capsys, "--model", tmp_path / "gpt2", *text, "--stride", 17)
    assert "no room" in error(capsys, "--model", tmp_path / "roberta", *text, "--seq_len", 2)


# Encoder-decoders


@pytest.mark.parametrize("length", [1, 2, 3, 20, 21, 22, 64])
def test_each_token_of_a_span_model_is_written_once_from_the_others(length):
    ids, sentinels = list(range(100, 100 + length)), [1000 + i for i in range(9)]
    rows = list(filled_rows(ids, sentinels, 1))
    written = [token for row in rows for token, counts in zip(row.labels, row.counted, strict=True) if counts]
    assert sorted(written) == ids and len(rows) <= 7
    for row in rows:
        filled, spans = [], {}
        for token in row.labels:
            if token >= 1000:
                spans[token] = last = []
            else:
                last.append(token)
        for token in row.inputs[:-1]:
            filled += spans.get(token, [token])
        assert filled == ids and row.inputs[-1] == 1


def test_spans_are_scored_as_transformers_does_in_any_batch(denoiser, capsys, tmp_path):
    network = AutoModelForSeq2SeqLM.from_pretrained(denoiser).eval()
    tokenizer = AutoTokenizer.from_pretrained(denoiser)
    texts = ["the film was fine and its end lovely", "no", "é and more of it"]
    total = SpanScorer(network, tokenizer, 30).score(texts)
    nats, tokens = 0.0, 0
    for row in SpanScorer(network, tokenizer, 30).rows(texts):
        labels = torch.tensor([[t if c else -100 for t, c in zip(row.labels, row.counted, strict=True)]])
        start = torch.tensor([[network.config.decoder_start_token_id, *row.labels[:-1]]])
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([row.inputs]), decoder_input_ids=start).logits
        nats += float(F.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum"))
        tokens += int((labels >= 0).sum())
    assert total.nats == pytest.approx(nats, rel=1e-5) and total.tokens == tokens
    assert total.bytes == sum(len(text.encode()) for text in texts)
    assert SpanScorer(network, tokenizer, 30).score(texts, 1).nats == pytest.approx(nats, rel=1e-5)
    (tmp_path / "a.txt").write_text(texts[0])
    score.main(["--model", str(denoiser), "--data.path", str(tmp_path / "a.txt")])
    assert "each span of three tokens left out once" in capsys.readouterr().out


def test_a_model_that_gives_no_probability_is_refused(capsys, tmp_path: Path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = save(tmp_path / "t5", T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes)), **CAUSAL)
    no_mask = save(tmp_path / "no_mask", bert(), **CAUSAL)
    small = save(tmp_path / "small", LSTMForCausalLM(LSTMConfig(vocab_size=80, hidden_size=16)), **CAUSAL)
    (tmp_path / "a.txt").write_text("é")
    text = ["--data.path", tmp_path / "a.txt"]
    assert "knows no spans to fill" in error(capsys, "--model", t5, *text)
    assert "has no mask token" in error(capsys, "--model", no_mask, *text)
    assert "gives id 127, the model knows 80 ids" in error(capsys, "--model", small, *text)


def test_what_is_wrong_with_the_text_is_said(capsys, tmp_path: Path):
    folder = ["--model", save(tmp_path / "model", lstm(), **CAUSAL)]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    assert "nowhere.txt does not exist" in error(capsys, *folder, "--data.path", tmp_path / "nowhere.txt")
    assert "empty.txt is empty" in error(capsys, *folder, "--data.path", tmp_path / "empty.txt")
    assert "latin.txt is not UTF-8 at byte 2" in error(capsys, *folder, "--data.path", tmp_path / "latin.txt")
    assert "rows.jsonl:2: " in error(capsys, *folder, "--data.path", tmp_path / "rows.jsonl")
    assert "did you mean --data.path" in error(capsys, *folder, "--data.pat", "x")
    score.main([*map(str, folder), "--data.path", str(tmp_path / "rows.jsonl"), "--data.on_bad_row", "skip"])
    captured = capsys.readouterr()
    assert "1 rows of" in captured.err and "left out" in captured.err
    assert "documents                    1" in captured.out


def test_help_comes_without_torch():
    script = "import sys, score\ntry: score.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "recipes", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--data.text_column" in run.stdout


@pytest.mark.skipif(not DATA.exists(), reason="needs the stories260K checkpoint and TinyStories")
def test_a_real_model_scores_as_transformers_does():
    folder = DATA / "ckpt_stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    names = AutoTokenizer.from_pretrained(folder)
    stories = (DATA / "lm_tinystories" / "stories.txt").read_text().split("<|endoftext|>")
    stories = [story.strip() for story in stories[:16] if len(story) < 900]  # they fit the model
    nats = tokens = 0
    for story in stories:
        ids = names(story, return_tensors="pt")["input_ids"]
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    total = Scorer(model, names, False, 512, None, None, stories[0]).score(stories)
    assert total.tokens == tokens
    assert total.nats_per_token == pytest.approx(nats / tokens, rel=1e-6)
