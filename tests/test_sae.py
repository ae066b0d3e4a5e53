"""`TopKSAE`: the published arithmetic on tensors of any leading shape, and what it refuses."""

import pytest
import torch

from qwen_scope import QwenScopeError, SparseFeatures, TopKSAE

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(9))


def test_encode_is_the_cards(make_sae):
    sae = make_sae()
    pre = X @ sae.W_enc.T + sae.b_enc
    values, indices = pre.topk(8, dim=-1)
    found = sae.encode(X)
    assert (found.shape, found.k, found.d_sae) == ((2, 5), 8, 128)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.values, values)


def test_decode_is_the_dense_product(make_sae):
    sae = make_sae()
    found = sae.encode(X)
    expected = found.to_dense() @ sae.W_dec.T + sae.b_dec
    torch.testing.assert_close(sae.decode(found), expected)
    torch.testing.assert_close(sae(X), expected)


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 4, 32)])
def test_any_leading_shape(make_sae, shape):
    sae = make_sae()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert sae.encode(x).indices.shape == (*shape[:-1], 8)
    assert sae(x).shape == shape
    flat = x.reshape(-1, 32)
    torch.testing.assert_close(sae(x).reshape(-1, 32), torch.stack([sae(row) for row in flat]))


def test_negative_values_are_kept_or_cut(make_sae):
    raw, cut = make_sae(k=128).encode(X), make_sae(k=128, activation="topk_relu").encode(X)
    assert (raw.values < 0).any()
    assert torch.equal(raw.indices, cut.indices)
    assert torch.equal(cut.values, raw.values.relu())
    assert make_sae().activation == "topk"
    torch.testing.assert_close(make_sae(k=128).encode(X).to_dense(), X @ make_sae().W_enc.T + make_sae().b_enc)


def test_another_k_for_one_call(make_sae):
    sae = make_sae()
    assert torch.equal(sae.encode(X, k=3).indices, sae.encode(X).indices[..., :3])
    assert sae.encode(X, k=20).k == 20
    assert sae.k == 8


def test_half_precision_in_float32_out(make_sae):
    sae = make_sae()
    found = sae.encode(X.bfloat16())
    assert found.values.dtype == sae.decode(found).dtype == torch.float32
    assert torch.equal(found.indices, sae.encode(X.bfloat16().float()).indices)
    assert sae.bfloat16().encode(X).values.dtype == torch.float32


def test_sizes(make_sae):
    sae = make_sae()
    assert (sae.d_model, sae.d_sae, sae.k) == (32, 128, 8)
    assert sae.nbytes == 4 * (2 * 32 * 128 + 128 + 32)
    assert sae.device == torch.device("cpu")
    assert "d_model=32, d_sae=128, k=8, activation='topk'" in repr(sae)
    assert set(sae.state_dict()) == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_decoder_rows_relay_the_storage_and_change_no_number(make_sae):
    sae = make_sae()
    before = sae.W_dec.clone()
    rows = sae.decoder_rows()
    assert rows.is_contiguous()
    assert torch.equal(rows, before.T)
    assert torch.equal(sae.W_dec, before)
    assert sae.W_dec.shape == (32, 128)
    assert sae.decoder_rows().data_ptr() == rows.data_ptr(), "laid out again"


def test_it_is_frozen_until_asked(make_sae):
    sae = make_sae()
    assert not any(p.requires_grad for p in sae.parameters())
    assert not sae(X).requires_grad
    sae.requires_grad_()
    (sae(X) - X).pow(2).sum().backward()
    dense = [p.detach().clone().double().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)]
    W_enc, W_dec, b_enc, b_dec = dense
    pre = X.double() @ W_enc.T + b_enc
    top = pre.topk(8, dim=-1)
    acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
    (acts @ W_dec.T + b_dec - X).pow(2).sum().backward()
    for name, exact in zip(("W_enc", "W_dec", "b_enc", "b_dec"), dense, strict=True):
        torch.testing.assert_close(getattr(sae, name).grad, exact.grad.float(), rtol=1e-4, atol=1e-3)


