"""Samples, features specific to a tag and their limits, scripts and switches, and how SAEs fit a changed model."""

import json

import pytest
import torch
from conftest import VOCABULARY, random_sae
from hypothesis import given
from hypothesis import strategies as st

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.finetuning import specific
from qwen_scope.finetuning.drift import Drift, Fit, LayerDrift, drift, fit, overlap
from qwen_scope.finetuning.evaluate import sample_losses
from qwen_scope.finetuning.restraints import Restrained, Restraints, vocabulary_hash
from qwen_scope.finetuning.samples import Sample, check_tags, read_samples
from qwen_scope.finetuning.scripts import SCRIPTS, letters_of, scripts_of, tokens_of
from qwen_scope.finetuning.specific import specific_features
from qwen_scope.finetuning.switching import switch_ratio
from qwen_scope.suite import Suite

WORDS = {
    "en": ["the capital of France is Paris", "the capital of Italy", "is Rome the capital"],
    "xx": ["zq vx jk", "qqz jxv zzk wq", "kzq jj vxw"],
    "yy": ["0 1 2 3", "40 51 62", "7 8 9 0 1"],
}
SAMPLES = [Sample.of(text, tag) for tag, texts in WORDS.items() for text in texts]


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(specific, "LEAST_TOKENS", 3)


def written(folder, rows, name="set.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Samples


def test_every_kind_of_sample_is_read(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (
        {"text": "abc"},
        {"messages": talk},
        {"prompt": "a", "completion": "b"},
        {"prompt": talk[:1], "completion": talk[1:]},
    ):
        (sample,) = read_samples(written(tmp_path, [{**row, "language": "en", "more": 1}]))
        assert (sample.row, sample.tag) == (row, "en")
        assert "line 1" in sample.place


def test_parquet_and_another_tag_column(tmp_path):
    from datasets import Dataset

    path = tmp_path / "set.parquet"
    Dataset.from_list([{"text": "abc", "kind": "calm"}, {"text": "d", "kind": "loud"}]).to_parquet(path)
    assert [sample.tag for sample in read_samples(path, "kind")] == ["calm", "loud"]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "a"}], "a column 'language' with each sample's tag"),
        ([{"text": "a", "language": "en"}, {"text": "b", "language": None}], "found none in line 2"),
        ([{"text": "a", "language": "en"}, {"text": "b", "language": " "}], "found none in line 2"),
        ([{"body": "a", "language": "en"}], "text, messages, or prompt and completion"),
        ([{"text": " ", "language": "en"}], "a value of text in line 1"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}], "language": "en"}], "of one kind"),
    ],
)
def test_bad_samples_are_one_sentence(tmp_path, rows, sentence):
    with pytest.raises(QwenScopeError) as error:
        read_samples(written(tmp_path, rows))
    assert sentence in str(error.value)


def test_no_file_is_said_as_ever(tmp_path):
    with pytest.raises(QwenScopeError, match="found nothing at"):
        read_samples(tmp_path / "none.jsonl")


def test_prompt_of_a_sample(tokenizer):
    text, asked = Sample({"prompt": "the capital of", "completion": " France"}, "en").tokenized(tokenizer)
    assert "".join(text.tokens[:asked]) == "the capital of"
    assert Sample.of("the capital of France", "en").prompt(tokenizer, 2).text == "the capital"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Sample.of(talk, "en").prompt(tokenizer, 2).text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_unknown_tags_are_told():
    with pytest.raises(QwenScopeError, match="found 'yy' in a sample and 2 other"):
        check_tags(SAMPLES, ["en", "xx"])


# Features and limits


def test_features_and_limits_are_as_defined(llama, suite, tokenizer, few_are_enough):
    backbone = Backbone(llama, tokenizer)
    found = specific_features(backbone, suite, SAMPLES, ["xx"], layers=[0, 2], count=3)
    mean_activation, mean_pre = {}, {}
    for layer in (0, 2):
        for tag in WORDS:
            x = torch.cat(
                [
                    backbone.residuals(torch.tensor([sample.tokenized(tokenizer)[0].ids]), layers=[layer])[layer][0, 1:]
                    for sample in SAMPLES
                    if sample.tag == tag
                ]
            )
            sae = suite[layer]
            mean_activation[layer, tag] = sae.encode(x).to_dense().clamp_min(0).mean(0)
            mean_pre[layer, tag] = (x @ sae.W_enc.T + sae.b_enc).mean(0)
    for layer in (0, 2):
        specific = mean_activation[layer, "xx"] - (mean_activation[layer, "en"] + mean_activation[layer, "yy"]) / 2
        features = [feature for feature in found.features if feature.layer == layer]
        assert [feature.number for feature in features] == specific.topk(3).indices.tolist()
        for feature in features:
            assert feature.monolinguality == pytest.approx(float(specific[feature.number]), rel=1e-4)
            assert set(feature.limits) == {"en", "yy"}
            for tag, limit in feature.limits.items():
                assert limit == pytest.approx(float(mean_pre[layer, tag][feature.number]), rel=1e-3, abs=1e-4)
    assert found.tags == ("en", "xx", "yy")
    assert found.tokenizer == vocabulary_hash(tokenizer)


