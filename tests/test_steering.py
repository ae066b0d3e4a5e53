"""Steering: its text and JSON, and what is written into the stream, against a plain hook on every architecture."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import pipeline

from qwen_scope import Backbone, QwenScopeError, Scope, Suite
from qwen_scope.evaluation import SAMPLE_TEXTS
from qwen_scope.generation import Sampling
from qwen_scope.index import FeatureIndex
from qwen_scope.outliers import norm_outliers
from qwen_scope.steering import Edit, Recipe, Steering, Where
from qwen_scope.steering.maxima import Maxima, maxima_of, measured
from qwen_scope.steering.trace import trace

# As text and as JSON

NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**18), 10**18)
PARTS = st.tuples(
    st.integers(0, 99),
    st.integers(0, 10**6),
    st.sampled_from(["add", "clamp", "scale", "ablate"]),
    NUMBERS,
    st.sampled_from(["raw", "x"]),
    st.sampled_from(["all", "prompt", "generated", "0", "-1", "3-7,prompt", "0,all", "-4--2,generated"]),
)


def edit_of(parts) -> Edit:
    # Not in a strategy: building one checks its types at random, which hypothesis forbids there.
    layer, number, how, strength, unit, where = parts
    unit = "raw" if how in ("scale", "ablate") else unit
    strength = 1.0 if how == "ablate" else float(strength)
    return Edit(layer, number, how, strength, unit, Where.parse(where))


@given(PARTS)
def test_an_edit_as_text_and_json_is_read_back(parts):
    edit = edit_of(parts)
    assert Edit.parse(str(edit)) == edit
    assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


@given(st.lists(PARTS, max_size=5, unique_by=lambda parts: parts[:2]))
def test_a_steering_as_text_and_json_is_read_back(many):
    steering = Steering(tuple(map(edit_of, many)))
    assert Steering.of(str(steering)) == steering
    assert Steering.of(json.loads(json.dumps(steering.to_dict()))) == steering
    assert Steering.of([edit.to_dict() for edit in steering.edits]) == steering
    assert Steering.of(steering) is steering


@given(st.text(max_size=30) | st.text("0123456789/:=*x@-,. eEablategenerated", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        steering = Steering.of(text)
    except QwenScopeError:
        return
    assert Steering.of(str(steering)) == steering


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["edits", "feature", "how", "strength", "unit", "where", "?"]), inner, max_size=4
        )
        | st.fixed_dictionaries({"feature": st.sampled_from(["1/2", "x"]), "strength": inner, "how": inner})
        | st.fixed_dictionaries({"feature": st.just("1/2"), "unit": inner, "where": inner})
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_read_or_refused(value):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtyping.config.jaxtyping_disable", True)
        try:
            steering = Steering.of(value)
        except QwenScopeError:
            return
    assert Steering.of(steering.to_dict()) == steering


def test_lists_without_end_are_refused(unchecked):
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(QwenScopeError, match="expected a steering"):
        Steering.of(deep)


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("1/2", Edit(1, 2, "add", 1.0, "x")),
        ("1/2:-2x", Edit(1, 2, "add", -2.0, "x")),
        ("1/2:2", Edit(1, 2, "add", 2.0)),
        ("1/2:=5", Edit(1, 2, "clamp", 5.0)),
        ("1/2:=.5x@prompt", Edit(1, 2, "clamp", 0.5, "x", Where(generated=False))),
        ("1/2:*0@-1", Edit(1, 2, "scale", 0.0, where=Where(False, False, ((-1, -1),)))),
        ("1/2:ablate@generated", Edit(1, 2, "ablate", where=Where(prompt=False))),
    ],
)
def test_the_text_of_an_edit(text, edit):
    assert Edit.parse(text) == edit


@pytest.mark.parametrize(
    "given",
    [
        "1/2:",
        "1/2:nan",
        "1/2:inf",
        "1/2:1e999",
        "1/2:*2x",
        "1/2:2y",
        "1/2@",
        "1",
        "1/2:2@x",
        5,
        b"1/2",
        [5],
        {"feature": 1},
    ],
)
def test_what_is_no_steering(unchecked, given):
    with pytest.raises(QwenScopeError, match=r"^expected "):
        Steering.of(given)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, 10**400, True])
def test_strengths_that_are_no_numbers(unchecked, strength):
    with pytest.raises(QwenScopeError, match=r"expected a (finite strength|number)"):
        Edit(1, 2, "add", strength)


@pytest.mark.parametrize(
    "text",
    [
        "1/2:=5 1/2:=6",
        "1/2:5 1/2:ablate",
        "1/2:5@prompt 1/2:=6@3",
        "1/2:=5@0 1/2:=6@-1",
        "1/2:*2@generated 1/2:ablate",
        "1/2:ablate 1/2:ablate",
    ],
)
def test_edits_that_contradict_each_other(text):
    with pytest.raises(QwenScopeError, match="expected edits that agree"):
        Steering.of(text)


@pytest.mark.parametrize("text", ["1/2:5 1/2:6", "1/2:=5@prompt 1/2:=6@generated", "1/2:=5 2/2:=6 1/3:ablate"])
def test_edits_that_agree(text):
    assert str(Steering.of(text)) == text


def test_more_edits_than_anybody_makes():
    assert len(Steering.of(" ".join(f"1/{n}:1" for n in range(256))).edits) == 256
    with pytest.raises(QwenScopeError, match="expected at most 256 edits at once, found 257"):
        Steering.of(" ".join(f"1/{n}:1" for n in range(257)))


def test_the_opposite():
    assert Steering.of("1/2:2x 1/3:-1@0").scaled(-1.0) == Steering.of("1/2:-2x 1/3:1@0")
    with pytest.raises(QwenScopeError, match="expected edits that add"):
        Steering.of("1/2:=2").scaled(-1.0)


# What is written, on every architecture


@pytest.fixture(scope="module")
def every(model, suite) -> Scope:
    """Of each architecture in turn."""
    return Scope(model, suite)


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


def ids_of(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def written(suite: Suite, steering: str, x: torch.Tensor, positions: torch.Tensor, length: int) -> dict:
    """What the definitions of `How` make of the residuals (tokens, d_model) of one text, in float64: by layer."""

    def at(layer: int, x: torch.Tensor) -> torch.Tensor:
        sae, edits = suite[layer], [edit for edit in Steering.of(steering).edits if edit.layer == layer]
        values = sae.encode(x.float()).to_dense().double()
        x, out = x.double(), x.double().clone()
        for n, position in enumerate(positions.tolist()):
            here = [edit for edit in edits if position >= 0 and edit.where.mask(torch.tensor([position]), length)[0]]
            for edit in here:
                d, a = sae.W_dec[:, edit.number].detach().double(), values[n, edit.number]
                size = {"add": edit.strength, "clamp": edit.strength - a, "scale": (edit.strength - 1) * a}.get(
                    edit.how
                )
                if size is not None:
                    out[n] += size * d
            gone = [sae.W_dec[:, edit.number].detach().double() for edit in here if edit.how == "ablate"]
            if gone:
                d = torch.stack(gone, 1)
                out[n] -= d @ torch.linalg.lstsq(d, out[n][:, None]).solution[:, 0]
        return out

    return {layer: (lambda x, layer=layer: at(layer, x)) for layer in Steering.of(steering).layers}


def by_hooks(scope: Scope, steering: str, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Logits of one text (1, tokens) with hooks written by hand."""
    positions, handles = torch.arange(ids.shape[1]), []
    for layer, write in written(scope.suite, steering, ids, positions, length).items():

        def hook(module, args, output, write=write):
            x = output if isinstance(output, torch.Tensor) else output[0]
            new = write(x[0]).to(x.dtype)[None]
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        handles.append(scope.backbone.layers[layer].register_forward_hook(hook))
    try:
        with torch.no_grad():
            return scope.backbone.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def logits(scope: Scope, ids: torch.Tensor, **more) -> torch.Tensor:
    with torch.no_grad():
        return scope.backbone.model(input_ids=ids, use_cache=False, **more).logits


