"""The benchmarks run, their committed figures keep the promises on memory, and the tables say what the figures say.

Nothing here looks at a time: times belong to the machine that measured them.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
from app_browser import CHROMIUM

from qwen_scope.kernels import Kernel

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
COMMITTED = BENCHMARKS / "results"
ALWAYS_COMMITTED = {
    "encode",
    "encode-1-thread",
    "training",
    "quality",
    "pipeline",
    "layers",
    "load",
    "harvest",
    "index",
    "classify",
    "footprints",
    "steer",
    "sasft",
    "serve",
    "app",
}
MARKED = {"README.md": {"summary"}, "docs/performance.md": ALWAYS_COMMITTED | {"encode-large"}}
SCRIPTS = [
    "encode",
    "training",
    "quality",
    "pipeline",
    "layers",
    "load",
    "harvest",
    "index",
    "classify",
    "steer",
    "sasft",
    "serve",
    "footprints",
    *(["app"] if CHROMIUM else []),
]
WAYS = {"card", "qwen_scope", "qwen_scope_prepared"}


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of quick runs of all scripts."""
    if not Path("/proc/self/status").exists():
        pytest.skip("two of the benchmarks need Linux")
    results = tmp_path_factory.mktemp("results")
    options = {"training": ["--threads", "1"], "layers": ["--folder", results], "load": ["--folder", results]}
    options["harvest"] = options["pipeline"] = options["footprints"] = options["classify"] = ["--folder", results]

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return python(f"{script}.py", "--quick", "--out", results / f"{script}.json", *options.get(script, []))

    with ThreadPoolExecutor(2) as two_at_a_time:
        for done in two_at_a_time.map(run, SCRIPTS):
            assert done.returncode == 0, done.stderr
    assert {path.suffix for path in results.iterdir()} == {".json"}, "a benchmark left files behind"
    return results


def check_structure(found: dict[str, Any]) -> None:
    assert {"cpu", "cores", "threads", "memory_gib", "torch", "python", "date"} <= set(found["machine"])
    checks = {
        "encode": check_encode,
        "training": check_training,
        "quality": check_quality,
        "layers": check_layers,
        "load": check_load,
        "harvest": check_harvest,
        "index": check_index,
        "classify": check_classify,
        "pipeline": check_pipeline,
        "steer": check_steer,
        "sasft": check_sasft,
        "serve": check_serve,
        "footprints": check_footprints,
        "app": check_app,
    }
    checks[found["benchmark"]](found)


def check_timed(result: dict[str, Any], names: set[str], min_rounds: int) -> None:
    assert result["rounds"] >= min_rounds
    assert set(result["seconds"]) == names
    assert min(result["seconds"].values()) > 0
    assert set(result["times_as_fast"]) == set(result["times_as_fast_quartiles"]) == names - {"qwen_scope"}
    for name, (low, high) in result["times_as_fast_quartiles"].items():
        assert 0 < low <= result["times_as_fast"][name] <= high


def check_encode(found: dict[str, Any]) -> None:
    names, parameters = set(found["contenders"]), found["parameters"]
    assert {"qwen_scope", "qwen_scope_reference", "card"} <= names
    assert len(names) + len(found["not_installed"]) == 5
    assert found["contenders"]["qwen_scope_reference"]["kernel"] == "reference"
    check_kernel(found["contenders"]["qwen_scope"])
    assert all(of["kept_beside_weights_mib"] >= 0 for of in found["contenders"].values())
    cases = [(operation, tokens) for operation in parameters["operations"] for tokens in parameters["tokens"]]
    assert [(r["operation"], r["tokens"]) for r in found["results"]] == cases
    for result in found["results"]:
        check_timed(result, names, parameters["min_rounds"])
        assert set(result["agreement"]) == names - {"qwen_scope"}
        assert all(seen["rows"] == result["tokens"] for seen in result["agreement"].values())
        assert ("peak_mib" in result) == (result["tokens"] in parameters["memory_tokens"])
        assert set(result.get("peak_mib", names)) == names


