"""The trainer: gradients against dense autograd, what is folded into the SAE, dead features, seeds, and states."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen_scope import QwenScopeError
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.kernels import Encoder, Kernel, adam, pairs
from qwen_scope.training.autoencode import autoencode
from qwen_scope.training.config import TrainConfig
from qwen_scope.training.in_memory import train_sae
from qwen_scope.training.normalise import Normalisation, geometric_median
from qwen_scope.training.trainer import SAETrainer

CONFIG = TrainConfig(d_sae=48, k=4, batch=100, learning_rate=1e-3, dead_after=100_000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Sparse sums of 24 directions in 16 dimensions, far from the origin and not of scale 1."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(1000, 24, generator=generator) * (torch.rand(1000, 24, generator=generator) < 0.1)
    return 20 * acts @ draw(24, 16, seed=1) + 50 * draw(16, seed=2)


# Gradients


@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (5, 3), (130, 7), (20, 40)])
def test_sparse_gradients_equal_dense_autograds(tokens, k):
    # 130 tokens are more than one block of row products; with k = d_sae many kept values are cut to 0 by the ReLU.
    given = [draw(40, 12), draw(40, seed=1), draw(40, 12, seed=2), draw(12, seed=3)]
    given.insert(0, draw(tokens, 12, seed=4))
    target = draw(tokens, 12, seed=5)
    sparse = [p.clone().requires_grad_() for p in given]
    out = autoencode(*sparse, k)
    (out.x_hat - target).pow(2).sum().backward()

    x, W_enc, b_enc, decoder, b_dec = dense = [p.clone().requires_grad_() for p in given]
    pre = x @ W_enc.T + b_enc
    values, indices = pre.topk(k, dim=1)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    x_hat = acts @ decoder + b_dec
    (x_hat - target).pow(2).sum().backward()

    torch.testing.assert_close(out.x_hat, x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.zeros_like(pre).scatter(1, out.indices, out.values), acts.detach())
    for found, expected in zip(sparse, dense, strict=True):
        allowed = 1e-5 * float(expected.grad.abs().max())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=allowed)


def test_values_carry_no_gradient_of_their_own():
    parameters = [draw(8, 4).requires_grad_(), draw(8).requires_grad_(), draw(8, 4).requires_grad_(), draw(4)]
    out = autoencode(draw(3, 4), *parameters, 2)
    assert not out.values.requires_grad
    assert out.x_hat.requires_grad


# Normalisation


@pytest.mark.parametrize(
    ("points", "median"),
    [
        # On a line it is the median, not the mean.
        ([[0.0, 0], [1, 0], [2, 0], [3, 0], [100, 0]], [2, 0]),
        # Of four corners of a convex quadrilateral it is where the diagonals cross.
        ([[0.0, 0], [4, 4], [4, 0], [0, 4]], [2, 2]),
        ([[0.0, 0], [6, 6], [1, 0], [0, 1]], [0.5, 0.5]),
        # A point that outweighs the rest is the median itself.
        ([[5.0, 5]] * 4 + [[0, 0], [9, 1], [-3, 2]], [5, 5]),
        ([[7.0, -7]], [7, -7]),
    ],
)
def test_the_geometric_median(points, median):
    found = geometric_median(torch.tensor(points), steps=500)
    torch.testing.assert_close(found, torch.tensor(median, dtype=torch.float32), atol=0.03, rtol=0)


def test_a_few_extreme_points_do_not_move_the_centre():
    x = draw(1000, 8)
    moved = x.clone()
    moved[:10] += 1e4
    assert (geometric_median(moved) - geometric_median(x)).norm() < 0.2
    assert (moved.mean(0) - x.mean(0)).norm() > 100


def test_normalised_residuals_have_unit_scale(x):
    normalise = Normalisation.of(x)
    assert float(normalise(x).pow(2).mean()) == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(normalise(x) * normalise.scale + normalise.centre, x, rtol=1e-4, atol=1e-3)
    assert Normalisation.of(x.bfloat16()).centre.dtype == torch.float32


# Training


def test_the_sae_folds_the_normalisation_in(x):
    trainer = SAETrainer(CONFIG, x, steps=20)
    for start in range(0, 1000, 100):
        trainer.step(x[start : start + 100])
    sae = trainer.sae()
    assert (sae.k, sae.d_sae, sae.d_model, sae.activation) == (4, 48, 16, "topk_relu")
    scale = trainer.normalise.scale
    out = autoencode(trainer.normalise(x), *trainer.parameters, 4)
    # Encoder weights are as trained, so values come out in the residual stream's units.
    values, order = out.values.sort(dim=1, descending=True)
    found = sae.encode(x)
    torch.testing.assert_close(found.values, values * scale, rtol=1e-4, atol=1e-3)
    assert (found.indices == out.indices.gather(1, order)).float().mean() > 0.99
    torch.testing.assert_close(sae(x), out.x_hat * scale + trainer.normalise.centre, rtol=1e-4, atol=5e-3)
    torch.testing.assert_close(sae.W_dec.norm(dim=0), torch.ones(48))


def test_training_explains_more_and_more(x):
    before = SAETrainer(CONFIG, x, steps=1).sae()
    after = train_sae(x, CONFIG, epochs=3.0)
    assert fvu(x, after(x)) < 0.5 * fvu(x, before(x))
    assert fvu(x, after(x)) < 0.4
    assert not any(p.requires_grad for p in after.parameters())


def test_decoder_rows_keep_norm_1_and_their_gradients_no_radial_part(x):
    trainer = SAETrainer(CONFIG, x, steps=20)
    before = trainer.weights.decoder.clone()
    trainer.step(x[:100])
    # After one step, Adam's mean is a multiple of the gradient.
    mean = trainer.optimisers[2].mean
    assert mean.abs().max() > 0
    assert (mean * before).sum(1).abs().max() < 1e-6 * mean.norm(dim=1).max()
    for start in range(100, 500, 100):
        trainer.step(x[start : start + 100])
        torch.testing.assert_close(trainer.weights.decoder.norm(dim=1), torch.ones(48))


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def dense_loss(trainer: SAETrainer, parameters: list[Tensor], x: Tensor, last_fired: Tensor, seen: int) -> Tensor:
    """The recipe's loss with nothing sparse about it; also notes which features fire."""
    W_enc, b_enc, decoder, b_dec = parameters
    pre = x @ W_enc.T + b_enc
    values, indices = pre.topk(trainer.config.k, dim=1)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    x_hat = acts @ decoder + b_dec
    last_fired[(acts > 0).any(dim=0)] = seen
    loss = (x_hat - x).pow(2).sum(1).mean() / (x - x.mean(0)).pow(2).sum(1).mean()
    dead = seen - last_fired > trainer.config.dead_after
    if dead.any():
        pre = pre.masked_fill(~dead, -torch.inf)
        values, indices = pre.topk(min(x.shape[1] // 2, int(dead.sum())), dim=1)
        acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
        residue = (x - x_hat).detach()
        aux = (acts @ decoder - residue).pow(2).sum(1).mean() / residue.pow(2).sum(1).mean()
        loss = loss + trainer.config.aux_coefficient * aux
    return loss


@pytest.mark.parametrize("kernel", ["reference", "cpu-bfloat16", "cpu-float32"])
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["gradients as they are", "gradients that are clipped"])
def test_steps_equal_dense_autograd_and_adam(x, scale, kernel):
    config = replace(CONFIG, dead_after=150, aux_coefficient=0.5)
    trainer = SAETrainer(config, x, steps=40)
    trainer.encoder = Encoder(kernel)
    trainer.weights.W_enc[:6] *= 0.01  # so weak that they die
    trainer.weights.W_enc[6:] *= scale
    parameters = [p.clone().requires_grad_() for p in trainer.parameters]
    decoder = parameters[2]
    optimizer = torch.optim.Adam(parameters, betas=(trainer.config.beta1, 0.999))
    last_fired, clipped, had_dead = torch.zeros(48, dtype=torch.long), [], []
    for number in range(8):
        rows = x[100 * number : 100 * number + 100]
        trainer.step(rows)
        had_dead.append(len(trainer.dead) > 0)

        loss = dense_loss(trainer, parameters, trainer.normalise(rows), last_fired, 100 * (number + 1))
        loss.backward()
        decoder.grad -= (decoder.grad * decoder.detach()).sum(1, keepdim=True) * decoder.detach()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)) > 1)
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            decoder.copy_(unit(decoder))
        for found, expected in zip(trainer.parameters, parameters, strict=True):
            allowed = 1e-5 * float(expected.detach().abs().max())
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=allowed)
    assert had_dead[0] is False
    assert had_dead[-1] is True
    assert any(clipped) == (scale > 1)