STEERINGS = [
    "1/3:4",
    "1/3:=6",
    "1/3:*3 1/4:*0 1/5:*-1",
    "1/3:ablate",
    "1/3:ablate 1/4:ablate 1/5:4 1/6:=3",
    "0/1:3 1/3:=6 2/7:ablate",
    "1/3:4@2-4 1/5:=6@-1 2/3:-3@0,5",
]


@pytest.mark.parametrize("steering", STEERINGS)
def test_a_forward_pass_is_what_plain_hooks_make(every, steering):
    ids = ids_of(1, 8)
    with every.steered(steering):
        ours = logits(every, ids)[0]
    torch.testing.assert_close(ours, by_hooks(every, steering, ids, 8), rtol=2e-3, atol=2e-3)
    assert not torch.allclose(ours, logits(every, ids)[0], atol=1e-2)


@pytest.mark.parametrize("steering", ["1/3:=6", "1/3:*0", "1/3:*2@generated,-1"])
def test_values_below_0_that_an_sae_keeps_count_as_it_decodes_them(llama, make_sae, steering):
    scope, ids = Scope(llama, Suite.of({1: make_sae(k=128)})), ids_of(1, 8)
    kept = scope.features(ids[0])[1].activation(3)
    assert kept.min() < 0 < kept.max()
    with scope.steered(steering):
        ours = logits(scope, ids)[0]
    torch.testing.assert_close(ours, by_hooks(scope, steering, ids, 8), rtol=2e-3, atol=2e-3)
    trace = scope.generate(ids[0], "1/3:*0", Sampling(max_new_tokens=1, ignore_eos=True), trace=True).trace
    assert trace.edits[0].before == pytest.approx(kept[1:].mean().item(), rel=1e-3)


