"""Variations of the loss against dense autograd, and going on from a finished SAE."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen_scope import QwenScopeError
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.kernels import Encoder, adam, pairs
from qwen_scope.training import SAETrainer, TrainConfig

CONFIG = TrainConfig(d_sae=64, k=4, batch=100, learning_rate=1e-3, dead_after=150, aux_coefficient=0.5, clip_norm=0.0)
VARIATIONS = {
    "plain": {},
    "batch_topk": {"batch_topk": True},
    "matryoshka": {"prefixes": (0.125, 0.5)},
    "both": {"batch_topk": True, "prefixes": (0.25,)},
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Sparse sums of 24 directions in 16 dimensions; some tokens hold many of them, some few."""
    generator = torch.Generator().manual_seed(0)
    share = 0.3 * torch.rand(1000, 1, generator=generator)
    acts = torch.rand(1000, 24, generator=generator) * (torch.rand(1000, 24, generator=generator) < share)
    return 20 * acts @ draw(24, 16, seed=1) + 50 * draw(16, seed=2)


def dense_acts(config: TrainConfig, pre: Tensor, relu: bool) -> Tensor:
    """All activations, 0 where they are not kept."""
    if config.batch_topk:
        candidates = torch.zeros_like(pre).scatter(1, pre.topk(min(4 * config.k, pre.shape[1]), dim=1).indices, 1) > 0
        threshold = pre[candidates].topk(config.k * len(pre)).values[-1]
        kept = candidates & (pre >= threshold)
    else:
        kept = torch.zeros_like(pre).scatter(1, pre.topk(config.k, dim=1).indices, 1) > 0
    return torch.where(kept, pre.relu() if relu else pre, 0)


