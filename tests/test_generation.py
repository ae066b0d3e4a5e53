"""Text out: what is generated together is what each is alone, and what transformers itself generates."""

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.generation import Generation, Sampling
from qwen_scope.generation import generate as generating
from qwen_scope.generation.batch import Batch
from qwen_scope.generation.cache import ROOM, RowCache, prompt_cache
from qwen_scope.generation.continuation import PARTIAL, Continuation
from qwen_scope.generation.generate import continuation
from qwen_scope.generation.sampling import draw
from qwen_scope.steering import Steering
from qwen_scope.tokens import tokenize

NEVER = 5000
"""An end that no tiny model knows."""
STEERINGS = [
    None,
    "0/5:4@generated",
    "1/7:=6",
    "2/9:*0",
    "0/3:ablate 2/11:ablate",
    "1/20:-5@prompt 2/4:3@generated",
    "0/5:4 1/7:=6@generated 2/9:*3",
    "2/100:8@0,-1",
]


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


@pytest.fixture(scope="module")
def bare(model, suite) -> Scope:
    """A scope of each architecture, without a tokenizer."""
    return Scope(model, suite)


def some_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def own(model, ids: Sequence[int], count: int, end: int = NEVER) -> list[int]:
    """What transformers' own generate says under greedy decoding."""
    read = torch.tensor([list(ids)])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": end, "pad_token_id": 2}
    return model.generate(read, attention_mask=torch.ones_like(read), **options)[0, len(ids) :].tolist()


def greedy(count: int, **options) -> Sampling:
    return Sampling(**{"max_new_tokens": count, "ignore_eos": True, **options})


def pieces(tokens) -> str:
    return "".join(token.piece for token in tokens)


# Against transformers


@pytest.mark.parametrize(("length", "count"), [(1, 9), (6, ROOM + 6)])
def test_greedy_is_what_transformers_generates(bare, length, count):
    # The long one makes the cache move, and windows of 4 tokens slide.
    ids = some_ids(length)
    found = bare.generate(ids, None, greedy(count))
    assert found.ids == own(bare.backbone.model, ids, count)
    assert found.finish == "length"
    assert found.prompt_ids == ids
    assert found.steered_tokens == []


@pytest.mark.parametrize("steering", STEERINGS[1:])
def test_steering_is_what_it_is_around_transformers_generate(bare, steering):
    ids = some_ids(5, seed=1)
    found = bare.generate(ids, steering, greedy(6))
    with bare.steered(steering) as following:
        expected = own(bare.backbone.model, ids, 6)
    assert found.ids == expected
    assert found.steered_tokens == following.touched[0]


def test_the_steerings_of_these_tests_make_other_texts(scope):
    texts = [tuple(scope.generate(some_ids(5, seed=1), item, greedy(12)).ids) for item in STEERINGS]
    assert len(set(texts)) >= 6


def test_texts_generated_together_are_what_each_is_alone(bare):
    # Lengths and ends in no order, so that rows join and leave in the first, the last and middle places.
    lengths = [3, 17, 1, 9, 40, 2, 25, 5, 12, 1, 30, 7]
    counts = [5, 3, 10, 1, 4, 7, 2, 9, 3, 6, 5, 8]
    prompts = [some_ids(length, seed) for seed, length in enumerate(lengths)]
    steerings = [STEERINGS[n % len(STEERINGS)] for n in range(12)]
    samplings = [greedy(count, candidates=n % 3) for n, count in enumerate(counts)]
    together = bare.generate(prompts, steerings, samplings)
    for one, prompt, steering, sampling in zip(together, prompts, steerings, samplings, strict=True):
        same(one, bare.generate(prompt, steering, sampling))


def same(one: Generation, other: Generation):
    assert one.ids == other.ids
    assert one.text == other.text
    assert one.finish == other.finish
    assert one.steered_tokens == other.steered_tokens
    for mine, theirs in zip(one.tokens, other.tokens, strict=True):
        # Weights as large as these make more of rounding than those of trained models.
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [c.id for c in mine.candidates] == [c.id for c in theirs.candidates]