def test_without_numba_the_steps_are_the_same(x, monkeypatch):
    def trained() -> list[Tensor]:
        trainer = SAETrainer(replace(CONFIG, dead_after=150), x, steps=20)
        trainer.weights.W_enc[:6] *= 0.01
        for start in range(0, 500, 100):
            trainer.step(x[start : start + 100])
        return trainer.parameters

    compiled = trained()
    for module in (pairs, adam):
        monkeypatch.setattr(module, "compiled_loops", lambda *given: None)
    for found, expected in zip(trained(), compiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_same_seed_gives_the_same_sae(x):
    one, same = train_sae(x, CONFIG, epochs=3.0), train_sae(x, CONFIG, epochs=3.0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    other = train_sae(x, replace(CONFIG, seed=1), epochs=3.0)
    assert not torch.equal(one.W_enc, other.W_enc)


def test_the_learning_rate_rises_and_falls(x):
    trainer = SAETrainer(CONFIG, x, steps=100)
    peak = CONFIG.learning_rate / math.sqrt(48 / 2**14)
    rates = [trainer.learning_rate(step) / peak for step in range(100)]
    assert rates[0] == pytest.approx(1 / 5)
    assert rates[4:70] == pytest.approx([1] * 66)
    assert rates[85] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 30)


@pytest.mark.parametrize("aux_coefficient", [1 / 32, 0.0])
def test_dead_features_get_a_gradient_from_auxk_alone(x, aux_coefficient):
    config = replace(CONFIG, dead_after=150, aux_coefficient=aux_coefficient)
    trainer = SAETrainer(config, x, steps=200)
    trainer.weights.W_enc[:10] *= 0.01  # so weak that others are always among the k largest
    start = trainer.weights.W_enc.clone()
    moved = []
    for step in range(4):
        trainer.step(x[100 * step : 100 * step + 100])
        moved.append(int((trainer.weights.W_enc - start)[:10].any(dim=1).sum()))
    # Dead after 150 tokens, that is in the second step.
    assert moved[0] == 0
    assert moved[3] >= 8 if aux_coefficient else moved[3] == 0


def test_features_are_dead_after_so_many_tokens_without_firing(x):
    config = replace(CONFIG, dead_after=250)
    trainer = SAETrainer(config, x, steps=10)
    trainer.weights.b_enc[7] = -1000.0
    dead = []
    for step in range(4):
        trainer.step(x[100 * step : 100 * step + 100])
        dead.append(7 in trainer.dead.tolist())
    assert dead == [False, False, True, True]


def test_a_loss_that_is_not_finite_stops_before_the_step(x):
    trainer = SAETrainer(CONFIG, x, steps=20)
    trainer.step(x[:100])
    trainer.weights.b_dec[3] = float("inf")
    before = trainer.weights.W_enc.clone()
    with pytest.raises(QwenScopeError, match="expected a finite loss, found inf at step 1; lower the learning rate"):
        trainer.step(x[:100])
    assert torch.equal(trainer.weights.W_enc, before)


def test_residuals_that_are_not_finite(x):
    broken = x.clone()
    broken[500, 2] = float("nan")
    with pytest.raises(QwenScopeError, match="NaN or infinity in 1 of 1000 tokens; leave those out"):
        train_sae(broken, CONFIG)
    trainer = SAETrainer(CONFIG, x, steps=20)
    with pytest.raises(QwenScopeError, match="1 of 100 tokens"):
        trainer.step(broken[450:550])


def test_too_few_tokens(x):
    with pytest.raises(QwenScopeError, match="one batch of 100 tokens, found 99"):
        train_sae(x[:99], CONFIG)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": 0}, "expected k from 1 to d_sae = 48, found 0"),
        ({"k": 49}, "expected k from 1 to d_sae = 48, found 49"),
        ({"batch": 0}, "expected batch above 0, found 0"),
        ({"learning_rate": float("nan")}, "expected learning_rate above 0, found nan"),
        ({"dead_after": 0}, "expected dead_after above 0"),
        ({"clip_norm": -1.0}, "expected clip_norm of at least 0, found -1.0; choose 0 to leave it out"),
        ({"aux_coefficient": -0.1}, "expected aux_coefficient of at least 0"),
        ({"warmup": 5.0}, "expected warmup from 0 to 1, found 5.0; it is a share of the steps"),
        ({"decay": -0.1}, "expected decay from 0 to 1"),
    ],
)
def test_configs_that_cannot_be(wrong, said):
    with pytest.raises(QwenScopeError, match=said):
        replace(CONFIG, **wrong)


