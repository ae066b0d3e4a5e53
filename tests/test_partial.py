"""Statistics and examples of a layer against the same from dense matrices, in one go or in parts."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.index.layout import HALF_OCTAVES
from qwen_scope.index.partial import NEVER, PER_OCTAVE, Chunk, Keep, Partial, half_octave, scrambled
from qwen_scope.index.windows import activations_around

D_SAE, K = 12, 4
KEEP = Keep(examples=1, window=(2, 1))


def chunk(seed: int, lengths: list[int], first: int = 0) -> Chunk:
    """Random features at the tokens of some pieces; some values are 0, some tokens do not count."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    indices = np.stack([random.permutation(D_SAE)[:K] for _ in range(tokens)]).astype(np.int32)
    # Few different values, so that there are ties.
    values = (random.integers(0, 9, (tokens, K)) * 0.75).astype(np.float32)
    piece = np.repeat(np.arange(len(lengths)), lengths) + first
    return Chunk(indices, values, first + np.arange(tokens), piece, random.random(tokens) < 0.8)


def dense(part: Chunk) -> np.ndarray:
    found = np.zeros((len(part.indices), D_SAE))
    np.put_along_axis(found, part.indices, part.values, axis=1)
    return found


def of(parts: list[Chunk], outliers: int = 0) -> Partial:
    found = Partial.none(D_SAE, K, sum(KEEP.window) + 1)
    for part in parts:
        found = found.with_chunk(part, outliers, KEEP)
    return found


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(st.integers(0, 99), lengths)
def test_statistics_are_those_of_the_dense_matrix(seed: int, lengths: list[int]):
    part = chunk(seed, lengths, first=100)
    found, acts = of([part], outliers=3), dense(part) * part.kept[:, None]
    assert found.kept == part.kept.sum()
    assert found.outliers == 3
    assert found.fired.tolist() == (acts > 0).sum(0).tolist()
    np.testing.assert_allclose(found.total, acts.sum(0), rtol=1e-12)
    assert found.highest.tolist() == acts.max(0).tolist()
    first = [100 + column.nonzero()[0][0] if column.any() else NEVER for column in acts.T]
    assert found.first.tolist() == first
    assert found.histogram.sum(1).tolist() == found.fired.tolist()
    for feature in range(D_SAE):
        bins = half_octave(acts[:, feature][acts[:, feature] > 0].astype(np.float32))
        assert found.histogram[feature].tolist() == np.bincount(bins, minlength=len(HALF_OCTAVES)).tolist()


@given(st.integers(0, 99), lengths)
def test_top_examples_are_the_highest_of_their_pieces(seed: int, lengths: list[int]):
    part = chunk(seed, lengths)
    found, acts = of([part]).top, dense(part) * part.kept[:, None]
    for feature in range(D_SAE):
        peaks = []
        for piece in np.unique(part.piece):
            here = np.flatnonzero(part.piece == piece)
            best = here[acts[here, feature].argmax()]
            if acts[best, feature] > 0:
                peaks.append((-acts[best, feature], best))
        expected = [(place, -value) for value, place in sorted(peaks)[: KEEP.top]]
        mine = found.feature == feature
        assert list(zip(found.place[mine].tolist(), found.value[mine].tolist(), strict=True)) == expected


@given(st.integers(0, 99), lengths)
def test_examples_across_the_range_are_a_fixed_draw_from_each_octave(seed: int, lengths: list[int]):
    part = chunk(seed, lengths)
    found, acts = of([part]).range, dense(part) * part.kept[:, None]
    for feature in range(D_SAE):
        places = acts[:, feature].nonzero()[0]
        octaves = half_octave(acts[places, feature].astype(np.float32)) // 2
        drawn = scrambled(places, np.full(len(places), feature))
        for octave in range(len(HALF_OCTAVES) // 2):
            mine = (found.feature == feature) & (found.group == octave)
            expected = places[octaves == octave][np.argsort(drawn[octaves == octave])][:PER_OCTAVE]
            assert found.place[mine].tolist() == expected.tolist()


@given(st.integers(0, 99), st.integers(1, 6), lengths)
def test_windows_hold_the_activations_around(seed: int, chunks: int, lengths: list[int]):
    parts = [chunk(seed + n, lengths, first=1000 * n) for n in range(chunks)]
    acts = {n: dense(part) for n, part in enumerate(parts)}
    for best in (of(parts).top, of(parts).range):
        for feature, place, window in zip(best.feature, best.place, best.window, strict=True):
            part, at = parts[place // 1000], place % 1000
            for offset, value in zip(range(-2, 2), window, strict=True):
                inside = 0 <= at + offset < len(part.piece) and part.piece[at + offset] == part.piece[at]
                assert value == (acts[place // 1000][at + offset, feature] if inside else 0)


def same(a: Partial, b: Partial) -> None:
    for name, array in a.arrays().items():
        np.testing.assert_array_equal(array, b.arrays()[name], err_msg=name)


@given(st.integers(0, 99), lengths, st.integers(2, 5))
def test_parts_joined_are_the_whole(seed: int, lengths: list[int], chunks: int):
    parts = [chunk(seed + n, lengths, first=1000 * n) for n in range(chunks)]
    joined = of(parts[:1])
    for part in parts[1:]:
        joined = joined.merged(of([part]), KEEP)
    whole = of(parts)
    # Sums are rounded in another order.
    np.testing.assert_allclose(joined.total, whole.total, rtol=1e-12)
    same(replace(joined, total=whole.total), whole)


def test_it_survives_as_arrays():
    found = of([chunk(1, [5, 9, 3])], outliers=2)
    same(Partial.of_arrays(found.arrays()), found)


def test_the_sample_is_bounded_and_the_same_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qwen_scope.index.partial.SAMPLED", 20)
    parts = [chunk(n, [9] * 3, first=1000 * n) for n in range(4)]
    joined = of(parts[:1])
    for part in parts[1:]:
        joined = joined.merged(of([part]), KEEP)
    assert len(joined.sample) == 20
    assert (np.diff(joined.sampled) > 0).all()
    other = of(parts[2:3]).merged(of(parts[3:]), KEEP)
    other = of(parts[1:2]).merged(other, KEEP)
    other = of(parts[:1]).merged(other, KEEP)
    np.testing.assert_array_equal(joined.sample, other.sample)


@given(st.floats(2.0**-30, 2.0**30, width=32))
def test_half_octaves(value: float):
    bin = int(half_octave(np.array([value], np.float32))[0])
    exponent = HALF_OCTAVES[bin] / 2
    assert bin == 0 or value >= 2**exponent
    assert bin == len(HALF_OCTAVES) - 1 or value < 2 ** (exponent + 0.5)


def test_powers_of_two_begin_a_half_octave():
    powers = np.exp2(np.arange(-10, 20)).astype(np.float32)
    assert half_octave(powers).tolist() == list(range(0, 60, 2))
    assert half_octave(np.nextafter(powers, np.float32(0)))[1:].tolist() == list(range(1, 58, 2))


def test_windows_do_not_reach_into_other_pieces():
    indices, values = np.zeros((4, 1), np.int32), np.arange(1, 5, dtype=np.float32)[:, None]
    found = activations_around(indices, values, np.array([0, 0, 1, 1]), np.array([1, 2]), np.array([0, 0]), 2, 2)
    assert found.tolist() == [[0, 1, 2, 0, 0], [0, 0, 3, 4, 0]]