def test_more_texts_than_are_generated_at_once(scope, monkeypatch):
    monkeypatch.setattr(generating, "ROWS", 3)
    prompts = [some_ids(1 + seed % 5, seed) for seed in range(11)]
    samplings = [greedy(1 + (seed * 5) % 9) for seed in range(11)]
    together = scope.generate(prompts, ["1/7:=6", None] * 5 + [None], samplings)
    assert [len(text.tokens) for text in together] == [sampling.max_new_tokens for sampling in samplings]
    for n in (0, 5, 10):
        same(together[n], scope.generate(prompts[n], "1/7:=6" if n % 2 == 0 and n < 10 else None, samplings[n]))


def test_a_bf16_model(suite, make_model):
    model = make_model("qwen3.5").to(torch.bfloat16)
    scope = Scope(model, suite)
    ids = some_ids(6)
    assert scope.generate(ids, None, greedy(20)).ids == own(model, ids, 20)
    with scope.steered("0/5:4 1/7:=6"):
        expected = own(model, ids, 20)
    assert scope.generate(ids, "0/5:4 1/7:=6", greedy(20)).ids == expected


# What a call takes


def test_one_prompt_and_several(scope):
    one = scope.generate("the capital", "1/7:=6", greedy(4))
    assert isinstance(one, Generation)
    assert str(one) == one.text == pieces(one.tokens)
    both = scope.generate(["the capital", "of Italy"], "1/7:=6", greedy(4))
    same(both[0], one)
    assert [text.steering for text in both] == ["1/7:=6"] * 2
    each = scope.generate(["the capital", "the capital"], ["1/7:=6", None], greedy(4))
    same(each[0], one)
    assert each[1].steering == ""
    several = scope.generate("the capital", [Steering.of("1/7:=6"), None, ["0/5:4", "2/9:*0"]], greedy(4))
    same(several[0], one)
    assert [text.steering for text in several] == ["1/7:=6", "", "0/5:4 2/9:*0"]
    assert scope.generate("the capital", ["1/7:=6", "0/5:4"], greedy(4)).steering == "1/7:=6 0/5:4"
    seeds = scope.generate("the capital", None, [greedy(4, temperature=1, seed=seed) for seed in range(3)])
    assert [text.seed for text in seeds] == [0, 1, 2]


@pytest.mark.parametrize(
    ("inputs", "steering", "samplings"),
    [
        (["the", "of"], [None, None, None], Sampling()),
        (["the", "of"], None, [Sampling()] * 3),
        ("the", [[], [], []], [Sampling()] * 2),
    ],
)
def test_wrong_counts_are_refused(scope, inputs, steering, samplings):
    with pytest.raises(QwenScopeError, match="as many steerings and samplings as prompts"):
        scope.generate(inputs, steering, samplings)


def test_messages_open_the_turn_of_the_assistant(scope):
    messages = [{"role": "user", "content": "Paris"}]
    plain = scope.generate(messages, None, greedy(3))
    assert plain.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    off = scope.generate(messages, None, greedy(3), thinking=False)
    assert off.prompt == plain.prompt + "<think>\n\n</think>\n\n"
    assert scope.generate(messages, None, greedy(3), thinking=True).prompt == plain.prompt
    token = next(scope.stream(messages, None, greedy(3), thinking=False))
    assert token.id == off.ids[0]
    assert scope.side_by_side(messages, "1/7:=6", greedy(3), thinking=False).steered.prompt == off.prompt


def test_a_stream_is_of_one_prompt(scope):
    with pytest.raises(QwenScopeError, match="one prompt to stream, found 2"):
        scope.stream(["the", "of"])
    with pytest.raises(QwenScopeError, match="side by side"):
        scope.side_by_side(["the", "of"], "1/7:=6")


def test_a_stream_is_the_text(scope):
    found = scope.generate("the capital", "1/7:=6", greedy(15, candidates=2))
    assert list(scope.stream("the capital", "1/7:=6", greedy(15, candidates=2))) == found.tokens
    assert pieces(found.tokens) == found.text


def test_side_by_side_of_one_seed(scope):
    sampling = greedy(12, temperature=1.0, seed=4)
    found = scope.side_by_side("the capital of", "1/7:=40", sampling)
    assert found.original.ids == scope.generate("the capital of", None, sampling).ids
    assert found.steered.ids != found.original.ids
    assert found.steered.trace is not None
    assert found.steered.trace.effective
    assert str(found).startswith(f"original: {found.original.text}")
    assert found.to_dict()["steered"]["trace"]["effective"] is True
    nothing = scope.side_by_side("the capital of", None, sampling)
    assert nothing.original.ids == nothing.steered.ids
    # A strength of 0 steers, and changes nothing: the same chance gives the same text.
    zero = scope.side_by_side("the capital of", "1/7:0", sampling)
    assert zero.original.ids == zero.steered.ids
    assert zero.steered.trace is not None
    assert not zero.steered.trace.effective


