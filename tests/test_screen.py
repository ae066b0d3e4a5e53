"""The screened encoder against float64: a hunt for inputs that break its bound, ties, batches, odd sizes, bad rows."""

import pickle
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_scope import QwenScopeError, TopKSAE
from qwen_scope.kernels import Encoder, compiled, encode, reference, screen
from qwen_scope.kernels.screen import BoundBroken, Screen
from qwen_scope.kernels.threads import share

PRODUCTS = ["bfloat16", "float32"]
TOKENS = 32
PROBLEMS = 36  # of each kind: 36 * 32 tokens * 12 kinds are 13 824 cases for each product


def gaussian(g: torch.Generator, d_model: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(TOKENS, d_model, generator=g),
        torch.randn(d_sae, d_model, generator=g),
        torch.randn(d_sae, generator=g),
    )


def heavy_tailed(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    return x / torch.rand(x.shape, generator=g), W / torch.rand(W.shape, generator=g), b


def outlier_dimensions(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    x[:, torch.randint(d_model, (3,), generator=g)] *= 3000
    return x, W, b


def duplicated_features(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    copies = torch.randint(max(1, d_sae // 8), (d_sae,), generator=g)
    return x, W[copies], b[copies]


def nearly_duplicated_features(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = duplicated_features(g, d_model, d_sae)
    return x, W * (1 + 1e-6 * torch.randn(W.shape, generator=g)), b


def whole_numbers(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = (t.sign() * (t.abs() > 0.7) for t in gaussian(g, d_model, d_sae))
    return x, W, b


def huge(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    return 1e17 * x, 1e17 * W, 1e34 * b


def tiny(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    return 1e-18 * x, 1e-18 * W, 1e-36 * b


def denormal(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    return 1e-39 * x, W, 1e-39 * b


def unequal_norms(g: torch.Generator, d_model: int, d_sae: int):
    x, W, b = gaussian(g, d_model, d_sae)
    return x, W * 10 ** torch.randint(-6, 7, (d_sae, 1), generator=g), b


def rounding_against_us(g: torch.Generator, d_model: int, d_sae: int):
    """Every weight and residual lies just beside the middle of two bfloat16 numbers, so that all roundings add up."""
    x, W, b = (t.bfloat16().float() for t in gaussian(g, d_model, d_sae))
    x = x.abs() * (1 + 0.498 * 2**-7 * torch.randint(-1, 2, (TOKENS, 1), generator=g))
    W = (W[:1].abs() + 0 * W) * (1 + 0.498 * 2**-7 * torch.randint(-1, 2, (d_sae, 1), generator=g))
    return x, W * (1 + 2**-6 * torch.rand(d_sae, 1, generator=g)), 0 * b


def cancelling_bias(g: torch.Generator, d_model: int, d_sae: int):
    x, W, _ = rounding_against_us(g, d_model, d_sae)
    return x, W, -(W.bfloat16().double() @ x[0].bfloat16().double()).float()


KINDS = [
    gaussian,
    heavy_tailed,
    outlier_dimensions,
    duplicated_features,
    nearly_duplicated_features,
    whole_numbers,
    huge,
    tiny,
    denormal,
    unequal_norms,
    rounding_against_us,
    cancelling_bias,
]


def by_float64(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest float64 pre-activations after rounding to float32, the lower feature first among equals.

    And which rows two orders of the same float64 sum could decide otherwise, because values nearly meet at rank k or nearly
    lie between two float32 numbers: there, the last bit may differ.
    """
    exact = x.double() @ W.double().T + b.double()
    scale = x.double().abs() @ W.double().abs().T + b.double().abs()
    low, high = ((exact + sign * 1e-14 * scale).float() for sign in (-1, 1))
    values, indices = (exact.float() + 0.0).sort(dim=1, descending=True, stable=True)
    return indices[:, :k], values[:, :k], ((low != high) & (high >= values[:, k - 1 : k])).any(dim=1)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_input_breaks_the_bound(kind, product):
    cases, unclear = 0, 0
    for seed in range(PROBLEMS):
        g = torch.Generator().manual_seed(seed)
        d_model = [1, 2, 7, 33, 64, 200][seed % 6]
        d_sae = [5, 17, 64, 200, 333, 1030][seed // 6]
        x, W, b = kind(g, d_model, d_sae)
        if seed % 4 == 1:
            x = x.bfloat16().float()
        if seed % 4 == 2:
            W = W.bfloat16()
        k = 1 + int(torch.randint(max(1, d_sae // 4), (1,), generator=g))
        made = Screen.of(W, b, product)
        assert made is not None
        indices, values = made.encode(x, k)
        alone = made.encode(x[:2], k)
        assert torch.equal(alone[0], indices[:2])
        expected_indices, expected_values, near = by_float64(x, W, b, k)
        clear = ~near
        assert torch.equal(indices[clear], expected_indices[clear])
        assert torch.equal(values[clear], expected_values[clear])
        torch.testing.assert_close(values, expected_values, rtol=1e-6, atol=1e-44)
        cases, unclear = cases + TOKENS, unclear + int(near.sum())
    assert cases == PROBLEMS * TOKENS
    assert unclear < cases / 20


@pytest.mark.parametrize("kind", [gaussian, rounding_against_us], ids=lambda kind: kind.__name__)
def test_the_hunt_has_teeth(kind):
    # With a fiftieth of the bound the same inputs give wrong features, or an exact value is caught above it.
    caught = 0
    for seed in range(PROBLEMS):
        x, W, b = kind(torch.Generator().manual_seed(seed), 2 + seed, 333)
        made = Screen.of(W, b, "bfloat16")
        tight = Screen(**{**made.__dict__, "lost": made.lost * 0.02, "length": made.length * 0.02})
        try:
            caught += not torch.equal(tight.encode(x, 20)[0], made.encode(x, 20)[0])
        except BoundBroken:
            caught += 1
    assert caught > 0


def draw(tokens: int, d_model: int = 64, d_sae: int = 500, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, d_model, generator=g),
        torch.randn(d_sae, d_model, generator=g),
        torch.randn(d_sae, generator=g),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gives_the_same_bits_alone_in_a_batch_on_threads_and_by_either_product(dtype):
    x, W, b = draw(514)  # the last chunk has 2 tokens
    x, W = x.to(dtype), W.to(dtype)
    by_product = [Screen.of(W, b, product) for product in PRODUCTS]
    expected = by_product[0].encode(x, 12)
    others = [by_product[1].encode(x, 12)]
    for made in by_product:
        for size in (1, 2, 3, 256):
            parts = [made.encode(rows, 12) for rows in x[:300].split(size)]
            assert torch.equal(torch.cat([p[0] for p in parts]), expected[0][:300])
            assert torch.equal(torch.cat([p[1] for p in parts]), expected[1][:300])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        others.append(by_product[0].encode(x, 12))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for indices, values in others:
        assert torch.equal(indices, expected[0])
        assert torch.equal(values, expected[1])


def test_the_reference_agrees_wherever_float32_can_tell():
    x, W, b = draw(400, 200, 3000)
    indices, values = Screen.of(W, b, "bfloat16").encode(x, 50)
    by_definition = reference.encode(x, W, b, 50)
    assert (indices.sort(1).values == by_definition[0].sort(1).values).all(1).float().mean() > 0.98
    torch.testing.assert_close(values, by_definition[1])


def test_few_candidates_need_an_exact_product():
    x, W, b = draw(64, 256, 8192)
    W /= W.norm(dim=1, keepdim=True)
    counts = []
    select = compiled.select

    def counting(*arguments):
        select(*arguments)
        counts.extend(arguments[-3][arguments[-2] : arguments[-1]].tolist())

    try:
        compiled.select = counting
        Screen.of(W, 0.1 * b, "bfloat16").encode(x, 50)
    finally:
        compiled.select = select
    assert len(counts) == 64
    assert min(counts) >= 50
    assert np.mean(counts) < 150


@pytest.mark.parametrize("product", PRODUCTS)
def test_tensors_need_not_be_contiguous(product):
    x, W, b = draw(9)
    strided = torch.empty(64, 9).T.copy_(x), torch.empty(64, 500).T.copy_(W), torch.empty(500, 2)[:, 0].copy_(b)
    assert not any(t.is_contiguous() for t in strided)
    found = Screen.of(*strided[1:], product).encode(strided[0], 7)
    expected = Screen.of(W, b, product).encode(x, 7)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("row", [0, 299])
@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_that_are_not_finite(bad, row, product):
    x, W, b = draw(300)
    x[row, 2] = bad
    with pytest.raises(QwenScopeError, match=rf"1 of 300 tokens \(the first at row {row}\)"):
        Screen.of(10 * W, b, product).encode(x, 3)


def test_rows_near_the_largest_number_are_still_exact():
    x, W, b = draw(5)
    x[3] *= 1e36 / 50
    found = Screen.of(W, b, "bfloat16").encode(x, 3)
    expected = by_float64(x, W, b, 3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_screened(bad):
    _, W, b = draw(1)
    W[7, 3] = bad
    assert Screen.of(W, b, "bfloat16") is None
    assert Screen.of(W.bfloat16(), b, "bfloat16") is None
    W[7, 3], b[0] = 0, bad
    assert Screen.of(W, b, "float32") is None


def test_rows_that_all_features_fit_are_computed_whole(monkeypatch):
    # Ties without end: too many candidates for a screen.
    x, W, b = torch.ones(3, 4), torch.ones(5000, 4), torch.zeros(5000)
    wholes = []
    whole = reference.encode_rows

    def watched(*arguments):
        wholes.append(len(arguments[0]))
        return whole(*arguments)

    monkeypatch.setattr(reference, "encode_rows", watched)
    indices, values = Screen.of(W, b, "bfloat16").encode(x, 3)
    assert wholes == [3]
    assert indices.tolist() == [[0, 1, 2]] * 3
    assert (values == 4).all()


def test_no_dense_matrix_is_ever_made(monkeypatch):
    x, W, b = draw(1000)
    largest = 0
    empty = torch.empty

    def watched(*size, **options):
        nonlocal largest
        made = empty(*size, **options)
        largest = max(largest, made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", watched)
    monkeypatch.setattr(screen, "CHUNK_BYTES", 20 * 500 * 2)
    found = Screen.of(W, b, "bfloat16").encode(x, 5)
    assert largest <= 1000 * 64 * 4
    monkeypatch.undo()
    assert torch.equal(found[0], Screen.of(W, b, "bfloat16").encode(x, 5)[0])


def test_products_that_sum_in_bfloat16_are_recognised(monkeypatch):
    _, W, b = draw(1)
    made = Screen.of(W, b, "bfloat16")
    assert made.sums_in_float32()

    def poor(x, weights, out, start, stop):
        total = torch.zeros(len(x), stop - start, dtype=torch.bfloat16)
        for d in range(x.shape[1]):
            total += x[:, d : d + 1] * weights[start:stop, d]
        out[:, start:stop] = total

    monkeypatch.setattr(screen, "_multiply", poor)
    assert not made.sums_in_float32()


# Encoder: what one SAE keeps


@pytest.mark.parametrize("kernel", ["cpu-bfloat16", "cpu-float32"])
def test_weights_changed_in_place_are_noticed(kernel):
    x, W, b = draw(20)
    encoder = Encoder(kernel)
    encode(x, W, b, 9, encoder)
    assert encoder.nbytes > 0
    W[torch.arange(0, 500, 2)] *= 3
    b += torch.arange(500) / 50
    assert torch.equal(encode(x, W, b, 9, encoder)[0], Screen.of(W, b, "float32").encode(x, 9)[0])


def test_weights_changed_behind_its_back_show_in_the_bound():
    x, W, b = draw(20)
    encoder = Encoder("cpu-bfloat16")
    encode(x, W, b, 9, encoder)
    W.data[::2] *= 3
    W.data[1::2] *= -2
    found = encode(x, W, b, 9, encoder)
    assert torch.equal(found[0], Screen.of(W, b, "bfloat16").encode(x, 9)[0])
    b.data[3] += 1000
    assert (encode(x, W, b, 9, encoder)[0][:, 0] == 3).all()
    W.data[7] = 100 * x[0]
    encoder.forget()
    assert encode(x, W, b, 9, encoder)[0][0, 0] == 7


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_weights_in_training_are_never_stale(options):
    x, W, b = draw(20)
    W.requires_grad_()
    b.requires_grad_()
    optimizer = torch.optim.Adam([W, b], lr=0.1, **options)
    encoder = Encoder("cpu-bfloat16")
    for _ in range(4):
        indices, values = encode(x, W, b, 9, encoder)
        expected = Screen.of(W, b, "float32").encode(x, 9)
        assert torch.equal(indices, expected[0])
        assert torch.equal(values.detach(), expected[1])
        optimizer.zero_grad()
        (values - 1).pow(2).sum().backward()
        optimizer.step()
    W.requires_grad_(False)
    b.requires_grad_(False)
    assert torch.equal(encode(x, W, b, 9, encoder)[0], Screen.of(W, b, "float32").encode(x, 9)[0])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 5, 600])
def test_inference_mode_and_autocast_change_nothing(tokens, threads):
    x, W, b = draw(tokens)

    def both() -> list[Tensor]:
        return [*encode(x, W, b, 9, Encoder("cpu-bfloat16")), *encode(x, W, b, 9)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        expected = both()
        for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                assert all(torch.equal(*pair) for pair in zip(both(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e30, -float("inf")])
def test_features_masked_by_a_very_low_bias(low):
    x, W, b = draw(6)
    b[:] = low
    b[100:103] = 0.0
    if low == -float("inf"):
        assert Screen.of(W, b, "bfloat16") is None
        return
    found = encode(x, W, b, 8, Encoder("cpu-bfloat16"))
    expected = reference.encode(x, W, b, 8)
    assert torch.equal(found[0], expected[0])
    b[103] = 3.4028234e38
    with pytest.raises(QwenScopeError, match="NaN or infinity"):
        encode(1e16 * x, 1e16 * W.abs(), b, 3, Encoder("cpu-bfloat16"))


def test_an_interrupted_part_waits_for_the_others():
    done = []

    def part(start: int, stop: int) -> None:
        if start == 0:
            raise KeyboardInterrupt
        time.sleep(0.2)
        done.append(start)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            share(part, 10)
        assert done == [5]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_larger_k_is_chosen_for_anew():
    x, W, b = draw(6)
    encoder = Encoder("cpu-bfloat16")
    encode(x, W, b, 300, encoder)
    assert str(encoder.choice) == "reference (more than a quarter of the features is kept)"
    encode(x, W, b, 5, encoder)
    assert str(encoder.choice) == "cpu-bfloat16 (asked for)"
    assert torch.equal(encode(x, W, b, 125, encoder)[0], Screen.of(W, b, "bfloat16").encode(x, 125)[0])


def test_more_candidates_than_are_counted_are_sorted():
    x, W, b = draw(6, d_sae=3000)
    found, expected = Screen.of(W, b, "bfloat16").encode(x, 700), by_float64(x, W, b, 700)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_product_that_breaks_the_bound_is_given_up(monkeypatch):
    x, W, b = draw(20)
    multiply = screen._multiply

    def wrong(x, weights, out, start, stop):
        multiply(x, weights, out, start, stop)
        out[:, start:stop] *= 0.9

    monkeypatch.setattr(screen, "_multiply", wrong)
    encoder = Encoder("cpu-bfloat16")
    with pytest.warns(UserWarning, match="the kernel cpu-bfloat16 cannot be used: its product is less precise"):
        found = encode(x, W, b, 9, encoder)
    assert torch.equal(found[0], reference.encode(x, W, b, 9)[0])
    assert str(encoder.choice).startswith("reference (its product")
    encode(x, W, b, 9, encoder)  # and says so once


def test_where_most_features_are_kept_the_reference_runs():
    x, W, b = draw(6)
    found = encode(x, W, b, 400, Encoder("cpu-bfloat16"))
    assert torch.equal(found[0], reference.encode(x, W, b, 400)[0])


def test_an_encoder_travels_without_what_it_prepared():
    encoder = Encoder("cpu-bfloat16")
    x, W, b = draw(6)
    encode(x, W, b, 5, encoder)
    again = pickle.loads(pickle.dumps(encoder))
    assert (again.kernel, again.nbytes, again.choice) == ("cpu-bfloat16", 0, None)


def test_an_sae_encodes_by_the_kernel_asked_for():
    x, W, b = draw(6)
    sae = TopKSAE(W.clone(), W.T, b, torch.zeros(64), k=5, kernel="cpu-bfloat16")
    weights = sae.nbytes
    found = sae.encode(x.view(2, 3, 64))
    assert torch.equal(found.indices.view(6, 5), Screen.of(W, b, "bfloat16").encode(x, 5)[0])
    assert str(sae.encoder.choice) == "cpu-bfloat16 (asked for)"
    assert sae.nbytes - weights >= 500 * 64 * 2
    sae.load_state_dict({**sae.state_dict(), "W_enc": -W})
    assert torch.equal(sae.encode(x).indices, Screen.of(-W, b, "bfloat16").encode(x, 5)[0])
    sae.double().float()
    assert torch.equal(sae.encode(x).indices, Screen.of(-W, b, "bfloat16").encode(x, 5)[0])
    sae.bfloat16()
    assert torch.equal(sae.encode(x).indices, Screen.of(-W.bfloat16(), b.bfloat16(), "bfloat16").encode(x, 5)[0])


@pytest.mark.parametrize(
    ("kernel", "match"),
    [
        ("fastest", "expected a kernel out of reference, cpu-bfloat16, cpu-float32, triton, found 'fastest'"),
        ("triton", "expected the kernel triton to be usable, found that"),
    ],
)
def test_kernels_that_cannot_be(kernel, match, unchecked):
    x, W, b = draw(6)
    with pytest.raises(QwenScopeError, match=match):
        encode(x, W, b, 5, Encoder(kernel))
