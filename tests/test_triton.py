"""The GPU's encoder, bit for bit against the CPU's: on a GPU where there is one, else under triton's interpreter."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qwen_scope import QwenScopeError
from qwen_scope.kernels import reference
from qwen_scope.kernels.screen import BoundBroken, Screen

pytest.importorskip("numba", reason="the CPU's encoder needs numba")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton", reason="triton is not installed")
from qwen_scope.kernels import triton_screen  # noqa: E402
from qwen_scope.kernels.triton_screen import TritonScreen  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32


def draw(tokens: int, d_model: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, d_model, generator=g),
        torch.randn(d_sae, d_model, generator=g),
        torch.randn(d_sae, generator=g),
    )


def prepared(W: Tensor, b: Tensor) -> TritonScreen:
    made = TritonScreen.of(W.to(DEVICE), b.to(DEVICE))
    assert made is not None
    return made


def check_against_the_cpu(x: Tensor, W: Tensor, b: Tensor, k: int, made: TritonScreen | None = None) -> None:
    indices, values = (made or prepared(W, b)).encode(x.to(DEVICE), k)
    expected = Screen.of(W, b, "float32").encode(x, k)
    assert torch.equal(indices.cpu(), expected[0])
    assert torch.equal(values.cpu(), expected[1])
    assert values.dtype == FP32


@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k", "x_dtype", "W_dtype"),
    [
        (1, 1, 9, 1, FP32, FP32),
        (1, 33, 64, 16, FP32, BF16),
        (2, 7, 40, 10, BF16, FP32),
        (9, 33, 300, 9, FP32, FP32),
        (3, 130, 65, 2, BF16, BF16),
        (5, 16, 129, 1, torch.float16, FP32),
        (17, 12, 270, 3, FP32, FP32),
        (130, 2, 12, 3, FP32, FP32),
        (4, 1030, 20, 5, FP32, FP32),
    ],
)
def test_the_same_bits_as_on_the_cpu(tokens, d_model, d_sae, k, x_dtype, W_dtype):
    x, W, b = draw(tokens, d_model, d_sae)
    made = prepared(W.to(W_dtype), b)
    check_against_the_cpu(x.to(x_dtype), W.to(W_dtype), b, k, made)


def outlier_dimensions(x: Tensor, W: Tensor, b: Tensor):
    x[:, [1, 5]] *= 3000
    return x, W, b


def duplicated_features(x: Tensor, W: Tensor, b: Tensor):
    copies = torch.arange(len(W)) // 3
    return x, W[copies], b[copies]


def whole_numbers(x: Tensor, W: Tensor, b: Tensor):
    return x.round(), W.round(), b.round()


def huge(x: Tensor, W: Tensor, b: Tensor):
    return 1e17 * x, 1e17 * W, 1e34 * b


def tiny(x: Tensor, W: Tensor, b: Tensor):
    return 1e-18 * x, 1e-18 * W, 1e-36 * b


def denormal(x: Tensor, W: Tensor, b: Tensor):
    return 1e-39 * x, W, 1e-39 * b


def zero(x: Tensor, W: Tensor, b: Tensor):
    return 0 * x, 0 * W, 0 * b


def unequal_norms(x: Tensor, W: Tensor, b: Tensor):
    return x, W * 10.0 ** (torch.arange(len(W)) % 13 - 6)[:, None], b


def nearly_duplicated_features(x: Tensor, W: Tensor, b: Tensor):
    copies = torch.arange(len(W)) // 3
    return x, W[copies] * (1 + 1e-4 * W), b[copies]


def rounding_against_us(x: Tensor, W: Tensor, b: Tensor):
    """All numbers lie just beside the middle of two of bfloat16, so that all roundings add up."""
    x, W = (1 + (128 * t.abs()).floor() % 128 / 128 for t in (x, W))
    side = torch.tensor([-0.49, 0, 0.49])[torch.arange(len(W)) % 3, None]
    return x + 0.49 / 128, W + side / 128, 0 * b


KINDS = [
    outlier_dimensions,
    duplicated_features,
    nearly_duplicated_features,
    whole_numbers,
    huge,
    tiny,
    denormal,
    zero,
    unequal_norms,
    rounding_against_us,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_hard_numbers(kind):
    check_against_the_cpu(*kind(*draw(6, 20, 100, seed=1)), k=7)


def test_shorter_norms_would_give_wrong_features_or_be_caught():
    x, W, b = rounding_against_us(*draw(6, 20, 100, seed=1))
    made = prepared(W, b)
    tight = TritonScreen(**{**made.__dict__, "lost": made.lost * 0.02, "length": made.length * 0.02})
    with contextlib.suppress(BoundBroken):
        assert not torch.equal(tight.encode(x.to(DEVICE), 7)[0], made.encode(x.to(DEVICE), 7)[0])


@pytest.mark.parametrize("chunk", [1, 5, 300])
def test_chunks_of_tokens_join_seamlessly(monkeypatch, chunk):
    x, W, b = draw(11, 8, 50)
    made = prepared(W, b)
    bytes_per_token = 4 * 50 + 4 * 25 + 12 * 50
    monkeypatch.setattr(triton_screen, "CHUNK_BYTES", chunk * bytes_per_token)
    shapes = []
    room_of = triton_screen._Room.of
    monkeypatch.setattr(triton_screen._Room, "of", lambda *of: shapes.append(len((room := room_of(*of)).upper)) or room)
    check_against_the_cpu(x, W, b, 3, made)
    assert shapes == [min(chunk, 11)]


def test_few_candidates_need_an_exact_product(monkeypatch):
    x, W, b = draw(6, 300, 200)
    W /= W.norm(dim=1, keepdim=True)
    counts = []
    order = triton_screen._order
    monkeypatch.setattr(triton_screen, "_order", lambda *of: counts.append(of[3].clone()) or order(*of))
    check_against_the_cpu(x, W, 0.1 * b, 10)
    first, both = counts
    assert (first >= 10).all()
    assert (both >= first).all()
    assert (both > first).any()
    assert both.float().mean() < 20


def test_only_rows_with_too_many_candidates_are_computed_whole(monkeypatch):
    x, W, b = draw(5, 3, 200)
    x[[1, 4]] = 0
    wholes = []
    whole = reference.encode_rows
    made = prepared(W, 0 * b)
    monkeypatch.setattr(reference, "encode_rows", lambda *of: wholes.append(of[0].tolist()) or whole(*of))
    indices, _ = made.encode(x.to(DEVICE), 2)
    assert wholes == [[[0, 0, 0]] * 2]
    assert indices[[1, 4]].tolist() == [[0, 1]] * 2
    monkeypatch.undo()
    check_against_the_cpu(x, W, 0 * b, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_that_are_not_finite(bad):
    x, W, b = draw(5, 8, 40)
    x[3, 2] = bad
    with pytest.raises(QwenScopeError, match=r"1 of 5 tokens \(the first at row 3\); check the model's dtype"):
        prepared(10 * W, b).encode(x.to(DEVICE), 3)


def test_rows_near_the_largest_number_are_still_exact():
    x, W, b = draw(3, 8, 40)
    x[1] *= 1e36
    check_against_the_cpu(x, W, b, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_screened(bad):
    _, W, b = draw(1, 8, 20)
    W[7, 3] = bad
    for dtype in (FP32, BF16):
        assert TritonScreen.of(W.to(DEVICE, dtype), b.to(DEVICE)) is None
    W[7, 3], b[0] = 0, bad
    assert TritonScreen.of(W.to(DEVICE), b.to(DEVICE)) is None


def test_weights_changed_behind_its_back_show_in_the_bound():
    x, W, b = (t.to(DEVICE) for t in draw(2, 8, 40))
    made = TritonScreen.of(W, b)
    W *= 3
    with pytest.raises(BoundBroken):
        made.encode(x, 5)


def test_tensors_need_not_be_contiguous():
    x, W, b = draw(6, 8, 40)
    strided = torch.empty(8, 6).T.copy_(x), torch.empty(8, 40).T.copy_(W), torch.empty(40, 2)[:, 0].copy_(b)
    assert not any(t.is_contiguous() for t in strided)
    check_against_the_cpu(*strided, 7)


def test_no_tokens():
    _, W, b = draw(1, 8, 40)
    indices, values = prepared(W, b).encode(torch.empty(0, 8, device=DEVICE), 3)
    assert indices.shape == values.shape == (0, 3)


def test_what_it_keeps():
    _, W, b = draw(1, 8, 40)
    assert prepared(W, b).nbytes == 40 * (8 * 2 + 3 * 4)
    assert prepared(W.bfloat16(), b).nbytes == 40 * 3 * 4


def test_the_product_sums_in_float32(monkeypatch):
    _, W, b = draw(1, 300, 4)
    made = prepared(W, b)
    assert made.sums_in_float32()
    fill = TritonScreen._bound

    def poor(screen, x, room):
        fill(screen, x, room)
        room.upper.copy_(room.upper.bfloat16())

    monkeypatch.setattr(TritonScreen, "_bound", poor)
    assert not made.sums_in_float32()


COMPILE = """
import inspect

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


