"""Whole training runs on tiny models: what they write, how they go on after being stopped or killed, what they refuse."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_scope import QwenScopeError, Scope, Suite
from qwen_scope.backbone import Backbone
from qwen_scope.stopping import Stop, Stopped
from qwen_scope.training import RunConfig, TrainConfig, train
from qwen_scope.training.group import Group
from qwen_scope.training.plan import Plan, write_options
from qwen_scope.training.run import Run
from qwen_scope.training.tracking import History, Tracker, rows_of

RECIPE = TrainConfig(d_sae=64, k=4, batch=64, dead_after=600, learning_rate=1e-3)


@pytest.fixture(scope="module")
def model(llama, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """120 documents of words drawn at random, one file each."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome", "Italy", ",", "not", "Spain", "."]
    draw = random.Random(0)
    for number in range(120):
        text = " ".join(draw.choice(words) for _ in range(draw.randrange(5, 60)))
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def config(model) -> RunConfig:
    return RunConfig(
        RECIPE,
        (0, 2),
        model=str(model),
        context=32,
        held_out=300,
        buffer_tokens=600,
        forward_tokens=128,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def undisturbed(corpus, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(corpus, folder, config)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("layer*.safetensors"))}


def work(folder: Path) -> Path:
    [found] = folder.glob("training/*")
    return found


# What a run leaves


def test_a_run_writes_a_suite_with_its_report(undisturbed, config):
    suite = Suite.from_pretrained(undisturbed)
    assert suite.layers == [0, 2]
    assert (suite.k, suite.activation, suite[0].d_sae) == (4, "topk_relu", 64)
    facts = suite.provenance["layer2"]
    assert (facts["seed"], facts["context"], facts["d_sae"]) == (0, 32, 64)
    report = json.loads((undisturbed / "report.json").read_text())
    assert [row["layer"] for row in report["held_out"]["layers"]] == [0, 2]
    assert (undisturbed / "README.md").read_text().startswith("---\nlibrary_name: qwen-scope\n")
    steps = facts["steps"]
    rows = rows_of(work(undisturbed) / "metrics-0.jsonl")
    assert [row["step"] for row in rows if row["layer"] == 2] == list(range(1, steps + 1))
    assert rows[-1]["fvu"] < 0.8 * rows[0]["fvu"]
    assert not list(work(undisturbed).glob("*checkpoint*")), "what only a run needs is gone when it has ended"
    scope = Scope.from_pretrained(config.model, str(undisturbed))
    assert scope.check(["the capital of France is Paris and Rome"]).layers[1].fidelity.tokens > 5


def test_a_layer_is_the_same_alone_or_with_others(undisturbed, corpus, config, tmp_path):
    train(corpus, tmp_path, replace(config, layers=(2,)))
    assert weights(tmp_path)["layer2.safetensors"] == weights(undisturbed)["layer2.safetensors"]


def test_layers_are_added_to_a_suite(undisturbed, corpus, config, tmp_path):
    train(corpus, tmp_path, replace(config, layers=(2,)))
    suite = train(corpus, tmp_path, replace(config, layers=(0,), recipe=replace(RECIPE, d_sae=96)))
    assert {layer: suite[layer].d_sae for layer in suite} == {0: 96, 2: 64}
    assert [row["layer"] for row in json.loads((tmp_path / "report.json").read_text())["held_out"]["layers"]] == [0, 2]


def test_a_cache_changes_nothing_and_spares_the_model(undisturbed, corpus, config, tmp_path, monkeypatch):
    cached = replace(config, cache=tmp_path / "cache", passes=2)
    train(corpus, tmp_path / "plain", replace(config, passes=2))
    train(corpus, tmp_path / "a", replace(cached, layers=(0,)))
    train(corpus, tmp_path / "b", replace(cached, layers=(2,)))
    reads = []
    residuals = Backbone.residuals
    monkeypatch.setattr(Backbone, "residuals", lambda *a, **k: reads.append(1) or residuals(*a, **k))
    train(corpus, tmp_path / "both", cached)
    assert not reads
    assert weights(tmp_path / "both") == weights(tmp_path / "plain")
    with pytest.raises(QwenScopeError, match="context 32 and not 16; use another folder"):
        train(corpus, tmp_path / "c", replace(cached, context=16))


def test_a_run_goes_on_from_a_suite(undisturbed, corpus, config, tmp_path):
    other = tmp_path / "texts.jsonl"
    other.write_text(
        "".join(json.dumps({"text": "Italy is not Spain , Rome is " * 12 + str(n)}) + "\n" for n in range(90))
    )
    gentle = replace(config, layers=(2,), recipe=replace(RECIPE, learning_rate=5e-4, warmup=0.0))
    adapted = train(other, tmp_path / "adapted", replace(gentle, start=str(undisturbed)))
    scope = Scope.from_pretrained(config.model, str(undisturbed))
    texts = ["Italy is not Spain , Rome is Italy is not Spain"]
    before = scope.check(texts, layers=2).layers[0].fidelity.fvu
    after = Scope(scope.backbone, adapted).check(texts, layers=2).layers[0].fidelity.fvu
    assert after < 0.8 * before
    wider = replace(gentle, start=str(undisturbed), recipe=replace(RECIPE, d_sae=96))
    with pytest.raises(QwenScopeError, match="expected SAEs of d_sae = 96"):
        train(other, tmp_path / "wrong", wider)


