"""Labels: what is kept, which of them counts, and how they travel between indexes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from index_maker import write_index

from qwen_scope.cli import main
from qwen_scope.errors import QwenScopeError
from qwen_scope.index.feature import Label
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.labels import Labels


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    return Labels(tmp_path / "labels.jsonl")


def test_a_hand_counts_before_a_model_and_the_newest_of_each_before_the_rest(labels: Labels):
    assert labels.get(1, 0) is None
    labels.add(1, 0, Label("first", "model a"))
    labels.add(1, 0, Label("second", "model b"))
    labels.add(1, 0, Label("third", "model a", score=0.75, control=0.5, prompt="v1"))
    assert [label.text for label in labels.all(1, 0)] == ["third", "second"]
    labels.add(1, 0, Label("mine", "hand"))
    labels.add(1, 0, Label("fourth", "model b"))
    assert [label.text for label in labels.all(1, 0)] == ["mine", "fourth", "third"]
    assert labels.get(1, 0) == labels.of(1, 0, "hand")
    third = labels.of(1, 0, "model a")
    assert third is not None
    assert (third.score, third.control, third.prompt) == (0.75, 0.5, "v1")
    assert third.time
    # A new object reads the same from the file.
    assert Labels(labels.path).all(1, 0) == labels.all(1, 0)


def test_an_empty_text_takes_back_what_its_author_wrote(labels: Labels):
    labels.add(1, 0, Label("by a model", "model"))
    labels.add(1, 0, Label("mine", "hand"))
    labels.add(1, 0, Label("", "hand"))
    assert labels.of(1, 0, "hand") is None
    kept = labels.get(1, 0)
    assert kept is not None
    assert kept.text == "by a model"
    labels.add(1, 0, Label(" ", "model"))
    assert labels.get(1, 0) is None
    assert len(labels) == 0


def test_a_line_cut_short_loses_itself_only(labels: Labels):
    labels.add(1, 0, Label("whole", "hand"))
    with labels.path.open("ab") as file:
        file.write(b'{"layer": 1, "feature": 1, "text": "cut sho')
    labels.add(1, 2, Label("after", "hand"))
    assert [key for key, _ in labels.items()] == [(1, 0), (1, 2)]
    assert [key for key, _ in Labels(labels.path).items()] == [(1, 0), (1, 2)]


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"null",
        b"[1, 2]",
        b'{"layer": -1, "feature": 0, "text": "x"}',
        b'{"layer": 1, "feature": 99999999999, "text": "x"}',
        b'{"layer": 1, "feature": 0, "text": 3}',
        b'{"layer": 1, "feature": 0, "text": "x", "score": NaN}',
        b'{"layer": 1, "feature": 0, "text": "x", "score": 1' + b"0" * 400 + b"}",
        NESTED,
    ],
)
def test_what_is_no_label_is_passed_over(labels: Labels, line: bytes):
    labels.add(1, 0, Label("good", "hand"))
    with labels.path.open("ab") as file:
        file.write(line + b"\n")
    labels.add(1, 1, Label("good too", "hand"))
    assert [label.text for _, label in Labels(labels.path).items()] == ["good", "good too"]
    assert Labels(labels.path).to_table().num_rows == 2


def test_texts_stay_on_one_line_and_do_nothing_to_a_terminal(labels: Labels):
    labels.add(1, 0, Label("two\nlines \x1b[31mred\ud800 «é»", "a\nmodel"))
    (label,) = labels.all(1, 0)
    assert (label.text, label.by) == ("two lines [31mred «é»", "a model")
    assert Labels(labels.path).all(1, 0) == [label]


def test_labels_of_features_that_are_not_there(tmp_path: Path):
    index = write_index(tmp_path / "index", {1: 64})
    with pytest.raises(QwenScopeError, match="found 2/0"):
        index.labels.add(2, 0, Label("ghost", "hand"))
    assert not index.labels.path.exists()
    # Somebody copies a file of another index.
    labels = Labels(index.labels.path)
    for key in ((1, 0), (1, 64), (2, 0)):
        labels.add(*key, Label("a word", "hand"))
    assert [key for key, _ in index.labels.items()] == [(1, 0)]
    assert index.labels.to_table().num_rows == len(index.labels) == 1


def test_what_others_write_meanwhile_is_seen(labels: Labels):
    other = Labels(labels.path)
    for round_ in range(3):
        labels.add(1, round_, Label("ours", "hand"))
        assert len(labels) == len(other) == 2 * round_ + 1
        other.add(2, round_, Label("theirs", "hand"))
        assert len(labels) == len(other) == 2 * round_ + 2
    # Somebody edits the file, to the same size.
    labels.path.write_text(labels.path.read_text().replace("ours", "mine"))
    os.utime(labels.path, ns=(1, 1))
    assert {label.text for _, label in labels.items()} == {"mine", "theirs"}


def test_two_processes_add_labels_at_once(labels: Labels):
    code = (
        "import sys; from pathlib import Path; from qwen_scope.index.labels import Labels; "
        "from qwen_scope.index.feature import Label; labels = Labels(Path(sys.argv[1]))\n"
        "for n in range(150): labels.add(int(sys.argv[2]), n, Label('word ' * 40, 'model'))"
    )
    command = [sys.executable, "-c", code, str(labels.path)]
    writers = [subprocess.Popen([*command, layer]) for layer in ("1", "2")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(labels) == 300
    # A line may be blank, but none is mixed of two.
    assert len([json.loads(line) for line in labels.path.read_bytes().splitlines() if line]) == 300


def test_threads_read_all_that_was_written_before(labels: Labels):
    lines = (json.dumps({"layer": 0, "feature": number, "text": "a"}) + "\n" for number in range(300))
    labels.path.write_text("".join(lines))

    def wrong(number: int) -> bool:
        if number % 2:
            labels.add(1, number, Label(f"number {number}", by="hand"))
        return len(labels) < 300 or (number % 2 == 1 and labels.get(1, number) is None)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(wrong, range(100))) == 0
    finally:
        sys.setswitchinterval(interval)
    assert len(labels) == 350


def test_labels_below_are_older_and_never_written(tmp_path: Path):
    below = Labels(tmp_path / "below.jsonl")
    below.add(1, 0, Label("shipped", "model"))
    below.add(1, 1, Label("shipped too", "model"))
    before = below.path.read_bytes()
    labels = Labels(tmp_path / "own" / "labels.jsonl", below=below.path)
    labels.add(1, 0, Label("own", "model"))
    assert [label.text for _, label in labels.items()] == ["own", "shipped too"]
    assert below.path.read_bytes() == before


def test_labels_that_cannot_be_written_are_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QwenScopeError, match="expected to write labels to"):
        Labels(tmp_path / "file" / "labels.jsonl").add(1, 0, Label("x", "hand"))


def index_with_labels(folder: Path) -> FeatureIndex:
    index = write_index(folder)
    index.labels.add(1, 0, Label("sports", "model a", 0.9, 0.5, "v1", "2026-01-01T00:00:00+00:00"))
    index.labels.add(1, 0, Label("football", "hand", time="2026-01-02T00:00:00+00:00"))
    index.labels.add(2, 3, Label("law “and” <b>order</b>", "model a", time="2026-01-03T00:00:00+00:00"))
    index.labels.add(2, 4, Label("", "hand"))
    return index


def test_an_export_goes_into_another_index_whole(tmp_path: Path):
    index, other = index_with_labels(tmp_path / "one"), write_index(tmp_path / "other")
    assert index.labels.export(tmp_path / "labels.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert {row["suite"] for row in rows} == {index.about.fingerprint}
    assert set(rows[0]) == {"layer", "feature", "text", "by", "score", "control", "prompt", "time", "suite"}
    imported = other.labels.import_(tmp_path / "labels.jsonl")
    assert (imported.added, imported.older, imported.broken) == (3, 0, 0)
    assert [other.labels.all(*key) for key in ((1, 0), (2, 3))] == [index.labels.all(*key) for key in ((1, 0), (2, 3))]
    # Once more adds nothing.
    size = other.labels.path.stat().st_size
    imported = other.labels.import_(tmp_path / "labels.jsonl")
    assert (imported.added, imported.older, imported.broken) == (0, 3, 0)
    assert other.labels.path.stat().st_size == size


def test_an_import_does_not_put_an_older_label_over_a_newer(tmp_path: Path):
    index = index_with_labels(tmp_path / "index")
    rows = [
        {"layer": 1, "feature": 0, "text": "older", "by": "hand", "time": "2026-01-01T23:00:00-05:00"},
        {"layer": 1, "feature": 0, "text": "newer", "by": "model a", "time": "2026-01-01T12:00:00"},
        {"layer": 1, "feature": 0, "text": "newest", "by": "model a", "time": "2026-02-01"},
        {"layer": 1, "feature": 2, "text": "of now"},
    ]
    # 23:00 at -05:00 is 04:00 of the next day, which is later than midnight.
    rows[0]["time"] = "2026-01-01T18:00:00-05:00"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    imported = index.labels.import_(tmp_path / "rows.jsonl")
    assert (imported.added, imported.older) == (2, 1)
    assert [label.text for label in index.labels.all(1, 0)] == ["football", "newest"]
    (now,) = index.labels.all(1, 2)
    assert now.by == "hand"
    assert now.time > "2026-02"


def test_broken_lines_of_an_import_are_named_and_the_rest_goes_in(tmp_path: Path):
    index = write_index(tmp_path / "index")
    good = {"layer": 1, "feature": 3, "text": "law", "suite": index.about.fingerprint}
    lines = [
        b'{"layer": 1, "feature": 0, "text": "cut sho',
        b"\xff\xfe",
        json.dumps({**good, "feature": 64}).encode(),
        json.dumps({**good, "layer": 7}).encode(),
        json.dumps({**good, "suite": "another"}).encode(),
        json.dumps({**good, "text": " "}).encode(),
        b"",
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\r\n".join(lines))
    imported = index.labels.import_(tmp_path / "rows.jsonl")
    assert (imported.added, imported.broken) == (1, 6)
    assert [f"line {n} of" in said for n, said in enumerate(imported.broken_first, 1)] == [True, True, True]
    assert "found 1/64" in imported.broken_first[2]
    assert [label.text for _, label in index.labels.items()] == ["law"]
    with pytest.raises(QwenScopeError, match="expected a file of labels"):
        index.labels.import_(tmp_path / "none.jsonl")


def test_the_command_labels_by_hand_and_carries_labels(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    write_index(tmp_path / "one")
    write_index(tmp_path / "two")
    main(["label", "--index", one, "--feature", "1/0", "--text", "football, mostly"])
    assert capsys.readouterr().out == "1/0: football, mostly\n"
    main(["label", "--index", one, "--export", str(tmp_path / "labels.jsonl")])
    with (tmp_path / "labels.jsonl").open("a") as file:
        file.write("no label\n")
    capsys.readouterr()
    main(["label", "--index", two, "--import", str(tmp_path / "labels.jsonl")])
    out = capsys.readouterr().out
    assert "1 labels added" in out
    assert "line 2 of" in out
    label = FeatureIndex.open(two)["1/0"].label
    assert label is not None
    assert (label.text, label.by) == ("football, mostly", "hand")
    main(["label", "--index", two, "--feature", "1/0", "--text", ""])
    assert FeatureIndex.open(two)["1/0"].label is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "found 0 of them"),
        (["--text", "x", "--export", "f"], "found 2 of them"),
        (["--text", "x"], "expected one feature with --text, found 0"),
        (["--text", "x", "--features", "1/0", "1/1"], "expected one feature with --text, found 2"),
        (["--text", "x", "--feature", "1/64"], "expected a feature from 1/0 to 1/63"),
        (["--text", "x", "--feature", "sport"], "expected a feature's name"),
        (["--endpoint", "http://127.0.0.1:1/v1"], "give --model"),
    ],
)
def test_what_the_command_cannot_do_is_a_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
):
    write_index(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["label", "--index", str(tmp_path), *arguments])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "labels.jsonl").exists()


def test_a_label_without_end_is_cut(tmp_path):
    labels = Labels(tmp_path / "labels.jsonl")
    labels.add(1, 2, Label("x" * 10_000, by="hand"))
    assert labels.get(1, 2).text == "x" * 1000