def test_the_prompt_does_not_count(llama, suite, tokenizer, few_are_enough):
    backbone = Backbone(llama, tokenizer)
    asked = [Sample({"prompt": "0 1 2 3 ", "completion": text}, tag) for tag, of in WORDS.items() for text in of]
    found = specific.means(backbone, suite, asked, ["en", "xx", "yy"], [1])[1]
    wanted = [len(text) - start for text, start in (sample.tokenized(tokenizer) for sample in asked)]
    assert found.tokens.tolist() == [sum(wanted[at : at + 3]) for at in (0, 3, 6)]


def test_given_features_get_limits(llama, suite, tokenizer, few_are_enough):
    backbone = Backbone(llama, tokenizer)
    found = specific_features(backbone, suite, SAMPLES, ["xx"], features={"xx": ["1/4", "2/9"]})
    assert [feature.feature for feature in found.features] == ["1/4", "2/9"]


@pytest.mark.parametrize(
    ("homes", "options", "sentence"),
    [
        (["zz"], {}, "samples of 'zz'"),
        ([], {}, "one or more tags"),
        (["xx"], {"layers": [7]}, "layers among 0-2"),
        (["xx"], {"features": {"xx": ["1/999"]}}, "found 1/999"),
    ],
)
def test_what_cannot_be_found_is_said(llama, suite, tokenizer, few_are_enough, homes, options, sentence):
    with pytest.raises(QwenScopeError) as error:
        specific_features(Backbone(llama, tokenizer), suite, SAMPLES, homes, **options)
    assert sentence in str(error.value)


def test_too_little_text_is_said(llama, suite, tokenizer):
    with pytest.raises(QwenScopeError, match="at least 100 tokens of 'en'"):
        specific_features(Backbone(llama, tokenizer), suite, SAMPLES, ["xx"])


def test_restraints_are_kept_in_a_file(suite, tmp_path, tokenizer):
    made = Restraints.of([Restrained("1/5", "xx", {"en": -0.25}, 1.5)], suite, ["en", "xx"], tokenizer, {"en": 9})
    made.save(tmp_path / "made.json")
    assert Restraints.load(tmp_path / "made.json") == made
    made.check_suite(suite)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(QwenScopeError, match="expected restraints that"):
        Restraints.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    "make",
    [
        lambda suite: Restrained("1/5", "xx", {}),
        lambda suite: Restrained("1/5", "xx", {"xx": 1.0}),
        lambda suite: Restrained("1/5", "xx", {"en": float("nan")}),
        lambda suite: Restrained("1/5", "xx", {"en": -1e300}),
        lambda suite: Restrained("five", "xx", {"en": 1.0}),
        lambda suite: Restraints.of([], suite),
        lambda suite: Restraints.of([Restrained("9/5", "xx", {"en": 1.0})], suite),
        lambda suite: Restraints.of([Restrained("1/5000", "xx", {"en": 1.0})], suite),
        lambda suite: Restraints.of([Restrained("1/5", "xx", {"en": 1.0})] * 2, suite),
        lambda suite: Restraints.of([Restrained("1/5", "xx", {"en": 1.0})], suite, ["xx"]),
    ],
)
def test_restraints_that_cannot_be_are_refused(suite, make):
    with pytest.raises(QwenScopeError, match=r"^expected "):
        make(suite)


# Scripts


@pytest.mark.parametrize(
    ("texts", "intended", "into", "expected"),
    [
        (["all English, 3 % – done!", "one 字 is enough"], "en", "zh", [False, True]),
        (["кот", "cat кот", "cat"], "en", None, [True, True, False]),
        (["日本語です", "これは кот"], "ja", None, [False, True]),
        (["中文 and English"], "zh", "ja", [False]),
        (["안녕 漢"], "ko", "zh", [True]),
        (["é ß ʼ ½ ²", ""], "de", None, [False, False]),
        (["кот", "chat"], ["ru", "fr"], None, [False, False]),
    ],
)
def test_switches(texts, intended, into, expected):
    assert list(switch_ratio(texts, intended, into).switched) == expected


def test_how_many_letters_make_a_switch():
    assert switch_ratio(["a 字", "a 字字"], "en", "zh", least=2).ratio == 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([], "en"), "one or more texts"),
        ((["a"], ["en", "de"]), "a language for each"),
        ((["a"], "en", "fr"), "languages of different scripts"),
        ((["a"], "klingonese"), "languages by their code"),
    ],
)
def test_switches_that_cannot_be_told(arguments, sentence):
    with pytest.raises(QwenScopeError) as error:
        switch_ratio(*arguments)
    assert sentence in str(error.value)