def test_rows_of_their_own_steering_padded_on_either_side(every):
    """What each row gives alone; None steers nothing."""
    steerings = [Steering.of("1/3:5"), None, Steering.of("1/5:ablate 2/3:=4@-1")]
    rows = [ids_of(1, length, seed=length) for length in (5, 7, 4)]
    alone = []
    for steering, row in zip(steerings, rows, strict=True):
        with every.steered(steering):
            alone.append(logits(every, row)[0])
    for left in (False, True):
        ids, mask = torch.full((3, 7), 2), torch.zeros(3, 7, dtype=torch.long)
        places = [slice(7 - row.shape[1], 7) if left else slice(0, row.shape[1]) for row in rows]
        for at, (row, place) in enumerate(zip(rows, places, strict=True)):
            ids[at, place], mask[at, place] = row[0], 1
        # Models that count positions for themselves count padding too, unless they are told.
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with every.steered(steerings):
            together = logits(every, ids, attention_mask=mask, position_ids=positions)
        for at, place in enumerate(places):
            torch.testing.assert_close(together[at, place], alone[at], rtol=2e-3, atol=2e-3)


GENERATED = ["1/3:6 2/5:-4", "1/3:6@generated 1/4:ablate", "1/3:=6@prompt 1/5:5@generated,-1", "1/3:5@0-2 2/9:*3"]


