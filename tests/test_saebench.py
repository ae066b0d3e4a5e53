"""The adapter for SAEBench: dense features and reconstructions are our own, in the shape that it reads."""

import pytest
import torch

from qwen_scope.evaluation.saebench import SAEBenchSAE
from qwen_scope.sae import TopKSAE


@pytest.fixture(params=["topk", "topk_relu"])
def sae(request, make_sae) -> TopKSAE:
    """Decoder rows of norms from near 0 to 10, and one of norm 0."""
    sae = make_sae(activation=request.param)
    sae.W_dec.data *= torch.linspace(0.01, 2, sae.d_sae)
    sae.W_dec.data[:, 5] = 0
    return sae


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_dense_features_are_ours_in_units_of_norm_1(sae):
    adapted, x = SAEBenchSAE(sae, "org/model", 3), draw(2, 7, sae.d_model)
    norms = sae.W_dec.norm(dim=0)
    found = adapted.encode(x)
    ours = sae.encode(x).to_dense()
    assert found.shape == (2, 7, sae.d_sae)
    torch.testing.assert_close(found, ours * norms.where(norms > 0, 1))
    # The same features, ranked as the SAE ranks them.
    assert torch.equal(found != 0, ours != 0)
    torch.testing.assert_close(adapted.decode(found), sae(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted(x), sae(x), rtol=1e-4, atol=1e-4)


def test_weights_have_the_layout_and_norms_of_saebench(sae):
    adapted = SAEBenchSAE(sae, "org/model", 3)
    norms = adapted.W_dec.norm(dim=1)
    assert adapted.W_dec.shape == adapted.W_enc.T.shape == (sae.d_sae, sae.d_model)
    torch.testing.assert_close(norms[torch.arange(sae.d_sae) != 5], torch.ones(sae.d_sae - 1))
    assert norms[5] == 0
    x = draw(4, sae.d_model)
    # A feature that is kept has the value that these weights give.
    found = adapted.encode(x)
    pre = x @ adapted.W_enc + adapted.b_enc
    torch.testing.assert_close(found[found > 0], pre[found > 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(adapted.b_dec, sae.b_dec)


def test_the_config_follows_a_change_of_dtype_and_keeps_what_is_hung_on_it(make_sae):
    adapted = SAEBenchSAE(make_sae(), "org/model", 3)
    adapted.cfg.dataset_path = "somewhere"  # pyright: ignore[reportAttributeAccessIssue]
    adapted.to(dtype=torch.bfloat16)
    assert (adapted.cfg.dtype, adapted.dtype, adapted.W_dec.dtype) == ("bfloat16", torch.bfloat16, torch.bfloat16)
    assert adapted.cfg.dataset_path == "somewhere"  # pyright: ignore[reportAttributeAccessIssue]
    assert (adapted.cfg.hook_name, adapted.cfg.hook_layer) == ("blocks.3.hook_resid_post", 3)
    assert adapted.cfg.to_dict()["architecture"] == "topk"
    x = draw(3, adapted.cfg.d_in).bfloat16()
    assert adapted.encode(x).dtype == adapted(x).dtype == torch.bfloat16


def test_gradients_flow_to_features(make_sae):
    adapted = SAEBenchSAE(make_sae(), "org/model", 3)
    acts = adapted.encode(draw(2, adapted.cfg.d_in)).requires_grad_()
    adapted.decode(acts).sum().backward()
    assert acts.grad is not None
    assert acts.grad.abs().sum() > 0


def test_the_sae_itself_is_not_changed(make_sae):
    sae, same = make_sae(), make_sae()
    SAEBenchSAE(sae, "org/model", 3).to(dtype=torch.bfloat16)
    for found, expected in zip(sae.parameters(), same.parameters(), strict=True):
        assert torch.equal(found, expected)
