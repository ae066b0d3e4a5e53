"""The trainer: gradients against dense autograd, what is folded into the SAE, dead features, seeds, and the harvest."""

import math

import pytest
import torch
from torch import Tensor

from qwen_scope import Backbone, QwenScopeError
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.kernels import Encoder, adam, pairs
from qwen_scope.outliers import norm_outliers
from qwen_scope.training.activations import harvest_residuals, load_residuals, shards
from qwen_scope.training.autoencode import autoencode
from qwen_scope.training.trainer import Normalisation, SAETrainer, TrainConfig, geometric_median, train_sae

CONFIG = TrainConfig(d_sae=48, k=4, batch=100, epochs=3.0, learning_rate=1e-3, dead_after=100_000)


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
    after = train_sae(x, CONFIG)
    assert fvu(x, after(x)) < 0.5 * fvu(x, before(x))
    assert fvu(x, after(x)) < 0.4
    assert not any(p.requires_grad for p in after.parameters())


def test_decoder_rows_keep_norm_1_and_their_gradients_no_radial_part(x):
    trainer = SAETrainer(CONFIG, x, steps=20)
    before = trainer.decoder.clone()
    trainer.step(x[:100])
    # After one step, Adam's mean is a multiple of the gradient.
    mean = trainer.adam_decoder.mean
    assert mean.abs().max() > 0
    assert (mean * before).sum(1).abs().max() < 1e-6 * mean.norm(dim=1).max()
    for start in range(100, 500, 100):
        trainer.step(x[start : start + 100])
        torch.testing.assert_close(trainer.decoder.norm(dim=1), torch.ones(48))


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
    config = TrainConfig(**{**CONFIG.__dict__, "dead_after": 150, "aux_coefficient": 0.5})
    trainer = SAETrainer(config, x, steps=40)
    trainer.encoder = Encoder(kernel)
    trainer.W_enc[:6] *= 0.01  # so weak that they die
    trainer.W_enc[6:] *= scale
    parameters = [p.clone().requires_grad_() for p in trainer.parameters]
    decoder = parameters[2]
    optimizer = torch.optim.Adam(parameters)
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
        trainer = SAETrainer(TrainConfig(**{**CONFIG.__dict__, "dead_after": 150}), x, steps=20)
        trainer.W_enc[:6] *= 0.01
        for start in range(0, 500, 100):
            trainer.step(x[start : start + 100])
        return trainer.parameters

    compiled = trained()
    for module in (pairs, adam):
        monkeypatch.setattr(module, "compiled_loops", lambda *given: None)
    for found, expected in zip(trained(), compiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_same_seed_gives_the_same_sae(x):
    one, same = train_sae(x, CONFIG), train_sae(x, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    other = train_sae(x, TrainConfig(**{**CONFIG.__dict__, "seed": 1}))
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
    config = TrainConfig(**{**CONFIG.__dict__, "dead_after": 150, "aux_coefficient": aux_coefficient})
    trainer = SAETrainer(config, x, steps=200)
    trainer.W_enc[:10] *= 0.01  # so weak that others are always among the k largest
    start = trainer.W_enc.clone()
    moved = []
    for step in range(4):
        trainer.step(x[100 * step : 100 * step + 100])
        moved.append(int((trainer.W_enc - start)[:10].any(dim=1).sum()))
    # Dead after 150 tokens, that is in the second step.
    assert moved[0] == 0
    assert moved[3] >= 8 if aux_coefficient else moved[3] == 0


def test_features_are_dead_after_so_many_tokens_without_firing(x):
    config = TrainConfig(**{**CONFIG.__dict__, "dead_after": 250})
    trainer = SAETrainer(config, x, steps=10)
    trainer.b_enc[7] = -1000.0
    dead = []
    for step in range(4):
        trainer.step(x[100 * step : 100 * step + 100])
        dead.append(7 in trainer.dead.tolist())
    assert dead == [False, False, True, True]


def test_a_loss_that_is_not_finite_stops_before_the_step(x):
    trainer = SAETrainer(CONFIG, x, steps=20)
    trainer.step(x[:100])
    trainer.b_dec[3] = float("inf")
    before = trainer.W_enc.clone()
    with pytest.raises(QwenScopeError, match="expected a finite loss, found inf at step 1; lower the learning rate"):
        trainer.step(x[:100])
    assert torch.equal(trainer.W_enc, before)


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


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 49}])
def test_configs_that_cannot_be(wrong):
    with pytest.raises(QwenScopeError, match="expected"):
        TrainConfig(**{**CONFIG.__dict__, **wrong})


