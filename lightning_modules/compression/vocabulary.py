"""A tokenizer with fewer words, and the rows of a model that go with them."""

import copy
import json
from collections import Counter
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def counted(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Counter[int]:
    """How often each id comes in a text."""
    found: Counter[int] = Counter()
    for text in texts:
        found.update(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    return found


def kept_ids(
    tokenizer: PreTrainedTokenizerBase, counts: Counter[int], size: int, named: set[int] = frozenset()
) -> list[int]:
    """Those of special tokens and single characters, which any text needs, and the most frequent others with all that
    they are put together from, so that a text of these alone is cut as before. Sorted, at most `size`; those in `named`
    are among them.

    Raises ValueError where `size` leaves no room, or the tokenizer is of an unknown kind.
    """
    content = json.loads(backend_of(tokenizer).to_str())
    vocabulary, kind = vocabulary_of(content), content["model"]["type"]
    needed = {token["id"] for token in content["added_tokens"]} | {i for i in named if i < len(tokenizer)}
    needed |= {number for word, number in vocabulary.items() if is_single(word, kind)}
    if kind == "WordPiece":
        needed.add(vocabulary[content["model"]["unk_token"]])
    if kind == "Unigram" and content["model"].get("unk_id") is not None:
        needed.add(content["model"]["unk_id"])
    if size < len(needed):
        raise ValueError(f"--vocabulary {size}: special tokens and single characters are {len(needed)}; pass more")
    parts = parts_of(content, vocabulary)
    for number, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        wanted = closure(number, parts) - needed
        if len(needed) + len(wanted) <= size:
            needed |= wanted
    return sorted(needed)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = None if backend is None else json.loads(backend.to_str())["model"]["type"]
    if kind not in ("BPE", "WordPiece", "Unigram"):
        raise ValueError(f"--vocabulary: a tokenizer of {kind or type(tokenizer).__name__} cannot be cut; leave it out")
    return backend


def vocabulary_of(content: dict) -> dict[str, int]:
    vocab = content["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {word: number for number, (word, _) in enumerate(vocab)}


def is_single(word: str, kind: str) -> bool:
    is_byte = len(word) == 6 and word.startswith("<0x") and word.endswith(">")
    return len(word.removeprefix("##") if kind == "WordPiece" else word) == 1 or is_byte


def parts_of(content: dict, vocabulary: dict[str, int]) -> dict[int, list[tuple[int, int]]]:
    """Of each id the pairs that merge into it; only BPE puts words together."""
    found: dict[int, list[tuple[int, int]]] = {}
    for merge in content["model"].get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault(vocabulary[left + right], []).append((vocabulary[left], vocabulary[right]))
    return found


def closure(number: int, parts: dict[int, list[tuple[int, int]]]) -> set[int]:
    """An id with all that it is put together from."""
    found, left = set(), [number]
    while left:
        if (one := left.pop()) not in found:
            found.add(one)
            left += [part for pair in parts.get(one, ()) for part in pair]
    return found


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> PreTrainedTokenizerBase:
    """One that knows these ids alone, under new numbers in the same order."""
    content = json.loads(backend_of(tokenizer).to_str())
    numbers, vocabulary = {old: new for new, old in enumerate(kept)}, vocabulary_of(content)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [pair for number, pair in enumerate(model["vocab"]) if number in numbers]
        if model.get("unk_id") is not None:
            model["unk_id"] = numbers[model["unk_id"]]
    else:
        model["vocab"] = {word: numbers[number] for word, number in vocabulary.items() if number in numbers}
    if model.get("merges"):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    for token in content["added_tokens"]:
        token["id"] = numbers[token["id"]]
    _renumber(content.get("post_processor"), numbers)
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = Tokenizer.from_str(json.dumps(content))
    return smaller


def _renumber(processor: dict | None, numbers: dict[int, int]) -> None:
    """The special tokens that are put around a text, in place."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber(part, numbers)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [numbers[number] for number in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = numbers[processor[name][1]]


@torch.no_grad()
def smaller_network(network: PreTrainedModel, kept: list[int], auto_class: type) -> PreTrainedModel:
    """With the rows of these ids alone, in this order; a tied head stays tied."""
    config = copy.deepcopy(network.config)
    if max(kept) >= config.get_text_config().vocab_size:
        raise ValueError(f"the tokenizer gives id {max(kept)}, the model knows {config.vocab_size} ids; pass its own")
    numbers, before = {old: new for new, old in enumerate(kept)}, config.get_text_config().vocab_size
    config.get_text_config().vocab_size = len(kept)
    renumber_config(config, numbers)
    smaller = auto_class.from_config(config, dtype=network.dtype).eval()
    own, rows = smaller.state_dict(), torch.tensor(kept)
    for name, weight in network.state_dict().items():
        for axis, (one, other) in enumerate(zip(weight.shape, own[name].shape, strict=True)):
            if (one, other) == (before, len(kept)):
                weight = weight.index_select(axis, rows.to(weight.device))
        own[name].copy_(weight)
    if smaller.can_generate():
        smaller.generation_config = copy.deepcopy(network.generation_config)
        renumber_config(smaller.generation_config, numbers)
    return smaller


def ids_named_by(network: PreTrainedModel) -> set[int]:
    """Special tokens of the config, and of how it generates."""
    configs = [network.config] + ([network.generation_config] if network.can_generate() else [])
    values = [value for config in configs for name, value in vars(config).items() if name.endswith("_token_id")]
    return {i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None}


def renumber_config(config: object, numbers: dict[int, int]) -> None:
    """Special tokens by their new numbers, in place."""
    for name, value in list(vars(config).items()):
        if not name.endswith("_token_id") or value is None:
            continue
        many = value if isinstance(value, list) else [value]
        new = [numbers[number] for number in many if number in numbers]
        setattr(config, name, new if isinstance(value, list) else (new[0] if new else None))