def check_training(found: dict[str, Any]) -> None:
    names, parameters = set(found["contenders"]), found["parameters"]
    assert {"qwen_scope", "dense"} <= names
    assert len(names) + len(found["not_installed"]) == 4
    assert all(of["step"] for of in found["contenders"].values())
    cases = [(case["sizes"], case["tokens"]) for case in parameters["cases"]]
    assert [(r["sizes"], r["tokens"]) for r in found["results"]] == cases
    for result in found["results"]:
        check_timed(result, names, parameters["min_rounds"])
        assert set(result["peak_mib"]) == set(result["first_fvu"]) == names
        assert result["kernel"] in get_args(Kernel)
        assert result["kept_beside_weights_mib"] >= 0
        assert result["first_fvu_difference"] <= 1e-4


def check_quality(found: dict[str, Any]) -> None:
    contenders, parameters = found["contenders"], found["parameters"]
    packages = {name.split("_")[0] for name in contenders}
    assert "qwen" in packages
    assert len(packages) + len(found["not_installed"]) == 3
    tried = [(name, rate) for name, of in contenders.items() for rate in of["rates"][: parameters["rates"]]]
    assert [(r["contender"], r["learning_rate"]) for r in found["sweep"]] == tried
    assert [r["contender"] for r in found["results"]] == list(contenders)
    for result in found["results"]:
        swept = [r for r in found["sweep"] if r["contender"] == result["contender"]]
        assert result["learning_rate"] == min(swept, key=lambda r: r["fvu"])["learning_rate"]
        assert result["steps"] == parameters["steps"]
    for result in [*found["sweep"], *found["results"]]:
        assert 0 < result["fvu"] < 1
        assert 0 <= result["never_fired"] <= 1
        assert 0 <= result["unfired_lately"] <= 1
    assert set(found["speed"]["tokens_per_second"]) == set(contenders)
    assert set(found["speed"]["times_as_fast"]) == set(contenders) - {"qwen_scope"}
    assert min(found["speed"]["tokens_per_second"].values()) > 0


def check_layers(found: dict[str, Any]) -> None:
    check_kernel(found)
    limits = [(r["way"], r.get("limit_bytes")) for r in found["results"]]
    limit = found["parameters"]["limit_bytes"]
    unlimited = ["card", "qwen_scope", "qwen_scope_prepared", "qwen_scope_prepared"]
    assert limits == [*((way, None) for way in unlimited), ("card", limit), ("qwen_scope_prepared", limit)]
    assert found["parameters"]["max_bytes"] < found["suite_bytes"]
    for result in found["results"]:
        if "not_measured" in result:
            assert "limit_bytes" in result
            continue
        assert result["files_opened"] == found["parameters"]["layers"]
        assert result["seconds"] > 0
        assert result["page_cache"] in found["page_cache"]
        assert 0 < result["anonymous_before_mib"] <= result["peak_anonymous_mib"]
        assert result.get("peak_in_group_mib", 0) <= limit / 2**20
    rows = found["parameters"]["layers"] * found["parameters"]["tokens"]
    assert {way: seen["rows"] for way, seen in found["agreement"].items()} == dict.fromkeys(WAYS - {"qwen_scope"}, rows)
    ours = found["agreement"]["qwen_scope_prepared"]
    assert (ours["rows_with_same_features"], ours["largest_relative_difference"]) == (rows, 0)


def check_load(found: dict[str, Any]) -> None:
    check_kernel(found)
    assert [r["way"] for r in found["results"]] == list(found["contenders"])
    assert set(found["contenders"]) == WAYS
    assert all(min(value for field, value in r.items() if field != "way") > 0 for r in found["results"])


def check_harvest(found: dict[str, Any]) -> None:
    assert [r["layers"] for r in found["results"]] == [list(layers) for layers in found["parameters"]["layers"]]
    for result in found["results"]:
        check_timed(result, {"qwen_scope", "model"}, found["parameters"]["rounds"])
        assert set(result["tokens_per_second"]) == {"qwen_scope", "model"}
    whole = found["whole"]
    assert whole["tokens"] >= found["parameters"]["whole_tokens"]
    assert min(whole["seconds"], whole["peak_mib"], whole["index_bytes"], whole["features"]) > 0
    assert found["memory_method"]


