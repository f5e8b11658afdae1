import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from datamodules import encode_corpus
from datamodules.corpus import open_corpus
from datamodules.documents import _SAFE_CUT, pieces
from datamodules.encoding import TRICKY_TEXTS, Encoder, encoders, same_ids, token_bytes
from datamodules.files import BadRows
from datamodules.sources import ContentHashes
from datamodules.tokenization import (
    SENTINELS,
    bpe_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    document_start,
    fingerprint,
    load_tokenizer,
    require_special_tokens,
    sentinel_ids,
)

TEXT = "def pack(rows):\n    return [row for row in rows if row]  # größer als 0 – naïve 😀\n\n" * 20
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the shared data are not beside the project")


def made(name: str, objective: str = "causal") -> PreTrainedTokenizerBase:
    if name == "bpe":
        return bpe_tokenizer([TEXT], len(TEXT), 300 + SENTINELS * (objective == "denoising"), objective)
    return byte_tokenizer(objective) if name == "bytes" else character_tokenizer([TEXT], objective)


def random_texts(count: int = 200) -> list[str]:
    source = random.Random(0)
    alphabet = [chr(i) for i in range(0x250)] + list("  \n\n\t'’中文한글😀\u0301\u00a0\u2028\ufeff") + ["<|endoftext|>"]
    return ["".join(source.choices(alphabet, k=source.randrange(60))) for _ in range(count)]


@pytest.mark.parametrize("objective", ["causal", "masked", "denoising"])
@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
def test_a_saved_tokenizer_is_loaded_by_transformers_with_equal_ids_and_exact_text(tmp_path, name, objective):
    tokenizer = made(name, objective)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert loaded(TEXT)["input_ids"] == ids and loaded.decode(ids) == TEXT
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded.decode(tokenizer("a [ 0 ]  # in")["input_ids"]) == "a [ 0 ]  # in"


@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
def test_special_tokens_are_those_the_objective_needs(name):
    causal, masked, denoising = (made(name, objective) for objective in ("causal", "masked", "denoising"))
    for tokenizer in (causal, masked, denoising):
        assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
        assert (tokenizer.unk_token == "<|unk|>") == (name == "chars")
    assert causal.pad_token is None and causal.mask_token is None and not len(sentinel_ids(causal))
    assert masked.pad_token_id is not None and masked.mask_token_id is not None
    assert denoising.pad_token_id is not None and len(set(sentinel_ids(denoising))) == SENTINELS


def test_ids_of_bytes_are_the_bytes_and_ids_of_characters_are_in_their_order():
    assert made("bytes")("é")["input_ids"] == list("é".encode())
    characters = character_tokenizer(["cab", "a"], "causal")
    assert characters("abc")["input_ids"] == [0, 1, 2] and len(characters) == 5
    assert characters("x")["input_ids"] == [characters.unk_token_id]


def test_a_bpe_is_trained_to_its_size_and_twice_the_same():
    tokenizer = made("bpe")
    assert len(tokenizer) == 300 and fingerprint(tokenizer) == fingerprint(made("bpe"))
    assert len(tokenizer(TEXT)["input_ids"]) < len(TEXT.encode()) / 2


def test_a_vocabulary_below_the_bytes_is_refused_with_the_flag():
    with pytest.raises(ValueError, match="--data.vocab_size is 200; .* need 257"):
        bpe_tokenizer([TEXT], 1, 200, "causal")


@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
def test_the_fast_way_gives_the_tokenizers_own_ids_for_any_text(name):
    fast, slow = encoders(made(name))
    assert fast.name in ("tiktoken", "a table of bytes", "a table of characters")
    assert same_ids(fast, slow, [*TRICKY_TEXTS, *random_texts(), TEXT])


@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
def test_text_that_looks_like_a_special_token_is_text(name):
    tokenizer = made(name, "masked")
    for encoder in encoders(tokenizer):
        (ids,) = encoder.encode(["<|endoftext|><|mask|>"])
        assert document_start(tokenizer) not in ids and tokenizer.mask_token_id not in ids


@needs_data
@pytest.mark.parametrize("name", ["tok_gpt2", "pair"])
def test_gpt2s_files_take_the_fast_way(name):
    pair = f"{DATA}/tok_gpt2/vocab.json,{DATA}/tok_gpt2/merges.txt"
    tokenizer = load_tokenizer(pair if name == "pair" else str(DATA / name))
    fast, slow = encoders(tokenizer)
    assert fast.name == "tiktoken" and tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert same_ids(fast, slow, [*TRICKY_TEXTS, *random_texts(), TEXT])


@needs_data
def test_berts_vocabulary_lowercases_and_knows_its_special_tokens():
    tokenizer = load_tokenizer(str(DATA / "tok_bert_uncased"))
    assert tokenizer.tokenize("Hello World") == ["hello", "world"]
    assert document_start(tokenizer) == tokenizer.cls_token_id and len(encoders(tokenizer)) == 1
    (ids,) = encoders(tokenizer)[0].encode(["[MASK] hello"])
    assert tokenizer.mask_token_id not in ids


def test_ids_need_not_be_ranks_for_the_fast_way():
    tokenizer = made("bpe")
    state = tokenizer.backend_tokenizer.to_str()
    vocab = {token: i for token, i in tokenizer.get_vocab().items() if token != "<|endoftext|>"}
    merges = [tuple(merge) for merge in json.loads(state)["model"]["merges"]]
    turned = {token: len(vocab) - 1 - i for token, i in vocab.items()}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=turned, merges=merges)
    fast, slow = encoders(tokenizer)
    assert fast.name == "tiktoken" and same_ids(fast, slow, [TEXT, *random_texts(50)])


