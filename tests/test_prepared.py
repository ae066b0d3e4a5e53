"""Prepared copies: the same features, made once, made anew when the file changes, and small in what they touch."""

import os

import pytest
import torch

from qwen_scope import QwenScopeError, Suite
from qwen_scope.checkpoint import native, published
from qwen_scope.files import read_safetensors

X = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_SCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture(params=["published", "safetensors"])
def folder(request, tmp_path, make_sae):
    saes = {layer: make_sae(seed=layer) for layer in (0, 3)}
    Suite.of(saes, name="two").save_pretrained(tmp_path / "suite", request.param)
    return tmp_path / "suite"


def opened(folder, kernel="cpu-bfloat16", **options) -> Suite:
    return Suite.from_pretrained(folder, kernel=kernel, prepared=True, **options)


@pytest.mark.parametrize("kernel", ["reference", "cpu-bfloat16", "cpu-float32", None])
def test_prepared_layers_give_the_same_bits(folder, kernel):
    plain = Suite.from_pretrained(folder, kernel=kernel)
    for _ in range(2):  # made, then opened
        suite = opened(folder, kernel)
        for layer in (0, 3):
            expected, found = plain[layer].encode(X), suite[layer].encode(X)
            assert torch.equal(found.indices, expected.indices)
            assert torch.equal(found.values, expected.values)
            assert torch.equal(suite[layer].decode(found), plain[layer].decode(expected))
            assert all(
                torch.equal(a, b) for a, b in zip(suite[layer].parameters(), plain[layer].parameters(), strict=True)
            )


def test_a_copy_is_made_once_and_used_as_it_is(folder, cache):
    sae = opened(folder)[3]
    sae.encode(X)
    [made] = cache.iterdir()
    when = made.stat().st_mtime_ns
    tensors, _ = read_safetensors(made)
    assert set(tensors) == {"decoder", "operand", "lost", "length"}
    assert tensors["decoder"].is_contiguous()
    assert tensors["operand"].dtype == torch.bfloat16
    again = opened(folder)[3]
    assert str(again.encoder.choice) == "cpu-bfloat16 (asked for)"
    assert again.encoder.nbytes < 128 * 32  # biases and norms; the operand is the file's
    assert again.decoder_rows().data_ptr() == again.W_dec.data_ptr()
    assert made.stat().st_mtime_ns == when


def test_a_changed_file_gets_a_copy_of_its_own(folder, cache, make_sae):
    opened(folder)[3]
    [path] = folder.glob("layer3.*")
    other = make_sae(seed=9)
    module = native if path.suffix == ".safetensors" else published
    path.unlink()
    module.write(path, type(module.read(folder / path.name.replace("3", "0"))).of(other))
    os.utime(path, ns=(1, 1))
    assert torch.equal(opened(folder)[3].W_enc, other.W_enc)
    assert torch.equal(opened(folder)[3].decoder_rows(), other.W_dec.T)
    assert len(list(cache.iterdir())) == 2


def test_a_copy_made_for_another_kernel_is_completed(folder, cache):
    opened(folder, "reference")[0]
    [made] = cache.iterdir()
    assert set(read_safetensors(made)[0]) == {"decoder"}
    opened(folder)[0]
    assert set(read_safetensors(made)[0]) == {"decoder", "operand", "lost", "length"}
    opened(folder, "reference")[0].encode(X)


def test_weights_in_bfloat16_need_no_other_operand(tmp_path, make_sae, cache):
    Suite.of({0: make_sae()}).save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    suite, plain = opened(tmp_path / "half"), Suite.from_pretrained(tmp_path / "half", kernel="cpu-bfloat16")
    assert torch.equal(suite[0].encode(X).values, plain[0].encode(X).values)
    [made] = cache.iterdir()
    assert set(read_safetensors(made)[0]) == {"decoder"}


def test_numbers_are_checked_when_the_copy_is_made(tmp_path, make_sae, cache):
    sae = make_sae()
    sae.W_dec[3, 3] = float("nan")
    Suite.of({0: sae}).save_pretrained(tmp_path / "bad")
    with pytest.raises(QwenScopeError, match=r"expected finite weights in .*, found NaN or infinity in W_dec"):
        opened(tmp_path / "bad")[0]
    assert not cache.exists()


def test_a_damaged_copy_is_made_again(folder, cache):
    expected = opened(folder)[0].encode(X)
    [made] = cache.iterdir()
    whole = made.read_bytes()
    made.write_bytes(whole[:100])
    assert torch.equal(opened(folder)[0].encode(X).values, expected.values)
    assert made.read_bytes() == whole


def test_other_libraries_folders_are_read_as_ever(tmp_path, make_sae, cache):
    Suite.of({0: make_sae(activation="topk_relu")}).save_pretrained(tmp_path / "foreign", "sparsify")
    assert opened(tmp_path / "foreign")[0].encode(X).k == 8
    assert not cache.exists()


def test_a_copy_of_a_layer_of_another_size_is_refused(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"d_sae": 128', '"d_sae": 256'))
    with pytest.raises(QwenScopeError, match="expected d_sae = 256"):
        opened(folder)[0]
