"""What the layers of a network read while it reads a text.

Shape suffixes: B rows, T positions, N any count of positions, C inputs of a layer.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.model_folder import max_positions

BATCH_ROWS = 8
CHARACTERS = 8
"""Of a window for each token of a row, which are more than a token has."""
Batch = dict[str, Tensor]


def calibration_batches(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], rows: int, seq_len: int = 512
) -> list[Batch]:
    """About `rows` rows of a text as the network reads it, of one length in a batch, so that there is no padding.

    They are spread over the text. Decoders read documents one behind the other, encoders one document in a row,
    encoder-decoders its first half and write its second. Raises ValueError for a text too short for one row.
    """
    seq_len = min(seq_len, max_positions(network) or seq_len)
    decodes = network.config.is_encoder_decoder or network.can_generate()
    documents = [text for text in texts if text]
    if decodes:
        found = evenly(list(_packed(tokenizer, windows(documents, rows, CHARACTERS * seq_len), seq_len)), rows)
    else:
        found = [
            tokenizer(text, truncation=True, max_length=seq_len, verbose=False)["input_ids"]
            for text in evenly(documents, rows)
        ]
    if not found:
        raise ValueError(f"the calibration text is shorter than a row of {seq_len} tokens; pass more by --data.path")
    batches = []
    for length in sorted({len(ids) for ids in found}):
        ids_NT = torch.tensor([ids for ids in found if len(ids) == length])
        # A model of labels that has no padding looks for the end of one row alone.
        apart = not decodes and network.config.pad_token_id is None and network.get_output_embeddings() is None
        batches += [_inputs(network, ids_BT) for ids_BT in ids_NT.split(1 if apart else BATCH_ROWS)]
    return batches


def windows(documents: list[str], count: int, characters: int) -> Iterator[tuple[str, bool]]:
    """So many windows of a text that is longer than all of them, evenly over it, each inside of one document; else all
    documents. With each, whether a document begins with it."""
    step = sum(map(len, documents)) / count
    if step <= characters:
        yield from ((document, True) for document in documents)
        return
    begin, wanted = 0, step / 2
    for document in documents:
        end = begin + len(document)
        if wanted < end and len(document) <= characters:
            yield document, True
            wanted += step * (1 + (end - wanted) // step)  # what is short is read once
        while wanted < end:
            start = min(int(wanted - begin), len(document) - characters)
            yield document[start : start + characters], start == 0
            wanted += step
        begin = end


def evenly(items: list, count: int) -> list:
    return [items[place * len(items) // count] for place in range(count)] if len(items) > count else items


def _packed(tokenizer: PreTrainedTokenizerBase, parts: Iterable[tuple[str, bool]], seq_len: int) -> Iterator[list[int]]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    held: list[int] = []
    for text, begins in parts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        held += [start, *ids] if begins and start is not None else ids
        while len(held) >= seq_len:
            yield held[:seq_len]
            held = held[seq_len:]


def _inputs(network: PreTrainedModel, ids_BT: Tensor) -> Batch:
    ids_BT = ids_BT.to(network.device)
    if not network.config.is_encoder_decoder:
        return {"input_ids": ids_BT}
    half = max(1, ids_BT.shape[1] // 2)
    return {"input_ids": ids_BT[:, :half], "decoder_input_ids": ids_BT[:, half:]}


@contextmanager
def watched(layers: dict[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `note(name, inputs_NC)` is called with what each layer reads."""

    def watch(name: str, layer: nn.Module):
        def hook(module, args) -> None:
            note(name, args[0].detach().flatten(0, -2))

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_moments(network: PreTrainedModel, layers: dict[str, nn.Module], batches: list[Batch]) -> dict[str, Tensor]:
    """(C, C) float32 for each layer: the sum of xxᵀ over all inputs x. Layers that read the same share one."""
    moments: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    """Of each layer the one whose moments it shares: queries, keys and values read one tensor, one after the other."""
    last: list[tuple[Tensor, str]] = []

    def note(name: str, inputs_NC: Tensor) -> None:
        is_same = (
            bool(last) and last[0][0].data_ptr() == inputs_NC.data_ptr()
        )  # which is kept, so its memory is its own
        owners.setdefault(name, owners[last[0][1]] if is_same else name)
        last[:] = [(inputs_NC, name)]
        if owners[name] != name:
            return
        inputs_NC = inputs_NC.float()
        if name not in moments:
            moments[name] = torch.zeros(inputs_NC.shape[1], inputs_NC.shape[1], device=inputs_NC.device)
        moments[name].addmm_(inputs_NC.T, inputs_NC)

    network.eval()
    with watched(layers, note):
        for batch in batches:
            last.clear()
            network(**batch)
    return {name: moments[owners[name]] for name in layers if name in owners}
