"""Fidelity figures against closed forms, losses of spliced models, and the classic mistakes, caught and named."""

import json
import math
import re

import mistake_makers as make
import pytest
import torch
from torch import Tensor

from qwen_scope import Backbone, QwenScopeError, Scope, SparseFeatures, Suite, TopKSAE
from qwen_scope.evaluation import SAMPLE_TEXTS, Fidelity, FidelityMeter
from qwen_scope.evaluation.density import DENSE, LOG10_EDGES, NAMED, Density
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.evaluation.mistakes import best_length, find_mistakes
from qwen_scope.outliers import NORM_OUTLIER, norm_outliers
from qwen_scope.training import TrainConfig, train_sae

D_SAE = 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(x: Tensor, x_hat: Tensor, first: Tensor | None = None, features: SparseFeatures | None = None) -> Fidelity:
    meter = FidelityMeter(x.shape[1], D_SAE)
    meter.update(x, x_hat, firing(x) if features is None else features, none(x) if first is None else first)
    return meter.result()


def firing(x: Tensor) -> SparseFeatures:
    """Feature 0 at 2.0 and feature 1 at 1.0, everywhere."""
    return SparseFeatures(torch.tensor([[0, 1]]).expand(len(x), 2), torch.tensor([[2.0, 1.0]]).expand(len(x), 2), D_SAE)


def none(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.bool)


# Fidelity


@pytest.fixture(scope="module")
def x() -> Tensor:
    # Norms are alike, so that none is an outlier.
    return torch.randn(200, 12, generator=seeded(0)) + 2


def test_a_perfect_reconstruction(x):
    found = measure(x, x)
    assert (found.fvu, found.explained_variance, found.tokens) == (0, 1, 200)
    assert found.cosine == pytest.approx(1)
    assert found.norm_outliers == found.first_tokens == 0


def test_the_mean_explains_nothing(x):
    assert measure(x, x.mean(0).expand_as(x)).fvu == pytest.approx(1)
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1)


@pytest.mark.parametrize("c", [0.0, 0.5, 0.9, 1.3, -1.0])
def test_shrinking_about_the_mean(x, c):
    x = x.double()
    x_hat = x.mean(0) + c * (x - x.mean(0))
    assert measure(x, x_hat).fvu == pytest.approx((1 - c) ** 2, abs=1e-9)


@pytest.mark.parametrize("c", [0.1, 2.0, -1.0])
def test_cosine_ignores_length(x, c):
    assert measure(x, c * x).cosine == pytest.approx(math.copysign(1, c))


def test_cosine_of_a_known_angle():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    x_hat = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert measure(x, x_hat).cosine == pytest.approx((math.sqrt(0.5) + 1) / 2)


@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
def test_batches_of_any_size_give_what_float64_gives_at_once(offset):
    # Far from the origin, sums of squares would cancel: the variance is 1 and the mean square 1e10.
    x = (torch.randn(500, 6, generator=seeded(1), dtype=torch.float64) + offset).float()
    x_hat = (x + 0.1 * torch.randn(500, 6, generator=seeded(2))).float()
    a, b = x.double().numpy(), x_hat.double().numpy()
    expected = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    for sizes in ([500], [1, 499], [100] * 5, [7, 300, 193]):
        meter = FidelityMeter(6, D_SAE)
        for part, part_hat in zip(x.split(sizes), x_hat.split(sizes), strict=True):
            meter.update(part, part_hat, firing(part), none(part))
        assert meter.result().fvu == pytest.approx(expected, rel=1e-9)
        assert meter.result().tokens == 500


def test_batches_whose_means_differ_share_one_mean():
    parts = [torch.randn(50, 4, generator=seeded(seed)) + 10 * seed for seed in range(4)]
    meter = FidelityMeter(4, D_SAE)
    for part in parts:
        meter.update(part, torch.zeros_like(part), firing(part), none(part))
    whole = torch.cat(parts).double()
    expected = float(whole.pow(2).sum() / (whole - whole.mean(0)).pow(2).sum())
    assert meter.result().fvu_without_first == pytest.approx(expected, rel=1e-9)


def test_position_0_is_left_out_and_counted(x):
    first = none(x)
    first[::50] = True
    x_hat = x.clone()
    x_hat[first] = 0
    found = measure(x, x_hat, first)
    assert found.first_tokens == 4
    assert found.tokens == 200
    assert found.fvu == found.fvu_without_first == 0
    assert found.fvu_all == pytest.approx(fvu(x, x_hat)) != 0
    assert found.cosine == pytest.approx(1)