def test_side_by_side_as_it_comes(scope):
    sampling = greedy(9, temperature=1.0, seed=4, candidates=2)
    seen = list(scope.stream_side_by_side("the capital of", "1/7:=40", sampling))
    whole = scope.side_by_side("the capital of", "1/7:=40", sampling)
    assert (seen[-1].original.ids, seen[-1].steered.ids) == (whole.original.ids, whole.steered.ids)
    assert seen[-1].steered.trace == whole.steered.trace
    for before, after in itertools.pairwise(seen[:-1]):
        assert before.steered.trace is None
        assert after.original.ids[: len(before.original.ids)] == before.original.ids
        assert len(before.steered.ids) <= len(after.steered.ids)
    assert len(seen) > 5
    with pytest.raises(QwenScopeError, match="side by side, found several"):
        list(scope.stream_side_by_side(["the", "of"], "1/7:=6"))


def test_a_trace_if_asked_for(bare):
    ids = some_ids(4)
    found = bare.generate([ids, ids], ["0/5:4@generated", None], greedy(6), trace=True)
    assert found[0].trace.edits[0].positions == list(range(4, 9))  # the last token is never read
    assert found[0].steered_tokens == [5]
    assert len(found[0].trace.kl) == 6
    assert found[0].trace.kl[0] == pytest.approx(0, abs=1e-6)  # before anything was steered
    assert found[0].trace.effective
    assert found[1].trace.edits == []
    assert not found[1].trace.steered
    assert bare.generate(ids, None, greedy(2)).trace is None


def test_to_dict_is_plain(scope):
    import json

    found = scope.generate("the capital", "1/7:=6", greedy(3, candidates=2), trace=True)
    read = json.loads(json.dumps(found.to_dict()))
    assert read["text"] == found.text
    assert read["tokens"][0]["candidates"][0].keys() == {"id", "text", "logprob"}


def test_the_wrong_recipe_is_refused(scope, tmp_path):
    path = tmp_path / "recipe.json"
    scope.save_steering(path, "1/7:=6")
    kept = scope.side_by_side("the", path, greedy(5))
    assert kept.steered.ids == scope.generate("the", "1/7:=6", greedy(5)).ids
    other = Scope(scope.backbone, Suite.of({1: scope.suite[1]}, name="another"))
    for call in (other.generate, other.side_by_side):
        for steering in (path, [path, "1/8:2"]):
            with pytest.raises(QwenScopeError, match="a recipe for another"):
                call([5, 6], steering)


# Candidates and probabilities


def test_candidates_and_logprobs_are_those_of_a_plain_pass(scope):
    ids = some_ids(7)
    found = scope.generate(ids, None, greedy(10, candidates=5, temperature=1.5, seed=1))
    logits = scope.backbone.next_token_logits(ids + found.ids[:-1], 10)
    for token, expected in zip(found.tokens, logits.log_softmax(1), strict=True):
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
        best = expected.topk(5)
        assert [c.id for c in token.candidates] == best.indices.tolist()
        assert [c.logprob for c in token.candidates] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert token.candidates[0].text == scope.backbone.tokenizer.decode([token.candidates[0].id])


def test_each_text_gets_as_many_candidates_as_it_asked_for(scope):
    found = scope.generate([some_ids(3)] * 3, None, [greedy(4, candidates=n) for n in (0, 2, 100)])
    assert [{len(token.candidates) for token in text.tokens} for text in found] == [{0}, {2}, {100}]


