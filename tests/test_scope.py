"""`Scope`: text in, features out, as a user calls it; and what `TextFeatures` offers."""

import json
import re
from functools import partial

import pytest
import torch
import transformers

from qwen_scope import Backbone, QwenScopeError, Scope, SparseFeatures, Suite, TextFeatures, reading
from qwen_scope.reading import BATCH_TOKENS, batches
from qwen_scope.text_features import text_features
from qwen_scope.tokens import TokenizedText, tokenize

TEXT = "the capital of France is Paris"
GROUP = "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50"


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


@pytest.fixture(scope="module")
def found(scope) -> TextFeatures:
    return scope.features(TEXT)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test reaches a network, and none sees the user's mirror."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("QWEN_SCOPE_MIRROR", raising=False)


def same(a: TextFeatures, b: TextFeatures) -> bool:
    return (
        a.tokenized == b.tokenized
        and a.layers == b.layers
        and all(torch.equal(a[n].indices, b[n].indices) and torch.allclose(a[n].values, b[n].values) for n in a.layers)
    )


# Kinds of input


def test_a_text(found, suite):
    assert found.text == TEXT
    assert found.tokens == ["the", " capital", " of", " France", " is", " Paris"]
    assert "".join(found.tokens) == TEXT
    assert [TEXT[start:end] for start, end in found.spans] == found.tokens
    assert found.layers == [0, 1, 2]
    assert len(found) == len(found.ids) == 6
    for layer in found:
        assert isinstance(layer, SparseFeatures)
        assert layer.indices.shape == layer.values.shape == (6, 8)
        assert layer.d_sae == 128
        assert (layer.values.diff(dim=1) <= 0).all()
    # Each layer has its own SAE.
    assert not torch.equal(found[0].indices, found[1].indices)


def test_results_come_in_the_order_of_the_texts(scope):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 120, (50,), generator=generator).tolist()
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    assert len(batches(tokenize(ids, None)[0], scope.backbone)) > 1
    results = scope.features(ids)
    assert [result.ids for result in results] == ids
    for some, result in list(zip(ids, results, strict=True))[::7]:
        assert same(scope.features(some), result)


def test_batches_hold_like_lengths_and_few_tokens(scope):
    lengths = [3, 200, 7, 180, 1, 90] * 9
    texts, _ = tokenize([[5] * length for length in lengths], None)
    made = batches(texts, scope.backbone)
    assert sorted(i for batch in made for i in batch.texts) == list(range(len(lengths)))
    for batch in made:
        assert batch.ids.numel() <= BATCH_TOKENS
        assert batch.real.sum(1).tolist() == [lengths[i] for i in batch.texts]
        assert batch.real[:, 0].all()
        assert (batch.attention_mask is None) == (len(set(batch.real.sum(1).tolist())) == 1)
        assert (batch.ids[batch.real] == 5).all()
    assert sum(batch.ids.numel() for batch in made) < 1.5 * sum(lengths)


def test_several_texts_give_a_list_and_one_does_not(scope, found):
    several = scope.features([TEXT, "Rome", TEXT])
    assert [len(one) for one in several] == [6, 2, 6]
    assert same(several[0], found)
    assert same(several[2], found)
    assert same(scope.features((TEXT,))[0], found)


def test_token_ids_give_what_their_text_gives(scope, found):
    ids = found.ids
    assert same(scope.features(ids), found)
    assert same(scope.features(torch.tensor(ids)), found)
    for batch in ([ids], torch.tensor([ids]), torch.tensor([ids, ids], dtype=torch.int32)):
        several = scope.features(batch)
        assert isinstance(several, list)
        assert len(several) == len(batch)
        assert all(same(one, found) for one in several)


def test_messages(scope):
    messages = [{"role": "user", "content": "is Rome the capital?"}]
    plain, on, off = (scope.features(messages, thinking=thinking) for thinking in (None, True, False))
    assert plain.tokens[0] == "<|im_start|>"
    assert on.text == plain.text + "<|im_start|>assistant\n"
    assert off.text == on.text + "<think>\n\n</think>\n\n"
    assert [one.text for one in scope.features([messages, messages])] == [plain.text] * 2