def test_outliers_are_left_out_and_counted(x):
    sinks = x.clone()
    sinks[[3, 77]] *= 100
    x_hat = sinks.clone()
    x_hat[[3, 77]] = 0
    found = measure(sinks, x_hat)
    assert found.norm_outliers == 2
    assert found.fvu == 0
    assert found.fvu_without_first == found.fvu_all == pytest.approx(fvu(sinks, x_hat))
    assert found.fvu_all > 0.9


def test_position_0_does_not_decide_what_an_outlier_is():
    # Most tokens first in their text, and huge: the others are measured against each other.
    x = torch.ones(10, 4) + 0.1 * torch.randn(10, 4, generator=seeded(3))
    first = torch.arange(10) < 7
    x[first] *= 1000
    assert measure(x, x, first).norm_outliers == 0
    x[9] *= 100
    assert measure(x, x, first).norm_outliers == 1


def test_what_an_outlier_is():
    norms = torch.tensor([1.0, 1.0, 1.0, NORM_OUTLIER - 0.1, NORM_OUTLIER + 0.1, 0.0, 50.0])
    assert norm_outliers(norms[:, None]).tolist() == [False, False, False, False, True, False, True]


def test_features_counted_only_where_they_fire():
    x = torch.randn(4, 3, generator=seeded(4)) + 3
    indices = torch.tensor([[0, 1, 2], [0, 2, 3], [0, 5, 4], [0, 6, 7]])
    values = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, -1.0], [1.0, 0.5, 0.2], [1.0, 1.0, 1.0]])
    features = SparseFeatures(indices, values, D_SAE)
    found = measure(x, x, features=features)
    assert found.l0 == pytest.approx((2 + 2 + 3 + 3) / 4)
    assert found.short_rows == 2
    assert found.always_fired == [0]
    assert found.never_fired == D_SAE - 7  # 0, 1, 2, 4, 5, 6, 7 fire; 3 only below 0
    # Position 0 fires nothing that counts, but its short row is told.
    first = torch.tensor([True, False, False, False])
    found = measure(x, x, first, features)
    assert found.l0 == pytest.approx(8 / 3)
    assert found.short_rows == 2
    assert found.never_fired == D_SAE - 6
    assert found.always_fired == [0]


def test_each_density_falls_into_its_half_decade():
    # The first never fires, the last always; edges belong to the bin above, and what is rarer than 10^-6 to the first.
    fired = torch.tensor([0, 1, 10, 31, 32, 100, 3_000_000, 10_000_000])
    assert Density.of(fired, 10_000_000).histogram == [3, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_edges_are_powers_of_ten():
    for decade in range(6):
        found = Density.of(torch.tensor([10**decade]), 1_000_000)
        assert found.histogram.index(1) == 2 * decade
        assert LOG10_EDGES[2 * decade] == decade - 6
    assert Density.of(torch.tensor([7]), 7).histogram[-1] == 1


def test_dense_features_are_counted_and_the_densest_named():
    fired = torch.tensor([10, 11, 100, 0, 50, 20, 30, 50])
    found = Density.of(fired, 100)
    assert found.dense == 6, "a density of exactly 0.1 is not above it"
    assert found.densest == {2: 1.0, 4: 0.5, 7: 0.5, 6: 0.3, 5: 0.2}
    assert list(found.densest) == [2, 4, 7, 6, 5]
    assert len(found.densest) == NAMED
    assert Density.of(fired, 1000).densest == {}
    assert DENSE == 0.1


def test_densities_are_those_of_kept_tokens_of_all_batches():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]])
    values = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    x = torch.randn(5, 3, generator=seeded(4)) + 3
    first = torch.tensor([True, False, False, False, False])
    meter = FidelityMeter(3, D_SAE)
    for part in (slice(0, 2), slice(2, 5)):
        meter.update(x[part], x[part], SparseFeatures(indices[part], values[part], D_SAE), first[part])
    found = meter.result()
    assert found.density.densest == {0: 1.0, 1: 0.5, 2: 0.25}
    assert found.density.dense == 3
    assert sum(found.density.histogram) + found.never_fired == D_SAE
    assert found.density.histogram[-1] == 2  # 1.0 and 0.5
    assert found.density.histogram[-2] == 1


