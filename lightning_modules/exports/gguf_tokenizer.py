"""A tokenizer in the words of GGUF, for llama.cpp: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import json
from dataclasses import dataclass, field

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in a vocabulary of SentencePiece


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Args:
        model: "gpt2", a BPE over bytes, or "llama", SentencePiece's BPE over characters.
        pre: Name of the rule that cuts a text into words before merges.
        tokens: Of each id.
        types: `gguf.TokenType` of each id.
        merges: Pairs in the order of their rank, where `model` is "gpt2".
        scores: Of each id, the higher the sooner merged, where `model` is "llama".
        space_prefix: Whether a text is read as if a space stood before it.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, ids: int) -> Vocabulary:
    """Of a model with `ids` rows; raises ValueError for a tokenizer that llama.cpp has no counterpart of."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    kind = backend["model"]["type"]
    if kind == "BPE":
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"]]
        if '"ByteLevel"' in json.dumps(backend["pre_tokenizer"]):
            tokens, types = tokens_and_types(tokenizer, ids, bytes_as=None)
            return Vocabulary("gpt2", words_rule(backend, merges), tokens, types, [" ".join(pair) for pair in merges])
        if backend["model"]["byte_fallback"]:
            tokens, types = tokens_and_types(tokenizer, ids, bytes_as=gguf.TokenType.BYTE)
            ranks = {}
            for rank, (left, right) in enumerate(merges):
                ranks.setdefault(left + right, rank)
            scores = [-float(ranks.get(token, len(merges))) for token in tokens]
            return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=puts_space_first(backend))
    raise ValueError(
        f"--format gguf writes tokenizers of bytes (GPT-2's, ours by bpe or bytes) and SentencePiece's BPE (Llama's); "
        f"this one is {kind}, not over bytes"
    )


def tokens_and_types(
    tokenizer: PreTrainedTokenizerBase, ids: int, bytes_as: gguf.TokenType | None
) -> tuple[list[str], list[int]]:
    """Rows of the model behind the last token are of no use and have to have a name."""
    tokens = [f"[PAD{i}]" for i in range(ids)]
    types = [int(gguf.TokenType.UNUSED)] * ids
    for token, i in tokenizer.get_vocab().items():
        if i < ids:
            is_byte = bytes_as is not None and len(token) == 6 and token.startswith("<0x")
            tokens[i], types[i] = token, int(bytes_as if is_byte else gguf.TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        if i < ids:
            types[i] = int(gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED)
    if bytes_as is not None and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(gguf.TokenType.UNKNOWN)
    return tokens, types


def words_rule(backend: dict, merges: list[list[str]]) -> str:
    """llama.cpp's name for how a text is cut into words; without merges it makes no difference."""
    parts = backend["pre_tokenizer"].get("pretokenizers", [backend["pre_tokenizer"]])
    splits = [part["pattern"].get("Regex") for part in parts if part["type"] == "Split"]
    if not merges or (not splits and parts[-1]["use_regex"]):
        return "gpt-2"
    names = {split: name for name, split in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    names |= {
        GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "qwen2") if name in GGUF_PRE_TOKENIZER_SPLITS
    }
    if len(splits) == 1 and splits[0] in names:
        return names[splits[0]]
    raise ValueError(
        "--format gguf: llama.cpp knows the rules by which GPT-2, Llama 3 and Qwen cut a text into words, and this "
        f"tokenizer has another: {splits or 'none'}"
    )


def puts_space_first(backend: dict) -> bool:
    normalizer, pre_tokenizer = json.dumps(backend["normalizer"]), json.dumps(backend["pre_tokenizer"])
    return '"Prepend"' in normalizer or ('"Metaspace"' in pre_tokenizer and '"never"' not in pre_tokenizer)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, ids: int) -> None:
    vocabulary = vocabulary_of(tokenizer, ids)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        if vocabulary.merges:
            writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    special = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, token_id in special.items():
        if token_id is not None:
            add(token_id)
    ids_of_a = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids_of_a[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(ids_of_a[-1:] == [tokenizer.eos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