def test_without_a_tokenizer(llama, suite, found):
    scope = Scope(llama, suite, tokenizer=None)
    bare = scope.features(found.ids)
    assert bare.tokens == [f"<{i}>" for i in found.ids]
    assert all(torch.equal(bare[n].indices, found[n].indices) for n in (0, 1, 2))
    with pytest.raises(QwenScopeError, match="no tokenizer"):
        scope.features(TEXT)


def test_fewer_layers(scope, found, llama, suite, tokenizer):
    some = scope.features(TEXT, layers=[2, 0, 2])
    assert some.layers == [0, 2]
    assert torch.equal(some[2].indices, found[2].indices)
    narrow = Scope(llama, suite, tokenizer, layers=[1])
    assert narrow.layers == [1]
    assert narrow.features(TEXT).layers == [1]
    assert narrow.features(TEXT, layers=[0]).layers == [0]


def test_a_backbone_instead_of_a_model(llama, suite, tokenizer, found):
    assert same(Scope(Backbone(llama, tokenizer), suite).features(TEXT), found)


def test_saes_of_different_widths(llama, tokenizer, make_sae, found):
    wide = Scope(llama, Suite.of({0: make_sae(), 2: make_sae(d_sae=300)}), tokenizer).features(TEXT)
    assert [layer.d_sae for layer in wide] == [128, 300]
    assert torch.equal(wide[0].indices, found[0].indices)


def test_a_bfloat16_model(make_model, suite, tokenizer, found):
    half = Scope(make_model("llama").bfloat16(), suite, tokenizer).features(TEXT)
    assert half[0].values.dtype == torch.float32
    assert (half[0].values[:, 0] - found[0].values[:, 0]).abs().max() < 0.05 * found[0].values.max()


def test_features_carry_no_gradient(llama, tokenizer, make_sae):
    scope = Scope(llama, Suite.of({0: make_sae().requires_grad_()}), tokenizer)
    assert not scope.features(TEXT)[0].values.requires_grad


def test_repr(scope):
    assert re.fullmatch(r"Scope\(Backbone\(.*3 layers.*\), Suite\('tiny suite'.*\), layers=\[0, 1, 2\]\)", repr(scope))


# By name


def hankel(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """A full-size matrix that lies in rows + columns numbers: entry (i, j) is number i + j."""
    return torch.randn(rows + columns, generator=generator).as_strided((rows, columns), (1, 1))


@pytest.fixture(scope="module")
def published(tmp_path_factory, tokenizer):
    """A folder laid out like the hub: a random Qwen3.5-2B of the true width and depth, and its SAEs of the true shape."""
    root = tmp_path_factory.mktemp("mirror")
    text = {
        "vocab_size": 320,
        "hidden_size": 2048,
        "intermediate_size": 32,
        "num_hidden_layers": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 2048}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, dtype="bfloat16")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "Qwen" / "Qwen3.5-2B")
    tokenizer.save_pretrained(root / "Qwen" / "Qwen3.5-2B")
    (root / GROUP).mkdir(parents=True)
    for layer in range(24):
        generator = torch.Generator().manual_seed(layer)
        torch.save(
            {
                "W_enc": hankel(32768, 2048, generator),
                "W_dec": hankel(2048, 32768, generator),
                "b_enc": torch.randn(32768, generator=generator),
                "b_dec": torch.randn(2048, generator=generator),
            },
            root / GROUP / f"layer{layer}.sae.pt",
        )
    return root


def test_the_cards_second_demonstration(published, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(published))
    scope = Scope.from_pretrained("Qwen/Qwen3.5-2B", GROUP, layers=[0, 12], dtype="bfloat16")
    assert scope.layers == [0, 12]
    assert scope.backbone.model.dtype == torch.bfloat16
    assert scope.suite.backbone == "Qwen/Qwen3.5-2B-Base"
    assert (scope.suite[12].d_sae, scope.suite[12].d_model, scope.suite.k) == (32768, 2048, 50)
    assert scope.suite[12].activation == "topk"
    found = scope.features("The capital of France is")
    residual = scope.backbone.residuals(torch.tensor([found.ids]), layers=[12])[12][0].float()
    weights = torch.load(published / GROUP / "layer12.sae.pt", weights_only=True)
    expected = (residual @ weights["W_enc"].T + weights["b_enc"]).topk(50)
    torch.testing.assert_close(found[12].values, expected.values, rtol=1e-5, atol=1e-4)
    assert (found[12].indices == expected.indices).float().mean() > 0.99
    assert found.layers == [0, 12]


