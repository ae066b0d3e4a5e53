"""Encode and decode against their definitions: float64 arithmetic and a stable sort of dense pre-activations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError, kernels
from qwen_scope.kernels import reference
from qwen_scope.kernels.threads import share, thread_count, torch_alone, torch_together


def draw(tokens: int, d_model: int, d_sae: int, seed: int, scale: float = 1.0):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(tokens, d_model, generator=g)
    return x, torch.randn(d_sae, d_model, generator=g), scale * torch.randn(d_sae, generator=g)


def by_definition(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, the lower feature first among equals."""
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    return indices[:, :k], values[:, :k]


@st.composite
def problems(draw_from):
    tokens, d_model, d_sae = (draw_from(st.integers(1, most)) for most in (9, 12, 40))
    k = draw_from(st.integers(1, d_sae))
    scale = draw_from(st.sampled_from([1e-6, 1.0, 1e4]))
    return (*draw(tokens, d_model, d_sae, draw_from(st.integers(0, 99)), scale), k)


@given(problems())
def test_encode_agrees_with_float64(problem):
    x, W, b, k = problem
    indices, values = kernels.encode(x, W, b, k)
    pre = x.double() @ W.double().T + b.double()
    allowed = 1e-5 * pre.abs().max()
    _, expected = by_definition(pre, k)
    assert (values - expected).abs().max() <= allowed
    assert (pre.gather(1, indices) - values).abs().max() <= allowed
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "a feature is kept twice"
    assert values.dtype == torch.float32


@given(problems())
def test_decode_agrees_with_float64_and_with_the_dense_product(problem):
    x, W, b, k = problem
    indices, values = kernels.encode(x, W, b, k)
    b_dec = torch.arange(float(x.shape[1]))
    found = kernels.decode(indices, values, W, b_dec)
    acts = torch.zeros(len(x), len(W), dtype=torch.float64).scatter_(1, indices, values.double())
    expected = acts @ W.double() + b_dec.double()
    assert (found - expected).abs().max() <= 1e-5 * max(expected.abs().max(), values.abs().max() * k)
    assert found.dtype == torch.float32


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_ties_go_to_the_lower_feature(d_sae, k, seed):
    # Small integers make many exact ties, within the k kept and across rank k.
    k = min(k, d_sae)
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (20, 3), generator=g).float()
    W = torch.randint(-1, 2, (d_sae, 3), generator=g).float()
    indices, values = kernels.encode(x, W, torch.zeros(d_sae), k)
    expected_indices, expected_values = by_definition(x @ W.T, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(values, expected_values)


def test_a_tie_across_rank_k_only():
    W = torch.tensor([[1.0], [3.0], [2.0], [2.0], [2.0]])
    indices, values = kernels.encode(torch.ones(1, 1), W, torch.zeros(5), 2)
    assert indices.tolist() == [[1, 2]]
    assert values.tolist() == [[3, 2]]


def test_all_features_equal():
    indices, _ = kernels.encode(torch.ones(3, 2), torch.ones(200, 2), torch.zeros(200), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("features", [1, 7, 64])
@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_join_seamlessly(monkeypatch, rows, features, tokens, dtype):
    x, W, b = draw(tokens, 8, 64, seed=0)
    W = W.to(dtype)
    whole = kernels.encode(x, W, b, 5)
    monkeypatch.setattr(reference, "CHUNK_TOKENS", rows)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * features * min(rows, tokens))
    indices, values = kernels.encode(x, W, b, 5)
    assert torch.equal(indices, whole[0])
    torch.testing.assert_close(values, whole[1])


def test_ties_across_blocks_go_to_the_lower_index(monkeypatch):
    # Whole numbers, so that equal rows give equal values in blocks of any size.
    generator = torch.Generator().manual_seed(0)
    W = torch.randint(-3, 4, (40, 16), generator=generator).float().repeat(3, 1)
    x = torch.randint(-3, 4, (9, 16), generator=generator).float()
    expected = (x @ W.T).sort(dim=1, descending=True, stable=True).indices[:, :7]
    for features in (11, 40, 120):
        monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * 9 * features)
        assert torch.equal(kernels.encode(x, W, torch.zeros(120), 7)[0], expected)


