"""Sums over pairs and their gradients against dense autograd, and the fused step against `torch.optim.Adam`."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen_scope import QwenScopeError
from qwen_scope.kernels import adam, pairs, reference
from qwen_scope.kernels.adam import AdamRows, RowGradient
from qwen_scope.kernels.pairs import SparseDecode, TopKValues, group_by_feature, row_dots, sum_over_pairs

PATHS = pytest.mark.parametrize("path", ["compiled", "torch"])


@pytest.fixture(autouse=True)
def path(request, monkeypatch) -> None:
    """Without numba, where a test asks for the torch path."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("path") == "torch":
        monkeypatch.setattr(pairs, "compiled_loops", lambda *given: None)
        monkeypatch.setattr(adam, "compiled_loops", lambda *given: None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(tokens: int, k: int, d_sae: int, seed: int = 0) -> Tensor:
    """k features for each token, no token's twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(tokens)])


def dense(indices: Tensor, weights: Tensor, d_sae: int) -> Tensor:
    return torch.zeros(len(indices), d_sae, dtype=torch.float64).scatter(1, indices, weights.double())


def assert_close(found: Tensor, expected: Tensor, allowed: float = 1e-5) -> None:
    """To so much of the largest entry."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= allowed * expected.abs().max()


# (tokens, k, d_model, d_sae): one token, k = d_sae, features without pairs, sums of 0 to 5 pairs, odd sizes, one of each.
SHAPES = [(1, 3, 8, 20), (7, 20, 5, 20), (9, 2, 12, 100), (30, 5, 33, 60), (130, 7, 16, 9), (1, 1, 1, 1)]


@PATHS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_dots(path, shape, dtype):
    tokens, k, d_model, d_sae = shape
    indices, weights, rows = kept(tokens, k, d_sae), draw(tokens, k, seed=1), draw(tokens, d_model, seed=2)
    table = draw(d_sae, d_model, seed=3).to(dtype)
    grouped = group_by_feature(indices, d_sae)
    assert_close(sum_over_pairs(grouped, weights, rows), dense(indices, weights, d_sae).T @ rows.double())
    assert_close(row_dots(grouped, rows, table), (rows.double() @ table.double().T).gather(1, indices))


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(path, dtype):
    indices, weights = kept(9, 4, 20), draw(9, 4, seed=1).to(dtype)
    rows, table = draw(9, 6, seed=2).to(dtype), draw(20, 6, seed=3)
    grouped = group_by_feature(indices, 20)
    sums, dots = sum_over_pairs(grouped, weights, rows), row_dots(grouped, rows, table)
    assert sums.dtype == dots.dtype == dtype
    allowed = 1e-12 if dtype == torch.float64 else 0.02
    assert_close(sums, dense(indices, weights, 20).T @ rows.double(), allowed)
    assert_close(dots, (rows.double() @ table.double().T).gather(1, indices), allowed)


@PATHS
def test_pairs_are_grouped_by_feature_and_then_by_token(path):
    indices = torch.tensor([[4, 1], [1, 0], [4, 1]])
    grouped = group_by_feature(indices, 6)
    assert grouped.starts.tolist() == [0, 1, 4, 4, 4, 6, 6]
    assert grouped.order.tolist() == [3, 1, 2, 5, 0, 4]
    assert grouped.d_sae == 6


@PATHS
def test_tensors_need_not_be_contiguous(path):
    indices, weights = kept(5, 12, 30).T[:5].T, draw(5, 5, seed=1).T
    rows, table = draw(8, 5, seed=2).T, draw(8, 30, seed=3).T
    grouped = group_by_feature(indices, 30)
    assert_close(sum_over_pairs(grouped, weights, rows), dense(indices, weights, 30).T @ rows.double())
    assert_close(row_dots(grouped, rows, table), (rows.double() @ table.double().T).gather(1, indices))


@PATHS
def test_no_tokens(path):
    grouped = group_by_feature(torch.zeros(0, 3, dtype=torch.long), 4)
    assert torch.equal(sum_over_pairs(grouped, torch.zeros(0, 3), torch.zeros(0, 5)), torch.zeros(4, 5))
    assert row_dots(grouped, torch.zeros(0, 5), torch.zeros(4, 5)).shape == (0, 3)


@PATHS
@pytest.mark.parametrize("wrong", [-1, 8])
def test_indices_that_are_no_features(path, wrong):
    with pytest.raises(QwenScopeError, match="expected features from 0 to 7, found"):
        group_by_feature(torch.tensor([[3, wrong]]), 8)


def test_the_compiled_loops_serve_float32_on_the_cpu_where_numba_is(monkeypatch):
    cpu = torch.device("cpu")
    assert pairs.compiled_loops(cpu, draw(2)) is not None
    assert pairs.compiled_loops(cpu, draw(2), draw(2).double()) is None
    assert pairs.compiled_loops(torch.device("meta")) is None
    monkeypatch.delattr("qwen_scope.kernels.compiled_pairs")
    monkeypatch.setitem(sys.modules, "qwen_scope.kernels.compiled_pairs", None)
    assert pairs.compiled_loops(cpu, draw(2)) is None


def test_tensors_that_do_not_belong_to_the_pairs():
    grouped = group_by_feature(kept(4, 3, 8), 8)
    with pytest.raises(QwenScopeError, match=r"expected weights of shape \(4, 3\)"):
        sum_over_pairs(grouped, draw(4, 2), draw(4, 5))
    with pytest.raises(QwenScopeError, match=r"found \(5, 3\) and 5 rows"):
        sum_over_pairs(grouped, draw(5, 3), draw(5, 5))
    with pytest.raises(QwenScopeError, match="and 5 rows"):
        row_dots(grouped, draw(5, 5), draw(8, 5))
    with pytest.raises(QwenScopeError, match="expected a table of 8 rows, found 7"):
        row_dots(grouped, draw(4, 5), draw(7, 5))


# Gradients


@st.composite
def problems(draw_from):
    tokens, d_model, d_sae = (draw_from(st.integers(1, most)) for most in (12, 20, 40))
    return tokens, draw_from(st.integers(1, d_sae)), d_model, d_sae, draw_from(st.integers(0, 99))


@given(problems())
def test_gradients_of_encode_equal_dense_autograds(problem):
    tokens, k, d_model, d_sae, seed = problem
    given = [draw(tokens, d_model, seed=seed), draw(d_sae, d_model, seed=seed + 1), draw(d_sae, seed=seed + 2)]
    upstream = draw(tokens, k, seed=seed + 3)
    x, W_enc, b_enc = [p.double().requires_grad_() for p in given]
    values, indices = (x @ W_enc.T + b_enc).topk(k, dim=1)
    (values * upstream).sum().backward()

    sparse = [p.clone().requires_grad_() for p in given]
    found = TopKValues.apply(values.detach().float(), indices, *sparse)
    (found * upstream).sum().backward()
    assert torch.equal(found, values.float())
    for ours, expected in zip(sparse, (x, W_enc, b_enc), strict=True):
        assert_close(ours.grad, expected.grad)


@given(problems())
def test_gradients_of_decode_equal_dense_autograds(problem):
    tokens, k, d_model, d_sae, seed = problem
    given = [draw(tokens, k, seed=seed), draw(d_sae, d_model, seed=seed + 1), draw(d_model, seed=seed + 2)]
    upstream, indices = draw(tokens, d_model, seed=seed + 3), kept(tokens, k, d_sae, seed)
    values, decoder, b_dec = [p.double().requires_grad_() for p in given]
    expected = dense(indices, values, d_sae) @ decoder + b_dec
    (expected * upstream).sum().backward()

    sparse = [p.clone().requires_grad_() for p in given]
    found = SparseDecode.apply(indices, *sparse)
    (found * upstream).sum().backward()
    assert_close(found.detach(), expected.detach())
    for ours, wanted in zip(sparse, (values, decoder, b_dec), strict=True):
        assert_close(ours.grad, wanted.grad)


@PATHS
@pytest.mark.parametrize("needed", [1, 2, 3, 4])
def test_only_the_gradients_that_are_needed(path, needed):
    x, W, b, b_dec = draw(6, 5), draw(12, 5, seed=1), draw(12, seed=2), draw(5, seed=3)
    indices, values = reference.encode(x, W, b, 3)
    of_encode, of_decode = [x, W, b], [values, W, b_dec]
    for function, first, tensors in ((TopKValues, [values, indices], of_encode), (SparseDecode, [indices], of_decode)):
        given = [t.clone().requires_grad_(at == needed - 1) for at, t in enumerate(tensors)]
        out = function.apply(*first, *given)
        assert out.requires_grad == (needed <= 3)
        if needed <= 3:
            out.sum().backward()
            assert [t.grad is not None for t in given] == [at == needed - 1 for at in range(3)]


@PATHS
def test_bfloat16_weights_get_bfloat16_gradients_of_float32_sums(path):
    x, W, b_dec = draw(40, 16), draw(30, 16, seed=1).bfloat16(), torch.zeros(16).bfloat16()
    indices, values = reference.encode(x, W, torch.zeros(30), 4)
    sparse = [W.clone().requires_grad_(), b_dec.clone().requires_grad_()]
    SparseDecode.apply(indices, values, *sparse).pow(2).sum().backward()
    whole = [W.float().requires_grad_(), b_dec.float().requires_grad_()]
    SparseDecode.apply(indices, values, *whole).pow(2).sum().backward()
    for ours, expected in zip(sparse, whole, strict=True):
        assert torch.equal(ours.grad, expected.grad.bfloat16())
    encoder = W.clone().requires_grad_()
    TopKValues.apply(values, indices, x, encoder, torch.zeros(30)).pow(2).sum().backward()
    assert_close(encoder.grad, 2 * dense(indices, values, 30).T @ x.double(), allowed=0.005)


def test_gradients_of_gradients_are_refused_not_wrong():
    values = draw(2, 3).requires_grad_()
    x_hat = SparseDecode.apply(kept(2, 3, 9), values, draw(9, 4, seed=1), torch.zeros(4))
    [grad] = torch.autograd.grad(x_hat.pow(2).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_wrong_feature_in_decode_is_refused():
    values = torch.ones(1, 2).requires_grad_()
    with pytest.raises((QwenScopeError, RuntimeError, IndexError)):
        SparseDecode.apply(torch.tensor([[0, 9]]), values, draw(9, 4), torch.zeros(4)).sum().backward()


# The fused step


def gradient(number: int, tokens: int = 40, k: int = 5, d_sae: int = 30, d_model: int = 17, extra: bool = False):
    # Feature 29 never has a pair, nor feature 3 but for the extra rows.
    indices = kept(tokens, k, d_sae - 2, number)
    indices += indices >= 3
    more = (torch.tensor([3, 5, 29]), draw(3, d_model, seed=number + 300)) if extra else None
    grouped = group_by_feature(indices, d_sae)
    return RowGradient(grouped, draw(tokens, k, seed=number + 100), draw(tokens, d_model, seed=number + 200), more)


@PATHS
@pytest.mark.parametrize("extra", [False, True], ids=["", "extra rows"])
@pytest.mark.parametrize("unit_norm", [False, True], ids=["", "unit norm"])
@pytest.mark.parametrize("largest", [torch.inf, 0.3], ids=["", "clipped"])
def test_steps_equal_torchs_adam(path, extra, unit_norm, largest):
    start = draw(30, 17)
    start = start / start.norm(dim=1, keepdim=True)
    found, expected = start.clone(), start.clone().requires_grad_()
    ours, theirs = AdamRows(found, unit_norm=unit_norm), torch.optim.Adam([expected])
    for number in range(20):
        rate, given = 1e-3 * (number + 1), gradient(number, extra=extra)
        squared = ours.squared_norm(given)
        ours.step(given, rate, min(1.0, largest / squared**0.5))

        grad = dense(given.pairs.indices, given.weights, 30).T @ given.rows.double()
        if given.extra is not None:
            grad[given.extra[0]] += given.extra[1].double()
        if unit_norm:
            row = expected.detach().double()
            grad -= (grad * row).sum(1, keepdim=True) * row
        assert squared == pytest.approx(float(grad.pow(2).sum()), rel=1e-5)
        expected.grad = (grad * min(1.0, largest / float(grad.norm()))).float()
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        if unit_norm:
            with torch.no_grad():
                expected /= expected.norm(dim=1, keepdim=True)
    state = theirs.state[expected]
    assert_close(found, expected.detach())
    assert_close(ours.mean, state["exp_avg"])
    assert_close(ours.square, state["exp_avg_sq"])
    if unit_norm:
        torch.testing.assert_close(found.norm(dim=1), torch.ones(30))
    assert torch.equal(found[29], start[29]) == (not extra and not unit_norm) or unit_norm


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_several_threads_give_the_same_bits(tokens):
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            parameter = draw(30, 17)
            step, given = AdamRows(parameter, unit_norm=True), gradient(0, tokens, extra=True)
            squared = step.squared_norm(given)
            step.step(given, 1e-3)
            sums, dots = given.dense(), row_dots(given.pairs, given.rows, parameter)
            results.append([parameter, step.mean, step.square, sums, dots, torch.tensor(squared)])
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@PATHS
def test_a_step_can_be_saved_and_gone_on_from(path):
    whole = AdamRows(draw(30, 17))
    for number in range(3):
        whole.step(gradient(number), 1e-3)
    again = AdamRows(whole.parameter.clone())
    again.load_state_dict(whole.state_dict())
    for number in range(3, 6):
        whole.step(gradient(number), 1e-3)
        again.step(gradient(number), 1e-3)
    assert again.steps == 6
    assert torch.equal(whole.parameter, again.parameter)


@PATHS
def test_a_step_counts_as_a_change_of_the_parameter(path):
    parameter = draw(30, 17)
    version = parameter._version
    AdamRows(parameter).step(gradient(0), 1e-3)
    assert parameter._version > version


def test_parameters_and_gradients_that_cannot_be_used():
    with pytest.raises(QwenScopeError, match="expected a contiguous float32 matrix, found bfloat16;"):
        AdamRows(draw(8, 4).bfloat16())
    with pytest.raises(QwenScopeError, match="found float32, not contiguous;"):
        AdamRows(draw(8, 4).T)
    step = AdamRows(draw(30, 16))
    for use in (step.squared_norm, lambda given: step.step(given, 1e-3)):
        with pytest.raises(QwenScopeError, match=r"expected a gradient of shape \(30, 16\), found \(30, 17\)"):
            use(gradient(0))
    assert step.steps == 0
    good = gradient(0)
    with pytest.raises(QwenScopeError, match="expected extra features in ascending order"):
        RowGradient(good.pairs, good.weights, good.rows, (torch.tensor([4, 4]), draw(2, 17)))
