"""The report of a run: a card whose figures are the measured ones, whose text is only text, and pictures that open."""

import json
import sys

import pytest
import yaml
from PIL import Image

from qwen_scope import Scope, Suite
from qwen_scope.evaluation.check import CheckReport
from qwen_scope.training.report import card, write_report

HOSTILE = "</td><script>alert(1)</script> | [x](y) `code` *b* \n# head\n---\nbase_model: evil\u202e"
HISTORY = [
    {"layer": layer, "step": step, "tokens": 100 * step, "fvu": 1 / step, "dead": step, "learning_rate": 1e-3}
    for step in range(1, 9)
    for layer in (0, 2)
]


@pytest.fixture(scope="module")
def checked(llama, tokenizer, make_sae) -> CheckReport:
    suite = Suite.of({0: make_sae(), 2: make_sae()}, name="my suite", backbone="org/model")
    return Scope(llama, suite, tokenizer).check(["the capital of France is Paris", "Rome, the capital of Italy"])


def test_the_report_has_the_figures_of_the_check(checked, tmp_path):
    write_report(tmp_path, checked, HISTORY, {"seed": 3})
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["about"] == {"seed": 3}
    assert found["training"] == HISTORY
    assert found["held_out"] == json.loads(json.dumps(checked.to_dict()))
    text = (tmp_path / "README.md").read_text()
    for row in checked.layers:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {row.layer} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:3] == [str(row.d_sae), str(row.k)]
        assert cells[3] == f"{1 - row.fidelity.fvu:.4f}"
        assert cells[6] == f"{row.fidelity.fvu_all:.4f}"
        assert cells[11] == f"{row.loss_recovered:.2%}"
        assert cells[12] == str(row.fidelity.never_fired)
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "library_name": "qwen-scope",
        "tags": ["sparse-autoencoder", "interpretability"],
        "base_model": "org/model",
    }
    # Random SAEs do not fit, and the card says so.
    assert "**A mistake was found at layer 0:** poor fit" in text
    assert "must not be used" in text


def test_pictures_open(checked, tmp_path):
    write_report(tmp_path, checked, HISTORY, {})
    names = ["density.png", "training.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    for name in names:
        with Image.open(tmp_path / "plots" / name) as image:
            assert min(image.size) > 300
            # Something is drawn: more than the two colours of an empty page with its frame.
            assert len(image.convert("RGB").getcolors(10**6)) > 20
        assert f"](plots/{name})" in (tmp_path / "README.md").read_text()


def test_without_a_history_only_densities_are_drawn(checked, tmp_path):
    write_report(tmp_path, checked, [], {})
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["density.png"]


def test_without_matplotlib_the_card_says_how_to_get_plots(checked, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tmp_path, checked, HISTORY, {})
    assert not (tmp_path / "plots").exists()
    assert "pip install 'qwen-scope[train]'" in (tmp_path / "README.md").read_text()


def test_strings_of_others_stay_text(checked):
    text = card(checked, {HOSTILE: HOSTILE, "nested": {"corpus": HOSTILE}}, None)
    assert "<script" not in text.replace(r"\<script", "")
    assert "\u202e" not in text
    facts = text.split("## How they were trained\n\n")[1].split("\n\n## Caution")[0]
    assert len(facts.splitlines()) == 2, "no value begins a line of its own"
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/model"


def test_numbers_that_are_none_become_null(checked, tmp_path):
    write_report(tmp_path, checked, [{**HISTORY[0], "fvu": float("nan")}], {"speed": float("inf")})
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["about"]["speed"] is None