def test_all_layers_by_name(published, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(published))
    scope = Scope.from_pretrained("Qwen/Qwen3.5-2B", "qwen3.5-2b-k50", dtype="bfloat16")
    assert scope.layers == list(range(24))
    assert not scope.suite._loaded, "a layer is loaded before it is used"


def test_k_by_name(published, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(published))
    scope = Scope.from_pretrained("Qwen/Qwen3.5-2B", GROUP, layers=[3], dtype="bfloat16", k=7)
    assert scope.features("Rome")[3].k == 7


@pytest.fixture(scope="module")
def folders(llama, tokenizer, suite, tmp_path_factory):
    """A model and a suite that names it, as folders of a mirror."""
    root = tmp_path_factory.mktemp("folders")
    llama.save_pretrained(root / "org" / "tiny")
    tokenizer.save_pretrained(root / "org" / "tiny")
    saes = {layer: suite[layer] for layer in suite}
    Suite.of(saes, name="tiny suite", backbone="org/tiny").save_pretrained(root / "org" / "suite")
    Suite.of(saes, name="orphans").save_pretrained(root / "org" / "orphans")
    return root


def test_folders(folders, found):
    scope = Scope.from_pretrained(str(folders / "org" / "tiny"), str(folders / "org" / "suite"))
    assert same(scope.features(TEXT), found)
    assert Scope.from_pretrained(str(folders / "org" / "tiny"), str(folders / "org" / "suite"), layers=[1]).layers == [
        1
    ]


def test_the_model_a_suite_names(folders, found, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(folders))
    assert same(Scope.from_pretrained(suite="org/suite").features(TEXT), found)
    with pytest.raises(QwenScopeError, match="names none; pass model="):
        Scope.from_pretrained(suite="org/orphans")


def test_the_interface_on_the_bundled_model(bundled, make_sae):
    scope = Scope(bundled, Suite.of({15: make_sae(576, 1024, k=50)}))
    found = scope.features("The capital of France is")
    assert found.tokens == ["The", " capital", " of", " France", " is"]
    assert found.spans == [(0, 3), (3, 11), (11, 14), (14, 21), (21, 24)]
    assert found[15].indices.shape == found[15].values.shape == (5, 50)
    assert found[15].top(5).k == 5
    assert "' capital'" in repr(found[15].top(5))
    chat = scope.features([{"role": "user", "content": "Hello"}])
    assert "<|im_start|>" in chat.tokens
    assert "Hello" in chat.text


# Bad input


@pytest.mark.parametrize("inputs", ["", ["Rome", ""], [], [[]], None, 1.5])
def test_nothing_to_read(scope, inputs):
    with pytest.raises(QwenScopeError, match=r"expected .*found"):
        scope.features(inputs)


@pytest.mark.parametrize("layers", [[3], [-1], [0, 30]])
def test_a_layer_that_is_not_there(scope, llama, suite, tokenizer, layers):
    for call in (lambda: scope.features(TEXT, layers=layers), lambda: Scope(llama, suite, tokenizer, layers=layers)):
        with pytest.raises(QwenScopeError, match=rf"0-2 of tiny suite, found {max(layers, key=abs)}"):
            call()


def test_no_layer_at_all(scope):
    with pytest.raises(QwenScopeError, match="at least one layer"):
        scope.features(TEXT, layers=[])


def test_a_suite_with_more_layers_than_the_model(llama, make_sae):
    with pytest.raises(QwenScopeError, match="0 to 2, found 5"):
        Scope(llama, Suite.of({0: make_sae(), 5: make_sae()}))
    # Those it does have can still be read.
    assert Scope(llama, Suite.of({0: make_sae(), 5: make_sae()}), layers=[0]).layers == [0]


def test_a_model_of_another_width(llama, make_sae):
    other = Suite.of({0: make_sae(d_model=48)}, name="other", backbone="org/wide")
    with pytest.raises(QwenScopeError, match=r"d_model = 32 .*found 48 in other, which reads org/wide"):
        Scope(llama, other)


def test_a_text_longer_than_the_context(scope):
    longest = scope.features([5] * 256)
    assert len(longest) == 256
    for inputs in ([5] * 257, [[1, 2], [5] * 300]):
        with pytest.raises(QwenScopeError, match=r"at most 256 tokens.*found one of (257|300)"):
            scope.features(inputs)


