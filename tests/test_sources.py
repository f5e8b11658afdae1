import csv
import gzip
import json
import lzma
import os
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datamodules import sources
from datamodules.corpus import Corpus, hold_out, open_corpus
from datamodules.documents import pieces
from datamodules.files import BadRows
from datamodules.sources import ContentHashes, TextFile, find_files, is_hub_name, standard_library

TEXTS = ['plain "quoted", with a comma\tand a tab', "two\nlines – größer 😀", "third\r\n"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def write_rows(file: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    """Rows in the format that the file's name says, compressed where it says so."""
    plain = file.with_suffix("") if file.suffix in (".gz", ".xz", ".zst") else file
    if plain.suffix in (".csv", ".tsv"):
        with plain.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if plain.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows(row.values() for row in rows)
    elif plain.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif plain.suffix == ".json":
        plain.write_text(json.dumps(rows))
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if plain != file:
        compress(file, plain.read_bytes())
        plain.unlink()
    return file


def compress(file: Path, content: bytes) -> Path:
    if file.suffix.lower() == ".zst":
        with pyarrow.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(content)
    else:
        file.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(file.suffix, bytes)(content))
    return file


def read(file: Path, skip: bool = False, column: str = "text") -> list[str]:
    return [piece.text for piece in pieces(file, column, BadRows(skip))]


def corpus(path: str | list[str] | None, fraction: float = 0.2, val_path: str | None = None) -> Corpus:
    return open_corpus(path, val_path, fraction, "text", False, ContentHashes(Path(os.devnull) / "none"))


# Formats


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".zst"])
def test_every_row_of_every_format_is_a_document(tmp_path, form, compression):
    assert read(write_rows(tmp_path / f"rows.{form}{compression}")) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.tokens", "a", "a.txt.gz", "a.log.xz", "A.TXT.ZST"])
def test_any_other_file_is_one_document_with_its_line_ends_as_they_are(tmp_path, name):
    text = "\n".join(TEXTS)
    assert "".join(read(compress(tmp_path / name, text.encode()))) == text


