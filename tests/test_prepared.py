"""Shards are the tokens of the text, wherever they are and however they were made; mixtures have their shares."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import yaml

from datamodules import prepare as preparing
from datamodules import prepared
from datamodules.mixture import BLOCK, Mixed, MixedRows
from datamodules.prepared import Tokens, open_prepared
from datamodules.teacher_cache import CachedRows
from datamodules.text import Text
from recipes import prepare
from tests.test_recipes import ROOT, fit, run


def made(folder: Path, *paths: Path, **flags: object) -> dict:
    settings = {"data.path": json.dumps([str(path) for path in paths]), "output": folder, "workers": 2}
    settings |= {"data.tokenizer": "bytes", "data.val_fraction": 0.2, "shard_tokens": 900}
    prepare.main([f"--{name}={value}" for name, value in (settings | flags).items()])
    return json.loads((folder / "prepared.json").read_text())


def texts_of(folder: Path, count: int, word: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:02d}.txt").write_text("".join(f"{word} {number} {i} {i * number}\n" for i in range(40)))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """Two prepared folders; the second with a third of the text."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, count in (("a", 12), ("b", 4)):
            made(folder / f"prepared-{name}", texts_of(folder / name, count, name))
    return folder / "prepared-a", folder / "prepared-b"


def opened(path: object, **settings: object) -> Text:
    data = Text(path=path, seq_len=16, batch_size=4, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_shards_are_the_tokens_of_the_text(two):
    plain = opened(str(two[0].parent / "a"), tokenizer="bytes", val_fraction=0.2)
    shards = opened(str(two[0]))
    assert len(shards.store.train.shards) > 3
    for split in ("train", "val"):
        ours, theirs = getattr(shards.store, split), getattr(plain.store, split)
        assert np.array_equal(ours.tokens_N[0 : len(ours)], theirs.tokens_N) and ours.counts == theirs.counts
        assert np.array_equal(ours.document_bounds, theirs.document_bounds)
    assert list(shards.documents("val")) == list(plain.documents("val"))
    for name in ("train_dataloader", "val_dataloader"):
        for ours, theirs in zip(getattr(shards, name)(), getattr(plain, name)(), strict=True):
            assert all((ours[field] == theirs[field]).all() for field in theirs)


@pytest.mark.parametrize("settings", [{"objective": "masked"}, {"objective": "denoising"}])
def test_every_objective_reads_shards(settings, tmp_path):
    texts = texts_of(tmp_path / "texts", 6, "x")
    made(tmp_path / "prepared", texts, **{"data.objective": settings["objective"]})
    plain = opened(str(texts), tokenizer="bytes", val_fraction=0.2, cross_document_attention=False, **settings)
    shards = opened(str(tmp_path / "prepared"), cross_document_attention=False, **settings)
    for ours, theirs in zip(shards.train_dataloader(), plain.train_dataloader(), strict=True):
        assert all((ours[field] == theirs[field]).all() for field in theirs)


def test_one_process_or_three_and_an_interruption_make_the_same(two, tmp_path, monkeypatch):
    texts = two[0].parent / "a"
    one = made(tmp_path / "one", texts, workers=1)
    write, written = preparing.write_group, []

    def broken(job, group, copies):
        if group.split == "train" and group.number == 0:
            raise KeyboardInterrupt
        written.append(group.name)
        return write(job, group, copies)

    class Here:
        """A pool of this process."""

        def __init__(self, *_: object): ...

        def __enter__(self):
            return self

        def __exit__(self, *_: object): ...

        map = staticmethod(map)

    monkeypatch.setattr(preparing, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(preparing, "write_group", broken)
    with pytest.raises(SystemExit) as stop:
        made(tmp_path / "again", texts)
    assert stop.value.code == 130
    assert written == ["val-00000"] and not (tmp_path / "again" / "prepared.json").exists()
    (tmp_path / "again" / ".train-00000-000.bin.1.partial").touch()  # as a process leaves it that is killed
    before = (tmp_path / "again" / "val-00000-000.bin").stat().st_mtime_ns
    with pytest.raises(SystemExit):  # of other settings
        made(tmp_path / "again", texts, shard_tokens=500)
    monkeypatch.undo()
    assert made(tmp_path / "again", texts) == one
    assert (tmp_path / "again" / "val-00000-000.bin").stat().st_mtime_ns == before
    for file in (tmp_path / "one").glob("*.bin"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    assert not (tmp_path / "again" / "done").exists() and not list((tmp_path / "again").glob("*.partial"))


def test_ctrl_c_is_one_line(tmp_path):
    """Of all processes together, which a terminal tells at once."""
    texts = texts_of(tmp_path / "texts", 200, "word")
    flags = [f"--data.path={texts}", "--data.tokenizer=bytes", f"--output={tmp_path / 'out'}", "--shard_tokens=100"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "prepare.py"), *flags, "--workers=2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background is without
    )
    end = time.monotonic() + 60
    while not (tmp_path / "out" / "hashes").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "error: interrupted; the same command goes on\n")


def test_rows_of_the_only_file_that_are_left_out_are_counted_once(tmp_path, capsys):
    """In the part that is held out as in the other."""
    rows = [json.dumps({"text": f"document {i}" if i % 10 else ""}) for i in range(50)]
    rows[7] = rows[48] = "{no row"
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    found = made(tmp_path / "a b", tmp_path / "rows.jsonl", **{"data.on_bad_row": "skip"})
    assert found["about"]["skipped_rows"] == {str(tmp_path / "rows.jsonl"): 2} and found["about"]["empty_rows"] == 5
    assert sum(found["counts"][split]["documents"] for split in ("train", "val")) == 43
    said = capsys.readouterr().out
    assert "2 bad rows, 5 empty ones" in said and f"--data.path '{tmp_path / 'a b'}'" in said


def test_nothing_to_train_on_is_one_line_and_no_prepared_folder(tmp_path, capsys):
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "all of it"}) + "\n")
    with pytest.raises(SystemExit) as stop:
        made(tmp_path / "out", tmp_path / "train.jsonl", **{"data.val_path": tmp_path / "val.jsonl"})
    assert stop.value.code == 2 and "nothing is left to train on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_of_equal_documents_one_stays_and_a_held_out_one_before_all_others(tmp_path, capsys):
    rows = [f"document {i} of many" for i in range(50)]
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    for file, texts in ((train, rows + rows[:10] + ["held out"]), (val, ["held out", "another", "another"])):
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = made(tmp_path / "prepared", train, **{"data.val_path": val})
    assert found["counts"]["train"]["documents"] == 50 and found["counts"]["val"]["documents"] == 2
    assert found["about"]["duplicates"] == 12 and "12 copies of documents" in capsys.readouterr().out
    shards = opened(str(tmp_path / "prepared"))
    assert list(shards.documents("train")) == rows and list(shards.documents("val")) == ["held out", "another"]
    assert found["counts"]["train"]["bytes"] == sum(len(row) for row in rows)
    all_of_them = made(tmp_path / "all", train, **{"data.val_path": val, "remove_copies": "false"})
    assert all_of_them["counts"]["train"]["documents"] == 61