# Chance


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.0}, {"temperature": 2.0}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.3, "top_p": 0.7}],
)
def test_tokens_are_drawn_from_the_right_distribution(options):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    sampling = Sampling(**options)
    expected = (logits / sampling.temperature).softmax(0)
    order = expected.argsort(descending=True)
    kept = len(order)
    if sampling.top_k:
        kept = sampling.top_k
    elif sampling.top_p < 1:
        kept = int((expected[order].cumsum(0) < sampling.top_p).sum()) + 1
    expected[order[kept:]] = 0
    expected /= expected.sum()
    draws, generator = 4000, torch.Generator().manual_seed(0)
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[draw(logits, sampling, generator)] += 1
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    chi = float(((counts - draws * expected)[likely] ** 2 / (draws * expected)[likely]).sum())
    # Mean and deviation of chi square are n and sqrt(2 n).
    freedom = int(likely.sum()) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_hardly_any_temperature_takes_the_most_likely():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 30
    for temperature in (1e-300, 1e-30, 1e-7, 1e-4):
        assert draw(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0)) == int(logits.argmax())


def test_a_seed_says_the_same_whatever_is_beside_it(scope):
    sampling = greedy(15, temperature=1.0, top_p=0.9, seed=7)
    alone = scope.generate("the capital", "1/7:=6", sampling)
    others = [greedy(n, temperature=2.0, seed=n) for n in (3, 20)]
    beside = scope.generate(["of", "the capital", "Rome"], [None, "1/7:=6", "0/5:4"], [others[0], sampling, others[1]])
    same(beside[1], alone)
    assert scope.generate("the capital", "1/7:=6", replace(sampling, seed=8)).ids != alone.ids


ODD = st.one_of(st.none(), st.text(), st.booleans(), st.floats(allow_nan=True), st.lists(st.integers()))


@given(
    name=st.sampled_from(["max_new_tokens", "temperature", "top_p", "top_k", "seed", "candidates"]),
    value=st.one_of(ODD, st.integers()),
)
def test_sampling_takes_what_can_be_drawn_from_and_refuses_the_rest(name, value):
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        sampling = Sampling(**{name: value})
    except QwenScopeError:
        return
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    # What is taken can be drawn from.
    warm = sampling if sampling.temperature else replace(sampling, temperature=1.0)
    generator = torch.Generator().manual_seed(sampling.seed)
    assert 0 <= draw(torch.arange(9.0), warm, generator) < 9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("temperature", -1e-10),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("candidates", 101),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", "ab"),
        ("stop", (1,)),
    ],
)
def test_sampling_refuses(unchecked, name, value):
    with pytest.raises(QwenScopeError, match=name.replace("_", ".")):
        Sampling(**{name: value})


# Text


def said(tokenizer, ids: Sequence[int], sampling: Sampling, eos: Sequence[int] = (1,)) -> Continuation:
    """A text of which the model says these tokens."""
    prompts, _ = tokenize([5], tokenizer)
    text = Continuation(prompts[0], [], sampling, tokenizer, frozenset(eos), None)
    for id in ids:
        if text.finish is None:
            text.take(id, -1.0, [])
    return text


@given(st.text(alphabet="aé日👋🏽\u0301 \n\ufffd", min_size=1, max_size=12), st.booleans())
def test_pieces_make_the_text(text, ends):
    tokenizer = _tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = said(tokenizer, [*ids, 1] if ends else ids, Sampling(max_new_tokens=len(ids) + ends)).result()
    assert found.text == tokenizer.decode(ids)
    assert pieces(found.tokens) == found.text
    assert found.finish == ("stop" if ends else "length")
    assert found.ids == ids


@given(st.lists(st.integers(3, 319), min_size=1, max_size=30), st.lists(st.text("abe \ufffd", min_size=1), max_size=4))
def test_pieces_make_the_text_of_any_tokens(ids, stops):
    # Bytes in any order: many are no character at all.
    tokenizer = _tokenizer()
    running = said(tokenizer, [], Sampling(max_new_tokens=len(ids), stop=tuple(stops)))
    told = ""
    for id in ids:
        token = running.take(id, -1.0, [])
        told += token.piece if token else ""
        # Nothing is taken back that has been told.
        assert running.finish or not any(stop in told for stop in stops)
        if running.finish:
            break
    told += running.rest()
    found = running.result()
    assert told == found.text == pieces(found.tokens)
    whole = tokenizer.decode(found.ids, skip_special_tokens=True)
    assert whole.startswith(found.text)
    if found.finish == "length":
        assert found.text == whole
    else:
        assert any(whole[len(found.text) :].startswith(stop) for stop in stops)


_KEPT: list = []