# Stopped and gone on


class StopAfter(Stop):
    """Asks to stop when it has been looked at some times."""

    def __init__(self, looks: int):
        super().__init__()
        self.looks = looks

    def __getattribute__(self, name: str) -> Any:
        if name != "asked":
            return super().__getattribute__(name)
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("every", [1, 3, 7, 25])
def test_a_run_stopped_again_and_again_ends_the_same(undisturbed, corpus, config, tmp_path, every):
    def plan() -> Plan:
        return Plan.of(str(corpus), tmp_path, config, Group())

    def ended(run: Run) -> bool:
        try:
            run.train()
        except Stopped:
            return False
        return True

    planned, stops = plan(), 0
    # It looks once for each pass of the model too, so with few looks no step is taken before the first block is read.
    while not ended(run := Run(planned, tmp_path, Group(), StopAfter(every + 12))):
        stops += 1
        assert stops < 200
    assert stops > (8 if every < 10 else 2)
    suite = Suite.from_pretrained(undisturbed)
    for layer, of in run.layers.items():
        for name, value in of.trained.sae().named_parameters():
            assert torch.equal(value, getattr(suite[layer], name))
    rows = rows_of(tmp_path / "metrics-0.jsonl")
    assert len(rows) == len({(row["layer"], row["step"]) for row in rows}), "no moment is told twice"


def command(corpus: Path, folder: Path, config: RunConfig, *more: str) -> list[str]:
    options = {
        "--model": config.model, "--context": 32, "--held-out": 300, "--buffer-tokens": 600, "--forward-tokens": 128,
        "--dtype": "float32", "--d-sae": 64, "--k": 4, "--batch": 64, "--dead-after": 600, "--learning-rate": 1e-3,
    }  # fmt: skip
    flat = [str(part) for pair in options.items() for part in pair]
    return [
        sys.executable,
        "-m",
        "qwen_scope.cli",
        "train",
        str(corpus),
        str(folder),
        "--layers",
        "0",
        "2",
        *flat,
        *more,
    ]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(words: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )


