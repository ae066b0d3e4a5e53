"""Sweeps: effects and figures against closed forms, controls like what they control for, and verdicts that can be no."""

import importlib.util
import json
import math
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from qwen_scope import QwenScopeError, Scope
from qwen_scope.cli import main
from qwen_scope.evidence import Language, Reading, Regex, Scorer, Script, SweepConfig, Words, sweep
from qwen_scope.evidence.arms import Arm, arms_of, asked
from qwen_scope.evidence.effects import effect_of
from qwen_scope.evidence.fluency import perplexities, repetition
from qwen_scope.evidence.judging import Cell, coherent, halves, judge
from qwen_scope.evidence.random_features import POOL, densities_of, measured_density, random_steerings
from qwen_scope.evidence.statistics import bootstrap
from qwen_scope.evidence.texts import Key, Text, Texts
from qwen_scope.steering import Steering
from qwen_scope.stopping import Stopped
from qwen_scope.suite import Suite

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "scripts" / "steering_evidence"
PROMPTS = ["the capital", "of France is", "Italy and", "Rome is", "Paris the", "capital"]
QUICK = SweepConfig(strengths=(-1.0, 1.0, 2.0), instruction="say e", random_features=2, max_new_tokens=6, resamples=200)


@pytest.fixture(scope="module")
def scope(llama, suite, tokenizer) -> Scope:
    return Scope(llama, suite, tokenizer)


def test_words_are_a_share_whatever_their_case():
    effect = Words(("goal", "don't"))
    assert effect.score(["A GOAL is a goal.", "I don’t", "no", "", "12 goals"]) == [2 / 5, 1 / 2, 0, 0, 0]


def test_regex_counts_matches_per_word():
    assert Regex("!").score(["Oh! No!!", "no", ""]) == [3 / 2, 0, 0]


def test_script_is_a_share_of_letters():
    assert Script("Greek").score(["αβ cd!", "12", "γ"]) == [1 / 2, 0, 1]
    assert Script("CJK").score(["中文ab"]) == [1 / 2]


def test_language_is_a_probability():
    french, english, blank = Language("fr").score(
        ["Je voudrais un café et du pain, s'il vous plaît.", "I would like a coffee and some bread, please.", " "]
    )
    assert french > 0.9
    assert english < 0.1
    assert blank == 0


def test_reading_is_the_mean_over_tokens_but_the_first(scope):
    text = "the capital of France"
    found = scope.features(text, layers=1)[1]
    number = int(found.indices[2, 0])
    expected = [float(found[at].activation(number).clamp_min(0)) for at in range(1, len(found.indices))]
    (score,) = Reading(scope, f"1/{number}").score([text])
    assert score == pytest.approx(sum(expected) / len(expected))
    assert score > 0
    assert Reading(scope, f"1/{number}").score(["", "t"]) == [0, 0]


def test_effects_are_made_of_text_or_functions(scope):
    assert effect_of("words:goal, Team", scope) == Words(("goal", "Team"))
    assert effect_of("regex:a:b", scope) == Regex("a:b")
    assert effect_of("language:de", scope) == Language("de")
    assert effect_of("script:Greek", scope) == Script("Greek")
    assert effect_of("feature:1/5", scope) == Reading(scope, "1/5")
    assert effect_of("scorer:statistics:mean", scope).name == "statistics:mean"
    own = effect_of(lambda texts: [len(text) for text in texts], scope)
    assert own.score(["ab", "c"]) == [2, 1]
    assert effect_of(own, scope) is own


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("words:", "expected an effect as"),
        ("sentiment:good", "expected an effect as"),
        ("words:two words", "single words"),
        ("regex:(", "regular expression"),
        ("language:xx", "expected a language"),
        ("script:Klingon", "expected a script"),
        ("feature:1/999", "expected a feature"),
        ("feature:no", "expected"),
        ("scorer:no_such_module:f", "module:function"),
        ("scorer:math:pi", "found float"),
    ],
)
def test_what_is_no_effect_is_a_sentence(scope, given, message):
    with pytest.raises(QwenScopeError, match=message):
        effect_of(given, scope)


