"""A feature index opened and asked: features, tables, labels, SQL, and folders that are not whole."""

import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from index_maker import WORDS, write_index

from qwen_scope import QwenScopeError, Suite
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index import FeatureIndex
from qwen_scope.index.feature import Token
from qwen_scope.index.labels import Label, Labels
from qwen_scope.index.layout import DOCUMENTS, EXAMPLES, FEATURES, PAIRS, About, write_examples

PAGE = (Path(__file__).parent.parent / "docs" / "index-format.md").read_text()


@pytest.fixture
def index(tmp_path: Path) -> FeatureIndex:
    return write_index(tmp_path / "index")


def many_examples(index: FeatureIndex, layer: int, of: dict[int, int]) -> FeatureIndex:
    """The index with other examples: so many of each feature, each of the document of the feature's number."""
    row = index.rows(layer, "examples", 0).to_pylist()[0]
    rows = [
        {**row, "feature": number, "rank": rank, "document": number}
        for number, count in of.items()
        for rank in range(count)
    ]
    write_examples(index.folder, layer, pa.Table.from_pylist(rows, EXAMPLES))
    return FeatureIndex.open(index.folder)


def test_a_feature_is_what_was_written(index: FeatureIndex):
    feature = index["1/3"]
    assert (feature.name, feature.layer, feature.number, feature.label) == ("1/3", 1, 3, None)
    assert (feature.fired, feature.density, feature.mean, feature.max) == (20, 20 / 992, 2.5, 5.0)
    assert feature.first_seen == 30
    assert sum(feature.histogram) == 20
    assert not feature.dead
    assert not feature.always_on
    assert feature.top_tokens == [Token("court", 3, 1.0)]
    assert feature.promoted[0] == Token(" up3-0", 0, 3.0)
    assert feature.suppressed[0] == Token(" down3-0", 0, -3.0)
    assert [(n.feature, n.value, n.label) for n in feature.similar] == [(4, 0.5, None)]
    assert [(n.feature, n.value) for n in feature.together] == [(4, 0.25)]
    assert [example.value for example in feature.top] == [5.0, 4.0]
    assert [example.value for example in feature.range] == [4.0, 1.0]
    example = feature.top[0]
    assert example.text == WORDS[3][1]
    assert example.tokens[example.peak] == "court"
    assert example.text[example.start : example.end] == "court"
    assert index[1, 3] == feature
    dead = index["2/127"]
    assert (dead.dead, dead.fired, dead.mean, dead.max, dead.examples) == (True, 0, None, None, [])


def test_features_at_the_edges_of_what_is_read_together(tmp_path: Path):
    of = {0: 1000, 1: 50, 255: 3, 256: 4, 599: 2000}
    index = many_examples(write_index(tmp_path / "index", {0: 600}), 0, of)
    assert index._file(0, "features").file.num_row_groups == 3
    assert index._file(0, "examples").file.num_row_groups == 3
    for number in (0, 1, 2, 254, 255, 256, 511, 512, 598, 599):
        feature = index[0, number]
        assert feature.promoted[0].token == f" up{number}-0"
        assert [example.document for example in feature.examples] == [number] * of.get(number, 0)
        assert [example.rank for example in feature.examples] == list(range(of.get(number, 0)))


def test_rows_of_several_features(tmp_path: Path):
    index = write_index(tmp_path / "index", {0: 600})
    assert index.rows(0, "features", 250, 520, ["feature"]).column("feature").to_pylist() == list(range(250, 520))
    assert index.rows(0, "features", 598, 9000, ["feature", "dead"]).to_pylist() == [
        {"feature": 598, "dead": True},
        {"feature": 599, "dead": True},
    ]
    assert index.rows(0, "examples", 3, 5, ["feature"]).column("feature").to_pylist() == [3] * 4 + [4] * 4
    assert index.rows(0, "examples", 70, 90).num_rows == 0


def test_a_table_of_a_layer(index: FeatureIndex):
    assert index.table(2).column_names == FEATURES.names
    assert index.table(2).num_rows == 128
    assert index.table(1, ["max", "feature"]).column_names == ["max", "feature"]
    with pytest.raises(QwenScopeError, match=r"columns of feature, fired.*found nothing"):
        index.table(1, ["nothing"])
    with pytest.raises(QwenScopeError, match="layers 1, 2"):
        index.table(3)


