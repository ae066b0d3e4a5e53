"""Fine-tuning on the KL divergence: what it lowers, what it leaves alone, and its first step against dense autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen_scope import Backbone, QwenScopeError, TopKSAE
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.training import TrainConfig, train_sae
from qwen_scope.training.end_to_end import EndToEndConfig, finetune_end_to_end
from qwen_scope.training.normalise import geometric_median

LAYER = 1


@pytest.fixture
def backbone(make_model) -> Backbone:
    return Backbone(make_model("llama"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 320, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae(backbone, ids) -> TopKSAE:
    x = backbone.residuals(ids, layers=[LAYER])[LAYER][:, 1:].flatten(0, 1)
    return train_sae(x, TrainConfig(d_sae=128, k=8, batch=92, beta1=0.9), epochs=20.0)


def logits(backbone: Backbone, ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
    """Written with a hook of its own."""

    def hook(module, args, output):
        x = output if isinstance(output, Tensor) else output[0]
        new = torch.cat([x[:, :1], replace(x[:, 1:])], dim=1)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = backbone.layers[LAYER].register_forward_hook(hook)
    try:
        return backbone.model(input_ids=ids, use_cache=False).logits[:, 1:]
    finally:
        handle.remove()


def kl(backbone: Backbone, ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        before = torch.distributions.Categorical(logits=logits(backbone, ids, lambda x: x))
    after = torch.distributions.Categorical(logits=logits(backbone, ids, replace))
    return torch.distributions.kl_divergence(before, after).mean()


@pytest.mark.parametrize("activation", ["topk", "topk_relu"])
def test_the_divergence_falls_well_below_its_start(backbone, ids, sae, activation):
    sae = TopKSAE(*(p.data.clone() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)), k=8, activation=activation)
    before = [p.clone() for p in sae.parameters()]
    weights = {name: p.clone() for name, p in backbone.model.named_parameters()}
    config = EndToEndConfig(steps=40, learning_rate=3e-3)
    tuned = finetune_end_to_end(backbone, sae, LAYER, [ids] * 40, config)
    with torch.no_grad():
        start, end = (float(kl(backbone, ids, one)) for one in (sae, tuned))
    assert start > 0.05
    assert end < 0.5 * start
    x = backbone.residuals(ids, layers=[LAYER])[LAYER][:, 1:].flatten(0, 1)
    assert fvu(x, tuned(x)) < 1.5 * fvu(x, sae(x)), "the reconstruction was given up"
    assert (tuned.k, tuned.activation) == (8, activation)
    torch.testing.assert_close(tuned.W_dec.norm(dim=0), torch.ones(128))
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), before, strict=True)), "the SAE given was changed"
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_decoder_rows_of_another_norm_are_left_at_any(backbone, ids, make_sae):
    tuned = finetune_end_to_end(backbone, make_sae(), LAYER, [ids], EndToEndConfig(steps=1, learning_rate=1e-3))
    torch.testing.assert_close(tuned.W_dec.norm(dim=0), make_sae().W_dec.norm(dim=0), rtol=0.02, atol=0)


@pytest.mark.parametrize("fvu_weight", [0.0, 3.0])
def test_the_first_step_is_that_of_dense_autograd(backbone, ids, make_sae, fvu_weight):
    # Adam's first step is the rate times the gradient's sign. The encoder sees residuals less their centre.
    sae = make_sae()
    config = EndToEndConfig(steps=1, learning_rate=1e-3, fvu_weight=fvu_weight)
    tuned = finetune_end_to_end(backbone, sae, LAYER, [ids], config)
    W_enc, W_dec = sae.W_enc.detach().clone().requires_grad_(), sae.W_dec.detach().clone().requires_grad_()
    errors = []
    centre = geometric_median(backbone.residuals(ids, layers=[LAYER])[LAYER][:, 1:].flatten(0, 1))
    b_enc = sae.b_enc + sae.W_enc @ centre

    def dense(x: Tensor) -> Tensor:
        pre = (x - centre) @ W_enc.T + b_enc
        values, indices = pre.topk(8, dim=-1)
        x_hat = torch.zeros_like(pre).scatter(-1, indices, values) @ W_dec.T + sae.b_dec
        flat = x.flatten(0, 1)
        errors.append((x_hat - x).pow(2).sum() / (flat - flat.mean(0)).pow(2).sum())
        return x_hat

    divergence = kl(backbone, ids, dense)
    gradients = torch.autograd.grad(divergence + fvu_weight * errors[0], (W_enc, W_dec))
    for new, old, gradient in zip((tuned.W_enc, tuned.W_dec), (W_enc, W_dec), gradients, strict=True):
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert clear.sum() > 100
        moved = (new - old).detach()
        torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=0.01, atol=1e-6)
        assert not moved[gradient == 0].any()


def test_a_loss_that_is_not_finite_stops(backbone, ids, sae):
    with torch.no_grad():
        backbone.model.lm_head.weight[5] = float("inf")
    with pytest.raises(QwenScopeError, match="finite loss and gradient, found nan and nan at step 0; lower"):
        finetune_end_to_end(backbone, sae, LAYER, [ids], EndToEndConfig(steps=1))
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())


def test_too_few_batches_or_tokens(backbone, ids, sae):
    with pytest.raises(QwenScopeError, match="expected 3 batches, found 2; pass more or choose fewer steps"):
        finetune_end_to_end(backbone, sae, LAYER, iter([ids, ids]), EndToEndConfig(steps=3))
    with pytest.raises(QwenScopeError, match="expected 3 batches, found 0"):
        finetune_end_to_end(backbone, sae, LAYER, [], EndToEndConfig(steps=3))
    with pytest.raises(QwenScopeError, match="expected rows of at least 2 tokens, found 1"):
        finetune_end_to_end(backbone, sae, LAYER, [ids[:, :1]], EndToEndConfig(steps=1))


def test_an_sae_or_a_layer_of_another_model(backbone, ids, sae, make_sae):
    with pytest.raises(
        QwenScopeError, match=r"expected an SAE of width 32 for .*, found 16; use the model it was trained on"
    ):
        finetune_end_to_end(backbone, make_sae(d_model=16), LAYER, [ids], EndToEndConfig(steps=1))
    with pytest.raises(QwenScopeError, match="expected a layer from 0 to 2"):
        finetune_end_to_end(backbone, sae, 3, [ids], EndToEndConfig(steps=1))


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"learning_rate": 0.0}, {"clip_norm": 0.0}, {"fvu_weight": -1.0}, {"fvu_weight": float("nan")}],
)
def test_configs_that_cannot_be(wrong):
    with pytest.raises(QwenScopeError, match=f"expected {next(iter(wrong))}"):
        EndToEndConfig(**{"steps": 1, **wrong})