def test_nothing_measured_is_not_a_number():
    x = torch.randn(3, 4, generator=seeded(5))
    found = measure(x, x, first=torch.ones(3, dtype=torch.bool))
    assert math.isnan(found.fvu)
    assert math.isnan(found.cosine)
    assert math.isnan(found.l0)
    assert found.always_fired == []
    assert found.density == Density([0] * 12, 0, {})
    assert math.isnan(measure(x[:1], x[:1]).fvu), "one token has no variance"


# The model's loss


TEXTS = ["the capital of France is Paris", "Rome, the capital of Italy", "Paris"]


def loss_by_hand(model, tokenizer) -> float:
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


@pytest.fixture(scope="module")
def tiny(model, tokenizer) -> Scope:
    layers = len(Backbone(model).layers)
    # 2 as a bias, to see that encoder and decoder take it away and back.
    return Scope(model, Suite.of({n: make.exact(32, torch.full((32,), 2.0)) for n in range(layers)}), tokenizer)


def test_an_exact_sae_leaves_the_loss_as_it_is(tiny, model, tokenizer):
    report = tiny.check(TEXTS)
    by_hand = loss_by_hand(model, tokenizer)
    for row in report.layers:
        assert row.loss == pytest.approx(by_hand, rel=1e-5)
        assert row.loss_spliced == pytest.approx(row.loss, rel=1e-5)
        assert row.loss_recovered == pytest.approx(1, abs=1e-2)
        assert row.fidelity.fvu == pytest.approx(0, abs=1e-9)
        assert row.fidelity.cosine == pytest.approx(1, abs=1e-6)
        assert not row.mistakes
        assert row.fidelity.first_tokens == 3
        assert row.fidelity.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert report.ok


def test_an_sae_that_gives_zeros_recovers_nothing(llama, tokenizer):
    nothing = TopKSAE(torch.zeros(64, 32), torch.zeros(32, 64), torch.zeros(64), torch.zeros(32), k=8)
    row = Scope(llama, Suite.of({1: nothing}), tokenizer).check(TEXTS).layers[0]
    assert row.loss_spliced == row.loss_zeroed
    assert row.loss_recovered == 0
    assert row.mistakes[0].startswith("poor fit")
    assert row.fidelity.l0 == 0
    assert row.fidelity.never_fired == 64
    assert row.fidelity.short_rows == row.fidelity.tokens


def test_the_loss_of_zeros_after_the_last_layer_is_that_of_a_uniform_guess(llama, tokenizer):
    # Every position but the first gets logits 0, since the final norm of 0 is 0; the first keeps its own.
    text = "the capital of France is Paris"
    row = Scope(llama, Suite.of({2: make.exact(32)}), tokenizer).check([text]).layers[0]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = torch.nn.functional.cross_entropy(llama(input_ids=ids).logits[0, :1], ids[0, 1:2])
    expected = (float(first) + (ids.shape[1] - 2) * math.log(llama.config.vocab_size)) / (ids.shape[1] - 1)
    assert row.loss_zeroed == pytest.approx(expected, rel=1e-5)


def test_padding_counts_for_nothing(llama, tokenizer, make_sae):
    scope = Scope(llama, Suite.of({1: make_sae()}), tokenizer)
    both = scope.check(TEXTS[:2]).layers[0]
    alone = [scope.check([text]).layers[0] for text in TEXTS[:2]]
    weights = [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS[:2]]
    assert weights[0] != weights[1]
    for name in ("loss", "loss_spliced", "loss_zeroed"):
        mean = sum(w * getattr(row, name) for w, row in zip(weights, alone, strict=True)) / sum(weights)
        assert getattr(both, name) == pytest.approx(mean, rel=1e-4)
    assert both.fidelity.tokens == sum(weights) + 2


def test_texts_of_one_token_are_measured_but_have_nothing_to_predict(llama, tokenizer, make_sae):
    scope = Scope(llama, Suite.of({1: make_sae()}), tokenizer)
    with pytest.raises(QwenScopeError, match="two or more tokens"):
        scope.check([[5], [6]])
    with_one = scope.check([*TEXTS, "a"]).layers[0]
    assert with_one.loss == pytest.approx(scope.check(TEXTS).layers[0].loss, rel=1e-5)
    assert with_one.fidelity.first_tokens == 4