def test_what_an_index_says_of_itself(index: FeatureIndex):
    assert index.layers == [1, 2]
    assert len(index) == 192
    assert "tiny suite" in repr(index)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("1/64", "1/0 to 1/63"),
        ("3/0", "layers 1, 2"),
        ("1", "layer/feature"),
        ("1/-1", "layer/feature"),
        (7, "layer/feature"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_features_that_are_not_there(index: FeatureIndex, name: object, match: str):
    with pytest.raises(QwenScopeError, match=match):
        index[name]  # pyright: ignore[reportArgumentType]


def test_several_threads_read_one_index(tmp_path: Path):
    index = many_examples(write_index(tmp_path / "index", {0: 2000}), 0, dict.fromkeys(range(2000), 3))
    numbers = [n * 37 % 2000 for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        for number, feature in zip(numbers, pool.map(lambda n: index[0, n], numbers), strict=True):
            assert feature.promoted[0].token == f" up{number}-0"
            assert {example.document for example in feature.examples} == {number}


# Labels


def test_labels_by_hand_are_shown_and_taken_back(index: FeatureIndex):
    index.label("1/3", " courts and judges\n")
    label = index["1/3"].label
    assert label is not None
    assert (label.text, label.by) == ("courts and judges", "hand")
    assert [neighbour.label for neighbour in index["1/2"].similar] == ["courts and judges"]
    assert index["1/2"].to_dict()["similar"][0]["label"] == "courts and judges"
    index.label("1/3", "")
    assert index["1/3"].label is None
    assert index["1/2"].similar[0].label is None
    with pytest.raises(QwenScopeError, match="1/63"):
        index.label("1/64", "nothing")


def test_labels_of_another_process_are_seen_at_once(index: FeatureIndex):
    assert index["2/0"].label is None
    code = (
        f"from qwen_scope.index import FeatureIndex\nFeatureIndex.open({str(index.folder)!r}).label('2/0', 'football')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    label = index["2/0"].label
    assert label is not None
    assert label.text == "football"


# Folders that are not whole


def test_a_folder_without_an_index(tmp_path: Path):
    with pytest.raises(QwenScopeError, match=r"no index\.json"):
        FeatureIndex.open(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(QwenScopeError, match=r"another index\.json"):
        FeatureIndex.open(tmp_path)


def test_an_index_of_another_version(index: FeatureIndex):
    path = index.folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(QwenScopeError, match="found version 99; harvest again"):
        FeatureIndex.open(index.folder)


@pytest.mark.parametrize("table", ["features", "examples"])
def test_a_table_that_is_missing(index: FeatureIndex, table: str):
    (index.folder / "layer1" / f"{table}.parquet").unlink()
    with pytest.raises(QwenScopeError, match=f"{table}.parquet, found none; harvest again"):
        index["1/0"]
    assert index["2/0"].fired == 20  # the other layer is whole


@pytest.mark.parametrize("table", ["features", "examples"])
def test_a_table_that_is_cut_short(index: FeatureIndex, table: str):
    path = index.folder / "layer1" / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(QwenScopeError, match="damaged"):
        index["1/0"]


def test_a_table_that_is_damaged_in_the_middle(index: FeatureIndex):
    path = index.folder / "layer1" / "features.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:64] + bytes(400) + whole[464:])
    with pytest.raises(QwenScopeError, match="damaged"):
        index["1/0"]


def test_a_table_without_a_column_or_a_row(index: FeatureIndex):
    path = index.folder / "layer1" / "features.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 10), path)
    with pytest.raises(QwenScopeError, match="damaged"):
        FeatureIndex.open(index.folder)["1/20"]
    pq.write_table(table.drop_columns(["density"]), path)
    with pytest.raises(QwenScopeError, match="no column density"):
        FeatureIndex.open(index.folder)["1/0"]


# The model and suite it is of


@pytest.fixture
def harvested(tmp_path: Path, llama, tokenizer, suite: Suite) -> FeatureIndex:
    """An index that says it is of a model and suite that lie in folders."""
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    suite.save_pretrained(tmp_path / "suite")
    return write_index(
        tmp_path / "index",
        {1: 128, 2: 128},
        model=str(tmp_path / "model"),
        suite_source=str(tmp_path / "suite"),
        fingerprint=fingerprint(suite, [1, 2]),
    )


def test_the_scope_of_an_index(harvested: FeatureIndex):
    assert harvested.scope.features("the capital")[2].k == 8
    assert harvested.scope is harvested.scope


def test_other_weights_under_the_same_name(harvested: FeatureIndex, make_sae):
    Suite.of({layer: make_sae(seed=layer + 7) for layer in range(3)}, name="tiny suite").save_pretrained(
        Path(str(harvested.about.suite_source))
    )
    with pytest.raises(QwenScopeError, match="other weights"):
        harvested.scope  # noqa: B018


# SQL


def test_sql_over_all_layers(index: FeatureIndex):
    counted = index.sql("SELECT layer, count(*) AS n, sum(fired) AS fired FROM features GROUP BY layer ORDER BY layer")
    assert [(row["layer"], row["n"], int(row["fired"])) for row in counted.to_pylist()] == [(1, 64, 100), (2, 128, 100)]
    index.label("2/3", "courts")
    joined = index.sql(
        "SELECT e.layer, e.feature, l.text, array_to_string(e.tokens, '') AS context FROM examples e "
        "JOIN labels l USING (layer, feature) WHERE e.kind = 'top' AND e.rank = 0"
    )
    assert joined.to_pylist() == [{"layer": 2, "feature": 3, "text": "courts", "context": WORDS[3][1]}]


def test_sql_over_documents_and_pairs(index: FeatureIndex):
    with pytest.raises(QwenScopeError, match="pairs does not exist"):
        index.sql("SELECT * FROM pairs")
    for number in range(2):
        rows = [{"document": number, "position": 1, "token": 5, "kept": True, "feature": 3, "value": 2.0}]
        path = index.folder / "layer2" / "pairs" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, PAIRS), path)
    documents = [{"document": n, "place": f"line {n + 1} of words.txt"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(documents, DOCUMENTS), index.folder / "documents.parquet")
    found = index.sql("SELECT layer, place FROM pairs JOIN documents USING (document) ORDER BY document")
    assert found.to_pylist() == [{"layer": 2, "place": f"line {n} of words.txt"} for n in (1, 2)]


def test_sql_in_a_folder_of_an_odd_name(tmp_path: Path):
    index = write_index(tmp_path / "it's [1] *of* two?")
    assert index.sql("SELECT count(*) AS n FROM features").to_pylist() == [{"n": 192}]


def test_columns_of_the_same_name_are_told_apart(index: FeatureIndex):
    found = index.sql("SELECT 1 AS a, 2 AS a_2, 3 AS a, 4 AS a")
    assert found.to_pylist() == [{"a": 1, "a_2": 2, "a_3": 3, "a_4": 4}]


def test_ctrl_c_ends_a_query(index: FeatureIndex):
    ended, person = threading.Event(), threading.get_ident()

    def press() -> None:
        # On a busy machine the first may come before the query runs.
        while not ended.wait(5.0):
            signal.pthread_kill(person, signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            index.sql("SELECT count(*) FROM range(100000000000) a, range(1000) b WHERE hash(a.range + b.range) % 7 = 3")
    finally:
        ended.set()
        pressing.join()


@pytest.mark.parametrize(
    ("query", "match"), [("SELECT nothing", "refuses"), ("", "begin it with SELECT"), ("SELECT 1; nonsense", "refuses")]
)
def test_queries_without_an_answer(index: FeatureIndex, query: str, match: str):
    with pytest.raises(QwenScopeError, match=match):
        index.sql(query)


def test_sql_over_half_an_index(index: FeatureIndex):
    (index.folder / "layer1" / "examples.parquet").unlink()
    with pytest.raises(QwenScopeError, match=r"whole tables.*harvest again"):
        index.sql("SELECT count(*) FROM features")


def test_sql_without_duckdb(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(QwenScopeError, match="pip install"):
        index.sql("SELECT 1")


# docs/index-format.md


def documented(file: str) -> list[tuple[str, str]]:
    """Names and types of the columns that the page lists for a file."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(f"`{file}`")]
    return re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE)


def type_name(field: pa.Field) -> str:
    """How the page names a type."""
    name = str(field.type)
    name = name.replace("list<item: struct<token: string, id: int32, value: float>>", "list of tokens")
    name = name.replace("list<item: struct<feature: int32, value: float>>", "list of neighbours")
    name = re.sub(r"list<item: (\w+)>", r"list of \1", name)
    return f"{name} or null" if field.nullable else name


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        ("features.parquet", FEATURES),
        ("examples.parquet", EXAMPLES),
        ("pairs/*.parquet", PAIRS),
        ("documents.parquet", DOCUMENTS),
    ],
)
def test_the_page_lists_the_columns_there_are(file: str, schema: pa.Schema):
    assert documented(file) == [(field.name, type_name(field)) for field in schema]


def test_the_page_lists_the_fields_there_are():
    assert [name for name, _ in documented("index.json")] == ["format", "version", *(f.name for f in fields(About))]
    assert [name for name, _ in documented("labels.jsonl")] == ["layer", "feature", *(f.name for f in fields(Label))]


def test_files_are_named_as_the_page_says(index: FeatureIndex):
    index.label("1/0", "football")
    assert (index.folder / "labels.jsonl").is_file()
    assert len(Labels(index.folder / "labels.jsonl")) == 1
    assert (index.folder / "layer1" / "features.parquet").is_file()
    for name in ("index.json", "layer15/", "features.parquet", "examples.parquet", "labels.jsonl", "documents.parquet"):
        assert name in PAGE
