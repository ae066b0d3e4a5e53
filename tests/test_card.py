"""The model card's own snippet beside `Scope.features`: the same features and values, everywhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qwen_scope import Scope, Suite
from qwen_scope.features import SparseFeatures
from qwen_scope.sae import TopKSAE
from qwen_scope.text_features import TextFeatures

TEXTS = [
    "The capital of France is",
    "a",
    "Rome is the capital of Italy, and Paris is that of France; what is the capital of Spain? 🦉 ¿Dónde está? " * 2,
    "the end.\n\n",
    "The capital of France is",
]
DECODER_LAYERS = {
    "qwen3.5-vl": "model.language_model.layers",
    "gpt2": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}

# Values agree to 1e-5 of the largest value at their token. Relative to each value itself would ask for more than
# float32 can give where a value is a small difference of large products.
TOLERANCE = 1e-5


class CardSnippet:
    """The snippet of the model card, with the names it has there; only the hook's place depends on the model."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, saes: dict[int, TopKSAE]):
        self.model, self.layers, self.saes = model, layers, saes

    def pre_activations(self, inputs) -> dict[int, Tensor]:
        captured = {}

        def _hook(layer: int) -> Callable:
            def hook(module, input, output):
                hidden = output[0] if isinstance(output, tuple) else output
                captured[layer] = hidden.detach().cpu()

            return hook

        hooks = [self.layers[n].register_forward_hook(_hook(n)) for n in self.saes]
        with torch.no_grad():
            self.model(**inputs)
        for hook in hooks:
            hook.remove()
        return {layer: captured[layer] @ sae.W_enc.T + sae.b_enc for layer, sae in self.saes.items()}


def get_feature_acts(pre_acts: Tensor, k: int) -> Tensor:
    topk_vals, topk_idx = pre_acts.topk(k, dim=-1)
    acts = torch.zeros_like(pre_acts)
    acts.scatter_(-1, topk_idx, topk_vals)
    return acts


def assert_same_features(found: SparseFeatures, pre_acts: Tensor, k: int) -> None:
    """`found` (tokens, k) is what the card makes of `pre_acts` (tokens, d_sae)."""
    expected = get_feature_acts(pre_acts, k)
    assert found.indices.shape == (len(pre_acts), k)
    got = torch.zeros_like(expected).scatter_(-1, found.indices, found.values)
    allowed = TOLERANCE * expected.abs().amax(dim=1, keepdim=True)
    kept, kept_by_card = (
        torch.zeros_like(expected).scatter_(-1, i, 1.0).bool()
        for i in (found.indices, pre_acts.topk(k, dim=-1).indices)
    )
    assert (kept.sum(1) == k).all(), "a feature is kept twice"
    both = kept & kept_by_card
    error = torch.where(both, got - expected, 0).abs() / expected.abs().amax(dim=1, keepdim=True)
    assert error.max() <= TOLERANCE, f"values differ by {error.max():.2g} of the largest"
    # The last place may go to another feature only if the two are as good as tied.
    at_border = (pre_acts - pre_acts.topk(k, dim=-1).values[:, -1:]).abs() <= allowed
    assert (at_border | (kept == kept_by_card)).all(), "another feature is kept that is not tied at rank k"
    assert (found.values.diff(dim=1) <= 0).all(), "not strongest first"


def decoder_layers(model: nn.Module, architecture: str) -> nn.ModuleList:
    return model.get_submodule(DECODER_LAYERS.get(architecture, "model.layers"))


@pytest.fixture(scope="module")
def card(model, architecture, make_sae) -> CardSnippet:
    layers = decoder_layers(model, architecture)
    return CardSnippet(model, layers, {n: make_sae(seed=n) for n in range(len(layers))})


@pytest.fixture(scope="module")
def scope(card, tokenizer) -> Scope:
    return Scope(card.model, Suite.of(card.saes), tokenizer)


