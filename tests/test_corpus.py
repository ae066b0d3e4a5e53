"""Every kind of corpus gives its documents, all of them and in order, or one clear sentence."""

import csv
import gzip
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError
from qwen_scope.corpus import documents, located

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
# No surrogates, which are no Unicode text, and no zero byte, which marks binary files.
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("corpus")


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_rows(path: Path, delimiter: str, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_parquet(path: Path, row_group_size: int | None = None, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def not_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def read(source: Path, **options: Any) -> list[Any]:
    return list(documents(source, **options))


def read_or_refused(source: Path, expected: list[str], **options: Any) -> None:
    if expected:
        assert read(source, **options) == expected
    else:
        with pytest.raises(QwenScopeError, match="at least one document"):
            read(source, **options)


# Rows keep every character


@given(texts=TEXTS)
def test_json_lines_round_trip(folder: Path, texts: list[str]):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "text": t}, ensure_ascii=False) + "\n" for t in texts), newline="")
    read_or_refused(path, not_blank(texts))


@given(texts=TEXTS)
def test_json_list_round_trip(folder: Path, texts: list[str]):
    read_or_refused(write(folder / "a.json", json.dumps([{"text": t} for t in texts], indent=1)), not_blank(texts))


@given(texts=TEXTS, kind=st.sampled_from([(".csv", ","), (".tsv", "\t")]))
def test_separated_values_round_trip(folder: Path, texts: list[str], kind: tuple[str, str]):
    ending, delimiter = kind
    path = write_rows(folder / f"a{ending}", delimiter, [["id", 'the "text"'], *(["1", text] for text in texts)])
    read_or_refused(path, not_blank(texts), column='the "text"')


@given(texts=TEXTS)
def test_parquet_round_trip(folder: Path, texts: list[str]):
    path = write_parquet(
        folder / "a.parquet", other=list(range(len(texts))), body=pyarrow.array(texts, pyarrow.string())
    )
    read_or_refused(path, not_blank(texts))


@given(texts=TEXTS)
def test_text_files_round_trip(folder: Path, texts: list[str]):
    text = "".join(texts)
    read_or_refused(write(folder / "a.txt", text), not_blank([text.removeprefix("\ufeff")]))


# Files and folders


def test_a_long_text_comes_in_pieces_that_make_it_up(tmp_path: Path):
    lines = "".join(f"{number} ligne de forêt\n" for number in range(150_000))
    pieces = read(write(tmp_path / "a.txt", lines))
    assert "".join(pieces) == lines
    assert [len(piece) // (1 << 20) for piece in pieces] == [0] * len(pieces)
    assert len(pieces) == len(lines.encode()) // (1 << 20) + 1
    assert all(piece.endswith("forêt\n") for piece in pieces)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path):
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "a" / "z.md", "second")
    write(tmp_path / "a" / "B.py", "first = 1")
    write(tmp_path / "c", "fourth, no ending")
    write(tmp_path / ".hidden", "no")
    write(tmp_path / ".git" / "config", "no")
    write(tmp_path / "d.png", b"\x89PNG\0\0")
    write(tmp_path / "latin1.cfg", "é".encode("latin-1"))
    write(tmp_path / "e.txt", " \n")
    write_lines(tmp_path / "f.jsonl", {"text": "fifth"}, {"text": "sixth"})
    write_rows(tmp_path / "g.CSV", ",", [["quote"], ["seventh"]])
    assert read(tmp_path) == ["first = 1", "second", "third", "fourth, no ending", "fifth", "sixth", "seventh"]
    assert list(documents(str(tmp_path))) == read(tmp_path)


def test_links_to_files_are_read_and_links_to_folders_are_not(tmp_path: Path):
    write(tmp_path / "a.txt", "a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    os.mkfifo(tmp_path / "pipe.txt")  # opening one would wait for ever
    assert read(tmp_path) == ["a", "a"]


def test_a_folder_is_opened_file_by_file(tmp_path: Path):
    write(tmp_path / "a.txt", "fine")
    write_lines(tmp_path / "b.jsonl", {"text": "fine too"}, {"text": "and this"})
    write(tmp_path / "c.txt", b"\xff")
    stream = documents(tmp_path)
    assert [next(stream), next(stream)] == ["fine", "fine too"]
    (tmp_path / "c.txt").write_text("mended before its turn")
    assert list(stream) == ["and this", "mended before its turn"]


def test_compressed_files(tmp_path: Path):
    write(tmp_path / "a.txt.gz", gzip.compress(b"text"))
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"text": "row"}'))
    assert read(tmp_path) == ["text", "row"]