@pytest.mark.parametrize("function", [lambda texts: [1.0], lambda texts: [math.nan] * len(texts), lambda texts: 1 / 0])
def test_a_scorer_that_fails_is_a_sentence(function):
    with pytest.raises(QwenScopeError, match=r"own scorer to give a (finite )?number for each of 2 texts"):
        Scorer(function).score(["a", "b"])


def test_perplexity_is_that_of_a_pass_of_its_own(scope):
    prompts, outputs = [[5, 6, 7], [8, 9], [5, 6, 7], [4]], [[10, 11], [12, 13, 14, 15, 16], [], [3]]
    found = perplexities(scope.backbone, prompts, outputs)
    assert found[2] is None
    for prompt, output, perplexity in zip(prompts, outputs, found, strict=True):
        if output:
            with torch.no_grad():
                logits = scope.backbone.model(input_ids=torch.tensor([prompt + output])).logits[0].double()
            logs = logits.log_softmax(1)[len(prompt) - 1 : -1]
            mean = sum(float(logs[at, id]) for at, id in enumerate(output)) / len(output)
            assert perplexity == pytest.approx(math.exp(-mean), rel=1e-4)


def test_repetition_is_a_share_of_runs_of_four():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 9) == pytest.approx(5 / 6)
    assert repetition(range(9)) == repetition([1, 2, 3]) == repetition([]) == 0


def test_bootstrap_resamples_whole_prompts():
    # Seeds of one prompt move together: of two prompts, a resample has mean 0, 1/2 or 1, with odds 1 : 2 : 1.
    interval = bootstrap(np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), 4000, 0)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0, 1)
    assert bootstrap(np.full((5, 2), 3.0), 100, 0).low == 3
    # Of many prompts it is nearly the normal interval.
    values = np.random.default_rng(0).normal(size=(400, 1))
    interval, half = bootstrap(values, 4000, 0), 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)
    assert interval == bootstrap(values, 4000, 0)


def cell(effect, perplexity=10.0, repetition=0.0) -> Cell:
    effect = np.array(effect, dtype=float).reshape(8, 1)
    return Cell(effect, np.full((8, 1), float(perplexity)), np.full((8, 1), float(repetition)))


CONFIG = SweepConfig(strengths=(-1.0, 1.0, 2.0), resamples=200)
ARMS = [
    Arm("steered", "steered", Steering.of("1/1:1"), (-1.0, 0.0, 1.0, 2.0)),
    Arm("random 1", "random", Steering.of("1/2:1"), (-1.0, 1.0, 2.0)),
    Arm("prompted (before)", "prompted", Steering(), (0.0,)),
]


def cells(**changed: Cell) -> dict[tuple[str, float], Cell]:
    given = {
        "steered_-1": cell([0] * 8),
        "steered_0": cell([0.1] * 8),
        "steered_1": cell([0.5] * 8),
        "steered_2": cell([0.9] * 8, perplexity=31),
        "random_-1": cell([0.2] * 8),
        "random_1": cell([0] * 8),
        "random_2": cell([0.8] * 8, repetition=0.2),
        "prompted_0": cell([0.4] * 8),
        **changed,
    }
    arms = {"steered": "steered", "random": "random 1", "prompted": "prompted (before)"}
    return {(arms[name.split("_")[0]], float(name.split("_")[1])): value for name, value in given.items()}


