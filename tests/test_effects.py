"""Logit effects against the derivative of the model's own logits, and the highest products against a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qwen_scope import Backbone, QwenScopeError, Suite
from qwen_scope.index import ranking
from qwen_scope.index.effects import LinearNorm, linear_norm, logit_effects
from qwen_scope.index.ranking import Highest, products

VOCABULARY, D_MODEL = 320, 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def backbone(make_model, architecture) -> Backbone:
    """A model of each architecture whose final norm scales every dimension differently."""
    backbone = Backbone(make_model(architecture))
    with torch.no_grad():
        for number, parameter in enumerate(backbone.final_norm.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number))
    return backbone


def derivative(backbone: Backbone, stream: Tensor, direction: Tensor) -> Tensor:
    """Of the model's logits by its last layer's output, along a direction."""

    def logits(x: Tensor) -> Tensor:
        with backbone.editing({len(backbone.layers) - 1: lambda residual: x.expand_as(residual)}):
            return backbone.model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits[0, 0]

    return torch.autograd.functional.jvp(logits, stream, direction)[1]


def test_effects_are_the_derivative_of_the_logits(backbone, architecture):
    directions = draw(5, D_MODEL, seed=3)
    promoted, suppressed = logit_effects(backbone, directions, count=VOCABULARY)
    for number, direction in enumerate(directions):
        # Without the mean nothing of it is lost in a LayerNorm, and the stream has nothing of the direction to take out.
        centred = direction - direction.mean()
        stream = draw(D_MODEL, seed=number)
        stream -= stream.mean()
        basis = torch.stack([centred, torch.ones(D_MODEL)])
        stream -= basis.T @ torch.linalg.lstsq(basis.T, stream[:, None]).solution[:, 0]
        stream /= stream.square().mean().sqrt()
        expected = derivative(backbone, stream, direction)
        expected = expected - expected.mean()
        for found in (promoted, suppressed):
            effects = torch.empty(VOCABULARY)
            effects[torch.from_numpy(found.numbers[number]).long()] = torch.from_numpy(found.values[number])
            torch.testing.assert_close(effects, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert (np.diff(promoted.values[number]) <= 0).all()
        assert (np.diff(suppressed.values[number]) >= 0).all()


def test_what_is_parallel_to_the_stream_is_left_out(llama):
    # Elsewhere the derivative differs by the part that the norm takes out, and by one positive factor.
    backbone = Backbone(llama)
    direction, stream = draw(D_MODEL), 3 * draw(D_MODEL, seed=1)
    size = stream.square().mean().sqrt()
    rest = direction - stream * (stream @ direction) / (stream @ stream)
    found = logit_effects(backbone, rest[None], count=VOCABULARY).promoted
    expected = derivative(backbone, stream, direction) * size
    expected = (expected - expected.mean())[torch.from_numpy(found.numbers[0]).long()]
    torch.testing.assert_close(torch.from_numpy(found.values[0]), expected, rtol=1e-3, atol=1e-4)


def test_the_norms_scale_is_found(backbone, architecture):
    weight = next(backbone.final_norm.parameters()).detach()
    found = linear_norm(backbone.final_norm, D_MODEL)
    adds_one = architecture in ("qwen3.5", "qwen3.5-moe", "qwen3.5-vl", "gemma3")
    torch.testing.assert_close(found.gain, weight + adds_one, rtol=1e-4, atol=1e-5)
    assert found.removes_mean == (architecture in ("gpt2", "gpt-neox"))


def test_a_norm_in_bfloat16_is_not_rounded_further():
    norm = nn.LayerNorm(D_MODEL)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    norm.bfloat16()
    gain, removes_mean = linear_norm(norm, D_MODEL)
    torch.testing.assert_close(gain, norm.weight.detach().float(), rtol=1e-5, atol=1e-6)
    assert removes_mean
    assert norm.weight.dtype == torch.bfloat16


def test_no_norm_and_others():
    assert torch.equal(linear_norm(nn.Identity(), 4)(torch.eye(4)), torch.eye(4))
    assert LinearNorm(torch.ones(2), removes_mean=True)(torch.tensor([[1.0, 3.0]])).tolist() == [[-1, 1]]
    for other in (nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.0)):
        with pytest.raises(QwenScopeError, match=f"found {type(other).__name__}"):
            linear_norm(other, 4)


def test_tokens_that_no_tokenizer_has_are_left_out(llama, tokenizer):
    directions = draw(3, D_MODEL)
    assert logit_effects(Backbone(llama), directions, count=400).promoted.numbers.shape == (3, VOCABULARY)
    few = logit_effects(Backbone(llama), directions, count=400, vocabulary=20)
    assert set(few.promoted.numbers.flatten()) == set(range(20))
    assert np.abs(few.promoted.values.sum(axis=1)).max() < 1e-3  # centred over these
    # By default the tokenizer says how many there are.
    small = Backbone(llama, tokenizer)
    assert logit_effects(small, directions, count=400).promoted.numbers.max() == len(tokenizer) - 1


def test_a_direction_that_points_at_a_token_promotes_it(llama):
    backbone = Backbone(llama)
    tokens = [7, 100, 319]
    directions = backbone.unembedding.detach()[tokens].double()
    found = logit_effects(backbone, directions, count=3)
    assert found.promoted.numbers[:, 0].tolist() == tokens
    opposite = logit_effects(backbone, -directions, count=3)
    assert opposite.suppressed.numbers[:, 0].tolist() == tokens
    np.testing.assert_array_equal(opposite.suppressed.values, -found.promoted.values)


def test_a_direction_of_zeros_promotes_the_first_tokens(llama):
    found = logit_effects(Backbone(llama), torch.zeros(2, D_MODEL), count=4)
    for ranked in found:
        assert ranked.numbers.tolist() == [[0, 1, 2, 3]] * 2
        assert not ranked.values.any()
        assert not np.signbit(ranked.values).any()


def test_directions_of_another_width(llama, unchecked):
    with pytest.raises(QwenScopeError, match=r"expected directions of width 32, .*found 16"):
        logit_effects(Backbone(llama), draw(3, 16))


# The highest of many products


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    count=st.integers(1, 8),
    width=st.sampled_from([1, 3, 7, 64]),
    distinct=st.sampled_from([1, 2, 5, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_the_highest_are_those_of_a_stable_sort(rows, columns, count, width, distinct, seed):
    scores = torch.randint(distinct, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    best = Highest(rows, count, scores.device)
    for first in range(0, columns, width):
        part = scores[:, first : first + width]
        for start in range(0, rows, 4):
            best.add(part[start : start + 4], slice(start, min(start + 4, rows)), first)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    found, few = best.result(), min(count, columns)
    np.testing.assert_array_equal(found.numbers[:, :few], order[:, :few].numpy())
    np.testing.assert_array_equal(found.values[:, :few], values[:, :few].numpy())
    assert (found.numbers[:, few:] == -1).all()
    assert not found.values[:, few:].any()


def test_products_come_in_blocks(monkeypatch):
    monkeypatch.setattr(ranking, "COLUMNS", 8)
    monkeypatch.setattr(ranking, "BLOCK_BYTES", 100)
    rows, table = draw(10, 5), draw(21, 5, seed=1).bfloat16()
    found = torch.full((10, 21), torch.nan)
    for some, first, block in products(rows, table):
        assert block.nbytes <= 100
        found[some, first : first + block.shape[1]] = block
    torch.testing.assert_close(found, rows @ table.float().T)


@pytest.mark.parametrize("layer", [15, 23])
def test_writing_a_direction_raises_what_it_promotes_through_the_later_layers_too(bundled, layer):
    sae = Suite.from_pretrained(layers=[layer])[layer]
    text = "The committee met on Tuesday to discuss the new football stadium and its cost"
    ids = bundled.tokenizer(text, return_tensors="pt")["input_ids"]
    found = sae.encode(bundled.residuals(ids, layers=[layer])[layer][0, 1:])
    numbers = found.indices[:, 0].unique()
    directions = sae.decoder_rows()[numbers]
    promoted, suppressed = logit_effects(bundled, directions)

    def logits() -> Tensor:
        with torch.no_grad():
            return bundled.model(input_ids=ids, use_cache=False).logits[0, 1:].mean(dim=0)

    before, raised = logits(), []
    for direction, up, down in zip(directions, promoted.numbers, suppressed.numbers, strict=True):
        with bundled.editing({layer: lambda x, written=direction: x + 10 * written}):
            change = logits() - before
        raised.append(bool(change[up].mean() > change[down].mean()))
    assert len(raised) >= 8
    assert np.mean(raised) > 0.8  # half of them would be chance