def test_no_dense_matrix_is_ever_made(monkeypatch):
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and len(result) in (10, 1000):
                largest = max(largest, result.shape[1])
            return result

    x, W, b = draw(1000, 4, 512, seed=0)
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 10)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 10 * 64 * 4)
    with Watch():
        indices, values = kernels.encode(x, W, b, 5)
        kernels.decode(indices, values, W, torch.zeros(4))
    assert largest == 64


def test_bfloat16_is_computed_in_float32():
    x, W, b = (t.bfloat16() for t in draw(5, 16, 64, seed=1))
    indices, values = kernels.encode(x, W, b, 7)
    assert values.dtype == torch.float32
    same = kernels.encode(x.float(), W.float(), b.float(), 7)
    assert torch.equal(indices, same[0])
    assert torch.equal(values, same[1])
    decoded = kernels.decode(indices, values, W, torch.zeros(16).bfloat16())
    assert torch.equal(decoded, kernels.decode(indices, values, W.float(), torch.zeros(16)))


def test_tensors_need_not_be_contiguous():
    x, W, b = draw(6, 8, 40, seed=2)
    strided = torch.empty(8, 6).T.copy_(x), torch.empty(8, 40).T.copy_(W), torch.empty(40, 2)[:, 0].copy_(b)
    assert not any(t.is_contiguous() for t in strided)
    indices, values = kernels.encode(*strided, 5)
    expected = kernels.encode(x, W, b, 5)
    assert torch.equal(indices, expected[0])
    torch.testing.assert_close(values, expected[1])
    rows = torch.empty(8, 40).T.copy_(W)
    torch.testing.assert_close(
        kernels.decode(indices[::2], values[::2], rows, x[0]), kernels.decode(*expected, W, x[0])[::2]
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 4])
def test_rows_that_are_not_finite(monkeypatch, bad, row):
    monkeypatch.setattr(reference, "CHUNK_TOKENS", 2)
    x, W, b = draw(5, 8, 64, seed=3)
    x[row, 2] = bad
    with pytest.raises(QwenScopeError, match=rf"1 of 5 tokens \(the first at row {row}\)"):
        kernels.encode(x, W, b, 3)


def test_minus_infinity_alone_is_found_too():
    # An infinity can make all pre-activations minus infinity, or leave k finite ones above those that are not.
    x, W, b = torch.full((1, 1), float("inf")), -torch.ones(8, 1), torch.zeros(8)
    with pytest.raises(QwenScopeError, match="1 of 1"):
        kernels.encode(x, W, b, 2)
    W[:4] = 0.0  # 0 * inf is NaN, which counts as the largest
    with pytest.raises(QwenScopeError, match="1 of 1"):
        kernels.encode(x, W, b, 2)