def test_yes_where_every_control_is_beaten_at_its_best_coherent_strength():
    judgement = judge(ARMS, cells(), CONFIG)
    assert judgement.verdict
    assert judgement.best == 1  # at 2 the perplexity is more than three times as high
    assert judgement.effect == pytest.approx(0.5)
    assert judgement.perplexity == (10, 10)
    assert {c.control: (c.strength, c.difference.mean) for c in judgement.comparisons} == {
        "unsteered": (0, pytest.approx(0.4)),
        "turned round": (-1, pytest.approx(0.5)),
        "random 1": (-1, pytest.approx(0.3)),  # at 2 it repeats itself
        "prompted (before)": (0, pytest.approx(0.1)),
    }
    assert "nearest is prompted (before)" in judgement.why


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"prompted_0": cell([0.6] * 8)}, "not surely above prompted"),
        ({"random_1": cell([0.5] * 8)}, "not surely above random 1"),
        ({"steered_-1": cell([0.7] * 8)}, "not surely above turned round"),
        ({"steered_0": cell([0.5] * 8)}, "not surely above unsteered"),
        ({"steered_1": cell([0.1] * 7 + [0.9])}, "not surely above"),
        ({"steered_1": cell([0.5] * 8, perplexity=40)}, "at no strength are its texts coherent"),
        ({"steered_1": cell([0.5] * 8, repetition=0.5)}, "at no strength are its texts coherent"),
    ],
)
def test_no_says_why(changed, why):
    judgement = judge(ARMS, cells(**changed), CONFIG)
    assert not judgement.verdict
    assert why in judgement.why


def test_a_strength_is_chosen_on_other_prompts_than_it_is_judged_on():
    selection, judged = halves(8, CONFIG.seed)
    assert sorted(selection + judged) == list(range(8))
    # At 1 the effect is all on the selected prompts: it is chosen, and fails.
    chosen = np.zeros(8)
    chosen[selection] = 1.0
    judgement = judge(ARMS, cells(steered_1=cell(chosen), steered_2=cell([0.45] * 8)), CONFIG)
    assert (judgement.best, judgement.effect, judgement.verdict) == (1, 0, False)
    # Coherent where it was chosen, but not where it is judged.
    perplexity = np.full((8, 1), 10.0)
    perplexity[judged] = 100
    judgement = judge(ARMS, cells(steered_1=replace(cell([0.5] * 8), perplexity=perplexity)), CONFIG)
    assert not judgement.verdict
    assert "not coherent on the prompts it is judged on" in judgement.why


def test_a_control_that_is_never_coherent_is_left_out_and_named():
    broken = {f"random_{s}": cell([1] * 8, perplexity=1000) for s in (-1, 1, 2)}
    judgement = judge(ARMS, cells(**broken), CONFIG)
    assert judgement.verdict
    assert judgement.left_out == ["random 1"]


def test_empty_texts_are_not_coherent():
    plain = cell([0] * 8)
    assert not coherent(replace(plain, perplexity=np.full((8, 1), np.nan)), plain, CONFIG)


def test_random_features_are_like_those_steered(make_sae):
    sae = make_sae(d_sae=400)
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=0)
        sae.W_dec[:, :100] *= 2
    suite = Suite.of({1: sae, 2: sae})
    density = torch.arange(400).double() / 1000  # feature 0 never fires
    steering = Steering.of("1/350:2@prompt 1/350:3@generated 2/60:1 2/61:1")
    found = random_steerings(steering, [2.0, 3.0, 1.0, 1.0], suite, lambda layer: density, 20, 0)
    assert len(set(map(str, found))) > 10
    for other in found:
        assert [(e.layer, e.strength, e.unit, e.where) for e in other.edits] == [
            (e.layer, e.strength, "raw", e.where) for e in steering.edits
        ]
        one, same, two, three = (edit.number for edit in other.edits)
        assert one == same
        assert two != three
        assert not {one, two, three} & {0, 350, 60, 61}
        assert abs(one - 350) <= POOL + 1
        assert max(two, three) < 100  # the others' directions are half as long
        assert min(two, three) > 20
    again = random_steerings(steering, [2.0, 3.0, 1.0, 1.0], suite, lambda layer: density, 20, 0)
    assert again == found
    with pytest.raises(QwenScopeError, match="found 97"):
        random_steerings(steering, [2.0, 3.0, 1.0, 1.0], suite, lambda layer: density, 99, 0)