def check_index(found: dict[str, Any]) -> None:
    assert set(found["results"]) == {"open", "open, first feature", "a feature", "search, words"}
    for result in found["results"].values():
        low, high = result["quartiles"]
        assert 0 < low <= result["seconds"] <= high <= result["worst_seconds"]
    assert found["search_built_seconds"] > 0


def check_classify(found: dict[str, Any]) -> None:
    assert [r["layers"] for r in found["results"]] == [list(layers) for layers in found["parameters"]["layers"]]
    for result in found["results"]:
        check_timed(result, {"qwen_scope", "harvest"}, found["parameters"]["rounds"])
        assert set(result["tokens_per_second"]) == {"qwen_scope", "harvest"}
        assert result["tokens"] > result["texts"] > 0


def check_pipeline(found: dict[str, Any]) -> None:
    speeds = found["tokens_per_second"]
    assert set(speeds) == {"reading", "training", "together", "share_of_the_slower_half"}
    assert min(speeds.values()) > 0


def check_steer(found: dict[str, Any]) -> None:
    edits, parameters = set(found["parameters"]["edits"]), found["parameters"]
    assert [r["rows"] for r in found["cost"]] == list(parameters["rows"])
    for result in found["cost"]:
        check_timed(result, {"qwen_scope", *edits}, parameters["rounds_together"])
    check_timed(found["together"], {"qwen_scope", "one after another"}, parameters["rounds_together"])
    check_timed(found["transformers"], {"qwen_scope", "transformers"}, parameters["rounds"])
    assert found["together"]["same_tokens"] == parameters["together"]
    assert found["transformers"]["same_tokens"]


def check_sasft(found: dict[str, Any]) -> None:
    check_timed(found, {"qwen_scope", "sft"}, found["parameters"]["rounds"])
    low, high = found["added_quartiles"]
    assert low <= found["added"] <= high
    assert len(found["parameters"]["features"]) == 4


def check_serve(found: dict[str, Any]) -> None:
    parameters, load = found["parameters"], found["load"]
    assert found["together"]["same_texts"] == parameters["clients"]
    assert min(found["together"]["seconds"].values()) > 0
    assert load["failed"] == 0, load["requests"]
    assert sum(load["requests"].values()) > 0
    assert load["left_running"] == 0
    assert min(load["resident_mib"].values()) > 0


def check_app(found: dict[str, Any]) -> None:
    assert set(found["seconds"]) == {"first paint", "page can be used", "Prompt", "Compare"}
    for name, seconds in found["seconds"].items():
        low, high = found["quartiles"][name]
        assert 0 < low <= seconds <= high


def check_footprints(found: dict[str, Any]) -> None:
    assert [r["position"] for r in found["results"]] == ["last", "any"]
    for result in found["results"]:
        check_timed(result, {"qwen_scope", "model"}, found["parameters"]["rounds"])
        assert result["tokens"] > 0
        assert set(result["tokens_per_second"]) == {"qwen_scope", "model"}
    saved, parameters = found["saved"], found["parameters"]
    most = parameters["sets"] * parameters["items_of_each"] * parameters["k"]
    assert 0.8 * most <= saved["features_fired"] <= most
    assert set(saved["seconds"]) == set(saved["quartiles"]) == {"load, redundancy, overlaps", "intervals"}
    for name, (low, high) in saved["quartiles"].items():
        assert 0 < low <= saved["seconds"][name] <= high


