"""Control vectors: what the files hold, and that adding them by plain hooks is what our own steering does."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from qwen_scope import Backbone, QwenScopeError, Scope
from qwen_scope.cli import main
from qwen_scope.steering.vectors import control_vectors, model_hint, save_gguf, save_vectors

STEERING = "1/3:2 1/7:-1.5 2/5:3"


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


def expected(scope: Scope) -> dict[int, torch.Tensor]:
    one, two = (scope.suite[layer].W_dec for layer in (1, 2))
    return {1: 2 * one[:, 3] - 1.5 * one[:, 7], 2: 3 * two[:, 5]}


def read(path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}


def test_adds_of_a_layer_are_summed_with_their_strengths(scope):
    vectors = control_vectors(scope.changes(STEERING))
    assert list(vectors) == [1, 2]
    for layer, vector in expected(scope).items():
        assert vectors[layer].dtype == torch.float32
        torch.testing.assert_close(vectors[layer], vector)


def test_units_of_the_maximum_are_counted_in(scope):
    number = int(scope.maxima.layer(1).argmax())
    vector = control_vectors(scope.changes(f"1/{number}:-2x"))[1]
    torch.testing.assert_close(vector, -2 * scope.maxima(1, number) * scope.suite[1].W_dec[:, number])


def test_the_file_that_llama_cpp_reads(scope, tmp_path):
    save_vectors(tmp_path / "out.gguf", scope.changes(STEERING), scope.backbone, scope.suite)
    fields, tensors = read(tmp_path / "out.gguf")
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert STEERING in fields["general.description"]
    # Their number of a layer is ours.
    assert sorted(tensors) == ["direction.1", "direction.2"]
    for layer, vector in expected(scope).items():
        assert tensors[f"direction.{layer}"].dtype == np.float32
        assert tensors[f"direction.{layer}"].shape == (32,)
        np.testing.assert_allclose(tensors[f"direction.{layer}"], vector.numpy(), rtol=1e-6, atol=1e-6)


def test_safetensors(scope, tmp_path):
    save_vectors(tmp_path / "out.safetensors", scope.changes(f"0/1:1 {STEERING}"), scope.backbone, scope.suite)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["direction.0", "direction.1", "direction.2"]
        torch.testing.assert_close(file.get_tensor("direction.2"), expected(scope)[2])
        about = file.metadata()
    assert about["format"] == "qwen-scope control vectors 1"
    assert about["steering"] == f"0/1:1 {STEERING}"
    assert about["suite"] == "tiny suite"


def test_vectors_added_by_plain_hooks_do_what_our_steering_does_with_position_0(scope, tmp_path):
    # llama.cpp adds at every token: for us, all and 0.
    steering = "1/3:2@0,all 1/7:-1.5@0,all 2/5:3@0,all"
    save_vectors(tmp_path / "out.gguf", scope.changes(steering), scope.backbone, scope.suite)
    vectors = {int(name.split(".")[1]): torch.tensor(data) for name, data in read(tmp_path / "out.gguf")[1].items()}
    model, ids = scope.backbone.model, torch.randint(3, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    hooks = [
        model.model.layers[layer].register_forward_hook(lambda module, args, output, vector=vector: output + vector)
        for layer, vector in vectors.items()
    ]
    with torch.no_grad():
        other = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        with scope.steered(steering):
            ours = model(input_ids=ids).logits
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, model(input_ids=ids).logits, atol=0.1)


def test_vectors_are_what_our_steering_adds_to_the_residuals_after_position_0(scope):
    ids = torch.randint(3, 320, (1, 9), generator=torch.Generator().manual_seed(0))
    seen = {}
    for layer in (1, 2):  # one at a time, as what one adds changes what the next is given
        steering = " ".join(edit for edit in STEERING.split() if edit.startswith(f"{layer}/"))
        plain = scope.backbone.residuals(ids, layers=[layer])[layer]
        with scope.steered(steering):
            hook = scope.backbone.layers[layer].register_forward_hook(lambda m, a, output: seen.update(x=output))
            scope.backbone.model(input_ids=ids)
            hook.remove()
        added = (seen["x"] - plain)[0].detach()
        vector = control_vectors(scope.changes(steering))[layer]
        torch.testing.assert_close(added[1:], vector.expand(8, -1), rtol=1e-4, atol=1e-4)
        assert not added[0].any()


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ("", "expected features to make control vectors of, found none"),
        ("1/3:=2", r"expected edits that add, .* found 1/3:=2"),
        ("1/3:*2", "expected edits that add"),
        ("1/3:2 1/4:ablate", "expected edits that add, .* found 1/4:ablate"),
        ("1/3:2@generated", "expected edits at all tokens, .* found 1/3:2@generated"),
        ("1/3:2@prompt", "expected edits at all tokens"),
        ("1/3:2@0,3", "expected edits at all tokens"),
        ("1/3:1e300", "expected strengths that float32 can hold, found too large a vector at layer 1"),
    ],
)
def test_what_no_vector_can_do(scope, tmp_path, steering, message):
    with pytest.raises(QwenScopeError, match=message):
        save_vectors(tmp_path / "out.gguf", scope.changes(steering), scope.backbone, scope.suite)
    assert not list(tmp_path.iterdir())


def test_layer_0_is_not_for_llama_cpp(scope, tmp_path):
    with pytest.raises(QwenScopeError, match="expected control vectors of layers from 1"):
        save_vectors(tmp_path / "out.gguf", scope.changes("0/3:2 1/3:2"), scope.backbone, scope.suite)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.bin", "out", ".gguf"])
def test_other_endings(scope, tmp_path, name):
    with pytest.raises(QwenScopeError, match=r"expected a file that ends in \.gguf or \.safetensors, found"):
        save_vectors(tmp_path / name, scope.changes("1/3:2"), scope.backbone, scope.suite)


def test_a_file_that_cannot_be_written(scope, tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(QwenScopeError, match="expected to write"):
        save_vectors(tmp_path / "a file" / "out.gguf", scope.changes("1/3:2"), scope.backbone, scope.suite)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(QwenScopeError, match="expected to write"):
        save_gguf(tmp_path / "folder.gguf", {1: torch.ones(4)}, "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "folder.gguf"]


def test_what_llama_cpp_calls_the_model(architecture, model):
    names = {
        "qwen3-moe": "qwen3moe",
        "qwen3.5": "qwen35",
        "qwen3.5-moe": "qwen35moe",
        "qwen3.5-vl": "qwen35",
        "gpt-neox": "gptneox",
    }
    assert model_hint(Backbone(model)) == names.get(architecture, architecture)


def test_models_that_llama_cpp_calls_otherwise_or_does_not_know():
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    for config, name in (
        (transformers.MistralConfig(**small, num_key_value_heads=1), "llama"),
        (transformers.BioGptConfig(**small), "biogpt"),
    ):
        model = transformers.AutoModelForCausalLM.from_config(config)
        assert model_hint(Backbone(model)) == name


@pytest.mark.real
def test_the_command(bundled, tmp_path, capsys):
    main(["vectors", "15/1037:2x", str(tmp_path / "football.gguf")])
    out = capsys.readouterr().out
    assert "wrote control vectors of layers 15 to" in out
    assert "--control-vector" in out
    fields, tensors = read(tmp_path / "football.gguf")
    assert fields["controlvector.model_hint"] == "llama"
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in fields["general.description"]
    scope = Scope(bundled, Scope.from_pretrained(layers=[15]).suite)
    direction = scope.suite[15].W_dec[:, 1037].detach().float() * 2 * scope.maxima(15, 1037)
    np.testing.assert_allclose(tensors["direction.15"], direction.numpy(), rtol=1e-5)
    main(["vectors", "7/3:1 15/1037:-1", str(tmp_path / "out.safetensors")])
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["direction.15", "direction.7"]
        assert file.metadata()["steering"] == "7/3:1 15/1037:-1"
    with pytest.raises(SystemExit):
        main(["vectors", "15/1037:ablate", str(tmp_path / "out.gguf")])
    assert "expected edits that add" in capsys.readouterr().err