def test_two_tokens_are_enough_to_check(llama, tokenizer, make_sae):
    report = Scope(llama, Suite.of({1: make_sae()}), tokenizer).check([[5, 6]])
    assert report.layers[0].fidelity.tokens == 2
    assert math.isnan(report.layers[0].fidelity.fvu)
    assert "nan" in repr(report)
    # One token has no variance to explain, so nothing can be said against the SAE.
    assert report.ok


def test_a_share_of_no_loss_is_not_a_number(llama, tokenizer):
    model_that_adds_nothing = Scope(llama, Suite.of({2: make.exact(32)}), tokenizer)
    with model_that_adds_nothing.backbone.editing({2: torch.zeros_like}):
        row = model_that_adds_nothing.check(TEXTS).layers[0]
    assert math.isnan(row.loss_recovered)


def test_the_report(llama, tokenizer, make_sae):
    suite = Suite.of({0: make_sae(), 2: make_sae(k=8)}, name="mine", backbone="org/model")
    scope = Scope(llama, suite, tokenizer)
    report = scope.check(TEXTS)
    assert [row.layer for row in report.layers] == [0, 2]
    assert [row.layer for row in scope.check(TEXTS, layers=[2]).layers] == [2]
    assert (report.suite, report.trained_on, report.texts, report.ok) == ("mine", "org/model", 3, False)
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["layers"][1]["loss_recovered"] == report.layers[1].loss_recovered
    assert as_json["layers"][0]["fidelity"]["fvu"] == report.layers[0].fidelity.fvu
    assert as_json["ok"] is False
    fidelity = as_json["layers"][1]["fidelity"]
    assert fidelity["explained_variance"] == 1 - fidelity["fvu"]
    density = fidelity["density"]
    assert sum(density["histogram"]) + fidelity["never_fired"] == as_json["layers"][1]["d_sae"] == 128
    assert density["log10_edges"] == list(LOG10_EDGES)
    assert density["densest"] == report.layers[1].densest
    assert all(re.fullmatch(r"2/\d+", name) and share > DENSE for name, share in density["densest"].items())
    shown = repr(report)
    assert shown.startswith("mine on LlamaForCausalLM: 3 texts")
    assert shown.count("MISTAKE at layer") == 2
    assert re.search(f"densest feature of its layer: 0/.*, {next(iter(density['densest']))} ", shown)
    assert not any(layer._forward_hooks for layer in scope.backbone.layers)


def test_the_sample_is_read_unless_told(llama, make_sae, make_tokenizer_with):
    assert len(SAMPLE_TEXTS) == 10
    short = Scope(llama, Suite.of({0: make_sae()}), make_tokenizer_with())
    # The tiny model's context is shorter than these texts in its tiny vocabulary.
    with pytest.raises(QwenScopeError, match="at most 256 tokens"):
        short.check()


# Mistakes


def streams(seed: int, layers: int = 3, tokens: int = 9000, d_model: int = 64) -> list[Tensor]:
    """Residuals of a made-up model: sparse sums of directions about a mean; each layer turns them a little and adds."""
    generator = seeded(seed)

    def unit(*shape: int) -> Tensor:
        rows = torch.randn(*shape, generator=generator)
        return rows / rows.norm(dim=-1, keepdim=True)

    def sparse_sum(active: int) -> Tensor:
        which = torch.rand(tokens, 96, generator=generator).topk(active, dim=1).indices
        strengths = torch.rand(tokens, active, generator=generator) + 0.5
        return torch.zeros(tokens, 96).scatter_(1, which, strengths) @ unit(96, d_model)

    x = 4 * unit(d_model) + 1.5 * sparse_sum(8) + 0.1 * torch.randn(tokens, d_model, generator=generator)
    made = [x]
    for _ in range(layers - 1):
        turn, r = torch.linalg.qr(torch.eye(d_model) + 0.03 * torch.randn(d_model, d_model, generator=generator))
        x = x @ (turn * r.diagonal().sign()) + sparse_sum(2) + unit(d_model)
        made.append(x)
    return made


K = 8


@pytest.fixture(scope="session")
def residuals() -> dict[int, Tensor]:
    return dict(enumerate(streams(seed=0)))