def test_residuals_that_do_not_vary():
    with pytest.raises(QwenScopeError, match="expected residuals that vary, found 200 equal ones; train on more text"):
        train_sae(torch.ones(200, 8), CONFIG)


def test_no_epochs(x):
    with pytest.raises(QwenScopeError, match="expected epochs above 0, found 0"):
        train_sae(x, CONFIG, epochs=0.0)


def with_dead_features(x: Tensor, config: TrainConfig = CONFIG, kernel: Kernel | None = None) -> SAETrainer:
    trainer = SAETrainer(replace(config, dead_after=150), x, steps=12)
    trainer.weights.W_enc[:6] *= 0.01  # so weak that they die
    if kernel:
        trainer.encoder = Encoder(kernel)
    return trainer


def run(trainer: SAETrainer, x: Tensor, numbers: range) -> None:
    for number in numbers:
        start = 100 * (number % 10)
        trainer.step(x[start : start + 100])


@pytest.mark.parametrize("kernel", ["reference", "cpu-bfloat16"])
def test_a_restored_trainer_goes_on_bit_for_bit(x, tmp_path, kernel):
    whole, first = with_dead_features(x, kernel=kernel), with_dead_features(x, kernel=kernel)
    run(whole, x, range(10))
    run(first, x, range(5))
    assert len(first.dead) >= 3
    write_safetensors(tmp_path / "state.safetensors", first.state(), {})
    at_5 = [p.clone() for p in first.parameters]
    state, _ = read_safetensors(tmp_path / "state.safetensors")
    again = SAETrainer.restored(first.config, state, steps=12)
    run(again, x, range(5, 10))
    assert again.encoder.kernel == kernel
    assert (again.steps_done, again.tokens_seen) == (10, 1000)
    found, expected = again.state(), whole.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(again.dead, whole.dead)
    assert all(torch.equal(a, b) for a, b in zip(again.sae().parameters(), whole.sae().parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, at_5, strict=True)), "the state was not copied"


