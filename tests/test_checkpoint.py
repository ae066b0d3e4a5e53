"""Every file format: round trips, agreement with the libraries' own definitions, and every kind of bad file."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen_scope.checkpoint import Weights, native, published, sae_lens, sparsify
from qwen_scope.checkpoint.weights import subtracting_bias
from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import TopKSAE
from qwen_scope.suite import Suite


def weights(d_model: int = 6, d_sae: int = 20, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weights:
    g = torch.Generator().manual_seed(seed)
    shapes = ((d_sae, d_model), (d_model, d_sae), (d_sae,), (d_model,))
    return Weights(*(torch.randn(shape, generator=g).to(dtype) for shape in shapes))


def same(a: Weights, b: Weights) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def card_encode(w: Weights, x: torch.Tensor, k: int, relu: bool) -> torch.Tensor:
    """Dense activations, as the model card computes them."""
    pre = x @ w.W_enc.T + w.b_enc
    values, indices = pre.topk(k)
    return torch.zeros_like(pre).scatter(1, indices, values.relu() if relu else values)


def write_config(path: Path, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (before | changes).items() if value is not ...}))
    return path


# Round trips


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(d_model=st.integers(1, 9), d_sae=st.integers(1, 17), bf16=st.booleans())
def test_every_format_gives_back_what_was_written(tmp_path, d_model, d_sae, bf16):
    w = weights(d_model, d_sae, dtype=torch.bfloat16 if bf16 else torch.float32)
    published.write(tmp_path / "layer0.sae.pt", w)
    assert same(published.read(tmp_path / "layer0.sae.pt"), w)
    native.write(tmp_path / "layer0.safetensors", w)
    assert same(native.read(tmp_path / "layer0.safetensors"), w)

    sae_lens.write(tmp_path, w, 7, 1, "topk", "org/model")
    folder = tmp_path / "blocks.7.hook_resid_post"
    config = sae_lens.read_config(folder / "cfg.json")
    assert (config.k, config.activation, config.d_model, config.d_sae) == (1, "topk", d_model, d_sae)
    assert config.backbone == "org/model"
    assert same(sae_lens.read(folder / sae_lens.WEIGHTS, config), w)

    sparsify.write(tmp_path, w, 7, 1, "topk_relu")
    config = sparsify.read_config(tmp_path / "layers.7/cfg.json", None)
    assert (config.k, config.activation, config.d_model, config.d_sae) == (1, "topk_relu", d_model, d_sae)
    back = sparsify.read(tmp_path / "layers.7" / sparsify.WEIGHTS, config)
    assert same(back._replace(b_enc=w.b_enc), w)
    assert back.b_enc.dtype == torch.float32
    torch.testing.assert_close(back.b_enc, w.b_enc.float(), rtol=1e-5, atol=1e-5)


def test_files_have_the_documented_keys_and_shapes(tmp_path):
    w = weights()
    published.write(tmp_path / "a.pt", w)
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    native.write(tmp_path / "a.safetensors", w)
    for tensors in (plain, load_file(tmp_path / "a.safetensors")):
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        assert shapes == {"W_enc": (20, 6), "W_dec": (6, 20), "b_enc": (20,), "b_dec": (6,)}
    sae_lens.write(tmp_path, w, 0, 3, "topk_relu", None)
    lens = load_file(tmp_path / "blocks.0.hook_resid_post/sae_weights.safetensors")
    assert tuple(lens["W_enc"].shape) == (6, 20)
    assert tuple(lens["W_dec"].shape) == (20, 6)
    sparsify.write(tmp_path, w, 0, 3, "topk_relu")
    sparse = load_file(tmp_path / "layers.0/sae.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in sparse.items()} == {
        "encoder.weight": (20, 6),
        "encoder.bias": (20,),
        "W_dec": (20, 6),
        "b_dec": (6,),
    }


def test_a_relaid_decoder_is_written_in_the_published_layout(tmp_path):
    w = weights()
    sae = TopKSAE(*w, k=3)
    sae.decoder_rows()
    published.write(tmp_path / "layer0.sae.pt", Weights.of(sae))
    loaded = torch.load(tmp_path / "layer0.sae.pt", weights_only=True)
    assert type(loaded["W_dec"]) is torch.Tensor
    assert loaded["W_dec"].is_contiguous()
    assert torch.equal(loaded["W_dec"], w.W_dec)


def test_a_view_of_a_large_tensor_makes_a_small_file(tmp_path):
    w = weights()
    big = torch.zeros(1_000_000)
    published.write(tmp_path / "layer0.sae.pt", w._replace(b_dec=big[:6]))
    assert (tmp_path / "layer0.sae.pt").stat().st_size < 10_000


def test_a_published_file_is_mapped_and_a_legacy_one_is_read(tmp_path, monkeypatch):
    w, load, mapped = weights(), torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **kw: mapped.append(kw["mmap"]) or load(*a, **kw))
    published.write(tmp_path / "new.pt", w)
    torch.save(w._asdict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(published.read(tmp_path / "new.pt"), w)
    assert same(published.read(tmp_path / "old.pt"), w)
    assert mapped == [True, False]


# What other libraries compute, from their definitions


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_sae_lens_weights_compute_what_sae_lens_computes(tmp_path, subtract, rescale):
    g = torch.Generator().manual_seed(1)
    W_enc, W_dec = torch.randn(6, 20, generator=g), torch.randn(20, 6, generator=g)
    b_enc, b_dec = torch.randn(20, generator=g), torch.randn(6, generator=g)
    folder = tmp_path / "blocks.3.hook_resid_post"
    config = {"architecture": "topk", "k": 4, "d_in": 6, "d_sae": 20, "apply_b_dec_to_input": subtract}
    write_config(
        folder / "cfg.json",
        **config,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations="none",
        metadata={"hook_name": "blocks.3.hook_resid_post", "model_name": "org/model"},
    )
    save_file({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, folder / "sae_weights.safetensors")

    x = torch.randn(9, 6, generator=g)
    pre = (x - b_dec * subtract) @ W_enc + b_enc
    pre = pre * W_dec.norm(dim=-1) if rescale else pre
    values, indices = pre.topk(4)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    out = (acts / W_dec.norm(dim=-1) if rescale else acts) @ W_dec + b_dec

    suite = Suite.from_pretrained(tmp_path)
    assert (suite.layers, suite.k, suite.activation, suite.backbone) == ([3], 4, "topk_relu", "org/model")
    assert suite[3].W_enc.is_contiguous()
    torch.testing.assert_close(suite[3].encode(x).to_dense(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(suite[3](x), out, rtol=1e-4, atol=1e-4)


def test_sae_lens_reads_our_folder_as_we_do(tmp_path):
    w, x = weights(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    sae_lens.write(tmp_path, w, 2, 4, "topk_relu", "org/model")
    folder = tmp_path / "blocks.2.hook_resid_post"
    config, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert (config["architecture"], config["k"], config["dtype"]) == ("topk", 4, "float32")
    assert not config["rescale_acts_by_decoder_norm"]
    pre = (x - t["b_dec"] * config["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
    values, indices = pre.topk(4)
    acts = torch.zeros_like(pre).scatter(1, indices, values.relu())
    torch.testing.assert_close(acts, card_encode(w, x, 4, relu=True))


def test_sparsify_weights_compute_what_sparsify_computes(tmp_path):
    g = torch.Generator().manual_seed(1)
    tensors = {
        "encoder.weight": torch.randn(18, 6, generator=g),
        "encoder.bias": torch.randn(18, generator=g),
        "W_dec": torch.randn(18, 6, generator=g),
        "b_dec": torch.randn(6, generator=g),
    }
    write_config(tmp_path / "layers.15/cfg.json", activation="topk", expansion_factor=3, num_latents=0, k=4, d_in=6)
    save_file(tensors, tmp_path / "layers.15/sae.safetensors")
    write_config(tmp_path / "config.json", model="org/model", dataset="text")

    x = torch.randn(9, 6, generator=g)
    pre = ((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, indices = pre.topk(4)
    acts = torch.zeros_like(pre).scatter(1, indices, values)

    suite = Suite.from_pretrained(tmp_path)
    assert (suite.layers, suite.k, suite.activation, suite.backbone) == ([15], 4, "topk_relu", "org/model")
    torch.testing.assert_close(suite[15].encode(x).to_dense(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(suite[15](x), acts @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-4, atol=1e-4)
    assert Suite.from_pretrained(tmp_path / "layers.15").layers == [15]


def test_sparsify_reads_our_folder_as_we_do(tmp_path):
    w, x = weights(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    sparsify.write(tmp_path, w, 2, 4, "topk_relu")
    config = json.loads((tmp_path / "layers.2/cfg.json").read_text())
    t = load_file(tmp_path / "layers.2/sae.safetensors")
    assert (config["k"], config["d_in"], config["num_latents"], config["activation"]) == (4, 6, 20, "topk")
    assert not config["transcode"]
    assert not config["skip_connection"]
    pre = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    values, indices = pre.topk(4)
    acts = torch.zeros_like(pre).scatter(1, indices, values)
    torch.testing.assert_close(acts, card_encode(w, x, 4, relu=True), rtol=1e-4, atol=1e-5)


def test_the_folded_bias_is_summed_in_float64():
    w = weights(d_model=3, d_sae=1)._replace(
        W_enc=torch.tensor([[1e8, 1.0, -1e8]]), b_dec=torch.ones(3), b_enc=torch.zeros(1)
    )
    assert subtracting_bias(w, -1).tolist() == [-1.0]


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.12.hook_resid_pre", 11),
        ("model.layers.7", 7),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.3.hook_mlp_out", None),
        ("model.layers.7.mlp", None),
    ],
)
def test_sae_lens_hooks(hook, layer):
    assert sae_lens.layer_of(hook) == layer


@pytest.mark.parametrize(
    ("hookpoint", "layer"),
    [("layers.15", 15), ("h.3", 3), ("model.layers.2", 2), ("layers.15.mlp", None), ("embed_tokens", None)],
)
def test_sparsify_hookpoints(hookpoint, layer):
    assert sparsify.layer_of(hookpoint) == layer


def test_a_sae_lens_config_from_before_version_6(tmp_path):
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 9}}
    path = write_config(
        tmp_path / "cfg.json", **config, d_in=6, d_sae=20, normalize_activations=False, model_name="org/model"
    )
    read = sae_lens.read_config(path)
    assert (read.k, read.subtracts_b_dec, read.backbone) == (9, True, "org/model")


# Bad files


def bad_published(kind: str, path: Path) -> None:
    w = weights()._asdict()
    if kind == "truncated":
        torch.save(w, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "truncated legacy":
        torch.save(w, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello", "world")
    else:
        path.write_bytes({"text": b"hello world", "empty": b""}[kind])


@pytest.mark.parametrize("kind", ["truncated", "truncated legacy", "other zip", "text", "empty"])
def test_a_damaged_published_file(tmp_path, kind):
    bad_published(kind, tmp_path / "layer0.sae.pt")
    with pytest.raises(QwenScopeError, match=r"expected a whole torch checkpoint .* do not load .*get the file again"):
        published.read(tmp_path / "layer0.sae.pt")


def test_a_missing_file(tmp_path):
    with pytest.raises(QwenScopeError, match="found no file"):
        published.read(tmp_path / "layer0.sae.pt")
    with pytest.raises(QwenScopeError, match="found none"):
        native.read(tmp_path / "layer0.safetensors")


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_not_run(tmp_path, zipped):
    marker, path = tmp_path / "marker", tmp_path / "layer0.sae.pt"
    tensors = weights()._asdict() | {"W_enc": Payload(marker)}
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(QwenScopeError, match="the file is unsafe, do not load it"):
        published.read(path)
    assert not marker.exists()


def test_a_malicious_bare_pickle_is_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "layer0.sae.pt"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(QwenScopeError, match="expected"):
        published.read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [1, 2], "expected a dict of four tensors .* found a list"),
        (lambda w: w | {"extra": torch.ones(1)}, "none missing and extra too many"),
        (lambda w: {"W_enc": w["W_enc"]}, "W_dec, b_enc, b_dec missing"),
        (lambda w: w | {"b_dec": 3}, "expected a tensor at b_dec .* found a int"),
        (lambda w: w | {"W_dec": w["W_dec"].double()}, "W_dec of torch.float64"),
        (lambda w: w | {"b_enc": w["b_enc"].long()}, "b_enc of torch.int64"),
        (lambda w: w | {"W_dec": w["W_dec"].T.contiguous()}, "layer0.sae.pt: expected W_dec .* it looks transposed"),
        (lambda w: w | {"b_dec": torch.full((6,), torch.nan)}, "found NaN or infinity in b_dec"),
        (lambda w: w | {"W_enc": w["W_enc"].index_fill(0, torch.tensor(3), -torch.inf)}, "infinity in W_enc"),
        (
            lambda w: {k: v[..., :0] for k, v in (w | {"W_enc": torch.ones(0, 0), "W_dec": torch.ones(0, 0)}).items()},
            "empty",
        ),
    ],
)
def test_bad_contents(tmp_path, change, message):
    value = change(dict(weights()._asdict()))
    torch.save(value, tmp_path / "layer0.sae.pt")
    with pytest.raises(QwenScopeError, match=message):
        published.read(tmp_path / "layer0.sae.pt")


def test_a_nan_in_bfloat16_safetensors_is_found(tmp_path):
    w = weights(dtype=torch.bfloat16)
    w.W_dec[2, 3] = torch.nan
    native.write(tmp_path / "layer0.safetensors", w)
    with pytest.raises(QwenScopeError, match="found NaN or infinity in W_dec"):
        native.read(tmp_path / "layer0.safetensors")


def test_a_truncated_safetensors_file(tmp_path):
    path = tmp_path / "layer0.safetensors"
    native.write(path, weights())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(QwenScopeError, match="expected whole safetensors"):
        native.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "jumprelu"}, "expected architecture = 'topk' .* found 'jumprelu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'none' .* found 'layer_norm'"),
        ({"normalize_activations": True}, "normalize_activations = 'none' .* found True"),
        ({"reshape_activations": "hook_z"}, "found 'hook_z'"),
        ({"k": ...}, "expected k, d_in and d_sae"),
        ({"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "found only the hooks blocks.2.hook_mlp_out"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "found only the hooks blocks.0.hook_resid_pre"),
        ({"metadata": {}}, "found only the hooks no hook name"),
    ],
)
def test_sae_lens_saes_that_are_no_topk_sae_of_a_layer(tmp_path, change, message):
    sae_lens.write(tmp_path, weights(), 2, 4, "topk_relu", None)
    write_config(tmp_path / "blocks.2.hook_resid_post/cfg.json", **change)
    with pytest.raises(QwenScopeError, match=message):
        Suite.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "groupmax"}, "expected activation = 'topk' .* found 'groupmax'"),
        ({"signed": True}, "expected signed = False"),
        ({"transcode": True}, "expected transcode = False"),
        ({"skip_connection": True}, "expected skip_connection = False"),
        ({"k": ...}, "expected k, d_in and num_latents"),
        ({"num_latents": 21}, "d_sae = 21 at layer 2 .* as cfg.json says, found tensors with d_sae = 20"),
        ({"d_in": 7}, "d_model = 7 .* found tensors with d_model = 6"),
    ],
)
def test_sparsify_coders_that_are_no_topk_sae(tmp_path, change, message):
    sparsify.write(tmp_path, weights(), 2, 4, "topk_relu")
    write_config(tmp_path / "layers.2/cfg.json", **change)
    with pytest.raises(QwenScopeError, match=message):
        Suite.from_pretrained(tmp_path)[2]


def test_a_sparsify_folder_without_residual_layers(tmp_path):
    sparsify.write(tmp_path, weights(), 2, 4, "topk_relu")
    (tmp_path / "layers.2").rename(tmp_path / "layers.2.mlp")
    with pytest.raises(QwenScopeError, match=r"found only the hooks layers\.2\.mlp"):
        Suite.from_pretrained(tmp_path)


def test_folders_of_other_hooks_beside_layers_are_left_out(tmp_path):
    sparsify.write(tmp_path, weights(), 2, 4, "topk_relu")
    sparsify.write(tmp_path, weights(), 3, 4, "topk_relu")
    (tmp_path / "layers.2").rename(tmp_path / "embed_tokens")
    assert Suite.from_pretrained(tmp_path).layers == [3]


def test_two_saes_of_one_layer_and_two_ks_are_refused(tmp_path):
    sae_lens.write(tmp_path, weights(), 2, 4, "topk_relu", None)
    sae_lens.write(tmp_path, weights(), 3, 4, "topk_relu", None)
    second = tmp_path / "blocks.3.hook_resid_post/cfg.json"
    write_config(second, k=5)
    with pytest.raises(QwenScopeError, match=r"expected one k .* found 4 at layer 2, 5 at layer 3"):
        Suite.from_pretrained(tmp_path)
    write_config(second, k=4, metadata={"hook_name": "blocks.3.hook_resid_pre"})
    with pytest.raises(QwenScopeError, match=r"found blocks\.2\S+ and blocks\.3\S+ for layer 2"):
        Suite.from_pretrained(tmp_path)


# Atomicity


@pytest.mark.parametrize("module", [published, native])
def test_a_writer_that_dies_leaves_the_old_file(tmp_path, module, monkeypatch):
    path = tmp_path / "layer0"
    module.write(path, weights())
    before = path.read_bytes()

    def dies(*args, **kwargs):
        target = next(arg for arg in args if isinstance(arg, Path))
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    monkeypatch.setattr("safetensors.torch.save_file", dies)
    with pytest.raises(QwenScopeError, match="no space left"):
        module.write(path, weights(seed=1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["layer0"]


def test_a_foreign_config_is_written_after_its_weights(tmp_path, monkeypatch):
    def dies(*args, **kwargs):
        raise OSError("no space left")

    for module in (sae_lens, sparsify):
        monkeypatch.setattr(module, "write_safetensors", dies)
    with pytest.raises(OSError, match="no space"):
        sae_lens.write(tmp_path, weights(), 0, 3, "topk", None)
    with pytest.raises(OSError, match="no space"):
        sparsify.write(tmp_path, weights(), 0, 3, "topk")
    assert not list(tmp_path.rglob("cfg.json"))