@pytest.fixture(scope="session")
def trained(residuals) -> dict[int, TopKSAE]:
    config = TrainConfig(d_sae=256, k=K, batch=500, learning_rate=1.5e-3, dead_after=20_000, beta1=0.9)
    return {layer: train_sae(x[1000:], config, epochs=6.0) for layer, x in residuals.items()}


def mistakes_at(layer: int, sae: TopKSAE, residuals: dict[int, Tensor]) -> list[str]:
    near = {other: x[:1000] for other, x in residuals.items() if abs(other - layer) <= 1}
    return find_mistakes(sae, layer, near)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_good_sae_has_none(trained, residuals, layer):
    assert fvu(residuals[layer][:1000], trained[layer](residuals[layer][:1000])) < 0.4
    assert mistakes_at(layer, trained[layer], residuals) == []


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (make.b_dec_subtracted, "b_dec subtracted"),
        (make.b_dec_not_subtracted, "b_dec not subtracted"),
        (make.decoder_transposed, "transposed decoder"),
        (make.encoder_transposed, "transposed encoder"),
        (make.k_of(K // 4), f"k wrong: k = {K // 4} is too small"),
        (make.k_of(K // 2), f"k wrong: k = {K // 2} is too small"),
        (make.k_of(K * 2), f"k wrong: k = {K * 2} is too large"),
        (make.k_of(K * 4), f"k wrong: k = {K * 4} is too large"),
    ],
    ids=["b_dec subtracted", "b_dec not subtracted", "decoder", "encoder", "k / 4", "k / 2", "2 k", "4 k"],
)
def test_each_mistake_is_caught_and_named(trained, residuals, layer, mistake, name):
    found = mistakes_at(layer, mistake(trained[layer]), residuals)
    assert len(found) == 1
    assert found[0].startswith(name)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("k", [K // 2, 2 * K])
def test_the_k_of_the_training_is_found_again(trained, residuals, layer, k):
    [found] = mistakes_at(layer, make.k_of(k)(trained[layer]), residuals)
    [named] = re.findall(r"trained with k = (\d+)", found)
    assert abs(int(named) - K) <= 1


def test_best_length_in_closed_form():
    # An exact reconstruction has the best length; one three times too long fits best at a third of it.
    x = torch.randn(50, 4, generator=seeded(0))
    sae = make.exact(4)
    assert best_length(sae, x, sae.k) == pytest.approx(1)
    longer = TopKSAE(sae.W_enc, 3 * sae.W_dec, sae.b_enc, sae.b_dec, sae.k, sae.activation)
    assert best_length(longer, x, sae.k) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("read", "trained_at"), [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_a_layer_off_by_one_is_caught_and_named(trained, residuals, read, trained_at):
    found = mistakes_at(read, trained[trained_at], residuals)
    assert len(found) == 1
    assert found[0].startswith(f"layer off by 1: the SAE fits the residual after layer {trained_at} better")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_wrong_backbone_is_caught_and_named(trained, layer):
    other = dict(enumerate(streams(seed=1)))
    found = mistakes_at(layer, trained[layer], other)
    assert len(found) == 1
    assert found[0].startswith("poor fit")
    assert "belong to another model" in found[0]


def test_a_mistake_is_told_with_the_figures(trained, residuals):
    [found] = mistakes_at(0, make.decoder_transposed(trained[0]), residuals)
    bad = fvu(residuals[0][:1000], make.decoder_transposed(trained[0])(residuals[0][:1000]))
    good = fvu(residuals[0][:1000], trained[0](residuals[0][:1000]))
    assert found.endswith(f"(variance unexplained {good:.3f} instead of {bad:.3f})")


def test_the_mistakes_do_harm(trained, residuals):
    # What cannot be seen cannot be caught: each mistake changes the reconstruction for the worse.
    x = residuals[0][:1000]
    good = fvu(x, trained[0](x))
    for mistake in (make.b_dec_subtracted, make.b_dec_not_subtracted, make.decoder_transposed, make.encoder_transposed):
        assert fvu(x, mistake(trained[0])(x)) > 1.2 * good


def test_a_model_without_an_output_head_cannot_be_checked(llama, suite, tokenizer):
    with pytest.raises(QwenScopeError, match="load it with AutoModelForCausalLM"):
        Scope(llama.model, suite, tokenizer=tokenizer).check(["the capital of France"])
