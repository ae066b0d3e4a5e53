"""Which tokens are steered: masks against plain Python, words that are read back, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError
from qwen_scope.steering import Where

POSITIONS = st.tuples(st.integers(-9, 9), st.integers(-9, 9)).filter(lambda p: (p[0] < 0) != (p[1] < 0) or p[0] <= p[1])
# The parts of a Where: building one checks its types at random, which hypothesis forbids in a strategy.
WHERES = st.tuples(st.booleans(), st.booleans(), st.lists(POSITIONS, max_size=3).map(tuple)).filter(any)


def steered(where: Where, length: int, total: int) -> set[int]:
    """The positions that are steered, one by one."""
    found = set()
    for position in range(total):
        if where.prompt and 1 <= position < length:
            found.add(position)
        if where.generated and position >= length:
            found.add(position)
        for first, last in where.positions:
            first, last = (each + length if each < 0 else each for each in (first, last))
            if first <= position <= last:
                found.add(position)
    return found


def fits(where: Where, length: int) -> bool:
    try:
        where.check(length)
    except QwenScopeError:
        return False
    return True


@given(WHERES)
def test_what_is_written_is_read_back(parts):
    where = Where(*parts)
    assert Where.parse(str(where)) == where


@given(WHERES, st.integers(1, 12))
def test_a_mask_is_what_going_through_the_positions_gives(parts, length):
    where = Where(*parts)
    if not fits(where, length):
        return
    mask = where.mask(torch.arange(length + 4), length)
    assert set(mask.nonzero()[:, 0].tolist()) == steered(where, length, length + 4)
    # In any order, with padding between, and one at a time.
    shuffled = torch.tensor([length + 3, -1, 0, length - 1, length])
    assert where.mask(shuffled, length).tolist() == [
        int(at) in steered(where, length, length + 4) for at in shuffled.tolist()
    ]


@given(WHERES, st.integers(1, 12))
def test_what_fits_a_prompt(parts, length):
    where = Where(*parts)
    good = all(-length <= a < length and -length <= b < length and a % length <= b % length for a, b in where.positions)
    assert fits(where, length) == good


@given(WHERES, WHERES)
def test_edits_that_can_meet_overlap(parts, others):
    one, other = Where(*parts), Where(*others)
    for length in range(1, 20):
        if fits(one, length) and fits(other, length) and steered(one, length, 24) & steered(other, length, 24):
            assert one.overlaps(other)
            assert other.overlaps(one)
            return


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("prompt", "generated"),
        ("generated", "0,3-7"),
        ("generated", "-1"),
        ("prompt", "0"),
        ("0-2", "3-5"),
        ("-1", "-3--2"),
        ("0,2,4", "1,3,5"),
        ("1-9,0", "10"),
        # As many as a server may be sent: to look at every pair of them would take minutes.
        (",".join(map(str, range(0, 40_000, 2))), ",".join(map(str, range(1, 40_000, 2)))),
    ],
    ids=lambda text: text[:20],
)
def test_edits_that_never_meet_do_not_overlap(one, other):
    assert not Where.parse(one).overlaps(Where.parse(other))
    assert not Where.parse(other).overlaps(Where.parse(one))


@given(st.text(max_size=30) | st.text("0123456789-, allpromptgenerated", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        where = Where.parse(text)
    except QwenScopeError:
        return
    assert Where.parse(str(where)) == where


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("all", Where()),
        ("both", Where()),
        ("prompt,generated", Where()),
        ("prompt", Where(generated=False)),
        ("generated", Where(prompt=False)),
        ("0,1,5", Where(False, False, ((0, 0), (1, 1), (5, 5)))),
        ("3-7", Where(False, False, ((3, 7),))),
        ("-1", Where(False, False, ((-1, -1),))),
        ("-3--1", Where(False, False, ((-3, -1),))),
        ("1--2", Where(False, False, ((1, -2),))),
        (" 0 , generated ", Where(False, True, ((0, 0),))),
    ],
)
def test_words(text, where):
    assert Where.parse(text) == where


@pytest.mark.parametrize("text", ["", ",", "0,", "7-3", "-1--3", "a", "1.5", "1-", "٣", "all prompt", "1-2-3", "1e3"])
def test_words_that_are_refused(text):
    with pytest.raises(QwenScopeError, match=r"^expected (tokens to steer|positions in order)"):
        Where.parse(text)


def test_nothing_is_nowhere():
    with pytest.raises(QwenScopeError, match="expected tokens to steer, found none"):
        Where(prompt=False, generated=False)


@pytest.mark.parametrize(
    ("text", "length", "message"),
    [
        ("5", 5, r"positions from 0 to 4 of the prompt \(or from -5 to -1, from its end\), found 5"),
        ("-6", 5, "found -6"),
        ("3-5", 5, "found 5"),
        ("4--3", 5, "found 4--3, which is 4-2 of a prompt of 5 tokens"),
    ],
)
def test_positions_beyond_a_prompt(text, length, message):
    with pytest.raises(QwenScopeError, match=message):
        Where.parse(text).check(length)