def assert_card_alone(scope: Scope, card: CardSnippet, texts: list[str], found: list[TextFeatures]) -> None:
    for text, features in zip(texts, found, strict=True):
        inputs = scope.backbone.tokenizer(text, return_tensors="pt")
        pre_acts = card.pre_activations({"input_ids": inputs["input_ids"]})
        assert features.ids == inputs["input_ids"][0].tolist()
        assert features.layers == list(card.saes)
        for layer, sae in card.saes.items():
            assert_same_features(features[layer], pre_acts[layer][0], sae.k)


def assert_card_padded(scope: Scope, card: CardSnippet, texts: list[str], found: list[TextFeatures]) -> None:
    tokenizer = scope.backbone.tokenizer
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    assert not inputs["attention_mask"].all(), "nothing is padded"
    pre_acts = card.pre_activations({name: inputs[name] for name in ("input_ids", "attention_mask")})
    for row, (features, mask) in enumerate(zip(found, inputs["attention_mask"].bool(), strict=True)):
        for layer, sae in card.saes.items():
            assert_same_features(features[layer], pre_acts[layer][row][mask], sae.k)


def test_one_text(scope, card):
    for text in TEXTS[:3]:
        assert_card_alone(scope, card, [text], [scope.features(text)])


def test_a_batch_of_texts_of_different_lengths(scope, card):
    found = scope.features(TEXTS)
    assert_card_alone(scope, card, TEXTS, found)
    assert_card_padded(scope, card, TEXTS, found)


def test_the_last_layer_is_read_before_the_final_norm(scope, card):
    # The card hooks the layer itself; hidden_states[-1] is normalised and gives other features.
    last = len(card.layers) - 1
    inputs = scope.backbone.tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        normed = card.model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[-1][0]
    sae = card.saes[last]
    with pytest.raises(AssertionError):
        assert_same_features(scope.features(TEXTS[0])[last], normed @ sae.W_enc.T + sae.b_enc, sae.k)


def test_negative_values_are_kept_as_on_the_card(scope, card, make_sae):
    # With k above half the width some kept pre-activations are negative: the card keeps them, topk_relu does not.
    saes = {0: make_sae(k=100)}
    found = Scope(card.model, Suite.of(saes), scope.backbone.tokenizer).features(TEXTS[0])[0]
    assert (found.values < 0).any()
    pre_acts = CardSnippet(card.model, card.layers, saes).pre_activations(
        {"input_ids": torch.tensor([scope.features(TEXTS[0]).ids])}
    )
    assert_same_features(found, pre_acts[0][0], 100)
    relu = make_sae(k=100, activation="topk_relu")
    clamped = Scope(card.model, Suite.of({0: relu}), scope.backbone.tokenizer).features(TEXTS[0])[0]
    assert torch.equal(clamped.values, found.values.relu())


def test_reading_stops_after_the_last_layer_asked_for_and_leaves_no_hook(scope, card):
    calls: list[int] = []
    hooks = [len(module._forward_hooks) for module in card.model.modules()]
    counters = [layer.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(card.layers)]
    try:
        scope.features(TEXTS[0], layers=[0])
        assert calls == [0]
        calls.clear()
        scope.features(TEXTS[0], layers=[1, 0])
        assert calls == [0, 1]
        calls.clear()
        scope.features(TEXTS[0])
        assert calls == list(range(len(card.layers)))
    finally:
        for counter in counters:
            counter.remove()
    # transformers keeps hooks of its own on some modules.
    assert [len(module._forward_hooks) for module in card.model.modules()] == hooks


def test_the_bundled_model(bundled, make_sae):
    layers = decoder_layers(bundled.model, "llama")
    assert len(layers) == 30
    card = CardSnippet(bundled.model, layers, dict.fromkeys(range(30), make_sae(576, 2048, k=50)))
    scope = Scope(bundled, Suite.of(card.saes))
    found = scope.features(TEXTS)
    assert_card_alone(scope, card, TEXTS, found)
    assert_card_padded(scope, card, TEXTS, found)
    assert_card_alone(scope, card, TEXTS[:1], [scope.features(TEXTS[0])])
