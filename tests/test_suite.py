"""Naming, opening, keeping, evicting and saving suites."""

import json
import os
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from qwen_scope import hub
from qwen_scope.checkpoint import Weights, native, published, saving
from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import TopKSAE
from qwen_scope.suite import Suite, SuiteConfig

# httpx or httpx2, whichever huggingface_hub speaks through.
HTTP = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
GROUP = "Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50"


def make_sae(d_model: int = 6, d_sae: int = 20, k: int = 3, seed: int = 0, activation="topk_relu") -> TopKSAE:
    g = torch.Generator().manual_seed(seed)
    shapes = ((d_sae, d_model), (d_model, d_sae), (d_sae,), (d_model,))
    return TopKSAE(*(torch.randn(shape, generator=g) for shape in shapes), k=k, activation=activation)


def same(a: TopKSAE, b: TopKSAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(Weights.of(a), Weights.of(b), strict=True))


def write_published(folder: Path, layers=(0,), **kwargs) -> Path:
    for layer in layers:
        published.write(folder / f"layer{layer}.sae.pt", Weights.of(make_sae(seed=layer, **kwargs)))
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test reaches a network, and none sees the user's mirror."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("QWEN_SCOPE_MIRROR", raising=False)


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "mirror").mkdir()
    return tmp_path / "mirror"


# Saving and opening


@pytest.mark.parametrize("format", ["safetensors", "published", "sae-lens", "sparsify"])
def test_a_suite_comes_back_from_every_format(tmp_path, format):
    suite = Suite.of({2: make_sae(), 10: make_sae(d_sae=31, seed=1)}, name="mine", backbone="org/model")
    suite.save_pretrained(tmp_path / "out", format=format)
    back = Suite.from_pretrained(tmp_path / "out")
    assert (back.layers, list(back), len(back)) == ([2, 10], [2, 10], 2)
    assert (back.k, back.activation, back.backbone, back.d_model) == (3, "topk_relu", "org/model", 6)
    assert 10 in back
    assert 3 not in back
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    for layer in suite:
        if format != "sparsify":
            assert same(back[layer], suite[layer])
        torch.testing.assert_close(back[layer](x), suite[layer](x), rtol=1e-4, atol=1e-4)


def test_our_formats_keep_name_provenance_and_widths(tmp_path):
    provenance = {"tokens": 1000, "data": ["a", "b"]}
    suite = Suite.of({1: make_sae(), 2: make_sae(d_sae=9)}, name="mine", provenance=provenance)
    suite.save_pretrained(tmp_path)
    back = Suite.from_pretrained(tmp_path)
    assert (back.name, back.backbone, back.provenance) == ("mine", None, provenance)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "format": "qwen-scope suite 1",
        "name": "mine",
        "backbone": None,
        "k": 3,
        "activation": "topk_relu",
        "d_model": 6,
        "layers": {"1": {"d_sae": 20}, "2": {"d_sae": 9}},
        "provenance": provenance,
    }


@pytest.mark.parametrize("format", ["sae-lens", "sparsify"])
def test_topk_survives_other_formats_with_a_warning(tmp_path, format):
    suite = Suite.of({0: make_sae(activation="topk")})
    with pytest.warns(UserWarning, match=f"{format} applies a ReLU"):
        suite.save_pretrained(tmp_path, format=format)
    assert Suite.from_pretrained(tmp_path).activation == "topk"


def test_saving_some_layers_in_bfloat16_and_adding_more(tmp_path):
    suite = Suite.of({1: make_sae(), 2: make_sae(seed=1), 3: make_sae(seed=2)})
    suite.save_pretrained(tmp_path, layers=[1], dtype=torch.bfloat16)
    suite.save_pretrained(tmp_path, layers=[3])
    back = Suite.from_pretrained(tmp_path)
    assert back.layers == [1, 3]
    assert back[1].W_enc.dtype == torch.bfloat16
    assert torch.equal(back[1].W_enc, suite[1].W_enc.bfloat16())
    assert back[3].W_enc.dtype == torch.float32