def test_json_with_a_row_a_line(tmp_path: Path):
    path = write(tmp_path / "a.json", '\ufeff\n{"text": "one"}\n\n{"text": "two"}')
    assert read(path) == ["one", "two"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(4_000):
            file.write(json.dumps({"text": f"{number} " * 100}) + "\n")
    size = (tmp_path / "a.jsonl").stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in documents(tmp_path)) == 4_000
        assert tracemalloc.get_traced_memory()[1] < size / 20
    finally:
        tracemalloc.stop()


# Columns


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"title": "no", "text": "yes", "messages": CHAT}, "yes"),
        ({"title": "no", "messages": CHAT}, CHAT),
        ({"title": "no", "conversations": CHAT}, CHAT),
        ({"title": "no", "conversation": CHAT}, CHAT),
        ({"id": 3, "body": "yes", "score": 0.5, "none": None}, "yes"),
    ],
)
def test_the_column_is_found(tmp_path: Path, row: dict[str, Any], found: Any):
    assert read(write_lines(tmp_path / "a.jsonl", row)) == [found]
    assert read(write_parquet(tmp_path / "a.parquet", **{name: [value] for name, value in row.items()})) == [found]


def test_the_column_asked_for_wins(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "no", "title": "yes"})
    assert read(path, column="title") == ["yes"]


def test_rows_without_a_value_are_left_out(tmp_path: Path):
    rows = [{"text": None}, {"text": "a"}, {"other": 1}, {"text": "\n\t"}, {"text": "b"}, {"text": []}]
    assert read(write_lines(tmp_path / "a.jsonl", *rows)) == ["a", "b"]
    assert read(write(tmp_path / "a.csv", 'id,text\n1,a\n2\n\n3,""\n4,b\n')) == ["a", "b"]
    assert read(write_parquet(tmp_path / "a.parquet", text=[None, "a", "", "b"])) == ["a", "b"]


def test_long_fields(tmp_path: Path):
    text = "long " * 100_000
    assert read(write_rows(tmp_path / "a.csv", ",", [["text"], [text]])) == [text]


def test_sharegpt_is_renamed(tmp_path: Path):
    chat = [{"from": who, "value": who.upper()} for who in ("system", "human", "gpt", "tool")]
    path = write_lines(tmp_path / "a.jsonl", {"conversations": chat})
    assert read(path) == [
        [
            {"role": "system", "content": "SYSTEM"},
            {"role": "user", "content": "HUMAN"},
            {"role": "assistant", "content": "GPT"},
            {"role": "tool", "content": "TOOL"},
        ]
    ]


def test_blank_chats_are_left_out_and_silent_turns_kept(tmp_path: Path):
    silent = [{"role": "user", "content": "Call it."}, {"role": "assistant", "content": None, "tool_calls": [{}]}]
    blank = [{"role": "user", "content": " "}]
    assert read(write_lines(tmp_path / "a.jsonl", {"messages": blank}, {"messages": silent})) == [silent]


def test_parquet_is_read_in_bounded_memory_and_one_column_only(tmp_path: Path):
    # One row group of 32 MiB, and a second column of 32 MiB that must not be touched.
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([os.urandom(4096).hex() for _ in range(4096)])
    table = pyarrow.table({"text": texts, "other": pyarrow.array([os.urandom(4096).hex() for _ in range(4096)])})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none", column_encoding="PLAIN")
    with pyarrow.parquet.ParquetFile(path) as file:
        assert file.num_row_groups == 1
        other = file.metadata.row_group(0).column(1)
    with path.open("r+b") as file:  # whoever reads the second column fails
        file.seek(other.data_page_offset)
        file.write(b"\xff" * 64)
    with pytest.raises(QwenScopeError, match="cannot be read"):
        read(path, column="other")
    expected = texts.to_pylist()
    del texts, table
    before, peak = pyarrow.total_allocated_bytes(), 0
    for number, text in enumerate(documents(path)):
        assert text == expected[number]
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert number == len(expected) - 1
    assert peak < 16 << 20


