"""Tokenizers by a short name: made from the training text, read from files, or fetched from the Hub."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules import hub
from datamodules.cache_folders import written_whole

Objective = Literal["causal", "masked", "denoising"]

SENTINELS = 100
END_OF_TEXT, PAD, MASK, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|mask|>", "<|unk|>"

_TRAINING_BYTES = 1 << 28  # beyond a quarter of a gigabyte a sample of the pieces serves as well


@cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that a byte-level BPE writes for each byte, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in range(256))


# Made here


def byte_tokenizer(objective: Objective) -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes of UTF-8, special tokens follow."""
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(byte_characters())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _with_special_tokens(backend, objective)


def character_tokenizer(texts: Iterable[str], objective: Objective) -> PreTrainedTokenizerFast:
    """One id for each character of the text, in the order of their code points; others become `<|unk|>`."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    vocab = {char: i for i, char in enumerate(sorted(seen))} | {UNKNOWN: len(seen)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    return _with_special_tokens(backend, objective, unknown=UNKNOWN)


def bpe_tokenizer(
    texts: Iterable[str], text_bytes: int, vocab_size: int, objective: Objective
) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the text, with GPT-2's rule for words; its ids are its merge ranks.

    Args:
        texts: pieces of the training text.
        text_bytes: about how many bytes they have together.
        vocab_size: number of ids, special tokens included; fewer where the text has no more pairs to merge.
        objective: decides which special tokens there are.
    """
    ordinary = vocab_size - len(special_tokens(objective))
    if ordinary < 256:
        least = 256 + len(special_tokens(objective))
        raise ValueError(f"--data.vocab_size is {vocab_size}; bytes and special tokens alone need {least}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ordinary, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_sample(texts, text_bytes), trainer)
    return _with_special_tokens(backend, objective)


def _sample(texts: Iterable[str], text_bytes: int) -> Iterator[str]:
    """Every piece where there are few, else a share of them spread evenly over the text."""
    share = min(1.0, _TRAINING_BYTES / max(1, text_bytes))
    for number, text in enumerate(texts):
        if int((number + 1) * share) > int(number * share):
            yield text


def special_tokens(objective: Objective) -> list[str]:
    """The special tokens that a tokenizer made here has for an objective, without `<|unk|>`."""
    if objective == "causal":
        return [END_OF_TEXT]
    if objective == "masked":
        return [END_OF_TEXT, PAD, MASK]
    return [END_OF_TEXT, PAD, *(f"<extra_id_{i}>" for i in range(SENTINELS))]


def _with_special_tokens(
    backend: Tokenizer, objective: Objective, unknown: str | None = None
) -> PreTrainedTokenizerFast:
    specials = special_tokens(objective) + ([unknown] if unknown else [])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    named = {"pad_token": PAD, "mask_token": MASK, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        extra_special_tokens=[token for token in specials if token.startswith("<extra_id_")],
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token in specials},
    )


def remembered(folder: Path, make: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`; where there is none or a damaged one, the one that `make` makes, saved there."""
    tokenizer = _saved(folder)
    if tokenizer is None:
        with written_whole(folder, is_sound=lambda other: _saved(other) is not None) as temporary:
            make().save_pretrained(temporary)
        tokenizer = _saved(folder)
    assert tokenizer is not None, f"{folder} was written and cannot be read"
    return tokenizer


def _saved(folder: Path) -> PreTrainedTokenizerFast | None:
    if not folder.exists():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception:  # what a damaged file raises is tokenizers' secret
        return None


# Read


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a pair "vocab.json,merges.txt", or the Hub."""
    if "," in name:
        vocab, _, merges = name.partition(",")
        return _from_vocabulary_and_merges(Path(vocab.strip()).expanduser(), Path(merges.strip()).expanduser())
    folder = Path(name).expanduser()
    if not folder.exists():
        return _from_hub(name)
    if not folder.is_dir():
        raise ValueError(f"--data.tokenizer {name} is a file; pass its folder, or a pair vocab.json,merges.txt")
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        return _from_folder(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _from_vocabulary_and_merges(folder / "vocab.json", folder / "merges.txt")
    if (folder / "vocab.txt").exists():
        return _from_word_pieces(folder / "vocab.txt")
    raise FileNotFoundError(f"no tokenizer.json, vocab.json + merges.txt or vocab.txt in --data.tokenizer {name}")


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what a damaged file raises is tokenizers' secret
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--data.tokenizer {folder} cannot be loaded: {reason}; save it again") from None


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=not hub.is_within_reach())
    except (OSError, ValueError) as error:
        choices = "bpe, bytes, chars, a folder, vocab.json,merges.txt or a Hub name within reach"
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"--data.tokenizer {name} is none of: {choices} ({reason})") from None


def _from_vocabulary_and_merges(vocab: Path, merges: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's two files."""
    for file in (vocab, merges):
        if not file.is_file():
            raise FileNotFoundError(f"{file} of --data.tokenizer does not exist; pass vocab.json,merges.txt")
    try:
        backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{vocab} and {merges} are no vocabulary and merges: {error}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is None:
        raise ValueError(
            f"{vocab} has no {END_OF_TEXT} to stand between documents; pass a folder with a tokenizer.json"
        )
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _from_word_pieces(vocab: Path) -> PreTrainedTokenizerBase:
    """BERT's vocab.txt; it lowercases where no piece of the vocabulary has an upper-case letter."""
    from transformers import BertTokenizer

    pieces = vocab.read_text(encoding="utf-8").splitlines()
    lowercase = all(piece == piece.lower() for piece in pieces if not piece.startswith("["))
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=lowercase)


# What is known of a tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes ids: SHA-256 over the backend and the special tokens."""
    if tokenizer.is_fast:
        state = tokenizer.backend_tokenizer.to_str()
    else:
        state = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()])
    special = json.dumps([tokenizer.all_special_tokens, tokenizer.all_special_ids, document_start(tokenizer)])
    return hashlib.sha256(f"{state}\n{special}".encode()).hexdigest()


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands before each document: what the tokenizer itself puts before a text (Llama's begin of text,
    BERT's [CLS]); else end of text, else [CLS], else begin of text."""
    whole, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    if len(whole) > len(plain) and whole[:1] != plain[:1]:
        return whole[0]
    for token in (tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None:
            return token
    raise ValueError("--data.tokenizer has neither eos, cls nor bos token to stand between documents; add one")


def require_special_tokens(tokenizer: PreTrainedTokenizerBase, objective: Objective, sentinels: int) -> None:
    """Raises ValueError where the tokenizer lacks what the objective needs."""
    document_start(tokenizer)
    if objective == "masked" and tokenizer.mask_token_id is None:
        raise ValueError("--data.tokenizer has no mask token, which --data.objective masked needs; pass another")
    if objective == "denoising":
        found = len(sentinel_ids(tokenizer))
        if tokenizer.pad_token_id is None or not found:
            raise ValueError(
                "--data.tokenizer has no pad token and <extra_id_0>…, which --data.objective denoising needs"
            )
        if found < sentinels:
            raise ValueError(
                f"--data.tokenizer has {found} of the {sentinels} sentinels that a row needs; "
                "shorten --data.seq_len or raise --data.mean_span"
            )


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, … as far as the tokenizer has them."""
    vocab = tokenizer.get_vocab()
    ids = []
    while f"<extra_id_{len(ids)}>" in vocab:
        ids.append(vocab[f"<extra_id_{len(ids)}>"])
    return np.array(ids, np.int64)