def test_token_ids_the_model_does_not_have(llama, suite):
    scope = Scope(llama, suite)
    for ids in ([5, 320], [-1]):
        with pytest.raises(QwenScopeError, match=f"0 to 319.*found {min(ids)} to {max(ids)}"):
            scope.features(ids)


def test_a_model_that_overflows(make_model, suite):
    broken = make_model("llama")
    broken.model.layers[1].mlp.down_proj.weight.data.mul_(float("inf"))
    scope = Scope(broken, suite)
    with pytest.raises(QwenScopeError, match="NaN or infinity"):
        scope.features([1, 2, 3])
    assert scope.features([1, 2, 3], layers=[0]).layers == [0]


def test_names_of_nothing(folders, tmp_path):
    tiny, suite = str(folders / "org" / "tiny"), str(folders / "org" / "suite")
    for call, words in (
        (lambda: Scope.from_pretrained(tiny), "suite of SAEs beside the model"),
        (lambda: Scope.from_pretrained(tiny, "qwen3.5-2b-k51"), "did you mean qwen3.5-2b-k50"),
        (lambda: Scope.from_pretrained(tiny, str(tmp_path / "missing")), "missing"),
        (lambda: Scope.from_pretrained(tiny, str(tmp_path)), "no SAE"),
        (lambda: Scope.from_pretrained(str(tmp_path / "missing"), suite), "no folder there"),
        (lambda: Scope.from_pretrained(tiny, suite, layers=[9]), "found \\[9\\]"),
        (lambda: Scope.from_pretrained(tiny, suite, dtype="int4"), "'int4'"),
        (lambda: Scope.from_pretrained(tiny, suite, device="nowhere"), "'nowhere'"),
        (lambda: Backbone.from_pretrained(tiny, device="cpu:x"), "'cpu:x'"),
        (lambda: Scope.from_pretrained(tiny, suite, k=0), "k of at least 1"),
        (lambda: Scope.from_pretrained("org/unknown", suite), "org/unknown"),
    ):
        with pytest.raises(QwenScopeError, match=f"expected .*{words}") as error:
            call()
        assert "\n" not in str(error.value)


# TextFeatures


def test_save_and_load(found, tmp_path):
    found.save(tmp_path / "found.safetensors")
    back = TextFeatures.load(str(tmp_path / "found.safetensors"))
    assert back.tokenized == found.tokenized
    assert back.to_dict() == found.to_dict()
    assert repr(back[1]) == repr(found[1])
    assert back[1].d_sae == 128
    assert back[1].indices.dtype == torch.long


def test_errors_of_reconstruction_if_asked_for(scope, found, tmp_path):
    assert found.errors == {}
    one, two = scope.features([TEXT, "of France"], errors=True)
    assert same(one, found)
    for text in (one, two):
        residuals = scope.backbone.residuals(torch.tensor([text.ids]), layers=scope.layers)
        assert list(text.errors) == [0, 1, 2]
        for layer, off in text.errors.items():
            x = residuals[layer][0]
            x_hat = scope.suite[layer].decode(text[layer])
            assert torch.allclose(off, (x - x_hat).norm(dim=1) / x.norm(dim=1), rtol=1e-4)
    one.save(tmp_path / "found.safetensors")
    assert TextFeatures.load(tmp_path / "found.safetensors").to_dict() == one.to_dict()
    assert one.to_dict()["tokens"][2]["errors"]["1"] == float(one.errors[1][2])


def test_a_text_of_token_ids_saves_too(llama, suite, tmp_path):
    found = Scope(llama, suite).features([3, 4])
    found.save(tmp_path / "ids")
    assert same(TextFeatures.load(tmp_path / "ids"), found)


def test_loading_something_else(found, tmp_path):
    found[0].save(tmp_path / "layer")
    with pytest.raises(QwenScopeError, match=r"written by TextFeatures\.save"):
        TextFeatures.load(tmp_path / "layer")
    found.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:100])
    with pytest.raises(QwenScopeError, match="do not parse"):
        TextFeatures.load(tmp_path / "cut")
    with pytest.raises(QwenScopeError, match="found none"):
        TextFeatures.load(tmp_path / "missing")


