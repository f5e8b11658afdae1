import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datamodules.token_store import Counts, Encoded, TokenStore, open_store, write_store

START = 9


def stretch(*documents: list[int]) -> Encoded:
    lengths = [len(document) + 1 for document in documents]
    ids = [token for document in documents for token in (START, *document)]
    starts = np.cumsum([0, *lengths])[:-1]
    return Encoded(np.array(ids, np.uint32), starts, bytes=10 * len(documents), unknown=1)


def written(folder: Path, vocab_size: int = 100) -> TokenStore:
    train = iter([stretch([1, 2, 3], [4]), stretch([], [5, 6])])
    return write_store(folder, train, iter([stretch([7])]), vocab_size, {"encoder": "by hand"})


def test_what_is_written_is_read_again(tmp_path):
    written(tmp_path / "store")
    store = open_store(tmp_path / "store")
    assert store.train.tokens_N.tolist() == [9, 1, 2, 3, 9, 4, 9, 9, 5, 6] and len(store.train) == 10
    assert store.train.document_bounds.tolist() == [0, 4, 6, 7, 10]
    assert store.train.counts == Counts(documents=4, bytes=40, tokens=6, unknown=2)
    assert store.val.tokens_N.tolist() == [9, 7] and store.about == {"encoder": "by hand"}


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_take_two_bytes_where_two_are_enough(tmp_path, vocab_size, dtype):
    assert written(tmp_path / "store", vocab_size).train.tokens_N.dtype == dtype


def test_a_stream_is_sent_to_a_worker_as_its_files_names(tmp_path):
    stream = write_store(tmp_path / "store", iter([stretch([1] * 5000)]), iter([]), 100, {}).train
    assert len(stream.tokens_N) == 5001  # mapped before it is sent
    sent = pickle.dumps(stream)
    assert len(sent) < 2000 and pickle.loads(sent).tokens_N.tolist() == stream.tokens_N.tolist()


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train.documents.npy", "val.documents.npy", "header.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_damaged_store_is_not_opened_and_is_replaced(tmp_path, name, damage):
    file = written(tmp_path / "store").folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "short" else bytes([content[0] ^ 1]) + content[1:])
    assert open_store(tmp_path / "store") is None
    written(tmp_path / "store")
    assert open_store(tmp_path / "store") is not None


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def interrupted() -> Iterator[Encoded]:
        yield stretch([1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "store", interrupted(), iter([]), 100, {})
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_at_once_the_first_to_end_stays_and_both_can_read(tmp_path):
    def slow() -> Iterator[Encoded]:
        yield stretch([1])
        other = written(tmp_path / "store")
        yield stretch([len(other.train)])

    write_store(tmp_path / "store", slow(), iter([stretch([7])]), 100, {"encoder": "slow"})
    assert open_store(tmp_path / "store").about == {"encoder": "by hand"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"^.*file/tokens cannot be written: .*; pass another --data.cache_dir$"):
        written(tmp_path / "file" / "tokens" / "store")