@pytest.mark.parametrize("change", ["normalizer", "prefix space", "added token", "duplicate merge"])
def test_a_tokenizer_that_is_not_understood_takes_no_fast_way(change):
    tokenizer = made("bpe")
    backend = tokenizer.backend_tokenizer
    if change == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif change == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "added token":
        backend.add_tokens([AddedToken("return")])
    else:
        letters = {char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}
        vocab = letters | {"ab": 256, "bc": 257, "abc": 258}
        merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
        backend.model = models.BPE(vocab=vocab, merges=merges)
    assert [encoder.name for encoder in encoders(tokenizer)] == ["the tokenizer itself"]


def test_a_long_file_has_the_ids_of_the_whole_though_it_is_encoded_in_pieces(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 1000)
    parts = [piece.text for piece in pieces(file, "text", BadRows(False))]
    assert len(parts) > 1 and "".join(parts) == TEXT * 1000
    for name in ("bpe", "bytes", "chars"):
        encode = encoders(made(name))[0].encode
        assert np.array_equal(np.concatenate(encode(parts)), encode([TEXT * 1000])[0])


@pytest.mark.parametrize("name", ["bpe", pytest.param("tok_bert_uncased", marks=needs_data)])
def test_pieces_end_only_where_a_word_does(name):
    """Cuts every text at every place that counts as safe."""
    encoder = encoders(made(name) if name == "bpe" else load_tokenizer(str(DATA / name)))[0]
    encode = encoder.encode
    assert encoder.takes_pieces
    for text in [*TRICKY_TEXTS, *random_texts(), TEXT[:400]]:
        for match in _SAFE_CUT.finditer(text):
            halves = encode([text[: match.start()], text[match.start() :]])
            assert np.array_equal(np.concatenate(halves), encode([text])[0]), text


def test_where_the_fast_way_differs_the_tokenizer_itself_encodes_and_it_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = open_corpus(str(tmp_path / "text.txt"), None, 0.1, "text", False, ContentHashes(tmp_path / "hashes"))
    tokenizer = made("bytes")
    wrong = Encoder("a wrong table", lambda texts: [np.zeros(len(t), np.uint32) for t in texts], takes_pieces=True)
    monkeypatch.setattr(encode_corpus, "encoders", lambda t: [wrong, encoders(t)[-1]])
    store = encode_corpus.encode_corpus(tmp_path / "store", corpus, tokenizer, 257)
    assert bytes(store.train.tokens_N[1:].astype(np.uint8)) + bytes(store.val.tokens_N[1:].astype(np.uint8)) == (
        TEXT.encode()
    )
    assert len(capsys.readouterr().err.splitlines()) == 1 and store.about["encoder"] == "the tokenizer itself"


@pytest.mark.parametrize("trap", ["document 3", "½"])
def test_ids_are_proven_on_text_from_all_over_the_corpus_and_on_unusual_text(tmp_path, monkeypatch, capsys, trap):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}\n" * 40)
    corpus = open_corpus(str(tmp_path / "*.txt"), None, 0.1, "text", False, ContentHashes(tmp_path / "hashes"))
    tokenizer = made("bytes")
    right = encoders(tokenizer)[0].encode

    def err(texts: list[str]) -> list[np.ndarray]:
        return [ids + (trap in text) for ids, text in zip(right(texts), texts, strict=True)]

    wrong = Encoder("a wrong table", err, takes_pieces=True)
    monkeypatch.setattr(encode_corpus, "encoders", lambda t: [wrong, encoders(t)[-1]])
    store = encode_corpus.encode_corpus(tmp_path / "store", corpus, tokenizer, 257)
    assert store.about["encoder"] == "the tokenizer itself" and "a wrong table" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bpe", "bytes", "chars"])
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(name):
    tokenizer = made(name, "masked")
    sizes = token_bytes(tokenizer, len(tokenizer), mean=1e9)
    assert sizes[tokenizer(TEXT)["input_ids"]].sum() == len(TEXT.encode())
    assert (sizes[tokenizer.all_special_ids] == 0).all()


@needs_data
def test_bytes_of_tokens_are_the_mean_where_the_tokenizer_changes_the_text():
    tokenizer = load_tokenizer(str(DATA / "tok_bert_uncased"))
    sizes = token_bytes(tokenizer, len(tokenizer), mean=4.5)
    assert sizes[tokenizer.cls_token_id] == 0 and sizes[tokenizer.convert_tokens_to_ids("hello")] == 4.5


@pytest.mark.parametrize(("objective", "missing"), [("masked", "no mask token"), ("denoising", "no pad token")])
def test_a_tokenizer_without_what_the_objective_needs_is_refused(objective, missing):
    with pytest.raises(ValueError, match=f"--data.tokenizer has {missing}.*--data.objective {objective}"):
        require_special_tokens(made("bytes"), objective, sentinels=1)


def test_too_few_sentinels_are_refused():
    with pytest.raises(ValueError, match="has 100 of the 114 sentinels.*--data.seq_len"):
        require_special_tokens(made("bytes", "denoising"), "denoising", sentinels=114)


@pytest.mark.parametrize("content", [{}, {"vocab.json": "{}"}, {"tokenizer.json": "{"}])
def test_a_folder_that_holds_no_tokenizer_is_said_in_one_line(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((OSError, ValueError)) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_documents_begin_with_what_the_tokenizer_itself_puts_before_a_text():
    """So a model that was trained with it reads the beginning that it knows, in training as in scoring."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from lightning_modules.architectures import fit_config

    backend = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert document_start(plain) == 2
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert document_start(begun) == 1 and fingerprint(begun) != fingerprint(plain)
    for tokenizer, ends in ((plain, 2), (begun, [2, 1])):
        config = LlamaConfig()
        fit_config(config, tokenizer, 4, 8)
        assert config.eos_token_id == ends  # what generation stops at