def greedy(scope: Scope, steering: str, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens most likely next under hooks written by hand, from whole passes."""
    length = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, by_hooks(scope, steering, ids, length)[-1:].argmax(1)[None]], 1)
    return ids


@pytest.mark.parametrize("steering", GENERATED)
def test_generate_with_and_without_a_cache(every, steering):
    ids = ids_of(1, 6, seed=3)
    expected = greedy(every, steering, ids, 5)
    for use_cache in (True, False):
        with every.steered(steering) as following:
            out = every.backbone.model.generate(
                input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=use_cache, eos_token_id=None, pad_token_id=2
            )
        assert out.tolist() == expected.tolist(), use_cache
        assert following.passes == 5


def test_beams_and_several_samples(scope):
    ids, options = ids_of(2, 6, seed=5), {"eos_token_id": None, "pad_token_id": 2, "max_new_tokens": 4}
    steerings = [Steering.of("1/3:6@generated"), Steering.of("1/4:-6 2/3:=5")]
    model = scope.backbone.model
    for more in ({"num_beams": 2}, {"num_beams": 4, "num_return_sequences": 2}):
        alone = []
        for steering, row in zip(steerings, ids, strict=True):
            with scope.steered(steering):
                alone.append(model.generate(input_ids=row[None], do_sample=False, **options, **more))
        with scope.steered(steerings):
            together = model.generate(input_ids=ids, do_sample=False, **options, **more)
        assert together.tolist() == torch.cat(alone).tolist()
        # The same without a cache, where each pass reads the prompt again.
        with scope.steered(steerings):
            assert model.generate(input_ids=ids, do_sample=False, use_cache=False, **options, **more).tolist() == (
                together.tolist()
            )
    with scope.steered("1/3:2 1/4:1@generated") as following:
        model.generate(input_ids=ids[:1], do_sample=True, num_return_sequences=3, **options)
    # Of each of three samples, five tokens of the prompt and three of those generated: the last is never read.
    assert following.touched == [[3 * (5 + 3), 3 * 3]]


def test_a_pipeline(scope, tokenizer):
    generate = pipeline("text-generation", model=scope.backbone.model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompt = "the capital of France"
    plain = generate(prompt, **options)[0]["generated_text"]
    with scope.steered("1/3:8"):
        steered = generate(prompt, **options)[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = greedy(scope, "1/3:8", ids, 5)[0, ids.shape[1] :]
    assert steered == tokenizer.decode(expected, skip_special_tokens=True)
    assert steered != plain


def test_positions_beyond_the_prompt(every):
    with every.steered("1/3:6@6"), pytest.raises(QwenScopeError, match="expected positions from 0 to 5 of the prompt"):
        every.backbone.model.generate(input_ids=ids_of(1, 6), max_new_tokens=3, pad_token_id=2)
    with every.steered("1/3:6@5"):
        every.backbone.model.generate(input_ids=ids_of(1, 6), max_new_tokens=3, pad_token_id=2)


def test_two_directions_that_are_not_orthogonal_leave_nothing_of_either(every):
    seen = {}
    with every.steered("1/3:ablate 1/4:ablate"):
        hook = every.backbone.layers[1].register_forward_hook(
            lambda module, args, output: seen.update(x=output if isinstance(output, torch.Tensor) else output[0])
        )
        logits(every, ids_of(1, 8))
        hook.remove()
    directions = every.suite[1].W_dec[:, [3, 4]].detach()
    assert abs(float(torch.nn.functional.cosine_similarity(*directions.T, dim=0))) > 0.01
    left = seen["x"][0] @ directions / directions.norm(dim=0) / seen["x"][0].norm(dim=1, keepdim=True)
    assert left[1:].abs().max() < 1e-5
    assert left[0].abs().max() > 1e-3


def test_hooks_are_gone_after_the_block(every):
    def hooks() -> int:
        return sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in every.backbone.model.modules()
        )

    before, ids = hooks(), ids_of(1, 5)
    plain = logits(every, ids)
    with every.steered("1/3:5 2/4:=3"):
        assert hooks() > before
    assert hooks() == before
    with pytest.raises(RuntimeError, match="mine"), every.steered("1/3:5"):
        raise RuntimeError("mine")
    assert hooks() == before
    with pytest.raises(QwenScopeError), every.steered("1/3:5@9"):
        logits(every, ids)
    assert hooks() == before
    assert torch.equal(logits(every, ids), plain)


@pytest.mark.parametrize("nothing", [None, "", [], Steering(), [None]])
def test_an_empty_steering_changes_nothing(every, nothing):
    ids = ids_of(2, 5)
    plain = logits(every, ids)
    with every.steered(nothing):
        assert torch.equal(logits(every, ids), plain)


def test_batches_of_other_sizes_are_refused(scope):
    with scope.steered([Steering.of("1/3:5"), None]), pytest.raises(QwenScopeError, match="a batch of 2 rows"):
        logits(scope, ids_of(3, 5))


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ("3/1:1", "expected features of layers 0-2 of tiny suite, found 3/1"),
        ("1/128:1", "expected a feature from 1/0 to 1/127, found 1/128"),
    ],
)
def test_features_that_are_not_there(scope, steering, message):
    with pytest.raises(QwenScopeError, match=message):
        scope.steered(steering)


# Recipes


def test_a_recipe_is_the_same_wherever_it_is_used(scope, suite, tmp_path):
    one = Scope(scope.backbone, suite)
    one.maxima = Maxima(lambda layer: torch.full((128,), 3.0), "somewhere")
    recipe = one.save_steering(tmp_path / "recipe.json", "1/3:2x 1/5:=1x@prompt 2/7:*0.3 2/8:ablate", note="a try")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert recipe.steering == "1/3:6 1/5:=3@prompt 2/7:*0.3 2/8:ablate"
    assert recipe.given == "1/3:2x 1/5:=1x@prompt 2/7:*0.3 2/8:ablate"
    assert (recipe.units, recipe.suite, recipe.note) == ("somewhere", "tiny suite", "a try")
    other = Scope(scope.backbone, suite)
    other.maxima = Maxima(lambda layer: torch.full((128,), 50.0), "elsewhere")
    ids = [5, 17, 60, 131, 8, 44]
    path = tmp_path / "recipe.json"
    few = Sampling(max_new_tokens=8)
    texts = [
        with_units.generate(ids, steering, few).ids
        for with_units, steering in ((one, recipe.given), (one, path), (other, path), (other, recipe.given))
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    assert [change.strength for change in other.changes(path)] == [6.0, 3.0, 0.3, 0.0]


def test_a_recipe_names_the_model_and_no_place_on_this_machine(llama, suite, tokenizer, tmp_path):
    def named(name: str, backbone: str | None) -> str:
        llama.config.name_or_path = name
        scope = Scope(llama, Suite.of({1: suite[1]}, backbone=backbone), tokenizer)
        return scope.save_steering(tmp_path / "recipe.json", "1/3:2").model

    (folder := tmp_path / "my model").mkdir()
    before = llama.config.name_or_path
    try:
        assert named(str(folder), "org/base") == "org/base"
        assert named(str(folder), None) == "my model"
        # Another model of the same width, which the suite was not trained on.
        assert named("org/instruct", "org/base") == "org/instruct"
    finally:
        llama.config.name_or_path = before


def test_a_recipe_of_another_suite_is_refused(scope, suite, tmp_path):
    path = tmp_path / "recipe.json"
    other = Scope(scope.backbone, Suite.of({layer: suite[layer] for layer in (1, 2)}, name="another suite"))
    other.save_steering(path, "1/3:2")
    for use in (
        lambda: scope.generate([5, 6, 7], path),
        lambda: scope.steered(path),
        lambda: scope.steered([path, None]),
        lambda: scope.side_by_side([5, 6, 7], path),
        lambda: scope.generate([[5, 6], [7, 8]], [path, None]),
        lambda: scope.changes(["1/5:1", path]),
        lambda: scope.changes([["1/5:1", [path]]]),
        lambda: scope.changes({"edits": [path]}),
    ):
        with pytest.raises(QwenScopeError, match=r"expected a recipe for tiny suite, found .* for another suite"):
            use()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "qwen-scope steering 1"}', b"[" * 100000, b"{}" * 2**20],
)
def test_damaged_recipes(tmp_path, content):
    path = tmp_path / "recipe.json"
    path.write_bytes(content)
    with pytest.raises(QwenScopeError, match=r"^expected "):
        Steering.of(path)


def test_recipes_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(QwenScopeError, match="expected a steering recipe at"):
            Steering.of(path)


# Highest activations


def test_measured_maxima_are_those_of_the_features_of_the_sample(scope, tokenizer):
    highest = torch.zeros(128)
    texts = [tokenizer(text)["input_ids"][:256] for text in SAMPLE_TEXTS]
    residuals = [scope.backbone.residuals(torch.tensor([ids]), layers=[1])[1][0] for ids in texts]
    kept = (~norm_outliers(torch.cat(residuals))).split([len(ids) for ids in texts])
    for found, keep in zip(scope.features(texts, layers=1), kept, strict=True):
        here = found[1].to_dense()[1:][keep[1:]]
        highest = torch.maximum(highest, here.amax(0))
    torch.testing.assert_close(measured(scope.backbone, scope.suite, 1), highest.clamp_min(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scope.maxima.layer(1), highest.clamp_min(0), rtol=1e-4, atol=1e-4)


def test_a_feature_that_never_fires_has_no_unit(scope, suite):
    quiet = Scope(scope.backbone, suite)
    quiet.maxima = Maxima(lambda layer: torch.tensor([2.0, 0.0, math.nan] + [1.0] * 125), "these texts")
    assert [change.strength for change in quiet.changes("1/0:-2x 1/1:3")] == [-4.0, 3.0]
    for number in (1, 2):
        with pytest.raises(QwenScopeError, match=f"found that 1/{number} never does in these texts"):
            quiet.changes(f"1/{number}:2x")
    # Nothing is multiplied by it.
    assert [change.strength for change in quiet.changes("1/1:ablate 1/2:*2")] == [0.0, 2.0]


def test_without_a_tokenizer_strengths_are_raw(llama, suite):
    bare = Scope(Backbone(llama), suite)
    assert bare.changes("1/3:2")[0].strength == 2
    with pytest.raises(QwenScopeError, match="expected a tokenizer"):
        bare.changes("1/3:2x")


def test_another_suite_is_told_from_the_bundled_one_without_loading_it(llama, make_sae, tmp_path):
    # Layer 7 is one of the bundled suite's; of a suite from the hub it would be downloaded here.
    Suite.of({layer: make_sae(seed=layer) for layer in (1, 7)}).save_pretrained(tmp_path)
    suite = Suite.from_pretrained(tmp_path)
    for file in tmp_path.glob("layer7.*"):
        file.write_bytes(b"damaged")
    assert "a sample of texts" in maxima_of(Backbone(llama), suite).source
    with pytest.raises(QwenScopeError):
        suite[7]


@pytest.mark.real
def test_the_maxima_that_come_with_the_package_are_those_of_its_index(bundled):
    scope, index = Scope(bundled, Scope.from_pretrained().suite), FeatureIndex.open()
    assert "comes with the package" in scope.maxima.source
    for layer in scope.layers:
        own = torch.nan_to_num(scope.maxima.layer(layer))
        torch.testing.assert_close(own, index.maxima.layer(layer), rtol=1e-6, atol=0)
    assert (scope.maxima.layer(15) > 0).float().mean() > 0.5


# What it did


def traced(scope: Scope, steering: str, ids: list[int], length: int):
    return trace(scope.backbone, scope.suite, ids, length, scope.changes(steering))


def test_a_trace_is_what_two_passes_show(scope):
    ids, length, steering = ids_of(1, 10)[0].tolist(), 6, "1/3:3 1/9:=2@generated"
    found = traced(scope, steering, ids, length)
    read = torch.tensor([ids[:-1]])
    steered, plain = by_hooks(scope, steering, read, length), logits(scope, read)[0]
    expected = torch.nn.functional.kl_div(
        plain[-4:].double().log_softmax(1), steered[-4:].double().log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    assert found.kl == pytest.approx(expected.tolist(), rel=1e-3)
    changed = (steered[-4:].argmax(1) != plain[-4:].argmax(1)).float().mean()
    assert found.top_changed == pytest.approx(float(changed))
    assert found.steered
    assert found.effective
    one, two = found.edits
    assert one.positions == list(range(1, 9))
    assert two.positions == [6, 7, 8]
    x = scope.backbone.residuals(read, layers=[1])[1][0]
    new = written(scope.suite, steering, x, torch.arange(9), length)[1](x)
    sizes = (new - x).norm(dim=1) / x.norm(dim=1)
    assert one.change == pytest.approx(float(sizes[1:].sort().values[3:5].mean()), rel=1e-3)
    assert one.largest_change == pytest.approx(float(sizes[1:].max()), rel=1e-3)
    for edit, number, where in ((one, 3, slice(1, 9)), (two, 9, slice(6, 9))):
        before, after = (scope.suite[1].encode(each.float()).activation(number).clamp_min(0) for each in (x, new))
        assert edit.before == pytest.approx(float(before[where].mean()), rel=1e-3, abs=1e-5)
        assert edit.after == pytest.approx(float(after[where].mean()), rel=1e-3, abs=1e-5)


def test_a_trace_of_a_prompt_alone_is_of_the_token_that_would_be_next(scope):
    found = traced(scope, "1/3:3@-1", ids_of(1, 6)[0].tolist(), 6)
    assert len(found.kl) == 1
    assert found.edits[0].positions == [5]


def test_a_steering_that_had_no_effect_says_so(scope):
    ids = ids_of(1, 6)[0].tolist()
    nothing = traced(scope, "1/3:3@generated", ids, 6)
    assert not nothing.steered
    assert not nothing.effective
    assert "1/3:3@generated: steered no token of this text" in str(nothing)
    assert "no effect: nothing was changed" in str(nothing)
    number = int(
        (scope.suite[1].encode(scope.backbone.residuals(torch.tensor([ids]), layers=[1])[1][0]).to_dense())
        .amax(0)
        .argmin()
    )
    assert "no effect: nothing was changed" in str(traced(scope, f"1/{number}:*2", ids, 6))
    weak = traced(scope, "2/3:1e-4@1", ids, 6)
    assert weak.steered
    assert not weak.effective
    assert "no effect: the residual was changed, but no token became more or less likely" in str(weak)
    assert weak.to_dict()["summary"] == str(weak)
    assert "no effect" not in str(traced(scope, "1/3:5", ids, 6))
