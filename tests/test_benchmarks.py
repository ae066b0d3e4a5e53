"""The benchmark runs, its committed figures keep the promise on memory, and the tables say what the figures say.

Nothing here looks at a time: times belong to the machine that measured them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
COMMITTED = BENCHMARKS / "results" / "encode.json"
WITH_TABLES = ["README.md", "docs/performance.md"]
OPERATIONS = ["encode", "encode + decode"]


def python(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def check_structure(found: dict[str, Any]) -> None:
    names = set(found["contenders"])
    assert {"qwen_scope", "card"} <= names
    assert len(names) + len(found["not_installed"]) == 4
    assert {"cpu", "cores", "threads", "memory_gib", "torch", "python", "date"} <= set(found["machine"])
    cases = [(operation, tokens) for operation in OPERATIONS for tokens in found["parameters"]["tokens"]]
    assert [(r["operation"], r["tokens"]) for r in found["results"]] == cases
    for result in found["results"]:
        assert result["rounds"] >= found["parameters"]["min_rounds"]
        assert set(result["seconds"]) == names
        assert min(result["seconds"].values()) > 0
        for field in ("times_as_fast", "times_as_fast_quartiles", "agreement"):
            assert set(result[field]) == names - {"qwen_scope"}
        for name, (low, high) in result["times_as_fast_quartiles"].items():
            assert 0 < low <= result["times_as_fast"][name] <= high
        assert all(seen["rows"] == result["tokens"] for seen in result["agreement"].values())
        assert ("peak_mib" in result) == (result["tokens"] in found["parameters"]["memory_tokens"])
        assert set(result.get("peak_mib", names)) == names


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results") / "encode.json"
    done = python("encode.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))


def test_quick_run_has_every_number(quick):
    found = json.loads(quick.read_text(encoding="utf-8"))
    check_structure(found)
    assert all(
        seen["rows_with_same_features"] == seen["rows"]
        for result in found["results"]
        if result["operation"] == "encode"
        for seen in result["agreement"].values()
    )


def test_committed_result_has_every_number(committed):
    check_structure(committed)
    sizes = {"d_model": 2048, "d_sae": 32768, "k": 50}
    assert committed["parameters"]["sizes"] == sizes
    assert committed["parameters"]["tokens"] == committed["parameters"]["memory_tokens"] == [1, 128, 1024, 4096]


def test_committed_result_names_no_place(committed):
    assert "/home" not in json.dumps(committed)
    assert not any(key in committed["machine"] for key in ("host", "hostname", "node", "path"))


def test_committed_run_gave_the_card_s_features(committed):
    for result in committed["results"]:
        seen = result["agreement"]["card"]
        if result["operation"] == "encode":
            assert seen["rows_with_same_features"] + seen["rows_with_near_ties"] == seen["rows"]
            assert seen["rows_with_near_ties"] <= max(1, seen["rows"] // 1000)
            assert seen["largest_relative_difference"] <= 1e-5


def test_peak_of_encode_and_decode_is_bounded(committed):
    (result,) = (r for r in committed["results"] if (r["operation"], r["tokens"]) == ("encode + decode", 4096))
    assert result["peak_mib"]["qwen_scope"] <= 150


@pytest.mark.parametrize("name", WITH_TABLES)
def test_table_is_fresh(name):
    assert "<!-- benchmark:encode -->" in (ROOT / name).read_text(encoding="utf-8")
    done = python("table.py", "--check", ROOT / name)
    assert done.returncode == 0, done.stderr


def test_stale_table_is_one_sentence_and_exit_1(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- benchmark:encode -->\nold\n<!-- /benchmark -->\n\nafter\n", encoding="utf-8")
    arguments = ("--results", quick.parent, page)
    stale = python("table.py", "--check", *arguments)
    assert (stale.returncode, len(stale.stderr.splitlines())) == (1, 1)
    assert "page.md is stale" in stale.stderr

    assert python("table.py", *arguments).returncode == 0
    assert python("table.py", "--check", *arguments).returncode == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert written.index("faster than") < written.index("| time, ")


def test_table_left_open_is_an_error(quick, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmark:encode -->\n", encoding="utf-8")
    done = python("table.py", "--results", quick.parent, page)
    assert done.returncode == 1
    assert "left open" in done.stderr
