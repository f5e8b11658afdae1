"""The tokens of a size, made once by our data module; all rows read the same file."""

import random
from pathlib import Path

from sizes import Job, Size

from datamodules.text import Text


def text_flags(size: Size, text_path: str | None) -> dict[str, int | str]:
    """The arguments of `Text`."""
    flags = {"seq_len": size.seq_len, "batch_size": size.batch_size}
    if size.bpe_ids:
        return flags | {"vocab_size": size.bpe_ids}
    assert text_path is not None
    return flags | {"path": text_path, "tokenizer": "chars"}


def prepare(size: Size, folder: Path, bf16: bool, device: str = "cpu") -> Job:
    """Makes the tokens, and the job of a row without special wishes."""
    text_path = None if size.bpe_ids else str(write_characters(folder / "characters.txt"))
    data = Text(**text_flags(size, text_path))
    data.prepare_data()
    data.setup("fit")
    assert data.store is not None
    train = data.store.train
    return Job(size, str(folder), text_path, data.vocab_size, str(train.tokens_file), train.dtype, bf16, device)


def write_characters(file: Path, count: int = 4_000_000) -> Path:
    """65 different characters in random order: as many as tinyshakespeare has, and speed does not see the order."""
    letters = "".join(map(chr, range(ord("!"), ord("!") + 64))) + "\n"
    file.write_text("".join(random.Random(0).choices(letters, k=count)))
    return file