def test_saving_refuses_what_it_cannot_do(tmp_path):
    suite = Suite.of({1: make_sae()}, name="mine")
    suite.save_pretrained(tmp_path)
    with pytest.raises(QwenScopeError, match=r"found torch.float16"):
        suite.save_pretrained(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(QwenScopeError, match=r"expected layers among 1 of mine, found \[7\]"):
        suite.save_pretrained(tmp_path / "seven", layers=[1, 7])
    with pytest.raises(QwenScopeError, match="found none at all"):
        suite.save_pretrained(tmp_path / "nothing", layers=[])
    with pytest.raises(QwenScopeError, match="found one with k = 3 and not 2"):
        Suite.of({2: make_sae(k=2)}, name="mine").save_pretrained(tmp_path)
    with pytest.raises(QwenScopeError, match=r"no other file for these layers in .*, found layer1\.safetensors"):
        suite.save_pretrained(tmp_path, format="published")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "layer1.safetensors"]


def test_saving_writes_what_the_user_changed(tmp_path):
    Suite.of({0: make_sae()}).save_pretrained(tmp_path / "a")
    suite = Suite.from_pretrained(tmp_path / "a")
    suite[0].b_dec.data.fill_(5)
    suite.save_pretrained(tmp_path / "b")
    assert (Suite.from_pretrained(tmp_path / "b")[0].b_dec == 5).all()
    assert not (Suite.from_pretrained(tmp_path / "a")[0].b_dec == 5).any()


def test_a_save_that_dies_leaves_the_old_suite(tmp_path, monkeypatch):
    Suite.of({0: make_sae()}, name="mine").save_pretrained(tmp_path)
    write = native.write

    def dies_at_the_second(path, weights):
        if path.name == "layer2.safetensors":
            raise OSError("no space left")
        write(path, weights)

    monkeypatch.setitem(saving._WRITERS, "safetensors", (dies_at_the_second, ".safetensors"))
    with pytest.raises(OSError, match="no space left"):
        Suite.of({1: make_sae(), 2: make_sae()}, name="mine").save_pretrained(tmp_path)
    assert Suite.from_pretrained(tmp_path).layers == [0]


def test_a_suite_in_memory_must_be_of_one_kind():
    for saes in ({}, {-1: make_sae()}, {0: make_sae(), 1: make_sae(k=2)}, {0: make_sae(), 1: make_sae(d_model=5)}):
        with pytest.raises(QwenScopeError, match="expected SAEs of one d_model, k and activation"):
            Suite.of(saes)


# Where k, activation and backbone come from


def test_k_from_argument_then_config_then_name(tmp_path):
    folder = write_published(tmp_path / "SAE-Res-Mine-W1K-L0_5", d_sae=1024)
    assert Suite.from_pretrained(folder).k == 5
    assert Suite.from_pretrained(folder, k=7)[0].k == 7
    Suite.of({0: make_sae(k=4, d_sae=1024)}, name="said").save_pretrained(folder, format="published")
    assert Suite.from_pretrained(folder).k == 4
    assert Suite.from_pretrained(folder).name == "said"
    assert Suite.from_pretrained(folder, k=7).k == 7


def test_activation_from_argument_then_config_then_the_card(tmp_path):
    write_published(tmp_path / "bare")
    assert Suite.from_pretrained(tmp_path / "bare", k=3).activation == "topk"
    Suite.of({0: make_sae(activation="topk_relu")}).save_pretrained(tmp_path / "ours")
    assert Suite.from_pretrained(tmp_path / "ours")[0].activation == "topk_relu"
    assert Suite.from_pretrained(tmp_path / "ours", activation="topk")[0].activation == "topk"