def test_json_may_hold_its_list_in_an_object_or_a_row_a_line(tmp_path):
    (tmp_path / "object.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert read(tmp_path / "object.json") == read(tmp_path / "lines.json") == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "text"), ("a.jsonl", '{"text": "text"}'), ("a.csv", "text\ntext")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read(tmp_path / name) == ["text"]


def test_characters_on_the_border_of_two_blocks_survive(tmp_path):
    text = "aé😀" * 400_000
    (tmp_path / "long.txt").write_text(text)
    assert "".join(read(tmp_path / "long.txt")) == text


def test_empty_rows_are_left_out_and_counted(tmp_path):
    bad_rows = BadRows(skip=False)
    file = write_rows(tmp_path / "rows.jsonl", [{"text": ""}, *ROWS])
    assert len(list(pieces(file, "text", bad_rows))) == 3 and bad_rows.empty == 1


# Bad input


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{oops", ":3: no JSON"),
        (b"[1]", ":3: no JSON object but list"),
        (b'{"text": null}', ":3: 'text' is null"),
        (b'{"text": 7}', ":3: 'text' is no text but int"),
        (b'{"id": 7}', ":3: no 'text'"),
        (b'{"text": "\xff"}', ":3: not UTF-8 at its byte 10"),
        (b'{"text": "\\ud800"}', ":3: 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_or_left_out_and_counted(tmp_path, line, fault):
    good = b'{"text": "good"}'
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(ValueError) as error:
        read(file)
    assert f"{file}{fault}" in str(error.value) and "--data.on_bad_row skip" in str(error.value)
    assert "\n" not in str(error.value)
    bad_rows = BadRows(skip=True)
    assert [piece.text for piece in pieces(file, "text", bad_rows)] == ["good"] * 3
    assert bad_rows.skipped == {str(file): 1}


def test_a_first_row_without_the_column_may_be_skipped_like_any_other(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n{"text": "good"}\n')
    assert read(tmp_path / "rows.jsonl", skip=True) == ["good"]


def test_a_row_of_csv_with_too_few_fields_is_bad(tmp_path):
    (tmp_path / "rows.csv").write_text("id,text\n1,good\n2\n3,good\n")
    with pytest.raises(ValueError, match="rows.csv:2: 1 fields where the header has 2"):
        read(tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv", skip=True) == ["good", "good"]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_missing_column_names_those_that_exist(tmp_path, form, skip):
    file = write_rows(tmp_path / f"rows.{form}")
    with pytest.raises(ValueError, match=rf"{file} has no column 'body'; pass --data.text_column, one of: id, text$"):
        read(file, skip, column="body")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.xz", "a.csv.zst", "a.parquet", "a.parquet.gz"])
def test_a_truncated_file_is_said_to_be_cut_off(tmp_path, name):
    rows = [{"text": f"{i} " + str(hash(str(i))) * 20} for i in range(2000)]
    file = write_rows(tmp_path / name, rows)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"^{file} is cut off or damaged \(.*\); fetch"):
        read(file)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"x" * (1 << 20) + b"caf\xe9!", f"is not UTF-8 at byte {(1 << 20) + 3}"),
        (b"\xef\xbb\xbfab\xff", "is not UTF-8 at byte 5"),
        (b"ends within a character \xc3", "is not UTF-8 at byte 24"),
        (b"PK\x03\x04\x00", "is no text: byte 4 is NUL"),
    ],
)
def test_what_is_no_utf8_text_is_named_by_its_byte(tmp_path, content, fault):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt {fault}"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ['[{"text": "a"}', '{"a": 1}', '{"a": [], "b": []}'])
def test_json_without_a_list_of_rows_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json (is no JSON|holds no single list)"):
        read(tmp_path / "a.json")


# Finding


def test_a_folder_gives_its_known_files_in_order_and_follows_links_but_not_in_circles(tmp_path):
    for name in ("b.txt", "a.md.gz", "c/d.jsonl", "c/e.bin", ".hidden.txt", ".git/x.txt", "c/__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "c" / "circle").symlink_to(tmp_path)
    outside = tmp_path.with_name(f"{tmp_path.name}_outside")
    outside.mkdir()
    (outside / "z.txt").write_text("x")
    (tmp_path / "linked").symlink_to(outside)
    found = [str(file.relative_to(tmp_path)) for file in find_files([str(tmp_path)], "--data.path")]
    assert found == ["a.md.gz", "b.txt", "c/d.jsonl", "linked/z.txt"]


def test_globs_match_across_folders_and_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.log", "2.log"):
        (tmp_path / name).write_text("x")
    found = find_files([str(tmp_path / "2.log"), str(tmp_path / "**/*.log")], "--data.path")
    assert [file.name for file in found] == ["2.log", "1.log"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("nothing.txt", "does not exist; pass files, folders, globs by --data.path"),
        ("*.zip", "nothing matches .*; mend the pattern of --data.path"),
        ("empty.txt", "is empty; leave it out of --data.path"),
        ("folder", "no text file in the folder .*; --data.path reads .txt"),
        ("loop", "cannot be read: Too many levels of symbolic links; mend it or leave it out of --data.path"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_mend(tmp_path, name, fault):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises((OSError, ValueError), match=fault) as error:
        find_files([str(tmp_path / name)], "--data.path")
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(PermissionError, match="a.txt cannot be read: permission denied; chmod it"):
        corpus(str(tmp_path / "a.txt"))


def test_the_standard_library_comes_without_its_tests_and_without_what_was_installed():
    files = [file.relative_to(sysconfig.get_path("stdlib")) for file in standard_library()]
    assert Path("argparse.py") in files and Path("json/decoder.py") in files and files == sorted(files)
    folders = {part for file in files for part in file.parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}


def test_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file, memory = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    first = ContentHashes(memory)
    digest = first(file)
    first.save()
    read_files: list[Path] = []
    real = sources.hashlib.file_digest
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda s, name: read_files.append(s) or real(s, name))
    assert ContentHashes(memory)(file) == digest and not read_files
    file.write_text("two")
    assert ContentHashes(memory)(file) != digest and len(read_files) == 1


# Held-out text


def files_of(folder: Path, count: int) -> list[TextFile]:
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text number {i}")
    return list(corpus(str(folder)).train + corpus(str(folder)).val)


def test_what_is_held_out_stays_so_when_files_are_added(tmp_path):
    few = files_of(tmp_path, 40)
    many = files_of(tmp_path, 80)
    _, held_before = hold_out(few, 0.3)
    _, held_after = hold_out(many, 0.3)
    assert 0 < len(held_before) < 40 and set(held_before) == set(held_after) & set(few)
    assert 0.1 < len(held_after) / 80 < 0.5


def test_where_no_file_qualifies_the_one_with_the_smallest_hash_is_held_out(tmp_path):
    files = files_of(tmp_path, 5)
    train, val = hold_out(files, 1e-9)
    assert val == [min(files, key=lambda file: file.digest)] and len(train) == 4
    train, val = hold_out(files, 1 - 1e-9)
    assert train == [max(files, key=lambda file: file.digest)] and len(val) == 4


def test_files_of_equal_content_land_on_the_same_side(tmp_path):
    files = files_of(tmp_path, 10)
    for i in range(10):
        (tmp_path / f"copy{i}.txt").write_text(f"text number {i}")
    split = corpus(str(tmp_path), fraction=0.3)
    assert not {file.digest for file in split.train} & {file.digest for file in split.val}
    assert len(split.train) + len(split.val) == 2 * len(files)
    with pytest.raises(ValueError, match="all 2 files hold the same text; pass --data.val_path"):
        hold_out([files[0], files[0]], 0.5)


def test_of_a_single_text_the_last_characters_are_held_out(tmp_path):
    text = "".join(f"größer {i}\n" for i in range(150_000))  # more than one block
    (tmp_path / "a.txt").write_text(text)
    split = corpus(str(tmp_path / "a.txt"), fraction=0.1)
    cut = int(len(text) * 0.9)
    assert list(split.documents("train")) == [text[:cut]] and list(split.documents("val")) == [text[cut:]]


def test_of_a_single_table_the_last_rows_are_held_out(tmp_path):
    split = corpus(str(write_rows(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10)])), fraction=0.25)
    assert list(split.documents("train")) == list("0123456") and list(split.documents("val")) == list("789")


def test_given_held_out_text_takes_nothing_from_the_rest(tmp_path):
    files_of(tmp_path, 4)
    split = corpus([str(tmp_path / "0.txt"), str(tmp_path / "1.txt")], val_path=str(tmp_path / "2.txt"))
    assert list(split.documents("train")) == ["text number 0", "text number 1"]
    assert list(split.documents("val")) == ["text number 2"]


def test_the_digest_of_a_corpus_follows_content_not_paths(tmp_path):
    files_of(tmp_path, 4)
    before = corpus(str(tmp_path)).digest
    moved = tmp_path.with_name(f"{tmp_path.name}_moved")
    tmp_path.rename(moved)
    assert corpus(str(moved)).digest == before
    (moved / "3.txt").write_text("other")
    assert corpus(str(moved)).digest != before


# The Hub


@pytest.mark.parametrize(
    ("given", "is_name"),
    [
        ("wikitext", True),
        ("owner/name-1.0", True),
        ("a/b:config", True),
        ("a.txt", False),
        ("./a", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_name_is_told_from_a_path(given, is_name):
    assert is_hub_name(given) == is_name


def test_a_hub_data_set_gives_its_rows_and_its_validation_split(monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"text": ["a", "", "b"], "id": [1, 2, 3]})
    both = datasets.DatasetDict(train=table, validation=table.select([2]), test=table)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: both)
    split = corpus("owner/name")
    assert list(split.documents("train")) == ["a", "b"] and list(split.documents("val")) == ["b"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: datasets.DatasetDict(train=table))
    split = corpus("owner/name")
    assert list(split.documents("train")) == ["a"] and list(split.documents("val")) == ["b"]


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(sources.hub, "is_within_reach", lambda: False)
    with pytest.raises(OSError, match="^no/such is neither a path on this machine nor a Hub data set within reach"):
        corpus("no/such")