def _tokenizer():
    # Hypothesis takes no fixtures of a function's scope.
    if not _KEPT:
        from conftest import make_tokenizer

        _KEPT.append(make_tokenizer())
    return _KEPT[0]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("capital of France", ("of",), "capital "),
        ("capital of France", (" of F",), "capital"),  # over several tokens
        ("capital of France", ("France",), "capital of "),  # at the very end
        ("capital of France", ("Francesca", "tall"), "capital of France"),  # begins and is never completed
        ("capital of France", ("of Fr", "l of", "France"), "capita"),  # the one that begins first
        ("ababac", ("abac",), "ab"),  # begins twice
        ("aaaa", ("aa",), ""),
        ("x👋y", ("👋",), "x"),
        ("x\n\ny", ("\n\n",), "x"),
    ],
)
def test_stop_texts_end_the_text_and_are_left_out(tokenizer, text, stop, expected):
    ids = tokenizer(text)["input_ids"]
    running = said(tokenizer, ids, Sampling(max_new_tokens=len(ids) + 1, stop=stop))
    if expected == text:
        assert running.finish is None
        running.cancel()
    else:
        assert running.finish == "stop"
    found = running.result()
    assert found.text == expected
    assert pieces(found.tokens) == expected
    assert pieces(running.tokens) + running.rest() == expected


def test_the_end_of_the_model_is_left_out(tokenizer):
    ids = tokenizer("of France")["input_ids"]
    ended = said(tokenizer, [*ids, 1, 9], Sampling()).result()
    assert (ended.text, ended.ids, ended.finish) == ("of France", ids, "stop")
    at_once = said(tokenizer, [1], Sampling()).result()
    assert (at_once.text, at_once.ids, at_once.finish) == ("", [], "stop")
    # Special tokens have no text; ignored, the end is one of them.
    ignored = said(tokenizer, [*ids, 1, 3, *ids], Sampling(max_new_tokens=len(ids) * 2 + 2, ignore_eos=True)).result()
    assert ignored.text == "of Franceof France"
    assert [token.text for token in ignored.tokens if not token.piece] == ["<|im_end|>", "<|im_start|>"]
    assert ignored.finish == "length"


def test_without_a_tokenizer_numbers_are_shown():
    found = said(None, [7, 8, 9], Sampling(max_new_tokens=3)).result()
    assert found.text == "<7><8><9>"
    assert said(None, [7, 8, 9], Sampling(stop=("8>",))).result().text == "<7><"


@pytest.fixture(scope="module")
def script(make_model, suite, tokenizer):
    """Makes a scope whose model goes from each token of a text to the next, then ends; no token may come twice."""

    def make(text: str, cut: int = 0) -> Scope:
        model = make_model("llama")
        ids = [3, *tokenizer(text)["input_ids"]]
        ids = [*ids[: len(ids) - cut], 1]
        assert len(set(ids)) == len(ids)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            embedding = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
            model.lm_head.weight.zero_()
            model.lm_head.weight[ids[1:]] = embedding[ids[:-1]]
        return Scope(model, suite, tokenizer)

    return make


@pytest.mark.parametrize(
    ("text", "stop", "cut"),
    [
        ("of é👋 Rome", (), 0),
        ("of France", ("France!", "ce?"), 0),  # held back until the model ends
        ("of France", ("nceX",), 0),
        ("of 👋", (), 1),  # ends within a character
    ],
)
def test_a_stream_gives_what_was_held_back(script, tokenizer, text, stop, cut):
    scope = script(text, cut)
    found = scope.generate([3], None, Sampling(stop=stop))
    assert found.finish == "stop"
    assert found.text == tokenizer.decode(found.ids)
    assert found.text == (text if not cut else "of " + PARTIAL)
    tokens = list(scope.stream([3], None, Sampling(stop=stop)))
    assert pieces(tokens) == found.text
    assert tokens == found.tokens


def test_a_stream_ends_where_the_model_says_nothing(script):
    assert list(script("").stream([3])) == []
    assert script("").generate([3]).text == ""
    assert len(script("").generate([3], None, greedy(5)).tokens) == 5


def test_the_model_that_ends_is_what_transformers_generates(script, tokenizer):
    scope = script("the capital of")
    assert own(scope.backbone.model, [3], 20, end=1) == [*scope.generate([3], None, Sampling()).ids, 1]