def test_to_dict_is_json(found):
    as_json = json.loads(json.dumps(found.to_dict(top=2)))
    assert as_json["text"] == TEXT
    assert [token["token"] for token in as_json["tokens"]] == found.tokens
    third = as_json["tokens"][3]
    assert (third["position"], third["id"], third["span"]) == (3, found.ids[3], [14, 21])
    assert third["features"]["2"] == [
        {"feature": f"2/{found[2].indices[3, i]}", "value": found[2].values[3, i].item()} for i in (0, 1)
    ]
    assert len(found.to_dict()["tokens"][0]["features"]["0"]) == 8


def test_a_layer_that_was_not_read(scope):
    with pytest.raises(QwenScopeError, match=r"\[1\], found 2"):
        scope.features(TEXT, layers=[1])[2]


def test_indexing_keeps_the_tokens(found):
    layer = found[1]
    for index, kept in ((slice(2, 4), (2, 3)), ([5, 0], (5, 0)), (torch.tensor([1]), (1,)), (4, (4,)), (-1, (5,))):
        part = layer[index]
        assert part.positions == kept
        assert part.tokens == tuple(found.tokens[i] for i in kept)
        assert torch.equal(part.indices, layer.indices[index])
        assert part.layer == 1
        # A position 0 comes with a line about what it is.
        assert repr(part).count("\n") == 1 + len(kept) + (0 in kept)
    mask = torch.tensor([False, True] * 3)
    assert layer[mask].positions == (1, 3, 5)
    assert layer[2].shape == ()
    assert layer[2:][1].positions == (3,)
    assert [len(row.tokens) for row in layer] == [1] * 6
    with pytest.raises(IndexError):
        layer[6]


def test_top_keeps_the_tokens(found):
    top = found[1].top(3)
    assert type(top) is type(found[1])
    assert top.k == 3
    assert top.tokens == found[1].tokens
    assert torch.equal(top.indices, found[1].indices[:, :3])
    assert torch.equal(found[1].to_dense(), SparseFeatures(found[1].indices, found[1].values, 128).to_dense())


def test_strongest(found):
    layer = found[0]
    dense = layer.to_dense()
    for skip, rows in ((True, dense[1:]), (False, dense)):
        best = layer.strongest(5, skip_first=skip)
        values, order = rows.amax(0).sort(descending=True)
        assert [name for name, _, _ in best] == [f"0/{i}" for i in order[:5].tolist()]
        torch.testing.assert_close(torch.tensor([value for _, value, _ in best]), values[:5])
        for name, value, at in best:
            assert dense[at, int(name[2:])] == value
            assert at > 0 or not skip
    assert layer.strongest(3) == layer.strongest()[:3]
    assert len({name for name, _, _ in layer.strongest(1000)}) == len(layer.strongest(1000))
    assert all(value > 0 for _, value, _ in layer.strongest(1000))
    # Positions stay those of the text in a part of it.
    assert {at for _, _, at in layer[3:].strongest(100)} == {3, 4, 5}
    assert layer[:1].strongest() == []


def test_readable_repr(found, scope):
    summary = repr(found)
    assert (
        summary.splitlines()[0]
        == f"TextFeatures({TEXT!r}, 6 tokens, layers [0, 1, 2]); strongest, position 0 left out:"
    )
    name, value, at = found[1].strongest(1)[0]
    assert f"  layer 1: {name} {value:.4g} at {found.tokens[at]!r}" in summary
    table = repr(found[1].top(2)).splitlines()
    assert table[0] == "layer 1: 6 tokens, 2 features each (d_sae 128)"
    assert table[3] == (
        f"   1  ' capital'  1/{found[1].indices[1, 0]} {found[1].values[1, 0]:.4g}  "
        f"1/{found[1].indices[1, 1]} {found[1].values[1, 1]:.4g}"
    )
    long = scope.features([5] * 60)
    assert "20 more tokens" in repr(long[0])
    assert len(repr(long[0]).splitlines()) == 44
    assert len(repr(long)) < 1000


def test_html_is_escaped():
    tokens = ["first", "<script>alert(1)</script>", "\"' & <b"]
    spans = [(0, 5), (5, 30), (30, 37)]
    pair = SparseFeatures(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), 8)
    found = text_features(TokenizedText("".join(tokens), [0, 1, 2], tokens, spans), {0: pair})
    for html in (found._repr_html_(), found[0]._repr_html_(), found[0][1]._repr_html_(), found[0][2]._repr_html_()):
        assert "<script" not in html
        assert "<b" not in html
        assert "&lt;" in html
    # All attributes are closed: whatever is left after the tags is the text.
    text = re.sub(r'</?[a-z]+( [a-z]+="[^"<>]*")*>', "", found[0]._repr_html_())
    assert "<" not in text
    assert ">" not in text


