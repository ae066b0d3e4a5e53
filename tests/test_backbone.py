"""Where decoder layers live, what reading and editing the residual stream do, and what loading refuses."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from qwen_scope import Backbone, QwenScopeError
from qwen_scope.backbone import as_dtype, find_decoder_layers

IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone(model) -> Backbone:
    return Backbone(model)


@pytest.fixture
def one_sentence():
    """Whether an error is one sentence that says what was expected, what was found and what to do."""

    def check(error: pytest.ExceptionInfo, *words: str) -> None:
        message = str(error.value)
        assert re.fullmatch(r"(in .*: )?expected .*found .*[;:] .*[^.]", message), message
        assert "\n" not in message
        for word in words:
            assert word in message

    return check


# Decoder layers


def test_decoder_layers_are_found(backbone, model, architecture):
    places = {"qwen3.5-vl": "model.language_model.layers", "gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}
    assert backbone.layers is model.get_submodule(places.get(architecture, "model.layers"))
    assert backbone.d_model == 32
    assert backbone.context_length == 256
    assert backbone.layers is find_decoder_layers(model)


def test_lists_of_the_same_length_inside_layers_are_not_taken_for_them(llama):
    inner = [nn.ModuleList([nn.Identity() for _ in llama.model.layers]) for _ in llama.model.layers]
    try:
        for layer, some in zip(llama.model.layers, inner, strict=True):
            layer.experts = some
        assert find_decoder_layers(llama) is llama.model.layers
    finally:
        for layer in llama.model.layers:
            del layer.experts


@pytest.mark.parametrize(
    "config",
    [
        transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
        transformers.T5Config(d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8, vocab_size=50),
        transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
    ],
    ids=["encoder", "encoder-decoder", "vision", "no layers"],
)
def test_other_models_are_refused(config, one_sentence):
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(QwenScopeError) as error:
        Backbone(model)
    one_sentence(error, "decoder-only", type(model).__name__)


# After the layers


def test_the_final_norm_is_found(backbone, model, architecture):
    places = {
        "qwen3.5-vl": "model.language_model.norm",
        "gpt2": "transformer.ln_f",
        "gpt-neox": "gpt_neox.final_layer_norm",
    }
    assert backbone.final_norm is model.get_submodule(places.get(architecture, "model.norm"))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_norm_and_unembedding_make_the_logits_of_the_last_residual(backbone, model):
    last = len(backbone.layers) - 1
    with torch.no_grad():
        normed = backbone.final_norm(backbone.residuals(IDS, layers=[last])[last])
        torch.testing.assert_close(normed @ backbone.unembedding.T, logits(model))


def test_a_model_without_a_final_norm(make_model):
    model = make_model("llama")
    layers, head = model.model.layers, model.lm_head
    model.model.norm = None
    model.model.forward = lambda input_ids, **_: SimpleNamespace(
        last_hidden_state=layers[-1](
            model.model.embed_tokens(input_ids),
            position_embeddings=model.model.rotary_emb(torch.zeros(1), torch.zeros(1, 1)),
        ),
    )
    assert isinstance(Backbone(model).final_norm, nn.Identity)
    assert Backbone(model).unembedding is head.weight


def test_a_model_without_an_unembedding(make_model, one_sentence):
    with pytest.raises(QwenScopeError) as error:
        _ = Backbone(make_model("llama").model).unembedding
    one_sentence(error, "LlamaModel")


# Reading


def test_residuals_are_the_hidden_states_except_after_the_last_layer(backbone, model):
    with torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    last = len(backbone.layers) - 1
    residuals = backbone.residuals(IDS, layers=range(last + 1))
    assert list(residuals) == list(range(last + 1))
    for layer in range(last):
        torch.testing.assert_close(residuals[layer], hidden[layer + 1])
    assert not torch.allclose(residuals[last], hidden[last + 1], rtol=1e-2)


def test_layers_can_be_named_in_any_order_and_twice(backbone):
    some = backbone.residuals(IDS, layers=[1, 0, 1])
    assert list(some) == [0, 1]
    assert torch.equal(some[1], backbone.residuals(IDS, layers=[1])[1])
    assert backbone.residuals(IDS, layers=[]) == {}


def test_residuals_carry_no_gradient(llama):
    assert not Backbone(llama).residuals(IDS, layers=[0])[0].requires_grad


@pytest.mark.parametrize("layer", [-1, 3, 100])
def test_a_layer_that_is_not_there(llama, layer, one_sentence):
    backbone = Backbone(llama)
    with pytest.raises(QwenScopeError) as error:
        backbone.residuals(IDS, layers=[0, layer])
    one_sentence(error, "0 to 2", str(layer))
    with pytest.raises(QwenScopeError), backbone.editing({layer: lambda x: x}):
        pass
    assert not any(layer._forward_hooks for layer in backbone.layers)


# Editing


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **inputs).logits


def test_editing_with_the_identity_changes_nothing(backbone, model):
    before = logits(model)
    seen = []
    everywhere = {layer: lambda x: (seen.append(x.shape), x)[1] for layer in range(len(backbone.layers))}
    with backbone.editing(everywhere):
        assert torch.equal(logits(model), before)
    assert seen == [(2, 9, 32)] * len(backbone.layers)


def test_editing_replaces_what_later_layers_read(backbone, model):
    before = logits(model)
    last = len(backbone.layers) - 1
    for layer in (0, last):
        with backbone.editing({layer: torch.zeros_like}):
            edited = logits(model)
        assert not torch.allclose(edited, before)
    # Nothing but the final norm of zeros and the head is left: every position gets the same logits.
    torch.testing.assert_close(edited, edited[:1, :1].expand_as(edited))
    with backbone.editing({0: torch.zeros_like}):
        assert not backbone.residuals(IDS, layers=[0])[0].any()
    assert torch.equal(logits(model), before)


def test_edited_residuals_of_another_run_carry_its_logits_over(llama):
    backbone = Backbone(llama)
    other = IDS.flip(0)
    residual = backbone.residuals(other, layers=[1])[1]
    with backbone.editing({1: lambda x: residual}):
        carried = logits(llama)
    torch.testing.assert_close(carried, logits(llama).flip(0))


def test_hooks_are_removed_after_an_exception(llama):
    backbone = Backbone(llama)

    def fail(x):
        raise RuntimeError("in an edit")

    with pytest.raises(RuntimeError, match="in an edit"), backbone.editing({0: lambda x: x, 1: fail}):
        logits(llama)
    with pytest.raises(IndexError):
        backbone.residuals(torch.tensor([[10_000]]), layers=[0, 2])
    assert not any(layer._forward_hooks for layer in backbone.layers)


# Layers that return tuples, as they did in transformers 4


class TupleLayer(nn.Module):
    def __init__(self, output: type):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.output = output

    def forward(self, x):
        return self.output((x + self.linear(x), "cache"))


class TupleModel(nn.Module):
    def __init__(self, output: type = tuple):
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=2, hidden_size=8, vocab_size=320)
        self.config = SimpleNamespace(get_text_config=lambda **_: text, name_or_path="tuples", is_encoder_decoder=False)
        self.embedding = nn.Embedding(320, 8)
        self.layers = nn.ModuleList([TupleLayer(output), TupleLayer(output)])

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x, cache = layer(x)
            assert cache == "cache"
        return SimpleNamespace(logits=x)


@pytest.mark.parametrize("output", [tuple, list])
def test_layers_that_return_tuples(output):
    torch.manual_seed(0)
    model = TupleModel(output)
    backbone = Backbone(model)
    with torch.no_grad():
        expected = model.layers[0](model.embedding(IDS))[0]
    residuals = backbone.residuals(IDS, layers=[0, 1])
    assert torch.equal(residuals[0], expected)
    assert torch.equal(residuals[1], logits(model))
    with backbone.editing({0: lambda x: x}):
        assert torch.equal(logits(model), residuals[1])
    with backbone.editing({0: torch.zeros_like}), torch.no_grad():
        assert torch.equal(logits(model), model.layers[1](torch.zeros(2, 9, 8))[0])


# Loading


@pytest.fixture(scope="module")
def folder(llama, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "org" / "tiny"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_local_folder(folder, llama, tokenizer):
    backbone = Backbone.from_pretrained(str(folder))
    assert backbone.name == str(folder)
    assert backbone.model.dtype == torch.float32
    assert not backbone.model.training
    assert torch.equal(logits(backbone.model), logits(llama))
    assert backbone.tokenizer("France")["input_ids"] == tokenizer("France")["input_ids"]


def test_a_hub_id_out_of_the_mirror(folder, monkeypatch, llama):
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(folder.parent.parent))
    assert torch.equal(logits(Backbone.from_pretrained("org/tiny").model), logits(llama))


def test_a_vision_language_model_out_of_a_folder(make_model, tokenizer, tmp_path):
    # AutoModelForCausalLM takes the text model out of the wrapper.
    wrapped = make_model("qwen3.5-vl")
    wrapped.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = Backbone.from_pretrained(str(tmp_path))
    assert len(backbone.layers) == 4
    assert backbone.d_model == 32
    expected = Backbone(wrapped).residuals(IDS, layers=[3])[3]
    torch.testing.assert_close(backbone.residuals(IDS, layers=[3])[3], expected)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16(folder, dtype, llama):
    backbone = Backbone.from_pretrained(str(folder), dtype=dtype)
    assert backbone.model.dtype == torch.bfloat16
    found = backbone.residuals(IDS, layers=[2])[2]
    assert found.dtype == torch.bfloat16
    expected = Backbone(llama).residuals(IDS, layers=[2])[2]
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_device_map(folder, llama):
    backbone = Backbone.from_pretrained(str(folder), device_map="cpu")
    assert backbone.device.type == "cpu"
    assert torch.equal(logits(backbone.model), logits(llama))


@pytest.mark.parametrize("dtype", ["int8", "float", "no dtype", torch.long, "nn"])
def test_a_bad_dtype(folder, dtype, one_sentence):
    if dtype == "float":
        assert as_dtype(dtype) == torch.float32
        return
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(folder), dtype=dtype)
    one_sentence(error, "bfloat16")


def test_a_folder_that_is_not_there(tmp_path, one_sentence, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "missing"), "org/missing"):
        with pytest.raises(QwenScopeError) as error:
            Backbone.from_pretrained(name)
        one_sentence(error, name)


def test_a_folder_without_a_model(tmp_path, one_sentence):
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, str(tmp_path))


def test_a_truncated_model(folder, tmp_path, one_sentence):
    for path in folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, str(tmp_path))


def test_a_model_with_weights_missing(folder, tmp_path, one_sentence):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, "1 missing", "layers.1.mlp.up_proj")


def test_a_model_of_other_shapes_than_its_config(folder, tmp_path, one_sentence):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"intermediate_size": 64', '"intermediate_size": 48'))
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, str(tmp_path))


def test_a_config_that_does_not_parse(folder, tmp_path, one_sentence):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, str(tmp_path))


def test_a_model_without_a_tokenizer(llama, tmp_path, one_sentence):
    llama.save_pretrained(tmp_path)
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, "tokenizer", str(tmp_path))


def test_a_folder_of_an_encoder(tmp_path, one_sentence, tokenizer):
    config = transformers.T5Config(d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8, vocab_size=320)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(QwenScopeError) as error:
        Backbone.from_pretrained(str(tmp_path))
    one_sentence(error, str(tmp_path))


def test_a_folder_in_the_users_home(tmp_path, monkeypatch, llama, tokenizer):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Backbone.from_pretrained("~/model").layers) == len(Backbone(llama).layers)
