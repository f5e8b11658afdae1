"""From text to ids, as fast as the machine allows: the tokenizer's own ids, by a shorter way where one is proven.

Text that looks like a special token is text: nothing in a corpus can end a document or mask a word.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor, from_numpy
from transformers import PreTrainedTokenizerBase

from datamodules.tokenization import END_OF_TEXT, byte_characters

Encode = Callable[[list[str]], list[np.ndarray]]
"""The ids of each text, none of them special."""

TRICKY_TEXTS = [
    "",
    " ",
    "\n",
    "  two  blanks,\ttabs\t\tand \n \n\n line ends \r\n ",
    "it's we'll they've I'm you'd DON'T 'S ''s '",
    "naïve Straße Ελλάδα русский עברית العربية हिन्दी 中文 日本語 한국어 ไทย",
    "e\u0301 \u00a0 \u2003 \u200b \u2028 \u3000 \ufeff \u0000 \x1c \x85 |",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ½ ⅷ ² ٣ 𝔘𝔫𝔦 12345 1,234.5e-6",
    "<|endoftext|> <|pad|><|mask|> <extra_id_0> [MASK] [CLS] </s> <s> <unk>",
    "a" * 300 + " " * 300 + "!" * 300 + "\n" * 300,
    "def f(x):\n    return x**2  # comment\n\n\nclass A(B):\n\tpass",
]


@dataclass(frozen=True)
class Encoder:
    """How a corpus is encoded, and whether a document may be encoded in the pieces that `documents` cuts."""

    name: str
    encode: Encode
    takes_pieces: bool


def encoders(tokenizer: PreTrainedTokenizerBase) -> list[Encoder]:
    """The ways to this tokenizer's ids, the fastest first and the tokenizer itself last."""
    name, encode = "the tokenizer itself", _own_encode(tokenizer)
    if not tokenizer.is_fast:
        return [Encoder(name, encode, takes_pieces=False)]
    backend = _Backend(tokenizer.backend_tokenizer)
    last = Encoder(name, encode, takes_pieces=backend.ends_words_at_blanks)
    if backend.spells_bytes:
        return [Encoder("a table of bytes", backend.encode_bytes, takes_pieces=True), last]
    if backend.spells_characters:
        return [Encoder("a table of characters", backend.encode_characters, takes_pieces=True), last]
    if backend.is_gpt2_like:
        return [Encoder("tiktoken", backend.tiktoken_encode(), takes_pieces=True), last]
    return [last]


def same_ids(encoder: Encoder, reference: Encoder, texts: list[str]) -> bool:
    """Whether two encoders give the same ids for every text."""
    pairs = zip(encoder.encode(texts), reference.encode(texts), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def _own_encode(tokenizer: PreTrainedTokenizerBase) -> Encode:
    if not tokenizer.is_fast:
        return lambda texts: [
            np.array(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), np.int64)
            for text in texts
        ]
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose settings are ours
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [
        np.array(encoding.ids, np.int64) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]


class _Backend:
    """What a `tokenizers` backend does, read from its own description; whatever is not understood is not claimed."""

    def __init__(self, backend: Tokenizer):
        state = json.loads(backend.to_str())
        self.model: dict = state["model"]
        self.normalizer: dict | None = state["normalizer"]
        self.pre_tokenizer: dict | None = state["pre_tokenizer"]
        self.decoder: dict | None = state["decoder"]
        self.added: list[dict] = state["added_tokens"]

    @property
    def _is_plain_bpe(self) -> bool:
        unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
        is_bpe = self.model["type"] == "BPE" and not any(self.model.get(option) for option in unusual)
        # Only special tokens can be told to be read as text.
        return is_bpe and self.normalizer is None and all(token["special"] for token in self.added)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token is a string of bytes, and decoding joins them."""
        pre, decoder = self.pre_tokenizer or {}, self.decoder or {}
        splits = pre.get("type") == "ByteLevel" and not pre["add_prefix_space"]
        alphabet = all(char in self.model.get("vocab", {}) for char in byte_characters())
        return self._is_plain_bpe and splits and decoder.get("type") == "ByteLevel" and alphabet

    @property
    def spells_bytes(self) -> bool:
        return self.is_byte_level and not self.model["merges"]

    @cached_property
    def spells_characters(self) -> bool:
        spells = (
            self._is_plain_bpe and self.pre_tokenizer is None and not self.model["merges"] and self.model["unk_token"]
        )
        return spells and (self.decoder or {}).get("type") == "Fuse" and not self.model["fuse_unk"]

    @property
    def is_gpt2_like(self) -> bool:
        """Whether words are cut by GPT-2's rule and each token is made by one merge."""
        if not self.is_byte_level or not self.pre_tokenizer["use_regex"]:
            return False
        made = ["".join(merge) for merge in self.model["merges"]]
        return len(set(made)) == len(made)

    @property
    def ends_words_at_blanks(self) -> bool:
        """Whether every word ends where `documents` cuts, whatever stands around."""
        if self.is_byte_level:
            return self.pre_tokenizer["use_regex"]
        is_bert = (self.pre_tokenizer or {}).get("type") == "BertPreTokenizer"
        plain = self.normalizer is None or self.normalizer["type"] == "BertNormalizer"
        return is_bert and plain and all(token["special"] for token in self.added)

    def encode_bytes(self, texts: list[str]) -> list[np.ndarray]:
        return [self._id_of_byte[np.frombuffer(text.encode(), np.uint8)] for text in texts]

    def encode_characters(self, texts: list[str]) -> list[np.ndarray]:
        return [self._id_of_character[np.frombuffer(text.encode("utf-32-le"), np.uint32)] for text in texts]

    @cached_property
    def _id_of_byte(self) -> np.ndarray:
        return np.array([self.model["vocab"][char] for char in byte_characters()], np.uint32)

    @cached_property
    def _id_of_character(self) -> np.ndarray:
        vocab = self.model["vocab"]
        table = np.full(0x110000, vocab[self.model["unk_token"]], np.uint32)
        for token, token_id in vocab.items():
            if len(token) == 1:
                table[ord(token)] = token_id
        return table

    def tiktoken_encode(self) -> Encode:
        """tiktoken on the same merges. It numbers tokens by rank, which the table turns into the tokenizer's ids."""
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's rule for words

        byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        tokens = [*byte_characters(), *("".join(merge) for merge in self.model["merges"])]
        ranks = {bytes(byte_of[char] for char in token): rank for rank, token in enumerate(tokens)}
        id_of_rank = np.array([self.model["vocab"][token] for token in tokens], np.uint32)
        # Without any special token tiktoken looks for one everywhere, which costs a third; with one that is not
        # allowed it reads all text as text.
        encoding = tiktoken.Encoding(
            "ranks", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
        )
        encode = partial(encoding.encode_to_numpy, disallowed_special=())
        if (id_of_rank == np.arange(len(id_of_rank))).all():
            return lambda texts: [encode(text) for text in texts]
        return lambda texts: [id_of_rank[encode(text)] for text in texts]


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int, mean: float) -> Tensor:
    """(V,) float64: UTF-8 bytes of text in each token, 0 for special ones; `mean` where that cannot be told."""
    sizes_V = np.full(vocab_size, mean)
    if tokenizer.is_fast:
        backend = _Backend(tokenizer.backend_tokenizer)
        if backend.is_byte_level or backend.spells_characters:
            for token, token_id in tokenizer.get_vocab().items():
                sizes_V[token_id] = len(token) if backend.is_byte_level else len(token.encode())
    sizes_V[tokenizer.all_special_ids] = 0.0
    return from_numpy(sizes_V)