def test_parquet_of_small_row_groups(tmp_path: Path):
    texts = [f"document {number}" for number in range(1000)]
    assert read(write_parquet(tmp_path / "a.parquet", row_group_size=7, text=texts)) == texts


# Datasets


def test_a_saved_dataset(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["a", None, "b"], "title": ["x", "y", "z"]})
    rows.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ["a", "b"]
    assert read(tmp_path / "one", column="title") == ["x", "y", "z"]
    with pytest.raises(QwenScopeError, match=r"column 'tex' in .*one, found 'id', 'text', 'title'; .*--column"):
        read(tmp_path / "one", column="tex")
    chats = datasets.Dataset.from_dict({"messages": [CHAT]})
    datasets.DatasetDict({"train": rows, "test": chats}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == ["a", "b"]
    assert read(tmp_path / "two", split="test") == [CHAT]
    with pytest.raises(QwenScopeError, match=r"split 'dev' in .*, found train, test;"):
        read(tmp_path / "two", split="dev")


def test_a_damaged_dataset(tmp_path: Path):
    datasets.Dataset.from_dict({"text": ["some text"] * 99}).save_to_disk(tmp_path)
    [arrow] = tmp_path.glob("*.arrow")
    # Offsets 18 and 27 of the texts in the data: without a check, reading far outside it ends the process.
    offsets = (18).to_bytes(4, "little") + (27).to_bytes(4, "little")
    assert offsets in arrow.read_bytes()
    arrow.write_bytes(arrow.read_bytes().replace(offsets, b"\xff\xff\xff\x7f" * 2))
    with pytest.raises(QwenScopeError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(QwenScopeError, match="cannot be read"):
        read(tmp_path)


def test_a_streamed_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A file stands in for the hub: what `datasets` makes of both is the same.
    path = write_lines(tmp_path / "a.jsonl", {"id": 1, "text": "a"}, {"id": 2, "text": "b"})
    here = {"path": "json", "data_files": {"train": str(path)}, "cache_dir": str(tmp_path / "cache")}
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, name, **options: load(name=name, **options, **here))
    assert list(documents("org/name")) == ["a", "b"]
    assert list(documents("org/name", streaming=False)) == ["a", "b"]
    with pytest.raises(QwenScopeError, match="column 'tex' in org/name, found 'id', 'text';"):
        next(documents("org/name", column="tex"))
    with pytest.raises(QwenScopeError, match=r"the split 'dev' .* Available splits: \['train'\]\); choose with split="):
        next(documents("org/name", split="dev"))
    write(path, "{")
    with pytest.raises(QwenScopeError, match="org/name"):
        next(documents("org/name"))


def test_an_unknown_dataset(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QwenScopeError, match=r"no file or folder and no such dataset within reach .*Offline.*; check"):
        next(documents("nobody/nothing"))


# Errors


@pytest.mark.parametrize(
    "source", ["", "nothing", "a/b.txt", "a/b/c", "/nothing/there", "../x", "x" * 5000, "a\0b", "a/.."]
)
def test_nothing_there(source: str):
    with pytest.raises(QwenScopeError, match="found nothing at"):
        next(documents(source))


def test_a_path_is_never_a_dataset():
    with pytest.raises(QwenScopeError, match="found nothing at 'org/name'"):
        next(documents(Path("org/name")))


PARQUET: Callable[[Path], bytes] = lambda path: write_parquet(path / "whole", text=["some text"] * 99).read_bytes()  # noqa: E731


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", "", "at least one document"),
        ("a.txt", " \n\n", "at least one document"),
        ("a.jsonl", "", "at least one document"),
        ("a.json", "", "at least one document"),
        ("a.json", "[]", "at least one document"),
        ("a.csv", "", "at least one document"),
        ("a.csv", "text\n", "at least one document"),
        ("a.jsonl", '{"text": " "}', "at least one document"),
        ("a.txt", b"abc\0", "zero byte at offset 3"),
        ("a.bin", b"\0" * 3_000_000, "zero byte at offset 0"),
        ("a.txt", "café".encode("latin-1"), "no UTF-8 at offset 3"),
        ("a.txt", "\ufeffé\n".encode() * 300_000 + b"\xff", f"no UTF-8 at offset {6 * 300_000}"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "no UTF-8 at offset 24"),
        ("a.csv", b"text\n\xe9\n", "no UTF-8 at offset 5"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "line 3 of .*does not parse"),
        ("a.jsonl", "[" * 100_000, "line 1 of .*does not parse"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 of .*does not parse"),
        ("a.json", '{\n"text": "a"\n}', "line 1 of .*does not parse"),
        ("a.json", '[{"text": "a"},]', r"JSON in .*a.json, found what does not parse"),
        ("a.jsonl", '{"text": "a"}\n"b"\n', "line 2 of .*found str"),
        ("a.json", '["b"]', "row 1 of .*found str"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', r"text or chat messages .*line 2 of .*found int 5; .*--column"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "line 1 of .*found list"),
        ("a.jsonl", '{"messages": [{"from": [], "value": "a"}]}', "line 1 of .*found list"),
        ("a.jsonl", '{"messages": ["hello"]}', "line 1 of .*found list"),
        ("a.jsonl", '{"text": "a\\ud800"}', "valid Unicode in line 1 of .*'.ud800' at character 1"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\udfff"}]}', "valid Unicode in line 1"),
        ("a.jsonl", '{"a": "x", "b": "y"}', r"one column of strings.* found 'a', 'b'; .*--column"),
        ("a.jsonl", "{}", "found no columns"),
        ("a.csv", "a,b\nx,y\n", r"one column of strings.* found 'a', 'b'; .*--column"),
        ("a.csv", 'text\n"a\nb\n', "line 3 .*unexpected end of data"),
        ("a.parquet", b"hello", "cannot be read .*Parquet"),
        ("a.parquet", b"", "cannot be read .*Parquet"),
        ("a.parquet", lambda path: PARQUET(path)[:-9], "cannot be read .*Parquet"),
        ("a.parquet", lambda path: PARQUET(path)[:8] + b"\xff" * 20 + PARQUET(path)[28:], "cannot be read"),
        ("a.parquet", lambda path: write_parquet(path / "x", n=[1], m=[2]).read_bytes(), r"found 'n', 'm'; .*--column"),
        ("a.parquet", lambda path: write_parquet(path / "x", text=[b"a"]).read_bytes(), "row 1 of .*found bytes b'a'"),
        ("a.txt.gz", b"hello", "cannot be read .*gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot be read .*Compressed file ended"),
        ("a.txt.gz", gzip.compress(b"a" * 99)[:12] + b"\xff" * 9, "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: Any, sentence: str):
    path = write(tmp_path / "in" / name, content(tmp_path) if callable(content) else content)
    with pytest.raises(QwenScopeError, match=sentence):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_is_not_there(tmp_path: Path, name: str):
    write_lines(tmp_path / "a.jsonl", {"id": "1", "text": "a"})
    write_rows(tmp_path / "a.csv", ",", [["id", "text"], ["1", "a"]])
    write_parquet(tmp_path / "a.parquet", id=["1"], text=["a"])
    with pytest.raises(QwenScopeError, match=rf"column 'body' in .*{name}, found 'id', 'text'; .*--column"):
        next(documents(tmp_path / name, column="body"))


def test_folders_without_text(tmp_path: Path):
    with pytest.raises(QwenScopeError, match="found 0 files and no UTF-8 text"):
        read(tmp_path)
    write(tmp_path / "a.png", b"\0")
    write(tmp_path / "b" / "c", b"\xff")
    with pytest.raises(QwenScopeError, match="found 2 files and no UTF-8 text"):
        read(tmp_path)
    write(tmp_path / "empty.txt", "")
    with pytest.raises(QwenScopeError, match="at least one document"):
        read(tmp_path)
    write(tmp_path / "z.txt", b"\xff")
    with pytest.raises(QwenScopeError, match=r"UTF-8 text in .*z\.txt"):
        read(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_permission(tmp_path: Path):
    write(tmp_path / "a.txt", "a").chmod(0)
    (tmp_path / "b").mkdir(mode=0)
    for source in (tmp_path, tmp_path / "a.txt", tmp_path / "b"):
        with pytest.raises(QwenScopeError, match=r"cannot be read .*denied"):
            read(source)
    (tmp_path / "b").rmdir()


def test_a_folder_that_vanishes_while_it_is_read(tmp_path: Path):
    write(tmp_path / "a" / "a.txt", "a")
    write(tmp_path / "b" / "b.txt", "b")
    stream = documents(tmp_path)
    next(stream)
    (tmp_path / "b" / "b.txt").unlink()
    (tmp_path / "b").rmdir()
    with pytest.raises(QwenScopeError, match=r"b, found that it cannot be read .*No such file"):
        next(stream)


@pytest.mark.parametrize(("source", "module"), [("a.parquet", "pyarrow"), ("org/name", "datasets")])
def test_packages_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(QwenScopeError, match=rf"package {module} to read {source}.* pip install 'qwen-scope\[train\]'"):
        next(documents(source))


# What is broken, told and passed over


def told(source: Path, **options: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    broken: list[str] = []
    return list(located(source, broken=broken.append, **options)), broken


def test_documents_come_with_their_places(tmp_path: Path):
    write(tmp_path / "a.txt", "one")
    write_lines(tmp_path / "b.jsonl", {"text": "two"}, {"text": " "}, {"text": "three"})
    found, broken = told(tmp_path)
    assert [document for _, document in found] == ["one", "two", "three"]
    assert [place.replace(str(tmp_path), "") for place, _ in found] == [
        "/a.txt",
        "line 1 of /b.jsonl",
        "line 3 of /b.jsonl",
    ]
    assert broken == []


def test_later_pieces_of_a_long_text_say_where_they_begin(tmp_path: Path):
    text = "a line of text\n" * 100_000
    found, _ = told(write(tmp_path / "a.txt", text))
    start = len(found[0][1])
    assert found[1][0].endswith(f"a.txt from character {start}")
    assert text[start:].startswith(found[1][1])


def test_broken_lines_are_told_and_passed_over(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{broken\n[1]\n{"text": 5}\n{"text": "two"}\n')
    found, broken = told(path)
    assert [document for _, document in found] == ["one", "two"]
    assert [f"line {n} of" in sentence for n, sentence in zip((2, 3, 4), broken, strict=True)] == [True] * 3
    with pytest.raises(QwenScopeError, match="line 2"):
        list(located(path))


def test_lines_that_are_not_utf_8_are_told_and_passed_over(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n{"text": "\xe9"}\n{"text": "\0"}\n{broken\n{"text": "two"}\n')
    found, broken = told(path)
    assert found == [(f"line 1 of {path}", "one"), (f"line 5 of {path}", "two")]
    expected = ("no UTF-8 at offset 26", "a zero byte at offset 40", f"JSON in line 4 of {path}")
    assert [words in sentence for words, sentence in zip(expected, broken, strict=True)] == [True] * 3


def test_rows_with_odd_quotes_are_told_and_passed_over(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'text,n\none,1\n"two"x,2\nthree,3\n')
    found, broken = told(path)
    assert [document for _, document in found] == ["one", "three"]
    assert len(broken) == 1
    assert "quotes" in broken[0]


def test_files_that_break_their_promise_are_told_and_passed_over(tmp_path: Path):
    write(tmp_path / "a.txt", b"\0\1\2")
    write(tmp_path / "b.parquet", b"no table")
    write(tmp_path / "c.txt", "text")
    write(tmp_path / "d.bin", b"\0")  # promises nothing, so it is not even told
    found, broken = told(tmp_path)
    assert [document for _, document in found] == ["text"]
    assert len(broken) == 2


def test_a_corpus_of_broken_lines_only_is_refused(tmp_path: Path):
    with pytest.raises(QwenScopeError, match=r"found only blank ones or none \(expected JSON in line 1 of"):
        told(write(tmp_path / "a.jsonl", "{broken\n"))
