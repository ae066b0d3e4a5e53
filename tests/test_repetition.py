"""Whether texts loop, and which features read it."""

from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope import QwenScopeError, Sampling, Scope
from qwen_scope.evidence.fluency import repetition
from qwen_scope.finetuning.repeats import LEAST, LONGEST, TIMES, Loop, loop_of, repeat_ratio
from qwen_scope.finetuning.repetition import looping_samples, repetition_features
from qwen_scope.finetuning.rewards import against_loops, against_repetition, reward_of


@given(before=st.integers(0, 30), period=st.integers(1, 20), times=st.integers(TIMES, 8), rest=st.integers(0, 19))
def test_a_block_of_distinct_tokens_again_and_again_is_the_loop_it_was_made_of(before, period, times, rest):
    rest %= period
    block = [1000 + n for n in range(period)]
    ids = [*range(before), *block * times, *block[:rest]]
    length = period * times + rest
    if length < LEAST:
        assert loop_of(ids) is None
    else:
        assert loop_of(ids) == Loop(before, period, length)
        assert loop_of(ids).times == length / period


def slow_loop(ids: list[int], longest: int) -> Loop | None:
    for period in range(1, longest + 1):
        length = min(period, len(ids))
        while length < len(ids) and ids[len(ids) - length - 1] == ids[len(ids) - length - 1 + period]:
            length += 1
        if length >= TIMES * period and length >= LEAST:
            return Loop(len(ids) - length, period, length)
    return None


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(1, 9))
def test_loops_are_those_of_the_definition_counted_token_by_token(before, block, longest):
    ids = before + block * 4
    assert loop_of(ids, longest) == slow_loop(ids, longest)
    assert loop_of(before, longest) == slow_loop(before, longest)


def test_a_loop_ends_with_the_text_and_is_no_longer_than_is_looked_for():
    looped = [7, *[1, 2, 3, 4] * 5]
    assert loop_of(looped) == Loop(1, 4, 20)
    assert loop_of([*looped, 9]) is None  # such as the token by which the model ends its text
    assert loop_of(list(range(LONGEST)) * TIMES) is not None
    assert loop_of(list(range(LONGEST + 1)) * TIMES) is None
    assert loop_of([]) is None
    with pytest.raises(QwenScopeError, match="at least 1 token"):
        loop_of(looped, 0)


def test_the_repeat_ratio_is_the_share_of_texts_that_loop():
    looped, plain = [5] * LEAST, list(range(40))
    assert repeat_ratio([looped, plain, plain, looped]) == 0.5
    assert repeat_ratio([plain]) == 0
    with pytest.raises(QwenScopeError, match="found none"):
        repeat_ratio([])


def test_rewards_by_name():
    looped, plain = [5] * LEAST, list(range(LEAST))
    assert reward_of("repetition") is against_repetition
    assert against_repetition([looped, plain], prompts=["", ""]) == [-repetition(looped), 0]
    assert repetition(looped) == 1 - 1 / (LEAST - 3)
    assert reward_of("loop") is against_loops
    assert against_loops([looped, plain]) == [-1, 0]
    assert reward_of("length:4")(completion_ids=[[1] * 4, [1] * 3, [1] * 40, []]) == [0, -0.25, -1, -1]


def own_reward(prompts, completions, completion_ids, **rest):
    return [float(len(text)) for text in completions]


def partial_reward(completion_ids, **rest):
    return [None, 1.5]


def short_reward(completion_ids, **rest):
    return [1.0]


def strange_reward(completion_ids, **rest):
    return [float("nan") for _ in completion_ids]


def test_a_reward_of_the_users_own_and_what_is_wrong_with_one():
    reward = reward_of("test_repetition:own_reward")
    assert reward(prompts=["a", "b"], completions=["ab", "c"], completion_ids=[[1], [2]]) == [2, 1]
    assert reward.__name__ == "test_repetition_own_reward"
    assert reward_of("test_repetition:partial_reward")(completion_ids=[[1], [2]]) == [None, 1.5]
    with pytest.raises(QwenScopeError, match="found 1 values"):
        reward_of("test_repetition:short_reward")(completion_ids=[[1], [2]])
    with pytest.raises(QwenScopeError, match="0 are finite"):
        reward_of("test_repetition:strange_reward")(completion_ids=[[1], [2]])
    with pytest.raises(QwenScopeError, match="found that it fails"):
        reward_of("test_repetition:own_reward")(completion_ids=[[1]])
    for name in ("repetitions", "length:", "length:x", ":f", "no_such_module:f", "test_repetition:LEAST", "length:0"):
        with pytest.raises(QwenScopeError):
            reward_of(name)


@pytest.fixture(scope="module")
def scope(llama, tokenizer, suite) -> Scope:
    return Scope(llama, suite, tokenizer)


def dense_difference(scope: Scope, samples: list[list[int]], layer: int) -> torch.Tensor:
    """By the definition, with dense activations and loops."""
    totals = []
    for ids in samples:
        dense = scope.features(ids)[layer].to_dense().clamp_min(0).double()
        places = defaultdict(list)
        for at, token in enumerate(ids):
            if at:
                places[token].append(at)
        each = [dense[at[-1]] - dense[at[0]] for at in places.values() if len(at) > 1]
        if each:
            totals.append(torch.stack(each).mean(0))
    return torch.stack(totals).mean(0)


def test_repetition_features_are_those_of_a_dense_reading(scope):
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(5, 12, (n,), generator=draw).tolist() for n in (30, 12, 2, 50)]
    samples.append([20, 21, 22])  # nothing repeats
    for layer in (0, 2):
        expected = dense_difference(scope, samples, layer)
        found = repetition_features(scope, samples, layer, count=6)
        assert [f.number for f in found] == expected.argsort(descending=True)[:6].tolist()
        for feature in found:
            assert feature.difference == pytest.approx(float(expected[feature.number]), rel=1e-5)
            assert feature.difference == pytest.approx(feature.last - feature.first)
            assert feature.name == f"{layer}/{feature.number}"
            assert 0 < feature.rises <= 1


def test_each_sample_counts_once_and_position_0_is_no_occurrence(scope):
    once = [9, 30, 31, 30, 31, 30]
    (first, *_) = repetition_features(scope, [once], 1)
    assert repetition_features(scope, [once, once, once], 1)[0] == first
    with pytest.raises(QwenScopeError, match="repeat a token after position 0"):
        repetition_features(scope, [[9, 30, 9]], 1)


def test_features_are_found_only_where_they_can_be(scope):
    with pytest.raises(QwenScopeError, match="one of the layers"):
        repetition_features(scope, [[1, 2, 1, 2]], 7)
    with pytest.raises(QwenScopeError, match="at least 1 feature"):
        repetition_features(scope, [[1, 2, 1, 2]], 1, count=0)


def test_looping_samples_are_the_models_own_texts_that_loop(scope):
    prompts = [f"the capital of {name}" for name in ("France", "Italy", "Spain", "Rome", "Paris", "the")]
    found = looping_samples(scope, prompts, Sampling(60))
    expected = [
        [*text.prompt_ids, *text.ids] for text in scope.generate(prompts, None, Sampling(60)) if loop_of(text.ids)
    ]
    assert found == expected
    assert looping_samples(scope, prompts, Sampling(60), most=1) == expected[:1]