def dense_loss(trainer: SAETrainer, parameters: list[Tensor], x: Tensor, last_fired: Tensor, seen: int) -> Tensor:
    """The loss with nothing sparse about it; also notes which features fire."""
    W_enc, b_enc, decoder, b_dec = parameters
    config, pre = trainer.config, x @ W_enc.T + b_enc
    acts = dense_acts(config, pre, trainer.objective.relu)
    last_fired[(acts > 0).any(dim=0)] = seen
    variance = (x - x.mean(0)).pow(2).sum()
    ends = [round(share * config.d_sae) for share in (*config.prefixes, 1)]
    x_hats = [acts[:, :end] @ decoder[:end] + b_dec for end in ends]
    loss = torch.stack([(x_hat - x).pow(2).sum() / variance for x_hat in x_hats]).mean()
    dead = seen - last_fired > config.dead_after
    if dead.any():
        values, indices = pre.masked_fill(~dead, -torch.inf).topk(min(x.shape[1] // 2, int(dead.sum())), dim=1)
        acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
        residue = (x - x_hats[-1]).detach()
        loss = loss + config.aux_coefficient * (acts @ decoder - residue).pow(2).sum() / residue.pow(2).sum()
    return loss


def check_steps(trainer: SAETrainer, x: Tensor) -> None:
    """Eight steps equal those of dense autograd and torch's Adam; at the end some features are dead."""
    parameters = [p.clone().requires_grad_() for p in trainer.parameters]
    decoder = parameters[2]
    optimizer = torch.optim.Adam(parameters, betas=(trainer.config.beta1, 0.999))
    last_fired = torch.zeros(64, dtype=torch.long)
    for number in range(8):
        rows = x[100 * number : 100 * number + 100]
        trainer.step(rows)
        dense_loss(trainer, parameters, trainer.normalise(rows), last_fired, 100 * (number + 1)).backward()
        if trainer.config.unit_norm:
            decoder.grad -= (decoder.grad * decoder.detach()).sum(1, keepdim=True) * decoder.detach()
        optimizer.param_groups[0]["lr"] = trainer.learning_rate(number)
        optimizer.step()
        optimizer.zero_grad()
        if trainer.config.unit_norm:
            with torch.no_grad():
                decoder /= decoder.norm(dim=1, keepdim=True)
        for found, expected in zip(trainer.parameters, parameters, strict=True):
            allowed = 3e-5 * float(expected.detach().abs().max())
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=allowed)
    assert len(trainer.dead) >= 3


@pytest.mark.parametrize("kernel", ["reference", "cpu-bfloat16"])
@pytest.mark.parametrize("variation", VARIATIONS)
def test_steps_equal_dense_autograd_and_adam(x, variation, kernel):
    trainer = SAETrainer(replace(CONFIG, **VARIATIONS[variation]), x, steps=40)
    trainer.encoder = Encoder(kernel)
    trainer.weights.W_enc[:6] *= 0.01  # so weak that they die
    check_steps(trainer, x)


@pytest.mark.parametrize("variation", VARIATIONS)
def test_without_numba_the_steps_are_the_same(x, monkeypatch, variation):
    for module in (pairs, adam):
        monkeypatch.setattr(module, "compiled_loops", lambda *given: None)
    trainer = SAETrainer(replace(CONFIG, **VARIATIONS[variation]), x, steps=40)
    trainer.weights.W_enc[:6] *= 0.01
    check_steps(trainer, x)


# BatchTopK


def test_batch_topk_gives_more_features_to_tokens_that_hold_more(x):
    trainer = SAETrainer(replace(CONFIG, batch_topk=True), x, steps=100)
    for number in range(40):
        trainer.step(x[100 * (number % 10) : 100 * (number % 10) + 100])
    found = trainer.objective.forward(trainer.normalise(x), trainer.weights, trainer.encoder)
    counts = (found.values > 0).sum(1)
    assert int(counts.sum()) == 4 * len(x)
    assert counts.max() > 8
    assert counts.min() < 3
    assert trainer.sae().k == 4, "afterwards it is a plain TopK SAE"


# Matryoshka


def test_a_prefix_of_a_matryoshka_explains_more_by_itself(x):
    def of_the_first_16(prefixes: tuple[float, ...]) -> float:
        trainer = SAETrainer(replace(CONFIG, prefixes=prefixes), x, steps=100)
        for number in range(100):
            trainer.step(x[100 * (number % 10) : 100 * (number % 10) + 100])
        sae = trainer.sae()
        acts = sae.encode(x).to_dense()
        acts[:, 16:] = 0
        return fvu(x, acts @ sae.W_dec.T + sae.b_dec)

    assert of_the_first_16((0.25,)) < 0.7 * of_the_first_16(())


@pytest.mark.parametrize("prefixes", [(0.5, 0.25), (0.5, 0.5), (0.0, 0.5), (0.5, 1.0), (float("nan"),)])
def test_prefixes_that_cannot_be(prefixes):
    with pytest.raises(
        QwenScopeError, match=r"expected prefixes in ascending order between 0 and 1, found .*leave out 1"
    ):
        replace(CONFIG, prefixes=prefixes)


# Going on from a finished SAE


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
def test_before_the_first_step_it_is_the_same_sae(x, make_sae, activation):
    sae = make_sae(d_model=16, d_sae=64, k=4, activation=activation)
    trainer = SAETrainer.adapting(CONFIG, sae, x, steps=40)
    again = trainer.sae()
    assert (again.k, again.activation) == (4, activation)
    for found, expected in zip(again.parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    found, expected = again.encode(x), sae.encode(x)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-3)
    # As the trainer sees it: the same features in the same order.
    seen = trainer.objective.forward(trainer.normalise(x), trainer.weights)
    assert (seen.indices == expected.indices).float().mean() > 0.999
    error = float((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
    assert trainer.step(x) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
@pytest.mark.parametrize("variation", ["plain", "both"])
def test_steps_from_an_sae_equal_dense_autograd_and_adam(x, make_sae, activation, variation):
    sae = make_sae(d_model=16, d_sae=64, k=4, activation=activation)
    sae.W_enc[:6] *= 0.01
    # So that some of the pre-activations kept are negative.
    sae.b_enc -= (x @ sae.W_enc.T).topk(4, dim=1).values.median()
    trainer = SAETrainer.adapting(replace(CONFIG, **VARIATIONS[variation]), sae, x, steps=40)
    assert not trainer.config.unit_norm
    kept = trainer.objective.forward(trainer.normalise(x[:100]), trainer.weights)
    assert bool((kept.values < 0).any()) == (activation == "topk")
    assert bool(kept.trained.all()) == (activation == "topk" and variation == "plain")
    before = sae.W_enc.clone()
    check_steps(trainer, x)
    assert torch.equal(sae.W_enc, before), "the SAE given was changed"


def test_an_sae_adapts_to_other_residuals(x):
    trainer = SAETrainer(CONFIG, x, steps=100)
    for number in range(100):
        trainer.step(x[100 * (number % 10) : 100 * (number % 10) + 100])
    sae = trainer.sae()
    other = x @ torch.linalg.qr(torch.eye(16) + 0.1 * draw(16, 16, seed=3)).Q + 3
    adapted = SAETrainer.adapting(CONFIG, sae, other, steps=40)
    assert adapted.config.unit_norm, "its rows have norm 1"
    for number in range(40):
        adapted.step(other[100 * (number % 10) : 100 * (number % 10) + 100])
    assert fvu(other, adapted.sae()(other)) < 0.5 * fvu(other, sae(other))
    torch.testing.assert_close(adapted.sae().W_dec.norm(dim=0), torch.ones(64))


def test_the_state_of_an_adapted_sae_keeps_its_convention(x, make_sae):
    sae = make_sae(d_model=16, d_sae=64, k=4, activation="topk")
    trainer = SAETrainer.adapting(CONFIG, sae, x, steps=40)
    again = SAETrainer.restored(CONFIG, trainer.state(), steps=40)
    for one in (trainer, again):
        one.step(x[:100])
    assert again.sae().activation == "topk"
    assert not again.config.unit_norm
    assert all(torch.equal(a, b) for a, b in zip(again.parameters, trainer.parameters, strict=True))


def test_an_sae_that_does_not_fit_the_recipe(x, make_sae):
    with pytest.raises(
        QwenScopeError,
        match="expected an SAE of d_sae = 64, k = 4 and d_model = 16, found 64, 8 and 16; set the recipe to the SAE's",
    ):
        SAETrainer.adapting(CONFIG, make_sae(d_model=16, d_sae=64, k=8), x, steps=40)