def wait_for(folder: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Returns when the run has told of so many steps, or has ended."""
    while process.poll() is None and not any(
        len(rows_of(path)) >= steps for path in folder.glob("training/*/metrics-0.jsonl")
    ):
        time.sleep(0.002)


def test_a_run_killed_at_random_moments_ends_the_same(undisturbed, corpus, config, tmp_path):
    draw = random.Random(1)
    words = command(corpus, tmp_path, config, "--save-minutes", "0")
    reached = 0
    for _ in range(3):
        process = started(words)
        reached += draw.randrange(1, 40)
        wait_for(tmp_path, reached, process)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert f"--suite {tmp_path}" in done.stdout
    assert weights(tmp_path) == weights(undisturbed)


def test_ctrl_c_saves_and_says_how_to_go_on(undisturbed, corpus, config, tmp_path):
    words = command(corpus, tmp_path, config)
    process = started(words)
    wait_for(tmp_path, 20, process)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130
    last = error.strip().splitlines()[-1]
    assert last.startswith("qwen-scope: stopped after ")
    assert last.endswith("run the same command again to go on")
    assert subprocess.run(words, capture_output=True, env=ENVIRONMENT).returncode == 0
    assert weights(tmp_path) == weights(undisturbed)


def test_a_full_disk_is_a_sentence_and_keeps_the_last_checkpoint(undisturbed, corpus, config, tmp_path):
    # A limit on the size of files stands for a full disk: the checkpoint of layer 0 does not fit.
    limit = 30_000
    words = command(corpus, tmp_path, config, "--save-minutes", "0")
    process = started(words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "expected to write" in error.strip().splitlines()[-1]
    assert "Traceback" not in error
    assert not list(work(tmp_path).glob("*checkpoint*"))
    assert subprocess.run(words, capture_output=True, env=ENVIRONMENT).returncode == 0
    assert weights(tmp_path) == weights(undisturbed)


# What is refused


def test_a_folder_of_another_suite_is_refused_before_training(undisturbed, corpus, config):
    with pytest.raises(QwenScopeError, match="to be empty or to hold the same suite, found one with"):
        train(corpus, undisturbed, replace(config, layers=(1,), recipe=replace(RECIPE, k=5)))


def test_what_was_refused_can_be_mended(corpus, config, tmp_path):
    """Neither options nor a corpus that were refused are remembered."""
    texts = tmp_path / "texts.txt"
    texts.write_text("Rome is not Spain " * 20)
    wanted = replace(config, layers=(0,), tokens=2000, held_out=100)
    with pytest.raises(QwenScopeError, match="add text"):
        train(texts, tmp_path / "out", replace(wanted, context=16))
    texts.write_text("Rome is not Spain and Paris is the capital of France " * 200)
    assert train(texts, tmp_path / "out", wanted).layers == [0]
    # Asked for few tokens, it holds out a tenth of them and not all that it may.
    assert Suite.from_pretrained(tmp_path / "out").provenance["layer0"]["tokens"] < 2300


def test_a_damaged_note_of_options(corpus, config, tmp_path):
    (tmp_path / "training" / "layers-0_2").mkdir(parents=True)
    (tmp_path / "training" / "layers-0_2" / "run.json").write_text("{")
    with pytest.raises(QwenScopeError, match="expected JSON in"):
        train(corpus, tmp_path, config)


def test_blocks_that_do_not_fit_into_memory(corpus, config, tmp_path):
    with pytest.raises(QwenScopeError, match="lower --buffer-tokens or train fewer layers"):
        train(corpus, tmp_path, replace(config, buffer_tokens=10**12))


def test_other_options_and_finished_runs(undisturbed, corpus, config, tmp_path):
    with pytest.raises(QwenScopeError, match="found one that has ended"):
        train(corpus, undisturbed, config)
    write_options(tmp_path / "training" / "layers-0_2", {"corpus": str(corpus), **config.to_dict()})
    changed = replace(config, context=16, save_minutes=1.0, recipe=replace(RECIPE, learning_rate=2e-3))
    with pytest.raises(
        QwenScopeError, match=r"context was 32 and is 16; learning_rate was 0.001 and is 0.002; give the"
    ):
        train(corpus, tmp_path, changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 100_000}, r"expected 100000 tokens to train on .* add text, or leave out --tokens"),
        ({"layers": (3,)}, "expected a layer from 0 to 2"),
        ({"context": 1000}, "expected a context of at most 256 tokens"),
        ({"column": "body"}, "the column 'body'"),
        ({"recipe": replace(RECIPE, batch=50_000), "buffer_tokens": 50_000}, "at least one batch of 50000 tokens"),
    ],
)
def test_what_is_known_to_fail_is_said_before_training(corpus, config, tmp_path, change, message):
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": p.read_text()}) + "\n" for p in sorted(corpus.iterdir())))
    with pytest.raises(QwenScopeError, match=message):
        train(table, tmp_path / "out", replace(config, **change))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", b"", "at least one document"), ("a.bin", b"\0\1\2", "UTF-8"), ("a.txt", b"I", "two or more tokens")],
)
def test_corpora_without_text(config, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QwenScopeError, match=message):
        train(tmp_path / name, tmp_path / "out", config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (-1,)},
        {"passes": 0},
        {"context": 1},
        {"tokens": 3},
        {"buffer_tokens": 8},
    ],
)
def test_options_that_cannot_be(config, wrong):
    with pytest.raises(QwenScopeError, match="expected"):
        replace(config, **wrong)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(corpus, config, tmp_path):
    plan = Plan.of(str(corpus), tmp_path, config, Group())
    with pytest.raises(Stopped):
        Run(plan, tmp_path, Group(), StopAfter(40)).train()
    run = Run(plan, tmp_path, Group(), Stop())
    run._restore()
    before = {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")}
    assert before
    broken = Run(plan, tmp_path, Group(), Stop())

    def restore() -> None:
        Run._restore(broken)
        broken.layers[2].trained.weights.b_dec[3] = float("inf")

    broken._restore = restore
    with pytest.raises(
        QwenScopeError, match=r"at layer 2, step \d+ of \d+: expected a finite loss.*checkpoint is kept"
    ):
        broken.train()
    assert {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*")} == before


# Figures on the way


def test_a_history_drops_what_will_be_told_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path, {})
    for step in range(1, 5):
        for layer in (0, 2):
            history.add({"layer": layer, "step": step})
    with path.open("a") as file:
        file.write('{"layer": 0, "st')  # killed while writing
    History(path, {0: 2, 2: 3})
    assert [(row["layer"], row["step"]) for row in rows_of(path)] == [(0, 1), (2, 1), (0, 2), (2, 2), (2, 3)]


def test_trackers_that_are_not_installed_or_do_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(QwenScopeError, match="pip install wandb"):
        Tracker("wandb", "name", {})
    nothing = Tracker("none", "name", {})
    nothing.log({"fvu": 1.0})
    nothing.finish()


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "told = []\n"
        "def init(**given): told.append(given)\n"
        "def log(figures):\n    told.append(figures)\n    1 / figures['fvu']\n"
        "def finish(): told.append('finished')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    tracker = Tracker("trackio", "a run", {"k": 4})
    tracker.log({"fvu": 0.5})
    with pytest.warns(UserWarning, match="trackio takes no more figures: float division by zero"):
        tracker.log({"fvu": 0.0})
    tracker.log({"fvu": 0.25})
    tracker.finish()
    told = sys.modules.pop("trackio").told
    assert told == [{"project": "qwen-scope", "name": "a run", "config": {"k": 4}}, {"fvu": 0.5}, {"fvu": 0.0}]


def test_no_signal_handler_is_left_behind(corpus, config, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(corpus, tmp_path, replace(config, layers=(0,), tokens=1000))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