def test_gradients_equal_those_of_the_dense_definition():
    x, W, b = (t.double().requires_grad_() for t in draw(4, 5, 12, seed=4))
    x32, W32, b32 = (t.detach().float().requires_grad_() for t in (x, W, b))
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    pre = x @ W.T + b
    acts = torch.zeros_like(pre).scatter(1, (top := pre.topk(3, dim=1)).indices, top.values)
    ((acts @ W - target.double()) ** 2).sum().backward()
    indices, values = kernels.encode(x32, W32, b32, 3)
    ((kernels.decode(indices, values, W32, torch.zeros(5)) - target) ** 2).sum().backward()
    for exact, found in ((x, x32), (W, W32), (b, b32)):
        torch.testing.assert_close(found.grad, exact.grad.float(), rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_rows_with_ties():
    W = torch.ones(6, 2, requires_grad=True)
    _, values = kernels.encode(torch.ones(3, 2), W, torch.zeros(6), 2)
    values.sum().backward()
    assert W.grad.tolist() == [[3, 3], [3, 3], *[[0, 0]] * 4]


def test_decoding_bf16_rows_equals_decoding_them_as_float32():
    generator = torch.Generator().manual_seed(0)
    decoder = torch.randn(50, 16, generator=generator).bfloat16()
    indices = torch.randint(50, (9, 4), generator=generator)
    values, bias = torch.rand(9, 4, generator=generator), torch.zeros(16)
    assert torch.equal(
        reference.decode(indices, values, decoder, bias), reference.decode(indices, values, decoder.float(), bias)
    )


# What is refused


X, W, B = draw(3, 4, 10, seed=0)
PAIR = (torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((X[0], W, B, 2), r"expected x \(tokens, d_model\), .* found \(4,\), \(10, 4\), \(10,\)"),
        ((X[:, :3], W, B, 2), r"found \(3, 3\), \(10, 4\), \(10,\); pass tensors of one SAE"),
        ((X, W.T, B, 2), "pass tensors of one SAE"),
        ((X, W, B[1:], 2), "pass tensors of one SAE"),
        ((X[:0], W, B, 2), r"expected at least one token, found x of shape \(0, 4\)"),
        ((X, W, B, 0), "expected k from 1 to d_sae = 10, found k = 0"),
        ((X, W, B, 11), "expected k from 1 to d_sae = 10, found k = 11"),
        ((X.long(), W, B, 2), r"expected floating-point tensors, found x of torch.int64; convert it with .float\(\)"),
        ((X, W.to("meta"), B, 2), "expected all tensors on one device, found x on cpu, W_enc on meta, b_enc on cpu"),
    ],
)
def test_what_cannot_be_encoded(arguments, match, unchecked):
    with pytest.raises(QwenScopeError, match=match):
        kernels.encode(*arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((PAIR[0][:2], PAIR[1], W, X[0]), r"expected indices and values \(tokens, k\)"),
        ((PAIR[0][0], PAIR[1][0], W, X[0]), "pass what encode gave"),
        ((*PAIR, W, B), "pass what encode gave and the decoder's rows"),
        ((PAIR[0].float(), PAIR[1], W, X[0]), "expected whole numbers as indices, found torch.float32"),
        ((PAIR[0], PAIR[0], W, X[0]), "expected floating-point tensors, found values of torch.int64"),
        ((*PAIR, W.to("meta"), X[0]), "expected all tensors on one device"),
        ((PAIR[0].to("meta"), PAIR[1], W, X[0]), "expected indices on cpu as the decoder is, found them on meta"),
        ((PAIR[0] + 10, PAIR[1], W, X[0]), "expected features from 0 to 9, found 10 to 10"),
        ((PAIR[0] - 1, PAIR[1], W, X[0]), "found -1 to -1; decode with the SAE that encoded them"),
    ],
)
def test_what_cannot_be_decoded(arguments, match, unchecked):
    with pytest.raises(QwenScopeError, match=match):
        kernels.decode(*arguments)


def test_torch_works_alone_while_loops_are_shared_as_before():
    torch.set_num_threads(3)
    try:
        parts: list[tuple[int, int]] = []
        with torch_alone():
            assert (torch.get_num_threads(), thread_count()) == (1, 3)
            share(lambda start, stop: parts.append((start, stop)), 9)
            with torch_together():
                assert (torch.get_num_threads(), thread_count()) == (3, 3)
            with torch_alone():
                assert (torch.get_num_threads(), thread_count()) == (1, 3)
            assert thread_count() == 3
        assert sorted(parts) == [(0, 3), (3, 6), (6, 9)]
        assert (torch.get_num_threads(), thread_count()) == (3, 3)
        with torch_together():
            assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), torch_alone():
            _ = 1 / 0
        assert (torch.get_num_threads(), thread_count()) == (3, 3)
    finally:
        torch.set_num_threads(1)