def test_densities_are_measured_where_there_is_no_index(scope):
    known, source = densities_of(scope)
    assert source == "a sample of texts"
    density = known(1)
    assert torch.equal(density, measured_density(scope.backbone, scope.suite, 1))
    assert float(density.sum()) == pytest.approx(8, rel=0.5)  # k, of which those below 0 do not fire
    assert 0 <= float(density.min()) <= float(density.max()) <= 1


def test_an_instruction_is_put_before_a_text_or_into_a_chat():
    assert asked("Once", "Be brief.", "before") == "Be brief.\n\nOnce"
    chat = [{"role": "user", "content": "Hello"}]
    assert asked(chat, "Be brief.", "user") == [{"role": "user", "content": "Be brief.\n\nHello"}]
    assert asked(chat, "Be brief.", "system") == [{"role": "system", "content": "Be brief."}, *chat]
    assert chat == [{"role": "user", "content": "Hello"}]
    arms = arms_of(Steering.of("1/1:1"), [], [chat], SweepConfig(instruction="Be brief."))
    assert [arm.name for arm in arms] == ["steered", "prompted (user)", "prompted (system)"]


def test_edits_without_multiples_are_swept_at_their_own_strength_alone(scope):
    clamped = "1/5:=3@generated"
    with pytest.raises(QwenScopeError, match="sweep over the strength 1 alone"):
        sweep(scope, clamped, PROMPTS, "regex:e", QUICK)
    report = sweep(scope, clamped, PROMPTS, "regex:e", replace(QUICK, strengths=(1.0,)))
    assert [p.strength for p in report.points if p.kind == "steered"] == [0, 1]


def test_a_sweep_generates_what_generate_does_and_beats_chance_where_it_should(scope, tmp_path):
    report = sweep(scope, "2/7:5", PROMPTS, "feature:1/3", QUICK, folder=tmp_path)
    lines = (tmp_path / "texts.jsonl").read_text().split("\n")
    texts = [json.loads(line) for line in lines[1:]]
    assert len(texts) == len(PROMPTS) * (4 + 2 * 3 + 1)
    assert {p.arm for p in report.points} == {"steered", "random 1", "random 2", "prompted (before)"}
    from qwen_scope.generation import Sampling

    (one,) = (t for t in texts if (t["arm"], t["strength"], t["prompt"]) == ("steered", 2.0, 3))
    alone = scope.generate(PROMPTS[3], "2/7:10", Sampling(6, 0.7, seed=3))
    assert (one["text"], one["tokens"]) == (alone.text, len(alone.ids))
    (told,) = (t for t in texts if (t["arm"], t["prompt"]) == ("prompted (before)", 1))
    assert told["text"] == scope.generate("say e\n\n" + PROMPTS[1], None, Sampling(6, 0.7, seed=1)).text

    # Its own last-layer direction read back from the output is what little else can beat, but the report says it is circular.
    assert not report.circular
    assert sweep(scope, "2/7:5", PROMPTS, "feature:2/7", QUICK, folder=tmp_path).circular


def test_a_sweep_that_was_cut_short_goes_on_with_the_same_result(scope, tmp_path, monkeypatch):
    whole = sweep(scope, "1/5:3", PROMPTS, "words:e,a", QUICK, folder=tmp_path / "whole")
    place = tmp_path / "cut"
    from qwen_scope.evidence import sweep as module

    real, calls = sys.modules[module.__module__].generate, []

    def once(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module.__module__], "generate", once)
    with pytest.raises(Stopped, match="32 texts are kept, and the same command goes on"):
        sweep(scope, "1/5:3", PROMPTS, "words:e,a", QUICK, folder=place)
    with (place / "texts.jsonl").open("a") as file:
        file.write('\n{"arm": "steered", "stren')  # as a crash leaves it
    again = sweep(scope, "1/5:3", PROMPTS, "words:e,a", QUICK, folder=place)
    assert sum(calls) == len(PROMPTS) * 11
    assert again == whole

    # Another effect is read from the same texts; another steering needs a folder of its own.
    other = sweep(scope, "1/5:3", PROMPTS, "regex:a", QUICK, folder=place)
    assert sum(calls) == len(PROMPTS) * 11
    assert other.effect != whole.effect
    with pytest.raises(QwenScopeError, match="other steering"):
        sweep(scope, "1/5:4", PROMPTS, "regex:a", QUICK, folder=place)
    (place / "texts.jsonl").write_text("no json")
    with pytest.raises(QwenScopeError, match="expected texts of a sweep"):
        sweep(scope, "1/5:3", PROMPTS, "regex:a", QUICK, folder=place)