def test_epochs_may_be_fractions(x):
    assert train_sae(x, TrainConfig(**{**CONFIG.__dict__, "epochs": 0.25})).d_sae == 48


def test_bfloat16_residuals_train_too(x):
    sae = train_sae(x.bfloat16(), CONFIG)
    assert sae.W_enc.dtype == torch.float32
    assert fvu(x, sae(x)) < 0.5


# Harvest


TEXTS = [
    "the capital of France is Paris, and the capital of Italy is Rome",
    "Paris",  # a text of fewer than 16 tokens is not worth a row
    "Rome is the capital of Italy: what is the capital of Spain? " * 9,
]


@pytest.fixture
def backbone(llama, tokenizer) -> Backbone:
    return Backbone(llama, tokenizer)


def pieces(tokenizer, context: int) -> list[list[int]]:
    found = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        found += [ids[at : at + context] for at in range(0, len(ids), context) if len(ids) - at >= 16]
    return found


def by_hand(backbone: Backbone, context: int, layer: int) -> Tensor:
    """The residuals of every piece but its first token, one piece at a time, the shortest pieces first."""
    parts = [
        backbone.residuals(torch.tensor([piece]), layers=[layer])[layer][0, 1:]
        for piece in sorted(pieces(backbone.tokenizer, context), key=len)
    ]
    return torch.cat(parts).bfloat16()


def test_the_harvest_holds_every_token_but_position_0(backbone, tmp_path):
    harvest_residuals(backbone, TEXTS, [0, 2], tmp_path, tokens=1000, context=32, batch=2, shard_tokens=1000)
    [shard] = shards(tmp_path)
    for layer in (0, 2):
        expected = by_hand(backbone, 32, layer)
        found = load_residuals([shard], layer)
        assert found.dtype == torch.bfloat16
        kept = expected[~norm_outliers(expected)]
        assert found.shape == kept.shape
        torch.testing.assert_close(found.float(), kept.float(), rtol=0.02, atol=0.02)


def test_a_harvest_goes_on_where_it_was_killed(backbone, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = {"tokens": 1000, "context": 20, "batch": 2, "shard_tokens": 40}
    harvest_residuals(backbone, TEXTS, [1], whole, **options)
    count = len(shards(whole))
    assert count > 2

    read = Backbone.residuals
    calls = 0

    def killed(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Backbone, "residuals", killed)
    with pytest.raises(KeyboardInterrupt):
        harvest_residuals(backbone, TEXTS, [1], again, **options)
    done = shards(again)
    assert 0 < len(done) < count
    assert {path.name for path in again.iterdir()} == {path.name for path in done}, "half a shard is left"
    made = {path: path.stat().st_mtime_ns for path in done}
    monkeypatch.undo()
    harvest_residuals(backbone, TEXTS, [1], again, **options)
    assert len(shards(again)) == count
    assert all(path.stat().st_mtime_ns == when for path, when in made.items()), "a shard was made twice"
    assert torch.equal(load_residuals(shards(again), 1), load_residuals(shards(whole), 1))


def test_several_processes_share_a_harvest(backbone, tmp_path):
    options = {"tokens": 1000, "context": 20, "batch": 2, "shard_tokens": 40}
    harvest_residuals(backbone, TEXTS, [1], tmp_path / "one", **options)
    for part in (0, 1):
        harvest_residuals(backbone, TEXTS, [1], tmp_path / "two", **options, part=(part, 2))
    one, two = shards(tmp_path / "one"), shards(tmp_path / "two")
    assert [path.name for path in one] == [path.name for path in two]
    assert torch.equal(load_residuals(one, 1), load_residuals(two, 1))


def test_a_harvest_stops_at_the_tokens_asked_for(backbone, tmp_path):
    harvest_residuals(backbone, TEXTS, [1], tmp_path, tokens=60, context=20, batch=2, shard_tokens=30)
    assert len(shards(tmp_path)) == 2


def test_no_shards(tmp_path):
    with pytest.raises(QwenScopeError, match="found none; harvest them first"):
        shards(tmp_path)


def test_norm_outliers_are_not_trained_on(backbone, tmp_path):
    harvest_residuals(backbone, TEXTS, [1], tmp_path, tokens=1000, context=32, batch=2, shard_tokens=1000)
    [shard] = shards(tmp_path)
    tensors, metadata = read_safetensors(shard)
    x = tensors["layer1"].clone()
    count = len(load_residuals([shard], 1))
    x[3] *= 1000
    write_safetensors(shard, {"layer1": x}, metadata)
    assert len(load_residuals([shard], 1)) == count - 1