def test_a_folder_that_says_no_k(tmp_path):
    write_published(tmp_path / "mystery", layers=(0, 3))
    with pytest.raises(QwenScopeError, match=r"config.json in mystery or a name that says k .* pass k="):
        Suite.from_pretrained(tmp_path / "mystery")
    with pytest.raises(QwenScopeError, match="expected a whole number k of at least 1, found 0"):
        Suite.from_pretrained(tmp_path / "mystery", k=0)
    suite = Suite.from_pretrained(tmp_path / "mystery", k=3)
    assert (suite.name, suite.layers, suite.backbone, suite.d_model) == ("mystery", [0, 3], None, 6)


def test_backbone_from_a_published_name(tmp_path):
    folder = write_published(tmp_path / "models--Qwen--SAE-Res-Qwen3.5-2B-Base-W32K-L0_50/snapshots/abc")
    suite = Suite.from_pretrained(folder)
    assert (suite.backbone, suite.k, suite.d_model) == ("Qwen/Qwen3.5-2B-Base", 50, 2048)


def test_backbone_from_the_config_before_the_name(tmp_path):
    folder = tmp_path / "SAE-Res-Qwen3.5-2B-Base-W32K-L0_50"
    Suite.of({0: make_sae()}, backbone="org/tuned").save_pretrained(folder)
    assert Suite.from_pretrained(folder).backbone == "org/tuned"
    assert Suite.from_pretrained(folder)[0].d_sae == 20


# Contradictions


def test_tensors_that_contradict_the_catalogue_the_name_and_the_config(tmp_path):
    folder = write_published(tmp_path / "SAE-Res-Qwen3.5-2B-Base-W32K-L0_50")
    with pytest.raises(QwenScopeError, match=r"d_model = 2048 .* the name SAE-Res-\S+ says, .* d_model = 6"):
        Suite.from_pretrained(folder)[0]
    folder = write_published(tmp_path / "SAE-Res-Mine-W2K-L0_5")
    with pytest.raises(QwenScopeError, match=r"d_sae = 2048 .* the name SAE-Res-Mine-W2K-L0_5 says, .* d_sae = 20"):
        Suite.from_pretrained(folder)[0]
    Suite.of({0: make_sae(d_sae=21)}).save_pretrained(tmp_path / "ours", format="published")
    write_published(tmp_path / "ours")
    with pytest.raises(QwenScopeError, match=r"d_sae = 21 .* config.json says, .* d_sae = 20"):
        Suite.from_pretrained(tmp_path / "ours")[0]


def test_k_above_the_width(tmp_path):
    write_published(tmp_path / "few")
    with pytest.raises(QwenScopeError, match="expected k from 1 to d_sae = 20, found k = 21"):
        Suite.from_pretrained(tmp_path / "few", k=21)[0]


# Names


def test_one_file(tmp_path):
    folder = write_published(tmp_path / "SAE-Res-Mine-W1K-L0_5", layers=(2, 12), d_sae=1024)
    assert Suite.from_pretrained(folder / "layer12.sae.pt").layers == [12]
    assert Suite.from_pretrained(folder / "layer12.sae.pt")[12].k == 5
    Suite.of({1: make_sae(), 2: make_sae()}, name="mine").save_pretrained(tmp_path / "ours")
    suite = Suite.from_pretrained(str(tmp_path / "ours/layer2.safetensors"))
    assert (suite.layers, suite.k, suite.name) == ([2], 3, "mine")
    (tmp_path / "sae.pt").touch()
    with pytest.raises(QwenScopeError, match=r"expected a file named layer\{n\}.sae.pt .* found sae.pt"):
        Suite.from_pretrained(tmp_path / "sae.pt")


def test_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_published(tmp_path / "SAE-Res-Mine-W1K-L0_5", d_sae=1024))
    suite = Suite.from_pretrained(".")
    assert (suite.name, suite.k) == ("SAE-Res-Mine-W1K-L0_5", 5)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing/at/all", "a/b/c", "../x"])
def test_a_path_with_nothing_there(name):
    with pytest.raises(QwenScopeError, match=r"expected a folder or a file of SAEs at .* found nothing there"):
        Suite.from_pretrained(name)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(QwenScopeError, match=r"found 'qwen3.5-2b-k60'; did you mean qwen3.5-2b-k50 or"):
        Suite.from_pretrained("qwen3.5-2b-k60")