def check_kernel(found: dict[str, Any]) -> None:
    assert found["kernel"] in get_args(Kernel)
    assert found["why"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_quick_run_has_every_number(quick, script):
    check_structure(read(quick / f"{script}.json"))


def test_quick_run_gave_the_same_features(quick):
    encoded, passed = read(quick / "encode.json"), read(quick / "layers.json")
    seen = [of for r in encoded["results"] if r["operation"] == "encode" for of in r["agreement"].values()]
    assert all(of["rows_with_same_features"] == of["rows"] for of in [*seen, *passed["agreement"].values()])


def test_threads_can_be_set(quick):
    assert read(quick / "training.json")["machine"]["threads"] == 1


def test_every_result_is_committed():
    assert {path.stem for path in COMMITTED.iterdir()} >= ALWAYS_COMMITTED


@pytest.mark.parametrize("path", sorted(COMMITTED.iterdir()), ids=lambda path: path.stem)
def test_committed_result_has_every_number_and_names_no_place(path):
    found = read(path)
    check_structure(found)
    assert not any(place in path.read_text(encoding="utf-8") for place in ("/home", "/tmp", "/root", "/work"))
    assert not any(key in found["machine"] for key in ("host", "hostname", "node", "path"))


def test_committed_sizes():
    sizes = {"d_model": 2048, "d_sae": 32768, "k": 50, "decodes": True}
    for name, threads in (("encode", 2), ("encode-1-thread", 1)):
        found = read(COMMITTED / f"{name}.json")
        assert found["machine"]["threads"] == threads
        assert found["parameters"]["sizes"] == sizes
        assert found["parameters"]["tokens"] == [1, 128, 1024, 4096]
    assert read(COMMITTED / "encode.json")["parameters"]["memory_tokens"] == [1, 128, 1024, 4096]
    passed = read(COMMITTED / "layers.json")["parameters"]
    assert (passed["sizes"], passed["layers"], passed["tokens"]) == (sizes, 24, 1024)
    assert read(COMMITTED / "load.json")["parameters"]["sizes"] == sizes


@pytest.mark.parametrize("name", ["encode", "encode-1-thread", "layers"])
def test_committed_run_gave_the_card_s_features(name):
    found = read(COMMITTED / f"{name}.json")
    seen = [r["agreement"]["card"] for r in found["results"] if r.get("operation") == "encode"]
    for of in seen or [found["agreement"]["card"]]:
        assert of["rows_with_same_features"] + of["rows_with_near_ties"] == of["rows"]
        assert of["rows_with_near_ties"] <= max(1, of["rows"] // 1000)
        assert of["largest_relative_difference"] <= 1e-5


def test_a_harvest_stays_within_2_gib():
    found = read(COMMITTED / "harvest.json")
    assert found["whole"]["layers"] == [7, 15, 23]
    assert found["whole"]["peak_mib"] <= 2048
    assert read(COMMITTED / "index.json")["parameters"]["features"] > 30_000


def test_peak_of_encode_and_decode_is_bounded():
    results = read(COMMITTED / "encode.json")["results"]
    (result,) = (r for r in results if (r["operation"], r["tokens"]) == ("encode + decode", 4096))
    assert result["peak_mib"]["qwen_scope"] <= 120


@pytest.mark.parametrize("name", MARKED)
def test_table_is_fresh(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    committed = {path.stem for path in COMMITTED.iterdir()} | {"summary"}
    assert all(f"<!-- benchmark:{mark} -->" in text for mark in MARKED[name] & committed)
    done = python("table.py", "--check", ROOT / name)
    assert done.returncode == 0, done.stderr


def test_stale_table_is_one_sentence_and_exit_1(quick, tmp_path):
    page = tmp_path / "page.md"
    marks = ["summary", "quality-summary", *SCRIPTS]
    blocks = "\n\n".join(f"<!-- benchmark:{mark} -->\nold\n<!-- /benchmark -->" for mark in marks)
    page.write_text(f"before\n\n{blocks}\n\nafter\n", encoding="utf-8")
    arguments = ("--results", quick, page)
    stale = python("table.py", "--check", *arguments)
    assert (stale.returncode, len(stale.stderr.splitlines())) == (1, 1)
    assert "page.md is stale" in stale.stderr

    assert python("table.py", *arguments).returncode == 0
    assert python("table.py", "--check", *arguments).returncode == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "\nold\n" not in written
    assert written.index("faster than") < written.index("| time, ")


def test_table_left_open_is_an_error(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:encode -->\n", encoding="utf-8")
    done = python("table.py", "--results", quick, page)
    assert done.returncode == 1
    assert "left open" in done.stderr


def test_table_without_its_result_is_one_sentence(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:load -->\n<!-- /benchmark -->\n", encoding="utf-8")
    done = python("table.py", "--results", tmp_path, page)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "run benchmarks/load.py" in done.stderr