def test_progress_is_told_and_can_end_a_sweep(scope, tmp_path):
    told: list[tuple[int, int]] = []
    report = sweep(scope, "1/5:3", PROMPTS, "words:e", QUICK, progress=lambda *news: told.append(news))
    assert told == [(0, 66), (32, 66), (64, 66)]
    assert report == sweep(scope, "1/5:3", PROMPTS, "words:e", QUICK)

    def enough(done: int, of: int) -> None:
        if done:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        sweep(scope, "1/5:3", PROMPTS, "words:e", QUICK, folder=tmp_path, progress=enough)
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 33


def test_texts_that_cannot_be_written_are_a_sentence(tmp_path):
    texts = Texts(tmp_path / "texts.jsonl", {})
    (tmp_path / "texts.jsonl").unlink()
    (tmp_path / "texts.jsonl").mkdir()
    with pytest.raises(QwenScopeError, match="expected to write"):
        texts.add({Key("steered", 1.0, 0, 0): Text("a", 1, 2.0, 0.0)})


def test_a_report_is_figures_a_page_and_a_plot(scope, tmp_path):
    report = sweep(scope, "1/5:3", ["a | `b`", *PROMPTS], "regex:<b>|\\|", QUICK)
    report.save(tmp_path)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert found["verdict"] == report.verdict == "no"
    assert len(found["points"]) == 4 + 2 * 3 + 1
    page = (tmp_path / "README.md").read_text()
    assert "**no**" in page
    assert "matches of \\<b\\>\\|" in page
    for line in page.splitlines():
        if line.startswith("| "):
            assert line.count(" | ") in (4, 7)
    assert report.judgement.why in str(report)


def test_chats_are_answered(scope):
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    report = sweep(scope, "1/5:3", chats, len_of, QUICK)
    assert {p.arm for p in report.points if p.kind == "prompted"} == {"prompted (system)", "prompted (user)"}
    assert report.effect == "len_of"
    assert report.prompts[0] == "user: the capital"


def len_of(texts: list[str]) -> list[float]:
    return [len(text) for text in texts]