class Ranges(SimpleHTTPRequestHandler):
    """A server of files that can be read by ranges, as object stores can."""

    asked: list[tuple[str, int]] = []

    def send_head(self):
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            return super().send_head()
        content = Path(self.translate_path(self.path)).read_bytes()
        start, end = int(found[1]), min(int(found[2]), len(content) - 1)
        self.send_response(206)
        for name, value in (
            ("Content-Range", f"bytes {start}-{end}/{len(content)}"),
            ("Content-Length", str(end + 1 - start)),
            ("Accept-Ranges", "bytes"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.asked.append((self.path, end + 1 - start))
        return io.BytesIO(content[start : end + 1])

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: object) -> None: ...


def test_what_is_elsewhere_is_read_by_ranges_and_kept(two, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "BLOCK_BYTES", 512)
    here = opened(str(two[0]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(two[0].parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{two[0].name}"
        there = opened(url, cache_dir=str(tmp_path / "cache"))
        there.train_rows.__getitems__(np.zeros((2, 1), np.int64))
        read = [size for path, size in Ranges.asked if path.endswith(".bin")]
        assert read and max(read) <= 512  # of a shard of 2,000 bytes
        for ours, theirs in zip(there.train_dataloader(), here.train_dataloader(), strict=True):
            assert all((ours[field] == theirs[field]).all() for field in theirs)
        stream = there.store.train
        count = len(Ranges.asked)
        again = Tokens(stream.shards, stream.dtype, stream.cache)[0 : len(stream)]
        assert np.array_equal(again, here.store.train.tokens_N[0 : len(stream)])
        assert len(Ranges.asked) == count  # it was kept
    finally:
        server.shutdown()


def test_a_range_is_read_and_no_more(two, tmp_path, monkeypatch):
    asked = []

    class Counted:
        def __init__(self, content: bytes):
            self.content = content

        def seek(self, place: int) -> None:
            self.place = place

        def read(self, size: int) -> bytes:
            asked.append((self.place, size))
            return self.content[self.place : self.place + size]

    stream = open_prepared(str(two[0]), tmp_path).train
    far = [prepared.Shard(f"file://{s.folder}", s.name, s.tokens, s.documents) for s in stream.shards]
    monkeypatch.setattr(prepared, "opened_by", lambda _, folder, name, __: Counted(Path(folder[7:], name).read_bytes()))
    border = stream.shards[0].tokens
    found = Tokens(far, stream.dtype, tmp_path)[border - 3 : border + 2]
    assert np.array_equal(found, stream.tokens_N[border - 3 : border + 2])
    assert asked == [(2 * (border - 3), 6), (0, 4)]


def test_a_mixture_has_its_shares_and_reads_all_of_each_source():
    weights, rows = (0.7, 0.2, 0.1), (900, 300, 2000)
    order = Mixed(rows, weights, seed=3)
    count = 20 * BLOCK
    stored_N = order(np.arange(count))
    of_N = np.searchsorted(order.firsts_S, stored_N, side="right") - 1
    for blocks in (1, 2, 7, 20):
        part = np.bincount(of_N[: blocks * BLOCK], minlength=3)
        assert (abs(part - np.array(weights) * blocks * BLOCK) <= 1).all()
    for source, length in enumerate(rows):  # each row once, before any comes a second time
        own = stored_N[of_N == source] - order.firsts_S[source]
        for epoch in range(len(own) // length):
            counts = np.bincount(own[np.sort(np.argsort(own, kind="stable"))], minlength=length)
            assert counts.max() - counts.min() <= 1 and epoch >= 0
    # A pure function of the place, however many places are asked for at once.
    assert np.array_equal(order(np.arange(count))[777:1333], order(np.arange(777, 1333)))
    assert not np.array_equal(Mixed(rows, weights, seed=4)(np.arange(count)), stored_N)


def test_rows_of_a_mixture_are_those_of_its_sources(two):
    mixed = opened({str(two[0]): 0.25, str(two[1]): 0.75})
    sources = [opened(str(path)) for path in two]
    assert isinstance(mixed.train_rows, MixedRows)
    assert len(mixed.val_rows) == sum(len(source.val_rows) for source in sources)
    seen = [0, 0]
    for batch in list(mixed.train_dataloader())[:8]:
        numbers_B = batch["rows"].numpy()
        for i, stored in enumerate(mixed._order()(numbers_B).tolist()):
            source = int(stored >= len(sources[0].train_rows))
            own = np.array([[numbers_B[i]], [stored - source * len(sources[0].train_rows)]])
            expected = sources[source].train_rows.__getitems__(own)
            assert (batch["input_ids"][i] == expected["input_ids"][0]).all()
            assert (batch["labels"][i] == expected["labels"][0]).all()
            seen[source] += 1
    assert seen[1] > seen[0] > 0


def test_a_mixture_trains_and_goes_on(two, tmp_path):
    path = {str(two[0]): 0.25, str(two[1]): 0.75}
    flags = {"trainer.accelerator": "cpu", "trainer.precision": "32-true", "model.schedule": "Constant"}
    whole = fit(tmp_path / "whole", json.dumps(path), **flags, **{"trainer.max_steps": 6})
    fit(tmp_path / "part", json.dumps(path), **flags, **{"trainer.max_steps": 2})
    folder = {"trainer.default_root_dir": tmp_path / "part", "ckpt_path": "last"}
    again = fit(tmp_path / "part", json.dumps(path), **flags, **folder, **{"trainer.max_steps": 6})
    assert again["val_loss_final"] == pytest.approx(whole["val_loss_final"], rel=1e-6)
    saved = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert saved["data"]["path"] == path
    with pytest.raises(SystemExit):  # another mixture is another order
        changed = {str(two[0]): 0.5, str(two[1]): 0.5}
        fit(tmp_path / "part", json.dumps(changed), **flags, **folder, **{"trainer.max_steps": 8})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b: {str(a): 1.0, str(a.parent / "a"): 1.0}, "was not prepared: python recipes/prepare.py"),
        (lambda a, b: {str(a): 1.0, str(b): 0}, "the weight 0"),
        (lambda a, b: {str(a): 1.0, str(b): 1e-4}, "less than a row in 1,024"),
        (lambda a, b: "nostore://bucket/prepared", "--data.path nostore://bucket/prepared: "),
        (lambda a, b: shortened(a), "prepare it once more"),
        (lambda a, b: undone(a), "is damaged"),
        (lambda a, b: {str(a): 1.0, str(with_words(b)): 1.0}, "was prepared with another tokenizer than"),
    ],
)
def test_a_mistake_is_one_line(change, said, two, tmp_path, capsys):
    own = [Path(shutil.copytree(path, tmp_path / path.name)) for path in two]
    shutil.copytree(two[0].parent / "a", tmp_path / "a")
    path = change(*own)
    with pytest.raises(SystemExit) as stop:
        run("fit", **{"data.path": json.dumps(path) if isinstance(path, dict) else path, "trainer.max_steps": 1})
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said in error[-1]


def shortened(folder: Path) -> Path:
    file = next(folder.glob("train*.bin"))
    file.write_bytes(file.read_bytes()[:-2])
    return folder


def undone(folder: Path) -> Path:
    (folder / "prepared.json").write_text('{"format": 1}')
    return folder


def with_words(folder: Path) -> Path:
    texts = texts_of(folder.parent / "words", 4, "word")
    made(folder.parent / "of-words", texts, **{"data.tokenizer": "chars"})
    return folder.parent / "of-words"


def test_what_is_written_anew_elsewhere_is_not_mixed_with_what_was_kept(tmp_path):
    """Under the same address."""
    made(tmp_path / "prepared", texts_of(tmp_path / "first", 6, "first"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/prepared"
        assert next(opened(url, cache_dir=str(tmp_path / "cache")).documents("val")).startswith("first")
        prepared.opened_by.cache_clear()
        shutil.rmtree(tmp_path / "prepared")
        made(tmp_path / "prepared", texts_of(tmp_path / "other", 6, "other"), **{"data.tokenizer": "chars"})
        data = opened(url, cache_dir=str(tmp_path / "cache"))
        assert all(text.startswith("other") for text in data.documents("train"))
    finally:
        server.shutdown()


def test_a_folder_of_texts_may_have_a_file_called_index(tmp_path):
    texts = texts_of(tmp_path / "texts", 6, "word")
    (texts / "index.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    assert opened(str(texts), tokenizer="bytes", val_fraction=0.3).store.train.counts.documents


def test_a_mixture_is_read_with_a_teachers_cache_beside_it(two):
    """Whose rows are wrapped once more."""
    mixed = opened({str(two[0]): 0.5, str(two[1]): 0.5})
    before = mixed._order()(np.arange(100))
    mixed.train_rows = CachedRows(mixed.train_rows, None)
    assert np.array_equal(mixed._order()(np.arange(100)), before)


def test_what_is_prepared_is_not_written_over(two, capsys):
    with pytest.raises(SystemExit) as stop:
        made(two[0], two[0].parent / "a")
    assert stop.value.code == 2 and "is prepared already" in capsys.readouterr().err
    open_prepared(str(two[0]), Path())  # it is as it was


def written_by_litdata(folder: Path, documents: list[list[int]], dtype: str, **config: object) -> Path:
    """In its format: number of items, where they begin, their bytes; seven items a chunk."""
    folder.mkdir(parents=True)
    chunks = []
    for number in range(0, len(documents), 7):
        items = [np.array(ids, dtype).tobytes() for ids in documents[number : number + 7]]
        starts = np.cumsum([4 * (len(items) + 2), *map(len, items)])
        header = np.array([len(items), *starts], np.uint32).tobytes()
        name = f"chunk-0-{number // 7}.bin"
        (folder / name).write_bytes(header + b"".join(items))
        chunks.append({"chunk_bytes": 1, "chunk_size": len(items), "dim": None, "filename": name})
    config = {"compression": None, "encryption": None, "item_loader": "TokensLoader"} | config
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return folder


@pytest.mark.parametrize(
    ("dtype", "data_format"),
    [("int32", "no_header_tensor:16"), ("uint16", "no_header_tensor:20"), ("uint16", "no_header_numpy:5")],
)
def test_shards_of_litdata_are_read(dtype, data_format, two, tmp_path):
    texts = [f"text {i} of those" * (i % 3 + 1) for i in range(20)]
    tokenizer = open_prepared(str(two[0]), tmp_path).tokenizer
    documents = [tokenizer(text)["input_ids"] for text in texts]
    train = written_by_litdata(tmp_path / "train", documents[:16], dtype, data_format=[data_format])
    val = written_by_litdata(tmp_path / "val", documents[16:], dtype, data_format=[data_format])
    data = opened(str(train), val_path=str(val), tokenizer=f"{two[0]}/tokenizer", cross_document_attention=False)
    assert data.store.train.tokens_N[0 : len(data.store.train)].tolist() == sum(documents[:16], [])
    assert np.array_equal(data.store.train.document_bounds, np.cumsum([0, *map(len, documents[:16])]))
    assert data.store.val.counts.bytes == sum(len(text) for text in texts[16:])
    seen = np.concatenate([batch["input_ids"].numpy() for batch in data.train_dataloader()])
    assert seen.shape[1] == 16 and (next(iter(data.train_dataloader()))["position_ids"] == 0).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compression": "zstd"}, "is compressed or encrypted"),
        ({"data_format": ["jpeg"]}, "no one-dimensional tensors"),
        ({"item_loader": "PyTreeLoader"}, "write it with item_loader=TokensLoader()"),
        ({}, "pass such a folder with held-out text by --data.val_path"),
    ],
)
def test_what_cannot_be_read_of_litdata_is_one_line(change, said, two, tmp_path, capsys):
    config = {"data_format": ["no_header_tensor:16"]} | change
    folder = written_by_litdata(tmp_path / "train", [[1, 2, 3]] * 9, "int32", **config)
    flags = {"data.path": folder, "data.tokenizer": f"{two[0]}/tokenizer", "trainer.max_steps": 1}
    with pytest.raises(SystemExit) as stop:
        run("fit", **flags, **({"data.val_path": folder} if change else {}))
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
