"""One run of SASFT from samples to report: through the command, killed and gone on with, refused, with LoRA and Parquet."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import CONFIGS, build, make_tokenizer, random_sae
from safetensors.torch import load_file

from qwen_scope.cli import main
from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.evaluate import Evaluation, Spoken
from qwen_scope.finetuning.restraints import Restraints
from qwen_scope.finetuning.samples import Sample
from qwen_scope.finetuning.sasft_report import switched
from qwen_scope.finetuning.sasft_run import finetune_sasft, split, trl_options
from qwen_scope.finetuning.sasft_run_config import SASFTRun
from qwen_scope.suite import Suite

ENGLISH = "the capital of France is Paris, and the capital of Italy is Rome, and so it is"
RUSSIAN = "столица Франции Париж, а столица Италии Рим"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model, a suite of it, and samples in two scripts."""
    folder = tmp_path_factory.mktemp("home")
    build(CONFIGS["llama"]()).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    Suite.of({layer: random_sae(seed=layer) for layer in range(3)}, name="tiny").save_pretrained(folder / "suite")
    rows = [{"text": f"{ENGLISH} {n}", "language": "en"} for n in range(20)]
    rows += [{"text": f"{RUSSIAN} {n}", "language": "ru"} for n in range(20)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(place, **options) -> SASFTRun:
    given = {
        "home": ("ru",),
        "model": str(place / "model"),
        "suite": str(place / "suite"),
        "layers": (0, 1),
        "steps": 6,
        "rows": 4,
        "new_tokens": 4,
        "texts_each": 1,
        "save_every": 2,
        "reduce_weight": 0.1,
        "learning_rate": 1e-3,
        "device": "cpu",
        **options,
    }
    return SASFTRun(**given)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory) -> Path:
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finetune_sasft(home / "samples.jsonl", folder, run(home))
    return folder


def test_a_run_leaves_a_model_and_a_report(home, whole):
    report = json.loads((whole / "report.json").read_text())
    assert report["samples"] == {"trained_on": 36, "kept_back": 4}
    assert set(report["before"]["perplexity"]) == {"en", "ru"}
    assert report["before"]["perplexity"] != report["after"]["perplexity"]
    assert set(report["after"]["switch_ratio"]) == {"en"}
    assert report["history"][-1]["reduce_loss"] >= 0
    assert [layer["layer"] for layer in report["drift"]["layers"]] == [0, 1]
    page = (whole / "README.md").read_text()
    assert "| en |" in page
    assert "the capital of France" in page
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    restraints = Restraints.load(whole / "restraints.json")
    assert {feature.home for feature in restraints.features} == {"ru"}
    # What was written is a model like any other.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(whole / "model")
    trained = AutoModelForCausalLM.from_pretrained(whole / "model")
    before = AutoModelForCausalLM.from_pretrained(home / "model")
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))