def compile_only(self, *args, grid, warmup, **named):
    sizes = {name: named.pop(name) for name in list(named) if name in self.arg_names}
    given = inspect.signature(self.fn).bind(*args, **sizes).arguments
    fixed = {name: value for name, value in given.items() if name.isupper() or value is None}
    kinds = {int: "i32", float: "fp32"}
    signature = {
        name: "constexpr" if name in fixed else TYPES[value.dtype] if isinstance(value, torch.Tensor) else kinds[type(value)]
        for name, value in given.items()
    }
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(self, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=named)
    assert made.metadata.shared <= 227 * 1024
    print(self.__name__)


triton.JITFunction.run = compile_only
from qwen_scope.kernels import triton_screen

W, b, x = torch.randn(512, 64), torch.randn(512), torch.randn(20, 64)
triton_screen.TritonScreen.of(W, b)
for weights in (W, W.bfloat16()):
    screen = triton_screen.TritonScreen(weights, W.bfloat16(), b, b, b, 1.0)
    screen.encode(x, 4)
screen.encode(x[:1], 100)
"""


def test_all_compiles_for_an_h100(tmp_path):
    # No GPU is needed for that. The interpreter takes much that the compiler does not.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = {"measure_rows", "bound_pre_activations", "collect", "compute_chosen", "order"}
    assert names == set(done.stdout.split())