# The context


def test_a_text_ends_at_the_end_of_the_context(scope):
    found = scope.generate(some_ids(250), None, greedy(50))
    assert len(found.tokens) == 6
    assert found.finish == "length"
    assert found.ids == own(scope.backbone.model, some_ids(250), 6)
    assert len(scope.generate(some_ids(255), None, greedy(50)).tokens) == 1


def test_a_prompt_that_fills_the_context_is_refused(scope):
    with pytest.raises(QwenScopeError, match=r"a prompt of less than 256 tokens.*found 256"):
        scope.generate(some_ids(256))
    with pytest.raises(QwenScopeError, match="token ids from 0 to 319"):
        Scope(scope.backbone.model, scope.suite).generate([3, 320])
    with pytest.raises(QwenScopeError, match="positions from 0 to 2"):
        scope.generate(some_ids(3), "1/7:2@5")


# Numbers that break


@pytest.mark.parametrize("strength", [1e30, 1e38, 1e200])
@pytest.mark.parametrize("where", ["all", "generated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strength_that_breaks_the_numbers_is_told(make_model, suite, strength, where, dtype):
    scope = Scope(make_model("llama").to(dtype), suite)
    with pytest.raises(QwenScopeError, match=r"numbers that are none under the steering 0/5:.*smaller strength"):
        scope.generate(some_ids(4), f"0/5:{strength}@{where}", greedy(5))


@pytest.mark.parametrize("place", [0, 2])
def test_a_text_that_breaks_leaves_the_others_alone(bare, place):
    # The others read features at the layers where the broken one's numbers are none.
    steerings: list = ["1/7:=6@generated", "2/9:*0@generated"]
    steerings.insert(place, "0/5:1e200@generated")
    prompts = [some_ids(9 - 3 * n, seed=n) for n in range(3)]
    batch = Batch(bare.backbone, bare.suite)
    texts = [opened(bare, prompt, steering, greedy(6)) for prompt, steering in zip(prompts, steerings, strict=True)]
    for text in texts:
        batch.add(text)
    broken = batch.step()
    assert [text for text, _ in broken] == [texts[place]]
    assert texts[place].finish == "cancelled"
    assert len(texts[place].tokens) == 1
    # Another text takes its place, and must not see what it left there.
    late = opened(bare, some_ids(2), None, greedy(6))
    batch.add(late)
    longer = opened(bare, some_ids(30), None, greedy(3))
    batch.add(longer)
    while batch.rows:
        assert batch.step() == []
    for text, steering in zip(texts, steerings, strict=True):
        if text is not texts[place]:
            same(text.result(), bare.generate(text.prompt.ids, steering, greedy(6)))
    same(late.result(), bare.generate(some_ids(2), None, greedy(6)))
    same(longer.result(), bare.generate(some_ids(30), None, greedy(3)))


def opened(scope: Scope, ids: list[int], steering, sampling: Sampling) -> Continuation:
    prompts, _ = tokenize(ids, scope.backbone.tokenizer)
    return continuation(scope.backbone, prompts[0], scope.changes(steering), sampling)


# A batch that texts join and leave


def test_a_text_is_taken_out_midway(bare):
    batch = Batch(bare.backbone, bare.suite)
    texts = [opened(bare, some_ids(4 + n, n), STEERINGS[n], greedy(8)) for n in range(4)]
    for text in texts:
        batch.add(text)
        batch.step()
    batch.remove(texts[1])
    batch.remove(texts[1])
    assert texts[1].finish == "cancelled"
    taken = texts[1].result()
    assert taken.ids == bare.generate(taken.prompt_ids, STEERINGS[1], greedy(8)).ids[: len(taken.ids)]
    assert taken.steered_tokens == [len(taken.ids) - 1]
    while batch.rows:
        batch.step()
    assert batch.step() == []
    assert batch.nbytes == 0
    for n in (0, 2, 3):
        same(texts[n].result(), bare.generate(some_ids(4 + n, n), STEERINGS[n], greedy(8)))


def test_a_refused_text_leaves_the_batch_as_it_was(scope):
    batch = Batch(scope.backbone, scope.suite)
    text = opened(scope, some_ids(4), "1/7:=6", greedy(10))
    batch.add(text)
    batch.step()
    with pytest.raises(QwenScopeError, match="smaller strength"):
        batch.add(opened(scope, some_ids(4), "0/5:1e30", greedy(5)))
    assert batch.rows == [text]
    while batch.rows:
        batch.step()
    same(text.result(), scope.generate(some_ids(4), "1/7:=6", greedy(10)))


def test_other_models_memory_is_refused():
    config = transformers.LlamaConfig(num_hidden_layers=2)
    assert [type(layer) for layer in prompt_cache(config).layers] == [DynamicLayer, DynamicLayer]
    zamba = transformers.FalconH1Config(num_hidden_layers=2)
    with pytest.raises(QwenScopeError, match=r"full, sliding or linear attention.*Scope\.steered"):
        prompt_cache(zamba)


# The cache, against lists of tensors


class Walk:
    """A `RowCache` of one layer of keys and one of states, and beside it what each row must hold."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.cache = RowCache()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.states: list[Tensor] = []

    def number(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self.generator))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def join(self, length: int, broken: bool) -> None:
        layers: list[Any] = [DynamicLayer(), LinearAttentionLayer()]
        keys, values, state = self.random(1, 2, length, 3), self.random(1, 2, length, 3), self.random(1, 4, 3)
        if broken:
            keys[:], values[:], state[:] = math.nan, math.nan, math.nan
        layers[0].update(keys, values)
        layers[1].update_conv_state(state.clone())
        layers[1].update_recurrent_state(state.clone())
        self.cache.join(Cache(layers=layers), length)
        self.keys.append(keys[0])
        self.values.append(values[0])
        self.states.append(state[0])

    def leave(self, row: int) -> None:
        self.cache.leave(row)
        for held in (self.keys, self.values, self.states):
            held[row] = held[-1]
            held.pop()

    def step(self) -> None:
        rows = len(self.keys)
        self.cache.before_step()
        mask = self.cache.attention_mask(torch.device("cpu"))
        keys, values = self.random(rows, 2, 1, 3), self.random(rows, 2, 1, 3)
        held_by_the_cache: Any = self.cache.cache
        attention, states = held_by_the_cache.layers
        longest = max(held.shape[1] for held in self.keys)
        assert attention.get_seq_length() == longest
        assert attention.get_mask_sizes(1) == (longest + 1, 0)
        found = attention.update(keys, values)
        for held, new, seen in zip((self.keys, self.values), (keys, values), found, strict=True):
            assert seen.shape == (rows, 2, longest + 1, 3)
            for row in range(rows):
                held[row] = torch.cat([held[row], new[row]], 1)
                length = held[row].shape[1]
                torch.testing.assert_close(seen[row, :, -length:], held[row], rtol=0, atol=0, equal_nan=True)
                # What a mask hides must be numbers all the same.
                assert (seen[row, :, :-length] == 0).all() if length <= longest else True
        lengths = [held.shape[1] for held in self.keys]
        if mask is None:
            assert set(lengths) == {longest + 1}
        else:
            expected = torch.tensor([[0] * (longest + 1 - length) + [1] * length for length in lengths])
            assert torch.equal(mask, expected)
        new = self.random(rows, 4, 3)
        for row in range(rows):
            torch.testing.assert_close(states.conv_states[0][row], self.states[row], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(states.recurrent_states[0][row], self.states[row], equal_nan=True)
            self.states[row] = new[row].clone()
        states.recurrent_states[0].copy_(new)
        states.conv_states[0].copy_(new)
        self.cache.after_step()
        assert self.cache.lengths == lengths


@pytest.mark.parametrize("seed", range(6))
def test_a_cache_that_rows_join_and_leave_at_random(seed):
    walk = Walk(seed)
    emptied = moved = 0
    for _ in range(300):
        move = walk.number(10)
        if move < 3 and len(walk.keys) < 6:
            walk.join(1 + walk.number(90 if walk.number(4) == 0 else 12), broken=walk.number(8) == 0)
        elif move < 5 and walk.keys:
            walk.leave(walk.number(len(walk.keys)))
            if not walk.keys:
                emptied += 1
                assert walk.cache.nbytes == 0
        elif walk.keys:
            before = walk.cache.columns, walk.cache.end
            walk.step()
            moved += before[1] >= before[0]
        assert walk.cache.lengths == [held.shape[1] for held in walk.keys]
    assert emptied
    assert moved or seed  # seldom: the batch must live for long


def test_a_long_text_after_many_short_ones_takes_no_room_for_them():
    walk = Walk(0)
    for _ in range(32):
        walk.join(3, broken=False)
    for _ in range(31):
        walk.leave(0)
    walk.join(900, broken=False)
    assert walk.cache.rows == 2
    walk.step()
    keys_and_values = 2 * 2 * 3 * 4  # for each, 2 heads of 3 float32
    assert walk.cache.nbytes < 2 * 2 * 900 * keys_and_values


def test_a_cache_does_not_grow_while_texts_come_and_go():
    # There always are some, so that it never starts anew.
    walk, sizes = Walk(0), []
    walk.join(5, broken=False)
    for at in range(1000):
        if at % 7 == 0:
            walk.join(1 + at % 20, broken=False)
            if len(walk.keys) > 4:
                walk.leave(max(range(len(walk.keys)), key=lambda row: walk.keys[row].shape[1]))
        walk.step()
        sizes.append((walk.cache.nbytes, walk.cache.columns, walk.cache.rows))
    longest = max(held.shape[1] for held in walk.keys)
    assert longest < 60
    assert walk.cache.rows <= 8
    assert max(columns for _, columns, _ in sizes[500:]) <= max(columns for _, columns, _ in sizes[:500])
    assert max(columns for _, columns, _ in sizes) <= 60 + 20 + 2 * ROOM


# Threads


def test_threads_that_generate_at_once_get_what_each_gets_alone(scope):
    jobs = [(some_ids(3 + n, n), STEERINGS[1 + n], greedy(12)) for n in range(3)]
    alone = [scope.generate(*job) for job in jobs]
    read = scope.features(some_ids(20))
    found: list = [None] * 4

    def generate(n: int) -> None:
        found[n] = scope.generate(*jobs[n])

    def features() -> None:
        found[3] = [scope.features(some_ids(20)) for _ in range(15)]

    threads = [threading.Thread(target=generate, args=(n,)) for n in range(3)]
    threads.append(threading.Thread(target=features))
    for thread in threads:
        thread.start()
    streamed = list(scope.stream(*jobs[0]))
    for thread in threads:
        thread.join()
    for one, expected in zip(found[:3], alone, strict=True):
        same(one, expected)
    assert [token.id for token in streamed] == alone[0].ids
    for one in found[3]:
        assert all(torch.equal(one[n].indices, read[n].indices) for n in read.layers)


def test_no_hooks_stay(bare):
    def hooks() -> list[int]:
        modules = bare.backbone.model.modules()
        return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]

    # The model is shared with other tests, which may have left some.
    before = hooks()
    bare.generate([5, 6, 7], "0/1:2 1/2:ablate", Sampling(max_new_tokens=3))
    assert hooks() == before


# The bundled model


@pytest.fixture(scope="module")
def real(bundled) -> Scope:
    return Scope(bundled, Suite.from_pretrained())


def test_the_bundled_model_answers_as_under_transformers(real):
    tokenizer, model = real.backbone.tokenizer, real.backbone.model
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    found = real.generate(messages, None, Sampling(max_new_tokens=40))
    read = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert found.prompt_ids == read["input_ids"][0].tolist()
    out = model.generate(**read, do_sample=False, max_new_tokens=40)[0, len(found.prompt_ids) :]
    assert found.finish == "stop"
    assert [*found.ids, tokenizer.eos_token_id] == out.tolist()
    assert found.text == tokenizer.decode(out, skip_special_tokens=True)
    assert "Paris" in found.text


def test_texts_of_the_bundled_model_are_what_each_is_alone(real):
    prompts = ["The weather", "Once upon a time", "def main():", "I think that", "1, 2, 3,", "Dear", "The", "In 1969"]
    steerings = [None, "15/1037:2x", "7/11:=3@generated", "23/5:*0", "15/1037:ablate", "15/8:-1x", "23/9:40", "7/2:*2"]
    samplings = [Sampling(max_new_tokens=count, candidates=3) for count in (12, 5, 9, 14, 3, 8, 14, 10)]
    together = real.generate(prompts, steerings, samplings)
    for one, prompt, steering, sampling in zip(together, prompts, steerings, samplings, strict=True):
        same(one, real.generate(prompt, steering, sampling))