def test_states_that_do_not_fit(x):
    state = SAETrainer(CONFIG, x, steps=2).state()
    with pytest.raises(QwenScopeError, match=r"found one without decoder\.square; pass what"):
        SAETrainer.restored(CONFIG, {name: t for name, t in state.items() if name != "decoder.square"}, steps=2)
    with pytest.raises(QwenScopeError, match="expected weights of 47 features, found 48; set d_sae to 48"):
        SAETrainer.restored(replace(CONFIG, d_sae=47), state, steps=2)


# Each piece of the recipe alone


def test_without_tied_weights_encoder_and_decoder_are_independent(x):
    tied = SAETrainer(CONFIG, x, steps=2).weights
    factors = tied.W_enc / tied.decoder
    torch.testing.assert_close(factors, factors.mean().expand_as(factors), rtol=1e-4, atol=1e-4)
    free = SAETrainer(replace(CONFIG, tied_init=False), x, steps=2).weights
    assert (free.W_enc * free.decoder).sum(1).mean().abs() < 0.15
    for rows in (free.W_enc, free.decoder, tied.decoder):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("centre", ["median", "mean", "none"])
def test_b_dec_starts_at_the_centre(x, centre):
    expected = {"median": geometric_median(x), "mean": x.mean(0), "none": torch.zeros(16)}[centre]
    trainer = SAETrainer(replace(CONFIG, centre=centre), x, steps=2)
    torch.testing.assert_close(trainer.sae().b_dec.data, expected)
    assert float(trainer.normalise(x).pow(2).mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_parallel_gradient_can_be_left_in(x, monkeypatch, compiled):
    if not compiled:
        for module in (pairs, adam):
            monkeypatch.setattr(module, "compiled_loops", lambda *given: None)
    trainer = SAETrainer(replace(CONFIG, remove_parallel_gradient=False, clip_norm=0.0), x, steps=20)
    weights = [p.clone().requires_grad_() for p in trainer.parameters]
    dense_loss(trainer, weights, trainer.normalise(x[:100]), torch.zeros(48), 100).backward()
    trainer.step(x[:100])
    expected = (1 - trainer.config.beta1) * weights[2].grad
    torch.testing.assert_close(trainer.optimisers[2].mean, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (expected * weights[2]).sum(1).abs().max() > 1e-3 * expected.norm(dim=1).max()
    torch.testing.assert_close(trainer.weights.decoder.norm(dim=1), torch.ones(48))


def test_decoder_rows_can_be_left_at_any_norm(x):
    trainer = SAETrainer(replace(CONFIG, unit_norm=False), x, steps=20)
    run(trainer, x, range(5))
    assert (trainer.weights.decoder.norm(dim=1) - 1).abs().max() > 1e-3


def test_clipping_bounds_the_norm_of_all_gradients_together(x):
    def moments(clip_norm: float) -> Tensor:
        trainer = SAETrainer(replace(CONFIG, clip_norm=clip_norm), x, steps=20)
        trainer.step(x[:100])
        return torch.cat([adam.mean.flatten() for adam in trainer.optimisers]) / (1 - trainer.config.beta1)

    whole = moments(0.0)
    assert whole.norm() > 0.02
    torch.testing.assert_close(moments(100.0), whole)
    torch.testing.assert_close(moments(0.01), whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-9)


def test_epochs_may_be_fractions(x):
    assert train_sae(x, CONFIG, epochs=0.25).d_sae == 48


def test_bfloat16_residuals_train_too(x):
    sae = train_sae(x.bfloat16(), CONFIG, epochs=3.0)
    assert sae.W_enc.dtype == torch.float32
    assert fvu(x, sae(x)) < 0.5
