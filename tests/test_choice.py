"""Which path is chosen: by what there is, by measurement, from memory; and what goes wrong then."""

import json
import sys

import pytest
import torch

from qwen_scope.kernels import choice as module
from qwen_scope.kernels.choice import Choice, choose

D_SAE = 2**14


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_chosen", {})
    return tmp_path


@pytest.fixture
def weights():
    return torch.randn(D_SAE, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(D_SAE)


def timed(monkeypatch, **seconds: tuple[float, float]):
    """Gives each path the seconds it takes for one token and for a batch."""
    calls = []

    def fake(runs, inputs):
        calls.append(list(runs))
        return {kernel: list(seconds[kernel.replace("-", "_")]) for kernel in runs}

    monkeypatch.setattr(module, "_seconds", fake)
    return calls


def test_the_fastest_is_chosen_remembered_and_not_measured_again(weights, cache, monkeypatch):
    calls = timed(monkeypatch, reference=(1.0, 8.0), cpu_bfloat16=(0.5, 2.0), cpu_float32=(0.9, 7.0))
    found = choose(*weights, 50)
    assert found == Choice("cpu-bfloat16", "2.0 times as fast as the reference for 1 token, 4.0 for 64, here")
    assert choose(*weights, 50) is found
    module._chosen.clear()
    assert choose(*weights, 50) == found
    assert calls == [["reference", "cpu-bfloat16", "cpu-float32"]]
    assert len(json.loads((cache / "kernels.json").read_text())) == 1
    choose(*weights, 40)
    assert len(calls) == 2
    assert len(json.loads((cache / "kernels.json").read_text())) == 2


@pytest.mark.parametrize("half", [(1.1, 2.0), (0.5, 8.1)])
def test_what_loses_for_one_token_or_for_a_batch_is_not_chosen(weights, monkeypatch, half):
    timed(monkeypatch, reference=(1.0, 8.0), cpu_bfloat16=half, cpu_float32=(1.2, 9.0))
    found = choose(*weights, 50)
    assert found.kernel == "reference"
    assert found.why.startswith("cpu-bfloat16 is")


def test_an_unlucky_measurement_is_repeated(weights, monkeypatch):
    taken = iter([(1.1, 9.0), (0.5, 4.0)])

    def fake(runs, inputs):
        mine = next(taken)
        return {"reference": [1.0, 8.0], "cpu-bfloat16": list(mine), "cpu-float32": [1.2, 9.0]}

    monkeypatch.setattr(module, "_seconds", fake)
    assert choose(*weights, 50).kernel == "cpu-bfloat16"


def test_a_real_measurement_gives_a_path_that_runs(weights, capsys):
    found = choose(*weights, 50)
    assert found.kernel in ("reference", "cpu-bfloat16", "cpu-float32")
    assert "here" in found.why
    assert "once" in capsys.readouterr().err
    assert all(t > 0 for times in module._seconds(*runs_of(weights)).values() for t in times)


def runs_of(weights):
    runs = module._runs(["reference", "cpu-bfloat16", "cpu-float32"], *weights, 50)
    assert list(runs) == ["reference", "cpu-bfloat16", "cpu-float32"]
    return runs, [module._probe(3, weights[0])]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"other": 1}', "\x00"])
def test_a_damaged_memory_is_replaced(weights, cache, monkeypatch, content):
    (cache / "kernels.json").write_text(content)
    timed(monkeypatch, reference=(1.0, 1.0), cpu_bfloat16=(0.5, 0.5), cpu_float32=(0.9, 0.9))
    assert choose(*weights, 50).kernel == "cpu-bfloat16"
    assert any(entry == {"kernel": "cpu-bfloat16", "why": choose(*weights, 50).why} for entry in entries(cache))


def entries(cache):
    return list(json.loads((cache / "kernels.json").read_text()).values())


def test_an_unknown_kernel_in_memory_is_measured_anew(weights, cache, monkeypatch):
    timed(monkeypatch, reference=(1.0, 1.0), cpu_bfloat16=(0.5, 0.5), cpu_float32=(0.9, 0.9))
    choose(*weights, 50)
    [key] = json.loads((cache / "kernels.json").read_text())
    (cache / "kernels.json").write_text(json.dumps({key: {"kernel": "quantum", "why": "?"}}))
    module._chosen.clear()
    assert choose(*weights, 50).kernel == "cpu-bfloat16"


def test_a_cache_that_cannot_be_written_is_no_error(weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "file"))
    timed(monkeypatch, reference=(1.0, 1.0), cpu_bfloat16=(0.5, 0.5), cpu_float32=(0.9, 0.9))
    assert choose(*weights, 50).kernel == "cpu-bfloat16"


def test_without_numba_the_reference_runs(weights, monkeypatch):
    import qwen_scope.kernels as package

    monkeypatch.delattr(package, "compiled", raising=False)
    monkeypatch.delitem(sys.modules, "qwen_scope.kernels.compiled", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    found = choose(*weights, 50)
    assert found.kernel == "reference"
    assert "numba cannot be used" in found.why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda W, b: (W[:100], b[:100]), "the encoder is small"),
        (lambda W, b: (W.half(), b), "the weights are float16"),
        (lambda W, b: (W.repeat(1, 20)[:120], b[:120]), "the encoder is small"),
    ],
)
def test_encoders_that_need_no_measurement(weights, change, why):
    assert choose(*change(*weights), 50) == Choice("reference", why)


def test_more_than_a_quarter_of_the_features(weights):
    assert choose(*weights, D_SAE // 4 + 1) == Choice("reference", "more than a quarter of the features is kept")