def test_gradients_reach_the_residuals(make_sae):
    x = X.clone().requires_grad_()
    make_sae().encode(x).values.sum().backward()
    assert x.grad.abs().sum() > 0


# What it refuses


def tensors(d_model=4, d_sae=6) -> dict[str, torch.Tensor]:
    return {
        "W_enc": torch.zeros(d_sae, d_model),
        "W_dec": torch.zeros(d_model, d_sae),
        "b_enc": torch.zeros(d_sae),
        "b_dec": torch.zeros(d_model),
    }


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_transposed_matrix_is_named(name):
    wrong = tensors()
    wrong[name] = wrong[name].T
    shape = rf"\({wrong[name].shape[0]}, {wrong[name].shape[1]}\)"
    with pytest.raises(QwenScopeError, match=rf"expected {name} .*found {shape}: it looks transposed"):
        TopKSAE(**wrong, k=2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("W_enc", (6, 5), "not of one SAE"),
        ("W_dec", (4, 7), "not of one SAE"),
        ("b_enc", (5,), "not of one SAE"),
        ("b_dec", (1, 4), "1-d biases"),
        ("b_enc", (6, 1), "1-d biases"),
    ],
)
def test_shapes_that_disagree(name, shape, found):
    with pytest.raises(QwenScopeError, match=found):
        TopKSAE(**{**tensors(), name: torch.zeros(shape)}, k=2)


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_out_of_bounds(make_sae, k):
    with pytest.raises(QwenScopeError, match=f"k from 1 to d_sae = 6, found k = {k}"):
        TopKSAE(**tensors(), k=k)
    with pytest.raises(QwenScopeError, match=f"found k = {k if k < 1 else 129}"):
        make_sae().encode(X, k=k if k < 1 else 129)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_activation():
    with pytest.raises(QwenScopeError, match="'relu'"):
        TopKSAE(**tensors(), k=2, activation="relu")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(5, 31), (32, 5), (), (31,)])
def test_residuals_of_another_width(make_sae, shape):
    with pytest.raises(QwenScopeError, match=r"width d_model = 32, found a tensor of shape \("):
        make_sae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_no_residuals_at_all(make_sae, shape):
    with pytest.raises(QwenScopeError, match="at least one residual"):
        make_sae().encode(torch.zeros(shape))


def test_residuals_on_another_device(make_sae):
    with pytest.raises(QwenScopeError, match=r"device cpu, found them on meta; move one with .to\(\)"):
        make_sae().encode(X.to("meta"))


def test_residuals_that_are_not_finite(make_sae):
    x = X.clone()
    x[1, 2, 0] = float("nan")
    with pytest.raises(QwenScopeError, match="1 of 10 tokens"):
        make_sae().encode(x)


def test_features_of_another_dictionary(make_sae):
    features = SparseFeatures(torch.tensor([[1]]), torch.tensor([[1.0]]), 64)
    with pytest.raises(QwenScopeError, match="dictionary of 128, found one of 64"):
        make_sae().decode(features)


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda sae: sae.encode(X.numpy()), "expected residuals as a dense tensor, found a ndarray"),
        (lambda sae: sae.encode([[1.0] * 32]), "found a list; convert it with torch.as_tensor"),
        (lambda sae: sae.encode(X.to_sparse()), "found a torch.sparse_coo tensor"),
        (lambda sae: sae.decode(X), "expected the features that encode gave, found a torch.strided tensor"),
        (lambda sae: TopKSAE(*sae.parameters(), k="8"), "expected k from 1 to d_sae = 128, found k = '8'"),
        (lambda sae: TopKSAE(*sae.parameters(), k=8, kernel="fast"), "expected a kernel out of reference"),
    ],
)
def test_what_is_no_input(make_sae, use, match, unchecked):
    with pytest.raises(QwenScopeError, match=match):
        use(make_sae())
