"""A whole run of reinforcement learning: from prompts to report, killed and gone on with, and what is wrong with one."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from qwen_scope import QwenScopeError, Scope
from qwen_scope.backbone import Backbone
from qwen_scope.cli import main
from qwen_scope.finetuning.grpo_report import GRPOReport
from qwen_scope.finetuning.grpo_run import finetune_grpo
from qwen_scope.finetuning.grpo_run_config import GRPORun, differences
from qwen_scope.finetuning.repeats import loop_of
from qwen_scope.steering.maxima import Maxima

ROOT = Path(__file__).parent.parent
EVIDENCE = ROOT / "scripts" / "grpo_evidence"
NAMES = ["France", "Italy", "Spain", "Rome", "Paris", "and", "the", "capital"]
PROMPTS = [f"the capital of {name}" for name in NAMES]
SMALL = {
    "steps": 4, "prompts_per_step": 2, "rollouts": 3, "rows": 3, "max_new_tokens": 6, "held_out": 2, "evaluate_every": 2,
    "evaluate_samples": 2, "evaluate_tokens": 24, "save_every": 1, "lora_rank": 2, "learning_rate": 1e-2, "feature_layer": 1,
}  # fmt: skip
STEERING = "1/5:1.5"
VARIED = "test_finetune_grpo:varied"
"""Six tokens hardly repeat: a reward that tells any two texts apart, so that there is something to learn."""


def varied(completion_ids, **rest):
    return [ids[0] / 100 + len(set(ids)) / 10 for ids in completion_ids]


@pytest.fixture
def scope(make_model, tokenizer, suite) -> Scope:
    return Scope(make_model("llama"), suite, tokenizer)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def done(make_model, tokenizer, suite, tmp_path_factory) -> tuple[GRPOReport, Path]:
    """A run and where it left its files."""
    folder = tmp_path_factory.mktemp("done")
    scope = Scope(make_model("llama"), suite, tokenizer)
    return finetune_grpo(scope, PROMPTS, folder, GRPORun(**SMALL, steering=STEERING, rewards=(VARIED,))), folder


def test_a_run_leaves_a_model_and_a_page(done, suite):
    report, folder = done
    assert report.steering == "1/5:1.5"
    assert [found.step for found in report.evaluations] == [0, 2, 4]
    assert [row["step"] for row in report.history] == [1, 2, 3, 4]
    assert all(row["steered/reward"] > 0 for row in report.history)
    assert {layer.layer for layer in report.drift.layers} == set(suite.layers)
    for found in report.evaluations:
        assert len(found.loops) == 2
        assert all(len(each) == 2 for each in found.loops)
        assert found.perplexity is not None
        assert found.perplexity > 1
    page, told = (folder / "README.md").read_text(), json.loads((folder / "report.json").read_text())
    assert "GRPO with rare negatives, off_policy as_reported" in page
    assert "| 4 |" in page
    assert told["evaluations"][2]["loops"] == report.evaluations[2].loops
    assert told["config"]["steering"] == STEERING
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any(tensor.abs().sum() > 0 for name, tensor in weights(folder).items() if "lora_B" in name)


def test_a_finished_run_is_not_trained_further(done, make_model, tokenizer, suite, tmp_path):
    shutil.copytree(done[1], tmp_path / "out")
    scope = Scope(make_model("llama"), suite, tokenizer)
    config = GRPORun(**SMALL, steering=STEERING, rewards=(VARIED,))
    again = finetune_grpo(scope, PROMPTS, tmp_path / "out", config)
    assert again.history == done[0].history
    expected = weights(done[1])
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_all_weights_can_be_trained_and_plain_grpo_steers_none(scope, tmp_path):
    config = GRPORun(**{**SMALL, "lora_rank": 0, "steps": 2, "learning_rate": 1e-3}, plain=True, rewards=(VARIED,))
    before = {name: p.detach().clone() for name, p in scope.backbone.model.named_parameters()}
    report = finetune_grpo(scope, PROMPTS, tmp_path, config, evaluate_on=["of the capital"])
    assert report.steering == ""
    assert "plain GRPO" in (tmp_path / "README.md").read_text()
    assert all("steered/reward" not in row for row in report.history)
    assert [len(found.loops) for found in report.evaluations] == [1, 1]
    assert report.evaluations[-1].perplexity is None
    assert any(not torch.equal(before[name], p) for name, p in scope.backbone.model.named_parameters())
    # The folder is a model of its own.
    again = Backbone.from_pretrained(str(tmp_path / "model"))
    for (name, expected), found in zip(scope.backbone.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(expected, found), name


def test_features_are_found_where_no_steering_is_given(scope, tmp_path):
    # A model that says the same token for ever: whatever a prompt is, its text loops.
    with torch.no_grad():
        scope.backbone.model.lm_head.weight[40] *= 30
        scope.backbone.model.lm_head.weight[41] = -scope.backbone.model.lm_head.weight[40]
    looped = [loop_of(text.ids) for text in scope.generate(PROMPTS)]
    assert sum(loop is not None for loop in looped) >= 3
    # A sample of texts does not fire every feature of a random SAE.
    scope.maxima = Maxima(lambda layer: torch.ones(128), "the test")
    config = GRPORun(**{**SMALL, "steps": 1}, features=2, strength=0.5)
    report = finetune_grpo(scope, PROMPTS, tmp_path, config)
    assert [feature.layer for feature in report.features] == [1] * len(report.features)
    assert all(feature.name in report.steering for feature in report.features)
    assert "Repetition features" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def given(llama, tokenizer, suite, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    suite.save_pretrained(folder / "suite")
    rows = [{"prompt": prompt, "wanted": n} for n, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(given: Path, out: Path, *more: str, **options) -> list[str]:
    named = [
        part for name, value in {**SMALL, **options}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    source = ["--model", str(given / "model"), "--suite", str(given / "suite")]
    return ["finetune", "grpo", str(given / "prompts.jsonl"), str(out), *source, "--steering", STEERING, *named, *more]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(given, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run, options = [sys.executable, "-m", "qwen_scope.cli"], ("--rewards", VARIED, "--off-policy", "corrected")
    subprocess.run([*run, *command(given, whole, *options)], env=environment, check=True)
    process = subprocess.Popen([*run, *command(given, killed, *options)], env=environment)
    while not (killed / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "report.json").exists()
    subprocess.run([*run, *command(given, killed, *options)], env=environment, check=True)
    expected = weights(whole)
    for name, tensor in weights(killed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    told = [json.loads((folder / "report.json").read_text()) for folder in (whole, killed)]
    assert told[0]["evaluations"] == told[1]["evaluations"]
    assert [row["reward"] for row in told[0]["history"]] == [row["reward"] for row in told[1]["history"]]


def test_the_command_trains_with_a_reward_of_the_users_own(given, tmp_path, capsys):
    options = ("--rewards", "repetition", "test_finetune_grpo:near", "--reward-columns", "wanted", "--json")
    main(command(given, tmp_path, *options, steps=1, evaluate_every=1))
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["rewards"] == ["repetition", "test_finetune_grpo:near"]
    assert told["evaluations"][-1]["step"] == 1
    with pytest.raises(SystemExit):
        main(command(given, tmp_path, steps=1, seed=5))
    assert "seed was 0 and is 5" in capsys.readouterr().err


def near(prompts, completions, completion_ids, wanted, **rest):
    assert all(NAMES[n] in prompt for n, prompt in zip(wanted, prompts, strict=True))
    return [-abs(len(ids) - n) / 10 for ids, n in zip(completion_ids, wanted, strict=True)]


def test_prompts_are_texts_or_chats_of_files(given, tmp_path):
    from qwen_scope.cli.finetune_grpo import Grpo

    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"q": [{"role": "user", "content": "a"}]}) + "\n" + json.dumps({"q": "b"}) + "\n")
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    made = Grpo(str(chats), tmp_path, column="q", chat=True)._read()
    assert made == ([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]], {})
    assert Grpo(str(tmp_path / "lines.txt"), tmp_path)._read() == (["one", "two"], {})
    prompts = given / "prompts.jsonl"
    assert Grpo(str(prompts), tmp_path, reward_columns=("wanted",), count=2)._read() == (
        PROMPTS[:2],
        {"wanted": [0, 1]},
    )
    chats.write_text('{"prompt": " "}\n')
    for grpo in (
        Grpo(str(chats), tmp_path),
        Grpo(str(tmp_path / "lines.txt"), tmp_path, reward_columns=("x",)),
        Grpo(str(prompts), tmp_path, column="no"),
    ):
        with pytest.raises(QwenScopeError):
            grpo._read()


def test_what_cannot_be_run_is_told_before_anything_is_trained(scope, tmp_path):
    config = GRPORun(**SMALL, steering=STEERING)
    for prompts, options, told in (
        (PROMPTS[:2], {}, "at least 4 prompts"),
        ([*PROMPTS, [{"role": "user", "content": "a"}]], {}, "all texts or all chats"),
        (PROMPTS, {"columns": {"a": [1]}}, "a value of a for each of 8"),
        (PROMPTS, {"evaluate_on": []}, "prompts to evaluate on"),
        (PROMPTS, {"config": GRPORun(**SMALL, rewards=("nothing",))}, "a reward as"),
        (PROMPTS, {"config": GRPORun(**SMALL, steering="9/1:1")}, "9/1"),
    ):
        with pytest.raises(QwenScopeError, match=told):
            finetune_grpo(scope, prompts, tmp_path / told[:4], options.pop("config", config), **options)
    with pytest.raises(QwenScopeError, match="with its tokenizer"):
        finetune_grpo(Scope(scope.backbone.model, scope.suite), PROMPTS, tmp_path, config)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"rollouts": 1}, {"rows": 5}, {"learning_rate": 0.0}, {"temperature": float("nan")}, {"beta": -1.0},
        {"beta": float("nan")}, {"evaluate_temperature": float("nan")}, {"reward_weights": (float("nan"),)}, {"seed": 2**32},
        {"rollouts": 2, "rows": 2}, {"plain": True, "steering": "1/1"}, {"rewards": ()}, {"reward_weights": (1.0, 2.0)},
    ],
)  # fmt: skip
def test_options_are_checked(options):
    with pytest.raises(QwenScopeError):
        GRPORun(**options)


@pytest.mark.parametrize("wrong", [{"steering": None}, {"steering": "1/99999:1"}, {"prompts_per_step": 7}])
def test_a_mistake_takes_no_folder(scope, tmp_path, wrong):
    # Without a steering, no text of this model loops.
    right = {**SMALL, "steps": 1, "steering": STEERING}
    with pytest.raises(QwenScopeError):
        finetune_grpo(scope, PROMPTS, tmp_path, GRPORun(**{**right, **wrong}))
    finetune_grpo(scope, PROMPTS, tmp_path, GRPORun(**right))


def test_prompts_leave_room_for_answers(scope, tmp_path):
    with pytest.raises(QwenScopeError, match="room for 250 tokens in the context of 256"):
        finetune_grpo(scope, PROMPTS, tmp_path, GRPORun(**{**SMALL, "max_new_tokens": 250}, steering=STEERING))


def test_a_run_that_ends_sooner_is_evaluated_at_its_end(make_model, tokenizer, suite, tmp_path):
    for steps in (3, 2):
        scope = Scope(make_model("llama"), suite, tokenizer)
        config = GRPORun(**{**SMALL, "steps": steps, "evaluate_every": 9}, steering=STEERING, rewards=(VARIED,))
        report = finetune_grpo(scope, PROMPTS, tmp_path, config)
        shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-3", ignore_errors=True)
    assert [found.step for found in report.evaluations] == [0, 2]


def test_too_few_prompts_for_an_update_are_refused(scope, tmp_path):
    # TRL drops what does not fill an update: nothing at all would be trained.
    with pytest.raises(QwenScopeError, match="as an update has, 4, found 2 beside 2 kept back"):
        finetune_grpo(scope, PROMPTS[:4], tmp_path, GRPORun(**{**SMALL, "prompts_per_step": 4}, steering=STEERING))


def test_two_runs_differ_by_what_changes_their_weights():
    one, other = GRPORun().to_dict(), GRPORun(steps=9, save_every=3, beta=0.5).to_dict()
    assert differences(one, other) == ["beta was 0.0 and is 0.5"]


def evidence() -> ModuleType:
    """The script that makes the figures of the documents."""
    spec = importlib.util.spec_from_file_location("grpo_evidence_run", EVIDENCE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_and_plot_are_those_of_the_committed_figures(tmp_path):
    run = evidence()
    page = run.PAGE.read_text(encoding="utf-8")
    assert run.with_table(page) == page
    result = json.loads(run.RESULT.read_text(encoding="utf-8"))
    assert result["specs"] == json.loads((EVIDENCE / "specs.json").read_text(encoding="utf-8"))
    arms, seeds = result["specs"]["arms"], result["specs"]["seeds"]
    assert {(each["arm"], each["seed"]) for each in result["runs"]} == {(arm, seed) for arm in arms for seed in seeds}
    steps = result["specs"]["config"]["steps"]
    for each in result["runs"]:
        assert each["evaluations"][-1]["step"] == steps
        assert [row["step"] for row in each["history"]] == list(range(1, steps + 1))
        assert ("steered/reward" in each["history"][0]) == (arms[each["arm"]]["steering"] != "none")
    # All begin with the same model and seeds of texts.
    assert (
        len({json.dumps(each["evaluations"][0]["loops"]) for each in result["runs"] if each["seed"] == seeds[0]}) == 1
    )
    run.draw(result, tmp_path / "plot" / "again.png")
    assert (tmp_path / "plot" / "again.png").read_bytes() == run.PLOT.read_bytes()
    assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(result))


def test_reports_hold_text_of_models_and_users_as_text_alone(done, tmp_path):
    replace(done[0], model="<script>|*a*").save(tmp_path)
    assert r"\<script\>\|\*a\*" in (tmp_path / "README.md").read_text()