def test_a_script_can_be_named():
    assert scripts_of("Cyrillic") == ("Cyrillic",)
    assert scripts_of("pt-BR") == ("Latin",)
    assert set(scripts_of("zh")) == {"Han", "Bopomofo"}
    assert set(scripts_of("sr")) == {"Cyrillic", "Latin"}
    # All languages of ISO 639-1 that people speak, in scripts that Unicode names.
    assert len(SCRIPTS) == 180
    for code, scripts in SCRIPTS.items():
        assert scripts
        letters_of(scripts)
        assert scripts_of(code) == scripts
    for code, script in {
        "ky": "Cyrillic",
        "nb": "Latin",
        "eo": "Latin",
        "ug": "Arabic",
        "ti": "Ethiopic",
        "bo": "Tibetan",
    }.items():
        assert scripts_of(code) == (script,)


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_latin_and_what_lies_beyond_share_no_letter(text):
    from qwen_scope.finetuning.scripts import letters_beyond, letters_of

    within, beyond = letters_of(("Latin",)).findall(text), letters_beyond(("Latin",)).findall(text)
    assert not set(within) & set(beyond)
    # Python's own Unicode tables may be older.
    assert {letter for letter in text if "a" <= letter <= "z"} <= set(within)


def test_tokens_of_a_script_and_their_first_bytes(tokenizer):
    # This vocabulary has every byte as a token, and no whole Cyrillic letter.
    pieces = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    cyrillic, latin = tokens_of(tokenizer, ["Cyrillic"]), tokens_of(tokenizer, ["Latin"])
    assert {pieces[token] for token in cyrillic} == {"Ð", "Ñ", "Ò", "Ó"}
    assert {"a", "Ġthe"} <= {pieces[token] for token in latin}
    assert not {"Ġ", "1"} & {pieces[token] for token in latin}


# Drift


def test_a_model_does_not_drift_from_itself(llama, suite, tokenizer, tmp_path):
    backbone = Backbone(llama, tokenizer)
    found = fit(backbone, suite, SAMPLES)
    found.save(tmp_path / "fit.safetensors")
    same = drift(Fit.load(tmp_path / "fit.safetensors"), found)
    assert all(layer.overlap == 1 and layer.fvu_before == layer.fvu_after for layer in same.layers)
    assert not same.warnings
    x = torch.cat(
        [backbone.residuals(torch.tensor([s.tokenized(tokenizer)[0].ids]), layers=[1])[1][0, 1:] for s in SAMPLES]
    )
    assert found.fvu[1] == pytest.approx(fvu(x, suite[1](x)), rel=1e-4)


def test_a_model_that_changed_is_warned_of(make_model, tokenizer):
    suite = Suite.of({1: random_sae()})
    before, changed = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for parameter in changed.model.layers.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = drift(*(fit(Backbone(model, tokenizer), suite, SAMPLES) for model in (before, changed)))
    assert found.layers[0].overlap < 0.5
    assert "fits the changed model worse" in found.warnings[0]
    assert "overlap" in str(found)


def test_thresholds_of_the_warning():
    assert not Drift((LayerDrift(1, 0.2, 0.24, 0.6),)).warnings
    assert "FVU rose" in Drift((LayerDrift(1, 0.2, 0.26, 0.6),)).warnings[0]
    assert "share 0.40" in Drift((LayerDrift(1, 0.2, 0.2, 0.4),)).warnings[0]
    assert len(Drift((LayerDrift(1, 0.2, float("nan"), 0.9),)).warnings) == 1


def test_overlap_is_jaccard():
    first = torch.tensor([[1, 2, 3], [1, 2, -1], [-1, -1, -1]])
    second = torch.tensor([[3, 4, 1], [5, 6, -1], [-1, -1, -1]])
    assert overlap(first, second) == pytest.approx((2 / 4 + 0 + 1) / 3)


def test_fits_of_other_texts_are_not_compared(llama, suite, tokenizer):
    backbone = Backbone(llama, tokenizer)
    with pytest.raises(QwenScopeError, match="the same texts"):
        drift(fit(backbone, suite, SAMPLES), fit(backbone, suite, SAMPLES[:2]))


# Evaluation


def test_losses_are_transformers_own(llama, tokenizer):
    found = sample_losses(Backbone(llama, tokenizer), SAMPLES)
    for sample, (total, count) in zip(SAMPLES, found, strict=True):
        ids = torch.tensor([sample.tokenized(tokenizer)[0].ids])
        with torch.no_grad():
            expected = float(llama(input_ids=ids, labels=ids).loss)
        assert total / count == pytest.approx(expected, rel=1e-4)


def test_losses_leave_out_the_prompt(llama, tokenizer):
    (whole,) = sample_losses(Backbone(llama, tokenizer), [Sample.of("the capital of France is Paris", "en")])
    asked = Sample({"prompt": "the capital of", "completion": " France is Paris"}, "en")
    (rest,) = sample_losses(Backbone(llama, tokenizer), [asked])
    _, start = asked.tokenized(tokenizer)
    assert rest[1] == whole[1] - (start - 1)
    assert 0 < rest[0] < whole[0]
