"""The catalogue against the model cards' table, and the one rule of each kind of name."""

import subprocess
import sys

import pytest

from qwen_scope import catalog


def test_there_are_14_groups_and_544_files():
    assert len(catalog.PUBLISHED) == 14
    assert sum(suite.n_layers for suite in catalog.PUBLISHED) == 544
    assert len({suite.repo_id for suite in catalog.PUBLISHED} | {s.short_name for s in catalog.PUBLISHED}) == 28


@pytest.mark.parametrize(
    ("repo_id", "short", "backbone", "numbers"),
    [
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_100", "qwen3-1.7b-k100", "Qwen/Qwen3-1.7B-Base", (28, 2048, 32768, 100)),
        ("SAE-Res-Qwen3.5-27B-W80K-L0_50", "qwen3.5-27b-k50", "Qwen/Qwen3.5-27B", (64, 5120, 81920, 50)),
        ("SAE-Res-Qwen3-8B-Base-W64K-L0_50", "qwen3-8b-k50", "Qwen/Qwen3-8B-Base", (36, 4096, 65536, 50)),
        (
            "SAE-Res-Qwen3-30B-A3B-Base-W128K-L0_100",
            "qwen3-30b-a3b-k100",
            "Qwen/Qwen3-30B-A3B-Base",
            (48, 2048, 131072, 100),
        ),
        (
            "SAE-Res-Qwen3.5-35B-A3B-Base-W32K-L0_50",
            "qwen3.5-35b-a3b-k50",
            "Qwen/Qwen3.5-35B-A3B-Base",
            (40, 2048, 32768, 50),
        ),
    ],
)
def test_a_group_is_found_by_each_of_its_names(repo_id, short, backbone, numbers):
    suite = catalog.find(short)
    assert suite is not None
    assert (suite.repo_id, suite.backbone) == (f"Qwen/{repo_id}", backbone)
    assert (suite.n_layers, suite.d_model, suite.d_sae, suite.k) == numbers
    for name in (repo_id, f"Qwen/{repo_id}", repo_id.lower(), f"QWEN/{repo_id.upper()}", short.upper()):
        assert catalog.find(name) is suite


@pytest.mark.parametrize("name", ["", "Qwen/", "qwen3.5-2b", "someone/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50", "gpt2"])
def test_other_names_find_nothing(name):
    assert catalog.find(name) is None


def test_every_repository_name_parses_to_its_own_numbers():
    for suite in catalog.PUBLISHED:
        assert catalog.parse_name(suite.repo_id) == (suite.backbone.removeprefix("Qwen/"), suite.d_sae, suite.k)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("/data/SAE-Res-Mine-W1K-L0_7/layer3.sae.pt", ("Mine", 1024, 7)),
        ("hub/models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_50/snapshots/abc", ("Qwen3.5-27B", 81920, 50)),
        (r"C:\saes\SAE-Res-Mine-W64K-L0_100", ("Mine", 65536, 100)),
        ("SAE-Res-Outer-W1K-L0_1/SAE-Res-Inner-W2K-L0_2", ("Inner", 2048, 2)),
        ("SAE-Res-Mine-L0_7", None),
        ("", None),
    ],
)
def test_parse_name(text, parsed):
    assert catalog.parse_name(text) == parsed


def test_nearest_suggests_short_names():
    assert catalog.nearest("qwen3.5-2b-k60")[0] == "qwen3.5-2b-k50"
    assert catalog.nearest("Qwen/SAE-Res-Qwen3.5-9B-W64K-L0_100")[0] == "qwen3.5-9b-k100"
    assert catalog.nearest("llama") == []


def test_the_catalogue_needs_no_torch():
    code = "import sys, qwen_scope.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