@pytest.mark.parametrize(
    ("steering", "prompts", "config", "message"),
    [
        ("", PROMPTS, {}, "empty one"),
        ("1/5:1", PROMPTS[:3], {}, "at least 4 prompts"),
        ("1/5:1", [*PROMPTS, [{"role": "user", "content": "a"}]], {}, "all texts or all chats"),
        ("9/5:1", PROMPTS, {}, "expected features of layers"),
        ("1/5:1", PROMPTS, {"strengths": (-1.0, 0.0)}, "above 0"),
        ("1/5:1", PROMPTS, {"strengths": (math.nan,)}, "finite strengths"),
        ("1/5:1", PROMPTS, {"random_features": 0}, "random_features of at least 1"),
        ("1/5:1", PROMPTS, {"perplexity_factor": 0.5}, "perplexity factor"),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(scope, steering, prompts, config, message):
    with pytest.raises(QwenScopeError, match=message):
        sweep(scope, steering, prompts, "regex:e", SweepConfig(**config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a prompt"),
        (("Hello",), "--steering or --recipe"),
        (("Hello", "--steering", "7/1:1", "--sweep", "out"), "--sweep FOLDER and --effect together"),
        (("Hello", "--steering", "7/1:1", "--effect", "regex:a"), "--sweep FOLDER and --effect together"),
        (("Hello", "--steering", "7/1:much"), "how to steer 7/1"),
        (("Hello", "--steering", "7/1:1", "--temperature", "-1"), "expected temperature"),
    ],
)
def test_wrong_options_of_steer_are_a_sentence_before_a_model_is_loaded(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("qwen_scope.cli.common.Source.open", lambda self: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit) as ended:
        main(["steer", *arguments])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.real
def test_steer_on_the_bundled_model(tmp_path, capsys):
    recipe = tmp_path / "capitals.json"
    common = ("--max-new-tokens", "8", "--seed", "3")
    main(["steer", "My neighbour told me", "--steering", "23/4411:0.8x", "--json", "--save", str(recipe), *common])
    (text,) = json.loads(capsys.readouterr().out)["texts"]
    assert text["original"]["text"] != text["steered"]["text"]
    assert text["steered"]["trace"]["effective"]

    main(["steer", "My neighbour told me", "--recipe", str(recipe), "--json", *common])
    assert json.loads(capsys.readouterr().out)["texts"][0]["steered"]["text"] == text["steered"]["text"]

    lines = tmp_path / "prompts.txt"
    lines.write_text("The old house\nLast summer we\nIn the morning\nMy neighbour told me\n")
    sweeping = ("--strengths", "-1", "1", "--random-features", "1", "--max-new-tokens", "6")
    given = ("--recipe", str(recipe), "--sweep", str(tmp_path / "out"), "--effect", "regex:[A-Z]{2,}", *sweeping)
    main(["steer", "--file", str(lines), "--instruction", "USE CAPITALS.", *given])
    assert "prompted (before)" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["densities"] == "the index that comes with the package"
    effect = {(p["arm"], p["strength"]): p["effect"]["mean"] for p in found["points"]}
    assert effect["steered", 1] > effect["steered", 0]


def evidence() -> ModuleType:
    """The script that makes the figures of the documents."""
    spec = importlib.util.spec_from_file_location("steering_evidence_run", EVIDENCE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (EVIDENCE / "results").glob("*.json")}


def test_table_and_plots_are_those_of_the_committed_figures():
    run = evidence()
    page = run.PAGE.read_text(encoding="utf-8")
    assert run.with_table(page) == page
    specs = json.loads((EVIDENCE / "specs.json").read_text(encoding="utf-8"))
    assert set(committed()) == set(specs["sweeps"]) == {path.stem for path in run.PLOTS.glob("*.png")}
    for name, found in committed().items():
        assert {key: value for key, value in found.items() if key not in ("name", "report")} == specs["sweeps"][name]
        assert found["report"]["prompts"] == specs["prompts"]
        assert f"![{name}:" in page
        assert found["report"]["judgement"]["why"] in page
        assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(found))


def test_three_steerings_beat_all_their_controls_and_one_that_does_not_is_reported():
    verdicts = [found["report"]["verdict"] for found in committed().values()]
    assert verdicts.count("yes") >= 3
    assert verdicts.count("no") >= 1


def test_committed_verdicts_follow_from_their_figures():
    for found in committed().values():
        report = found["report"]
        judgement, config = report["judgement"], report["config"]
        controls = {c["control"] for c in judgement["comparisons"]} | set(judgement["left_out"])
        if judgement["best"] is not None:
            randoms = {f"random {n}" for n in range(1, config["random_features"] + 1)}
            assert controls == {"unsteered", "turned round", "prompted (before)", *randoms}
        beaten = [c["difference"]["low"] > 0 for c in judgement["comparisons"]]
        assert judgement["verdict"] <= (bool(beaten) and all(beaten))
        assert not set(judgement["selection"]) & set(judgement["judged"])
        assert len(judgement["judged"]) >= 8