def test_a_folder_without_saes(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(QwenScopeError, match=r"expected layer0.sae.pt, .* found no SAE"):
        Suite.from_pretrained(tmp_path)


def test_the_bundled_suite(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_scope.suite.suite_folder", lambda: tmp_path / "bundled_suite")
    Suite.of({15: make_sae()}, name="bundled").save_pretrained(tmp_path / "bundled_suite")
    assert Suite.from_pretrained().name == "bundled"


def test_layers(tmp_path):
    suite = Suite.from_pretrained(write_published(tmp_path / "x", layers=(0, 1, 2, 5)), k=3, layers=[5, 1])
    assert suite.layers == [1, 5]
    with pytest.raises(QwenScopeError, match="expected one of the layers 1, 5 of x, found 2; choose one of those"):
        suite[2]
    with pytest.raises(QwenScopeError, match=r"expected layers among 0-2, 5 of x, found \[3, 4\]"):
        Suite.from_pretrained(tmp_path / "x", k=3, layers=[1, 3, 4])
    assert "layers 1, 5" in repr(suite)


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    write_published(tmp_path, layers=(0, 1))
    native.write(tmp_path / "layer0.safetensors", Weights.of(make_sae(seed=9)))
    suite = Suite.from_pretrained(tmp_path, k=3)
    assert same(suite[0], make_sae(seed=9))
    assert same(suite[1], make_sae(seed=1))


# config.json


def test_another_librarys_config_is_ignored_beside_published_files_only(tmp_path):
    write_published(tmp_path / "a")
    (tmp_path / "a/config.json").write_text('{"model_type": "qwen3"}')
    assert Suite.from_pretrained(tmp_path / "a", k=3).layers == [0]
    native.write(tmp_path / "b/layer0.safetensors", Weights.of(make_sae()))
    (tmp_path / "b/config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(QwenScopeError, match=r"expected the format 'qwen-scope suite 1' .* another kind of config"):
        Suite.from_pretrained(tmp_path / "b", k=3)


def test_a_config_whose_files_are_partly_or_wholly_missing(tmp_path):
    Suite.of({0: make_sae(), 1: make_sae()}).save_pretrained(tmp_path)
    (tmp_path / "layer0.safetensors").unlink()
    assert Suite.from_pretrained(tmp_path).layers == [1]
    (tmp_path / "layer1.safetensors").unlink()
    with pytest.raises(QwenScopeError, match=r"expected the layers 0, 1 that config.json .* found none of their files"):
        Suite.from_pretrained(tmp_path)


CONFIG = SuiteConfig("mine", None, 3, "topk", 6, {5: 20})


def test_config_round_trip():
    assert SuiteConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "qwen-scope suite 2"}, "expected the format 'qwen-scope suite 1' .* found 'qwen-scope suite 2'"),
        ({"k": "3"}, "expected k in .* to be of type int, found '3'"),
        ({"k": True}, "expected k in .* found True"),
        ({"k": ...}, "expected k in .* found nothing"),
        ({"k": 0}, "found k = 0"),
        ({"k": 21}, "at least k = 21 features each .* found layer 5 with d_sae = 20"),
        ({"activation": "relu"}, "expected activation 'topk' or 'topk_relu' .* found 'relu'"),
        ({"backbone": 3}, "expected backbone in .* of type str or null, found 3"),
        ({"layers": {"five": {"d_sae": 20}}}, "expected layers such as .* found 'five'"),
        ({"layers": {"5": 20}}, "expected layers such as .* found '5': 20"),
        ({"extra": 1}, "found also extra"),
    ],
)
def test_a_bad_config(tmp_path, change, message):
    Suite.of({5: make_sae()}).save_pretrained(tmp_path)
    raw = {**json.loads(CONFIG.to_json()), **change}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(QwenScopeError, match=message):
        Suite.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object(tmp_path, text):
    write_published(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(QwenScopeError, match=r"expected (a )?JSON"):
        Suite.from_pretrained(tmp_path, k=3)
    with pytest.raises(QwenScopeError, match="expected"):
        SuiteConfig.from_json(text)


# Keeping and evicting


def test_a_layer_is_read_once(tmp_path, monkeypatch):
    suite = Suite.from_pretrained(write_published(tmp_path / "x", layers=(0, 1)), k=3)
    reads, read = [], published.read
    monkeypatch.setattr(published, "read", lambda path, *more: reads.append(path.name) or read(path, *more))
    assert suite[0] is suite[0]
    assert reads == ["layer0.sae.pt"]


def test_the_least_recently_used_layer_goes_first(tmp_path):
    folder = write_published(tmp_path / "x", layers=(0, 1, 2))
    one = make_sae().nbytes
    suite = Suite.from_pretrained(folder, k=3, max_bytes=2 * one)
    zero, first = suite[0], suite[1]
    assert suite[0] is zero
    suite[2]
    assert suite[0] is zero
    assert suite[1] is not first
    small = Suite.from_pretrained(folder, k=3, max_bytes=1)
    kept = small[0]
    assert small[0] is kept
    small[1]
    assert small[0] is not kept


def test_layers_kept_can_be_counted_too(tmp_path):
    suite = Suite.from_pretrained(write_published(tmp_path / "x", layers=(0, 1, 2)), k=3)
    suite.most_layers = 2
    zero, first = suite[0], suite[1]
    assert suite[0] is zero
    suite[2]
    assert suite[0] is zero
    assert suite[1] is not first


def test_the_default_limit_is_half_of_memory(tmp_path):
    suite = Suite.from_pretrained(write_published(tmp_path / "x"), k=3)
    assert suite._max_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def test_saes_in_memory_are_never_evicted():
    saes = {layer: make_sae(seed=layer) for layer in range(3)}
    for sae in saes.values():
        sae.encoder.kernel = "cpu-bfloat16"
    suite = Suite.of(saes)
    for layer in [0, 1, 2, 0, 1, 2]:
        assert suite[layer] is saes[layer]
        suite[layer].encode(torch.randn(3, suite.d_model))
    assert saes[0].encoder.nbytes > 0


def test_many_threads_share_one_layer(tmp_path, monkeypatch):
    suite = Suite.from_pretrained(write_published(tmp_path / "x"), k=3)
    together, read, reads, got = threading.Barrier(8), published.read, [], []
    monkeypatch.setattr(published, "read", lambda path, *more: reads.append(path) or read(path, *more))

    def use():
        together.wait()
        got.append(suite[0])

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    assert all(sae is got[0] for sae in got)


# The hub and its mirror


@pytest.mark.parametrize("name", ["org/SAE-Res-Mine-W1K-L0_5", "org/other"])
def test_a_repository_in_the_mirror(mirror, name):
    write_published(mirror / name, layers=(1, 2), d_sae=1024)
    suite = Suite.from_pretrained(name, k=None if "L0" in name else 5)
    assert (suite.name, suite.layers, suite[2].k) == (name, [1, 2], 5)


def test_a_published_group_in_the_mirror_has_the_layers_that_are_there(mirror):
    write_published(mirror / GROUP, layers=(3, 4))
    suite = Suite.from_pretrained("qwen3.5-2b-k50")
    assert (suite.name, suite.layers, suite.backbone) == (GROUP, [3, 4], "Qwen/Qwen3.5-2B-Base")


def test_local_mirror(mirror, monkeypatch):
    (mirror / "org/name").mkdir(parents=True)
    (mirror.parent / "secret").mkdir()
    assert hub.local_mirror("org/name") == mirror / "org/name"
    assert hub.local_mirror("org") == mirror / "org"
    for other in ("org/other", "../secret", "org/..", "..", "/", ""):
        assert hub.local_mirror(other) is None
    monkeypatch.setenv("QWEN_SCOPE_MIRROR", str(mirror / "nowhere"))
    with pytest.raises(QwenScopeError, match="expected a folder of repositories in QWEN_SCOPE_MIRROR"):
        hub.local_mirror("org/name")
    monkeypatch.delenv("QWEN_SCOPE_MIRROR")
    assert hub.local_mirror("org/name") is None


def test_a_published_group_is_fetched_a_layer_at_a_time_without_a_listing(tmp_path, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path / "layer7.sae.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    suite = Suite.from_pretrained("qwen3.5-2b-k50", revision="main", cache_dir=tmp_path)
    assert (suite.layers, suite.k, suite.d_model, asked) == (list(range(24)), 50, 2048, [])
    write_published(tmp_path, layers=(7,))
    with pytest.raises(QwenScopeError, match="expected d_model = 2048 at layer 7"):
        suite[7]
    assert asked == [((GROUP, "layer7.sae.pt"), {"revision": "main", "cache_dir": tmp_path})]


def test_another_repository_is_listed_and_fetched_when_used(tmp_path, monkeypatch):
    Suite.of({4: make_sae(), 5: make_sae()}, name="mine").save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, revision, cache_dir):
        asked.append(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [path.name for path in tmp_path.iterdir()]
    )
    suite = Suite.from_pretrained("org/mine")
    assert (suite.layers, suite.k, set(asked)) == ([4, 5], 3, {"config.json"})
    assert same(suite[5], make_sae())
    assert "layer5.safetensors" in asked
    assert "layer4.safetensors" not in asked


def test_offline_the_cache_is_listed(tmp_path, monkeypatch):
    cached = tmp_path / "models--org--mine/snapshots/0123"
    Suite.of({4: make_sae()}, name="mine").save_pretrained(cached)
    (tmp_path / "models--org--mine/refs").mkdir()
    (tmp_path / "models--org--mine/refs/main").write_text("0123")
    suite = Suite.from_pretrained("org/mine", cache_dir=tmp_path)
    assert same(suite[4], make_sae())


def test_offline_with_nothing_cached(tmp_path):
    with pytest.raises(QwenScopeError, match=r"expected layer0.sae.pt of Qwen/\S+ .* found no connection"):
        Suite.from_pretrained(GROUP, cache_dir=tmp_path)[0]
    with pytest.raises(QwenScopeError, match=r"expected the list of files of org/other .* found no connection"):
        Suite.from_pretrained("org/other", cache_dir=tmp_path)


def response(error: type[Exception], status: int) -> Exception:
    answer = HTTP.Response(status, request=HTTP.Request("GET", "https://huggingface.co"))
    return error("said\nmore", response=answer)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: response(errors.GatedRepoError, 403), "found a gated repository; accept its terms"),
        (lambda: response(errors.RepositoryNotFoundError, 404), "expected a repository org/x .* found none"),
        (lambda: response(errors.RevisionNotFoundError, 404), "no such branch, tag or commit"),
        (lambda: response(errors.RemoteEntryNotFoundError, 404), "expected a.pt in org/x, found no such file"),
        (lambda: response(errors.HfHubHTTPError, 500), r"found it refused \(said\); try again"),
        (lambda: errors.LocalEntryNotFoundError("x"), "found no connection"),
        (lambda: errors.OfflineModeIsEnabled("x"), "found no connection"),
        (lambda: HTTP.ConnectError("x"), "found no connection"),
    ],
)
def test_every_error_of_the_hub_is_one_sentence(monkeypatch, error, message):
    def fails(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(QwenScopeError, match=message) as caught:
        hub.download("org/x", "a.pt")
    assert "\n" not in str(caught.value)


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, private, exist_ok: calls.append((repo_id, private))
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, commit_message, ignore_patterns: calls.append(
            (repo_id, hub.Folder(folder_path).names())
        ),
    )
    Suite.of({4: make_sae(), 5: make_sae()}).push_to_hub("me/mine", layers=[4], private=True)
    assert calls == [("me/mine", True), ("me/mine", ["config.json", "layer4.safetensors"])]