def test_html_names_features_and_shades_tokens(found):
    html = found[1]._repr_html_()
    assert html.count("<span") == 6
    assert f"1/{found[1].indices[2, 0]}  {found[1].values[2, 0]:.4g}" in html
    assert "0.60)" in html, "the strongest token is shaded most"


# What a review found


def test_two_threads_read_the_same_as_one(llama, suite, tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    scope = Scope(llama, suite, tokenizer=tokenizer)
    texts = [f"the capital of {name}" for name in ("France", "Italy", "Paris", "Rome")] * 5
    alone = [scope.features(text, layers=[i % 3]) for i, text in enumerate(texts)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: scope.features(job[1], layers=[job[0] % 3]), enumerate(texts)))
    for one, other in zip(alone, together, strict=True):
        assert one.layers == other.layers
        assert torch.equal(one[one.layers[0]].values, other[one.layers[0]].values)


def test_one_layer_can_be_named_by_its_number_alone(llama, suite, tokenizer, unchecked):
    assert Scope(llama, suite, tokenizer=tokenizer, layers=1).layers == [1]
    assert Scope(llama, suite, tokenizer=tokenizer).features("the", layers=2).layers == [2]


def test_a_suite_must_be_opened_first(llama, unchecked):
    with pytest.raises(QwenScopeError, match=r"found 'qwen3.5-2b-k50'; open it"):
        Scope(llama, "qwen3.5-2b-k50")


def test_a_tokenizer_beside_a_backbone_counts(llama, suite, tokenizer):
    assert Scope(Backbone(llama), suite, tokenizer=tokenizer).features("the").tokens


def test_text_that_is_not_unicode_is_one_sentence(llama, suite, tokenizer):
    with pytest.raises(QwenScopeError, match=r"valid Unicode, found '\\udcff' at character 3"):
        Scope(llama, suite, tokenizer=tokenizer).features("abc\udcffd")


def test_what_was_asked_for_is_shown(llama, make_sae, tokenizer):
    suite = Suite.of({0: make_sae(k=30)})
    found = Scope(llama, suite, tokenizer=tokenizer).features("the capital")[0]
    assert repr(found.top(20)).count("0/") == 20 * len(found.tokens)
    assert "22 more features a token" in repr(found)


# Many layers


def test_each_layer_is_needed_once_for_many_batches(llama, tokenizer, suite, monkeypatch, tmp_path):
    texts = [f"Rome is the capital of Italy {n} " * (1 + n % 4) for n in range(12)]
    expected = Scope(llama, suite, tokenizer).features(texts)
    suite.save_pretrained(tmp_path)
    monkeypatch.setattr(reading, "batches", partial(batches, most=64))
    one = suite[0].nbytes
    loads = []
    load = Suite._load
    monkeypatch.setattr(Suite, "_load", lambda self, layer: loads.append(layer) or load(self, layer))
    tight = Suite.from_pretrained(tmp_path, max_bytes=one)
    scope = Scope(llama, tight, tokenizer)
    found = scope.features(texts)
    assert loads == [0, 1, 2], "a layer was loaded more than once"
    loads.clear()
    monkeypatch.setattr(reading, "RESIDUAL_BYTES", 1)
    again = scope.features(texts)
    count = len(batches([text.tokenized for text in found], scope.backbone, 64))
    assert count > 3
    assert len(loads) >= 3 * count - 1
    for ours in (found, again):
        for text, other in zip(ours, expected, strict=True):
            for layer in scope.layers:
                torch.testing.assert_close(text[layer].values, other[layer].values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["reference", "cpu-bfloat16"])
def test_the_kernel_can_be_asked_for(llama, tokenizer, suite, tmp_path, kernel):
    suite.save_pretrained(tmp_path / "suite")
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for prepared in (False, True):
        scope = Scope.from_pretrained(
            str(tmp_path / "model"), str(tmp_path / "suite"), kernel=kernel, prepared=prepared, device="cpu"
        )
        scope.features("Paris is the capital of France")
        assert str(scope.suite[0].encoder.choice) == f"{kernel} (asked for)"
