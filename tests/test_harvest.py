"""Whole harvests on tiny models: what they write, how they go on after being stopped or killed, what they refuse."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import filelock
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest
import torch

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.index import FeatureIndex
from qwen_scope.index.config import HarvestConfig
from qwen_scope.index.harvest import harvest
from qwen_scope.index.layout import HALF_OCTAVES
from qwen_scope.index.ray_engine import ShardReader, cpus_of_worker, ray_partials
from qwen_scope.stopping import Stop, Stopped

WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome", "Italy", ",", "not", "Spain", "日本", "🙂"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 40))) for _ in range(90)]


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory) -> Path:
    """The texts, a line each, and three lines that cannot be read."""
    lines = [json.dumps({"text": text}) for text in texts]
    lines[20:20] = ["{broken", '{"text": 5}', "[]"]
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def config(llama, tokenizer, suite, tmp_path_factory) -> HarvestConfig:
    folder = tmp_path_factory.mktemp("names")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    suite.save_pretrained(folder / "suite")
    return HarvestConfig(
        model=str(folder / "model"),
        suite=str(folder / "suite"),
        layers=(0, 2),
        context=32,
        shard_tokens=400,
        examples=4,
        before=5,
        after=3,
        pairs=True,
    )


@pytest.fixture(scope="module")
def scope(config) -> Scope:
    return Scope.from_pretrained(config.model, config.suite)


@pytest.fixture(scope="module")
def undisturbed(corpus, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "index"
    harvest(corpus, folder, config)
    return folder


@pytest.fixture(scope="module")
def index(undisturbed) -> FeatureIndex:
    return FeatureIndex.open(undisturbed)


@pytest.fixture(scope="module")
def by_hand(scope, texts) -> dict[int, list[dict[str, Any]]]:
    """By layer every token with its features, from `Scope.features` on pieces of the texts."""
    found: dict[int, list[dict[str, Any]]] = {0: [], 2: []}
    for document, text in enumerate(texts):
        ids = scope.backbone.tokenizer(text)["input_ids"]
        for start in range(0, len(ids), 32):
            features = scope.features(ids[start : start + 32], layers=[0, 2])
            for layer in (0, 2):
                dense = features[layer].to_dense()
                found[layer] += [
                    {"document": document, "position": position, "id": ids[start + position], "acts": acts}
                    for position, acts in enumerate(dense)
                ]
    return found


def tables(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


# What a harvest leaves


@pytest.mark.parametrize("layer", [0, 2])
def test_statistics_are_those_of_scope_features(index, by_hand, layer):
    table = index.table(layer).to_pydict()
    # These models have no norm outliers; position 0 is left out.
    acts = torch.stack([token["acts"] for token in by_hand[layer] if token["position"] > 0]).clamp(min=0)
    about = index.about
    assert about.norm_outliers[layer] == 0
    assert about.kept(layer) == len(acts) == about.tokens - sum(t["position"] == 0 for t in by_hand[layer])
    assert table["fired"] == (acts > 0).sum(0).tolist()
    np.testing.assert_allclose(table["density"], (acts > 0).double().mean(0), rtol=1e-12)
    for feature in range(acts.shape[1]):
        values = acts[:, feature][acts[:, feature] > 0].double()
        if not len(values):
            assert table["dead"][feature]
            assert table["mean"][feature] is None
            continue
        assert table["mean"][feature] == pytest.approx(float(values.mean()), rel=1e-5)
        assert table["max"][feature] == pytest.approx(float(values.max()), rel=1e-5)
        assert sum(table["histogram"][feature]) == len(values)
        first = next(n for n, token in enumerate(by_hand[layer]) if token["position"] and token["acts"][feature] > 0)
        assert table["first_seen"][feature] == first
        assert table["always_on"][feature] == (len(values) >= 0.9 * len(acts))
        low = [2 ** (HALF_OCTAVES[n] / 2) for n, count in enumerate(table["histogram"][feature]) if count]
        assert low[0] * 0.999 <= values.min() < low[0] * 1.4143
        assert low[-1] * 0.999 <= values.max() < low[-1] * 1.4143


def test_examples_are_where_the_feature_fires_and_lead_back_to_the_text(index, texts, by_hand):
    at = {(t["document"], t["position"]): [] for t in by_hand[2]}
    for token in by_hand[2]:
        at[token["document"], token["position"]].append(token["acts"])
    seen = 0
    for feature in range(0, 128, 7):
        found = index[2, feature]
        assert [e.value for e in found.top] == sorted((e.value for e in found.top), reverse=True)
        assert len({(e.document, e.start) for e in found.examples}) == len(found.examples)
        for example in found.examples:
            # A document of several pieces has several tokens at a position.
            values = [float(acts[feature]) for acts in at[example.document, example.position]]
            assert any(value == pytest.approx(example.value, rel=1e-5) for value in values)
            assert example.values[example.peak] == example.value
            assert 1 <= example.position < 32
            if "\ufffd" not in example.text:
                text = texts[example.document]
                assert example.text == text[example.window_start : example.window_end]
                assert text[example.start : example.end] == example.tokens[example.peak]
                seen += 1
    assert seen > 50


def test_the_top_example_is_the_highest_value(index, by_hand):
    acts = torch.stack([token["acts"] for token in by_hand[2] if token["position"] > 0])
    for feature in range(128):
        top = index[2, feature].top
        if acts[:, feature].max() > 0:
            assert top[0].value == pytest.approx(float(acts[:, feature].max()), rel=1e-5)
            assert top[0].value == pytest.approx(index[2, feature].max, rel=1e-6)


def test_the_same_text_is_shown_once(config, scope, tmp_path):
    path = tmp_path / "same.txt"
    path.mkdir()
    for n in range(9):
        (path / f"{n}.txt").write_text("the capital of France is Paris")
    index = harvest(path, tmp_path / "index", replace(config, pairs=False))
    assert index.about.documents == 9
    for feature in range(128):
        windows = [tuple(example.tokens) for example in index[0, feature].top]
        assert len(set(windows)) == len(windows) <= 5


def test_characters_split_into_tokens_are_shown_whole(index):
    found = index.sql("SELECT tokens, peak FROM examples").to_pylist()
    with_japanese = [row for row in found if "日" in "".join(row["tokens"])]
    assert with_japanese
    assert all(row["tokens"][row["peak"]] for row in found)


def test_pairs_are_all_that_fire(index, by_hand):
    table = index.sql("SELECT * FROM pairs WHERE layer = 2").to_pydict()
    columns = [table[name] for name in ("document", "position", "token", "feature", "value", "kept")]
    # A document of several pieces has several tokens at a position, so pairs are compared as a sorted list.
    found = sorted(zip(*columns, strict=True))
    expected = sorted(
        (t["document"], t["position"], t["id"], int(f), float(t["acts"][f]), t["position"] > 0)
        for t in by_hand[2]
        for f in (t["acts"] > 0).nonzero().flatten()
    )
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    np.testing.assert_allclose([row[4] for row in found], [row[4] for row in expected], rtol=1e-5)
    assert [row[5] for row in found] == [row[5] for row in expected]


def test_broken_lines_are_counted_and_named(index, corpus, texts):
    assert (index.about.broken, index.about.documents) == (3, len(texts))
    for number, (expected, sentence) in enumerate(
        zip(["JSON", "text or chat messages", "a row of named columns"], index.about.broken_first, strict=True), 21
    ):
        assert sentence.startswith(f"expected {expected}")
        assert f"line {number} of" in sentence


def test_other_tools_open_it(undisturbed):
    path = undisturbed / "layer2" / "features.parquet"
    assert len(polars.read_parquet(path)) == len(pq.read_table(path).to_pandas()) == 128
    assert duckdb.sql(f"SELECT count(*) FROM '{path}' WHERE NOT dead").fetchall()[0][0] > 50


def test_nothing_else_is_left(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "documents.parquet",
        "index.json",
        "layer0",
        "layer2",
    ]


def test_the_order_of_layers_and_the_size_of_shards_change_no_count(undisturbed, corpus, config, tmp_path):
    harvest(corpus, tmp_path / "index", replace(config, layers=(2, 0), shard_tokens=10**6))
    a, b = FeatureIndex.open(undisturbed), FeatureIndex.open(tmp_path / "index")
    for layer in (0, 2):
        x, y = a.table(layer).to_pydict(), b.table(layer).to_pydict()
        for column in ("fired", "first_seen", "histogram", "dead"):
            assert x[column] == y[column]


# Stopped, killed, and gone on with


class StopsAfter(Stop):
    """Somebody who presses Ctrl-C after some looks."""

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def asked(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("looks", [0, 1, 3, 6])
def test_a_stopped_harvest_goes_on_and_ends_the_same(undisturbed, corpus, config, tmp_path, monkeypatch, looks):
    @contextmanager
    def stopping():
        yield StopsAfter(looks)

    folder = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.index.harvest.stopping", stopping)
        with pytest.raises(
            Stopped, match=r"stopped after \d+ of \d+ shards, .* run the same command again to go on .\d+ tokens"
        ):
            harvest(corpus, folder, config)
    assert not (folder / "index.json").exists()
    harvest(corpus, folder, replace(config, save_minutes=0.0))
    assert tables(folder) == tables(undisturbed)


def stop_after(looks: int, monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    @contextmanager
    def stopping():
        yield StopsAfter(looks)

    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.index.harvest.stopping", stopping)
        with pytest.raises(Stopped):
            call()


def command(corpus: Path, folder: Path, config: HarvestConfig) -> list[str]:
    options = ["--model", config.model, "--suite", config.suite, "--layers", *map(str, config.layers)]
    for name in ("context", "shard_tokens", "examples", "before", "after"):
        options += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    options += ["--pairs", "--save-minutes", "0"]
    return [sys.executable, "-m", "qwen_scope.cli", "harvest", str(corpus), str(folder), *options]


def test_a_killed_harvest_goes_on_and_ends_the_same(undisturbed, corpus, config, tmp_path):
    folder = tmp_path / "index"
    draw, kills = random.Random(1), 0
    for progress in ("harvest/options.json", "harvest/total.safetensors", "layer0/examples.parquet"):
        process = subprocess.Popen(command(corpus, folder, config), stderr=subprocess.DEVNULL)
        while process.poll() is None and not (folder / progress).exists():
            time.sleep(0.002)
        time.sleep(draw.random() * 0.2)
        kills += process.poll() is None
        process.kill()
        process.wait()
        if (folder / "index.json").exists():
            break
    assert kills >= 2
    if not (folder / "index.json").exists():
        subprocess.run(command(corpus, folder, config), check=True, stderr=subprocess.DEVNULL)
    assert tables(folder) == tables(undisturbed)


def test_ctrl_c_says_how_to_go_on(undisturbed, corpus, config, tmp_path):
    folder = tmp_path / "index"
    process = subprocess.Popen(command(corpus, folder, config), stderr=subprocess.PIPE, text=True)
    while not (folder / "harvest/options.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    # So small a corpus may have been done before it looked.
    if process.returncode:
        assert process.returncode == 130
        assert "run the same command again to go on" in errors
        subprocess.run(command(corpus, folder, config), check=True, stderr=subprocess.DEVNULL)
    assert tables(folder) == tables(undisturbed)


def test_a_full_disk_is_a_sentence_and_loses_nothing(undisturbed, corpus, config, tmp_path):
    folder = tmp_path / "index"
    # A limit on the size of files stands for a full disk.
    limit = 40_000

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command(corpus, folder, config), capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 1
    assert "qwen-scope: expected to write" in done.stderr
    assert "Traceback" not in done.stderr
    harvest(corpus, folder, config)
    assert tables(folder) == tables(undisturbed)


# On many machines


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_ray_gives_the_same(undisturbed, corpus, config, tmp_path):
    folder = tmp_path / "index"
    harvest(corpus, folder, replace(config, engine="ray", workers=2))
    assert tables(folder) == tables(undisturbed)


@pytest.mark.parametrize(
    ("machines", "workers", "cores"),
    [([2], 2, 1), ([2], 3, 1), ([16], 2, 8), ([16] * 4, 2, 16), ([16] * 4, 5, 8), ([16, 8], 2, 8), ([], 1, 1)],
)
def test_workers_have_no_more_cores_than_fit(machines: list[int], workers: int, cores: int):
    assert cpus_of_worker(machines, workers) == cores


def test_what_workers_have_read_is_kept_until_it_is_saved(undisturbed, corpus, config, scope, tmp_path, monkeypatch):
    folder, work = tmp_path / "index", tmp_path / "index/harvest"
    stop_after(0, monkeypatch, lambda: harvest(corpus, folder, config, scope))
    reader = ShardReader(config, str(folder), str(work), [0, 2])
    for number in range(len(reader.shards)):
        reader({"shard": number})
    parts = ray_partials(folder, work, config, [0, 2], reader.shards, 0, lambda tokens: None)
    # Killed, with nothing saved of what was joined.
    assert len(list(islice(parts, 3))) == 3
    assert len(list((work / "parts").iterdir())) == len(reader.shards)
    # All is read, so that no worker is needed.
    harvest(corpus, folder, replace(config, engine="ray"))
    assert tables(folder) == tables(undisturbed)


# What is refused


def test_a_folder_with_an_index_is_refused(undisturbed, corpus, config):
    with pytest.raises(QwenScopeError, match="expected a folder without a feature index, found one"):
        harvest(corpus, undisturbed, config)


def test_other_options_are_refused_and_named(corpus, config, tmp_path, monkeypatch):
    @contextmanager
    def stopping():
        yield StopsAfter(2)

    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.index.harvest.stopping", stopping)
        with pytest.raises(Stopped):
            harvest(corpus, tmp_path, config)
    with pytest.raises(QwenScopeError, match="examples was 4 and is 9"):
        harvest(corpus, tmp_path, replace(config, examples=9))


def test_other_weights_under_the_same_name_are_refused(corpus, config, scope, make_sae, tmp_path, monkeypatch):
    stop_after(2, monkeypatch, lambda: harvest(corpus, tmp_path, config, scope))
    saes = {layer: make_sae(seed=layer + 5) for layer in range(3)}
    with pytest.raises(QwenScopeError, match="fingerprint was"):
        harvest(corpus, tmp_path, config, Scope(scope.backbone, Suite.of(saes, name="tiny suite")))


def test_pairs_of_a_harvest_that_was_given_up_do_not_count(corpus, config, scope, index, tmp_path, monkeypatch):
    # Its shards are smaller, so it has more of them than the one that follows.
    stop_after(40, monkeypatch, lambda: harvest(corpus, tmp_path, replace(config, shard_tokens=50), scope))
    assert len(list(tmp_path.glob("layer2/pairs/*.parquet"))) > 10
    shutil.rmtree(tmp_path / "harvest")
    count = "SELECT count(*) AS n FROM pairs"
    assert harvest(corpus, tmp_path, config, scope).sql(count).equals(index.sql(count))


def test_a_folder_of_that_name_with_other_things_is_not_touched(corpus, config, scope, tmp_path):
    (tmp_path / "harvest").mkdir()
    (tmp_path / "harvest/mine.txt").write_text("dear to me")
    with pytest.raises(QwenScopeError, match="found a folder of other things"):
        harvest(corpus, tmp_path, config, scope)
    assert [path.name for path in (tmp_path / "harvest").iterdir()] == ["mine.txt"]


def test_the_same_path_in_another_folder_is_another_corpus(corpus, config, tmp_path, monkeypatch):
    @contextmanager
    def stopping():
        yield StopsAfter(0)

    monkeypatch.chdir(corpus.parent)
    with monkeypatch.context() as patch:
        patch.setattr("qwen_scope.index.harvest.stopping", stopping)
        with pytest.raises(Stopped):
            harvest(corpus.name, tmp_path / "index", config)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / corpus.name).write_text('{"text": "other words"}')
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(QwenScopeError, match="corpus was"):
        harvest(corpus.name, tmp_path / "index", config)
    # By its whole path it is the same again.
    assert harvest(corpus, tmp_path / "index", config).about.documents == 90


def test_two_harvests_in_one_folder(corpus, config, tmp_path):
    (tmp_path / "harvest").mkdir()
    with filelock.FileLock(tmp_path / "harvest/lock"), pytest.raises(QwenScopeError, match="nobody else at work"):
        harvest(corpus, tmp_path, config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 1000}, "expected a context of at most 256 tokens"),
        ({"layers": (9,)}, "expected layers among 0-2|found .*9"),
        ({"column": "nothing"}, "expected a corpus of at least one document|expected the column"),
    ],
)
def test_options_that_cannot_be(corpus, config, tmp_path, options, sentence):
    with pytest.raises(QwenScopeError, match=sentence):
        harvest(corpus, tmp_path, replace(config, **options))


@pytest.mark.parametrize("options", [{"tokens": 1}, {"examples": 0}, {"workers": 0}, {"before": 200, "after": 100}])
def test_configs_that_cannot_be(options):
    with pytest.raises(QwenScopeError, match="expected"):
        HarvestConfig(**options)


def test_an_empty_corpus_is_refused(config, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(QwenScopeError, match="found only blank ones or none"):
        harvest(tmp_path / "empty.txt", tmp_path / "index", config)


def test_a_scope_in_memory_is_not_for_workers(scope, corpus, config, tmp_path):
    with pytest.raises(QwenScopeError, match="found a Scope in memory"):
        harvest(corpus, tmp_path, replace(config, engine="ray"), scope)


def test_a_scope_in_memory_is_read_with(undisturbed, scope, corpus, config, tmp_path):
    harvest(corpus, tmp_path / "index", config, scope)
    assert tables(tmp_path / "index") == tables(undisturbed)


def test_the_index_knows_its_suite_again(index, undisturbed, tmp_path, config, make_sae):
    assert index.scope.layers == [0, 2]
    about = json.loads((undisturbed / "index.json").read_text())
    Suite.of({layer: make_sae(seed=layer + 5) for layer in range(3)}, name="tiny suite").save_pretrained(
        tmp_path / "other"
    )
    (tmp_path / "index").mkdir()
    (tmp_path / "index/index.json").write_text(json.dumps({**about, "suite_source": str(tmp_path / "other")}))
    with pytest.raises(QwenScopeError, match="found other weights under its name"):
        _ = FeatureIndex.open(tmp_path / "index").scope