KILLED = """
import sys
from contextlib import suppress
from pathlib import Path
from transformers import TrainerCallback
import qwen_scope.finetuning.sasft_run as runs
from test_sasft_run import run

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 3:
            import os, signal
            os.kill(os.getpid(), signal.{signal})

home, folder = map(Path, sys.argv[1:])
made = runs.make_trainer
def killing(*args):
    trainer = made(*args)
    trainer.add_callback(Kill())
    return trainer
runs.make_trainer = killing
runs.finetune_sasft(home / "samples.jsonl", folder, run(home))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_run_that_was_stopped_goes_on(home, whole, tmp_path, how):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(signal=how), str(home), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if how == "SIGKILL" else 130) or "Stopped" in done.stderr, done.stderr
    saved = {"SIGKILL": "checkpoint-2", "SIGINT": "checkpoint-3"}[how]
    assert (tmp_path / "checkpoints" / saved).is_dir()
    assert not (tmp_path / "README.md").exists()
    # What a kill in the midst of saving leaves.
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir()
    report = finetune_sasft(home / "samples.jsonl", tmp_path, run(home, save_every=3))
    assert [row["step"] for row in report["history"]] == [5]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, tmp_path))
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=1e-6), name


def test_a_finished_run_is_not_trained_further(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    finetune_sasft(home / "samples.jsonl", tmp_path / "out", run(home))
    saved = sorted(path.name for path in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-6"]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (whole, tmp_path / "out"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_another_run_in_the_folder_is_refused(home, whole):
    with pytest.raises(QwenScopeError, match=r"learning_rate was 0.001 and is 0.5"):
        finetune_sasft(home / "samples.jsonl", whole, run(home, learning_rate=0.5))


@pytest.mark.parametrize("wrong", [{"home": ("fr",)}, {"trl": ("optim=none",)}, {"features": ("0/99999",)}])
def test_a_mistake_takes_no_folder(home, tmp_path, wrong):
    with pytest.raises(QwenScopeError):
        finetune_sasft(home / "samples.jsonl", tmp_path / "out", run(home, steps=1, texts_each=0, **wrong))
    report = finetune_sasft(home / "samples.jsonl", tmp_path / "out", run(home, steps=1, texts_each=0))
    assert {feature["home"] for feature in report["features"]} == {"ru"}


def test_a_run_does_not_go_on_with_other_samples(home, whole, tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes((home / "samples.jsonl").read_bytes())
    options = {"steps": 1, "texts_each": 0, "restraints": whole / "restraints.json", "home": (), "layers": ()}
    finetune_sasft(samples, tmp_path / "out", run(home, **options))
    assert Restraints.load(tmp_path / "out" / "restraints.json") == Restraints.load(whole / "restraints.json")
    samples.write_text(samples.read_text(encoding="utf-8").replace("Paris", "Rome"), encoding="utf-8")
    with pytest.raises(QwenScopeError, match="the samples hold something else than before"):
        finetune_sasft(samples, tmp_path / "out", run(home, **options))


def test_the_command_with_adapters_parquet_and_restraints(home, whole, tmp_path, capsys):
    from datasets import Dataset

    rows = [json.loads(line) for line in (home / "samples.jsonl").read_text().splitlines()]
    samples = tmp_path / "samples.parquet"
    Dataset.from_list(rows).rename_column("language", "labels").to_parquet(samples)
    options = ["--model", str(home / "model"), "--suite", str(home / "suite"), "--steps", "2", "--rows", "2"]
    options += ["--restraints", str(whole / "restraints.json"), "--tag-column", "labels", "--lora-rank", "2"]
    options += ["--new-tokens", "3", "--texts-each", "1", "--device", "cpu", "--trl", "weight_decay=0.1", "--packing"]
    main(["finetune", "sasft", str(samples), str(tmp_path / "out"), *options])
    told = capsys.readouterr().out
    assert "en: perplexity" in told
    assert "report:" in told
    assert (tmp_path / "out" / "model" / "adapter_model.safetensors").exists()


def test_features_and_drift_as_commands(home, whole, tmp_path, capsys):
    source = ["--model", str(home / "model"), "--suite", str(home / "suite"), "--device", "cpu"]
    out = tmp_path / "restraints.json"
    main(["finetune", "features", str(home / "samples.jsonl"), "--home", "ru", "--out", str(out), *source])
    assert "of ru, monolinguality" in capsys.readouterr().out
    assert Restraints.load(out).layers == [1, 2]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the capital of France is Paris"}\n{"text": "and the capital of Italy is Rome"}\n')
    arguments = ["finetune", "drift", str(whole / "model"), "--samples", str(texts), "--json", *source]
    # A model that was trained for six steps has drifted or not: either way it is told.
    with suppress(SystemExit):
        main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"home": ()}, "expected a home"),
        ({"home": ("fr",)}, "samples of 'fr'"),
        ({"features": ("0/1",), "home": ("ru", "en")}, "a single home"),
        ({"steps": 0}, "steps of at least 1"),
        ({"held_out": 0.0}, "held_out between 0 and 1"),
        ({"trl": ("learning_rat=1",)}, "which TRL does not have"),
        ({"trl": ("learning_rate=1",)}, "that no other option of this command sets"),
        ({"trl": ("weight_decay",)}, "name=value"),
        ({"trl": ("padding_free=False",)}, "such as true, 0.1 or null, found 'False'"),
        ({"trl": ("max_grad_norm=much",)}, "a value of max_grad_norm"),
        ({"trl": ("dataloader_num_workers=1.5",)}, "a value of dataloader_num_workers"),
        ({"trl": ("lr_scheduler_kwargs=5",)}, "a value of lr_scheduler_kwargs"),
        ({"warmup": 2.0}, "warmup as a share"),
        ({"rows": 99, "trl": ("dataloader_drop_last=true",)}, "found that they ended after 0"),
        ({"trl": ("torch_compile=true",)}, "options that SASFT can follow"),
        ({"trl": ('lr_scheduler_type="no-such"',)}, "options that TRL takes together"),
        ({"method": "token-penalty", "home": ("ru",), "tag_column": "language", "suite": "none/there"}, "expected"),
    ],
)
def test_what_cannot_be_is_one_sentence(home, tmp_path, options, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QwenScopeError) as error:
        finetune_sasft(home / "samples.jsonl", tmp_path / "out", run(home, **options))
    assert sentence in str(error.value)


def test_the_penalty_of_tokens_runs(home, tmp_path):
    report = finetune_sasft(
        home / "samples.jsonl",
        tmp_path,
        run(home, method="token-penalty", steps=2, texts_each=0, trl=("logging_steps=1.0",)),
    )
    assert report["history"][0]["penalised_mass"] > 0
    assert report["after"]["switch_ratio"] == {}


def test_samples_are_kept_back_of_each_tag():
    samples = [Sample.of(f"text {n}", "en" if n % 3 else "ru") for n in range(30)]
    config = SASFTRun(home=("ru",))
    train, kept = split(samples, config)
    assert len(train) + len(kept) == 30
    assert {sample.tag for sample in kept} == {"en", "ru"}
    assert (train, kept) == split(samples, config)
    with pytest.raises(QwenScopeError, match="at least 2 samples of each tag"):
        split([*samples, Sample.of("alone", "de")], config)


def test_values_of_options_are_json():
    assert trl_options(["weight_decay=0.1", "optim=adamw_torch"]) == {"weight_decay": 0.1, "optim": "adamw_torch"}
    given = [
        "weight_decay=1",
        "padding_free=true",
        "neftune_noise_alpha=null",
        "pad_to_multiple_of=8",
        'optim_target_modules=["q"]',
    ]
    assert list(trl_options(given).values()) == [1, True, None, 8, ["q"]]


# The evidence in the documents

EVIDENCE = Path(__file__).parent.parent / "scripts" / "finetuning_evidence"


def evidence() -> ModuleType:
    """The script that makes the figures of the documents."""
    spec = importlib.util.spec_from_file_location("code_switch_evidence", EVIDENCE / "code_switch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_committed_figures():
    script = evidence()
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_table(page) == page
    found = json.loads(script.RESULT.read_text(encoding="utf-8"))
    assert (found["breaking"], found["updates"]) == (script.BREAKING, script.UPDATES)
    for kind, arms in script.ARMS.items():
        assert list(found[kind]["arms"]) == list(arms)
        for name in arms:
            assert len(found[kind]["arms"][name]["switch_ratio_of_each_seed"]) == len(found["seeds"])
            assert name in page


def test_switches_are_told_with_their_interval():
    def spoken(switched: list[bool]) -> Evaluation:
        texts = [Spoken("en", f"beginning {at // 2}", "text", each) for at, each in enumerate(switched)]
        return Evaluation({}, {}, tuple(texts))

    told = switched(spoken([True, True] * 3 + [False, False] * 3), "en")
    assert told == "50.0% of 12 [16.7%, 83.3%]"
    assert switched(spoken([False] * 4), "en") == "0.0% of 4"
    assert switched(spoken([]), "en") == "–"


def test_figures_are_summed_up_with_the_same_prompts_and_seeds_together():
    script = evidence()

    def report(switched: list[bool], loss: float) -> dict:
        return {
            "after": {
                "switch_ratio": {"en": sum(switched) / len(switched)},
                "perplexity": {"en": 3.0, "zh": 2.0},
                "losses": {"en": [loss, loss + 1], "zh": [loss, loss]},
                "spoken": [{"prompt": "a", "text": "b", "switched": each} for each in switched],
            },
            "drift": {"layers": [{"layer": 23, "fvu_before": 0.2, "fvu_after": 0.3, "overlap": 0.8}]},
            "history": [{"step": 5, "reduce_loss": 0.5}],
            "features": [],
        }

    found = {
        (name, seed): report([seed == 0, name == "sft", True, True], 1.0 if name == "sft" else 1.5)
        for name in ("sft", "sasft 0.1")
        for seed in (0, 1)
    }
    summed = script.summed_up(found, ["sft", "sasft 0.1"], range(2))
    assert summed["arms"]["sft"]["switch_ratio_of_each_seed"] == [1.0, 0.75]
    assert summed["arms"]["sasft 0.1"]["switch_ratio_of_each_seed"] == [0.75, 0.5]
    assert summed["arms"]["sasft 0.1"]["switches_less_sft"]["mean"] == pytest.approx(-0.25)
    assert summed["arms"]["sasft 0.1"]["loss_less_sft"]["en"]["mean"] == pytest.approx(0.5)
    table = script.table({"stages": {}, "mending": summed, "keeping": summed})
    assert table.count("| **sasft 0.1** | 62.5% (75.0%, 50.0%) |") == 2
