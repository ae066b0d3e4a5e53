"""One rollout of each group is steered, as plain hooks would, and enters the loss as `off_policy` says."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from trl import GRPOTrainer

from qwen_scope import QwenScopeError
from qwen_scope.backbone import find_decoder_layers, hidden_of
from qwen_scope.finetuning.grpo_config import LOSSES, RareNegativesConfig
from qwen_scope.finetuning.grpo_trainer import RareNegativesTrainer, policy_backbone

# TRL reads an attribute of the model under a name that transformers would rather not see.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")

STEERING = "1/5:1.5 2/7:-1"
PROMPTS = ["the capital of France is", "Rome", "Paris, and the capital of Italy"]
G = 4
TEMPERATURE = 0.8


def diverse(completion_ids, **rest):
    return [len(set(ids)) / 10 + ids[0] / 300 for ids in completion_ids]


@pytest.fixture
def make(tmp_path, make_model, tokenizer, suite) -> Callable[..., RareNegativesTrainer]:
    """A trainer of a new tiny model."""

    def trainer(architecture="llama", peft_config=None, model=None, rewards=diverse, **options) -> RareNegativesTrainer:
        plain = {
            "output_dir": str(tmp_path / "out"),
            "steering": STEERING,
            "num_generations": G,
            "per_device_train_batch_size": 2 * G,
            "max_completion_length": 9,
            "temperature": TEMPERATURE,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1.0,
            "save_steps": 1.0,
            "disable_tqdm": True,
            "activation_checkpointing": False,
            "lr_scheduler_type": "constant",
        }
        made = RareNegativesTrainer(
            model=make_model(architecture) if model is None else model,
            reward_funcs=rewards,
            args=RareNegativesConfig(**{**plain, **options}),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            peft_config=peft_config,
            suite=suite,
        )
        made.current_gradient_accumulation_steps = 1
        return made

    return trainer


LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
INPUTS = [{"prompt": prompt} for prompt in PROMPTS[:2] for _ in range(G)]
LAST = [G - 1, 2 * G - 1]


@contextmanager
def plain_hooks(model, suite, real, rows):
    """Adds to the residuals of some rows, at all tokens but padding and position 0, what STEERING says; by hand.

    `real` tells which tokens of the first pass are no padding.
    """
    first = real.int().argmax(1)

    def adding(layer, number, strength):
        def hook(module, args, output):
            x = hidden_of(output)
            at = torch.arange(x.shape[1]) + (real.shape[1] if x.shape[1] == 1 else 0)
            where = (at[None] > first[:, None]) & (torch.arange(len(x))[:, None] == torch.tensor(rows)).any(1)[:, None]
            new = x + strength * where[..., None] * suite[layer].W_dec[:, number]
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        return find_decoder_layers(model)[layer].register_forward_hook(hook)

    hooks = [adding(1, 5, 1.5), adding(2, 7, -1.0)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generated(trainer, seed=0) -> list[list[int]]:
    trainer.model.train()
    torch.manual_seed(seed)
    ids = trainer._tokenize_prompts([row["prompt"] for row in INPUTS])[0]
    return trainer._generate_single_turn(ids, None, {}, G)[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3.5", "gemma3"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_last_rollout_of_each_group_is_that_of_plain_hooks_and_the_others_are_as_ever(
    make, suite, architecture, adapter
):
    trainer = make(architecture, peft_config=copy.deepcopy(adapter))
    found = generated(trainer)
    base = trainer.accelerator.unwrap_model(trainer.model)
    base = base.get_base_model() if adapter else base
    prompts = trainer._tokenize_prompts([row["prompt"] for row in INPUTS])[0]
    real = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.bool)
    for row, ids in enumerate(prompts):
        real[row, real.shape[1] - len(ids) :] = True
    changes, trainer._changes = trainer._changes, []
    ordinary = generated(trainer)
    with plain_hooks(base, suite, real, LAST):
        expected = generated(trainer)
    trainer._changes = changes
    assert found == expected
    for row in range(len(INPUTS)):
        assert (found[row] == ordinary[row]) == (row not in LAST)


def test_evaluation_and_no_steering_are_trls_own(make, make_model, tokenizer, tmp_path):
    trainer = make()
    trainer.model.eval()
    ids = trainer._tokenize_prompts([row["prompt"] for row in INPUTS])[0]
    torch.manual_seed(0)
    evaluated = trainer._generate_single_turn(ids, None, {}, G)[0]
    plain = make(steering=None)
    assert generated(plain) == evaluated
    assert not plain.steered_rows(8).any()
    trls = GRPOTrainer(
        model=make_model("llama"),
        reward_funcs=diverse,
        args=plain.args,
        train_dataset=plain.train_dataset,
        processing_class=tokenizer,
    )
    assert generated(trls) == evaluated


def logps_of(model, batch) -> torch.Tensor:
    """By hand: the logarithm of the probability of each token of the completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits / TEMPERATURE
    every = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return every[:, -batch["completion_ids"].shape[1] :]


def loss_by_hand(kind, ratio, logps, advantages, mask, args) -> torch.Tensor:
    low, high = 1 - args.epsilon, 1 + args.epsilon
    a = advantages[:, None]
    if kind == "cispo":
        each = -ratio.clamp(max=high - 1).detach() * a * logps
    else:
        each = -torch.min(ratio * a, ratio.clamp(low, high) * a)
    if kind == "grpo":
        return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    if kind == "dr_grpo":
        return (each * mask).sum() / (len(a) * args.max_completion_length)
    return (each * mask).sum() / mask.sum()


@pytest.mark.parametrize("off_policy", ["as_reported", "corrected", "excluded"])
@pytest.mark.parametrize(("kind", "iterations"), [*((kind, 1) for kind in LOSSES), ("dapo", 2), ("cispo", 2)])
def test_loss_and_gradient_are_those_of_the_definition(make, suite, off_policy, kind, iterations):
    trainer = make(off_policy=off_policy, loss_type=kind, num_iterations=iterations)
    model = trainer.model.train()
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(copy.deepcopy(INPUTS))
    real = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1).bool()
    with torch.no_grad():
        old = logps_of(model, batch)
        with plain_hooks(model, suite, real, LAST):
            steered = logps_of(model, batch)
        if iterations == 2:
            # As an update would: the policy is no longer that which drew.
            for parameter in model.parameters():
                parameter.mul_(1.01)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logps, mask = logps_of(model, batch), batch["completion_mask"].float()
    chosen = torch.zeros(len(INPUTS), 1, dtype=torch.bool)
    chosen[LAST] = True
    old = logps.detach() if iterations == 1 else old
    if off_policy == "corrected":
        old = torch.where(chosen, steered, old)
    if off_policy == "excluded":
        mask = mask * ~chosen
    expected = loss_by_hand(kind, (logps - old).exp(), logps, batch["advantages"], mask, trainer.args)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=2e-3, atol=1e-5)


def test_advantages_are_over_the_whole_group(make):
    trainer = make(off_policy="excluded", scale_rewards="none")
    trainer.model.train()
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(copy.deepcopy(INPUTS))
    ids = [
        row[mask.bool()].tolist() for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(diverse(ids)).view(-1, G)
    torch.testing.assert_close(batch["advantages"], (rewards - rewards.mean(1, keepdim=True)).flatten())


@pytest.mark.parametrize("off_policy", ["as_reported", "corrected", "excluded"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_training_runs_and_tells_of_both_kinds_of_rollouts(make, off_policy, adapter):
    trainer = (
        make(off_policy=off_policy, beta=0.1, peft_config=copy.deepcopy(adapter), activation_checkpointing=True)
        if adapter
        else make(off_policy=off_policy, activation_checkpointing=True)
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == 3
    for row in rows:
        mean = ((G - 1) * row["ordinary/reward"] + row["steered/reward"]) / G
        assert row["reward"] == pytest.approx(mean, rel=1e-4)
        assert ("steered/log_ratio" in row) == (off_policy == "corrected")
        if off_policy == "corrected":
            assert row["steered/log_ratio"] != 0
            assert 0 <= row["steered/share_below_clip"] <= 1
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)]
    assert changed
    assert all(("lora" in name) == (adapter is not None) for name in changed)


def test_nobody_is_told_that_a_trainer_was_made(make, monkeypatch):
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **rest: told.append(args))
    monkeypatch.delenv("CI", raising=False)
    make()
    assert not told


def test_a_steering_beyond_numbers_ends_in_a_sentence(make):
    with pytest.raises(QwenScopeError, match="steer less strongly"):
        make(steering="1/5:1e300").train()


def test_rows_are_counted_over_all_processes(make, monkeypatch):
    trainer = make()
    assert trainer.steered_rows(8).nonzero()[:, 0].tolist() == [3, 7]
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda self: 1))
    # Six rows in each process: the second has rows 6 to 11, of which 7 and 11 end a group.
    assert trainer.steered_rows(6).nonzero()[:, 0].tolist() == [1, 5]


REFUSED = {
    "use_vllm": True,
    "use_transformers_continuous_batching": True,
    "use_liger_kernel": True,
    "torch_compile": True,
    "cache_implementation": "static",
    "generation_kwargs": {"num_beams": 2},
    "loss_type": "vespo",
    "num_generations": 2,
    "off_policy_mask_threshold": 0.5,
    "mask_truncated_completions": True,
    "off_policy": "on",
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_with_steered_rollouts_are_refused(tmp_path, name):
    options = {"output_dir": str(tmp_path), "steering": STEERING, "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(QwenScopeError, match=f"{name.removesuffix('_continuous_batching').split('_')[-1]}"):
        RareNegativesConfig(**options, **{name: REFUSED[name]})


@pytest.mark.parametrize(("name", "value"), [("top_p", 0.9), ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.2)])
def test_the_importance_ratio_needs_the_models_own_distribution(tmp_path, name, value):
    options = {"output_dir": str(tmp_path), "steering": STEERING, "use_cpu": True, "bf16": False, "report_to": "none"}
    with pytest.raises(QwenScopeError, match=name):
        RareNegativesConfig(**options, off_policy="corrected", **{name: value})
    assert RareNegativesConfig(**options, **{name: value}).off_policy == "as_reported"
    # Without steering all is TRL's business.
    assert RareNegativesConfig(**{**options, "steering": None}, loss_type="vespo", num_generations=2)


def test_the_importance_ratio_needs_no_generation_options_of_the_models_own(make, make_model):
    model = make_model("llama")
    model.generation_config.no_repeat_ngram_size = 3
    assert make(model=model, off_policy="as_reported")
    with pytest.raises(QwenScopeError, match="found no_repeat_ngram_size = 3 in its generation_config"):
        make(model=model, off_policy="corrected")


def test_too_few_prompts_for_one_batch_are_refused(make):
    few = {"per_device_train_batch_size": (len(PROMPTS) + 1) * G}
    with pytest.raises(QwenScopeError, match=f"expected at least {len(PROMPTS) + 1} prompts.*found {len(PROMPTS)}"):
        make(**few)


def a_tool(x: int) -> int:
    """Doubles.

    Args:
        x: a number.
    """
    return 2 * x


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tools": [a_tool]}, "tools"),
        ({"rollout_func": lambda prompts, trainer: {}}, "rollout function"),
        ({"environment_factory": object}, "environments"),
        ({"peft_config": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")}, "prompt tuning"),
        ({"processing_class": object()}, "processing class"),
        ({"args": None}, "RareNegativesConfig"),
    ],
)
def test_what_would_generate_otherwise_is_refused(make, suite, make_model, tokenizer, options, told):
    given = {"args": make().args, "train_dataset": Dataset.from_list(INPUTS), "processing_class": tokenizer}
    with pytest.raises(QwenScopeError, match=told):
        RareNegativesTrainer(make_model("llama"), diverse, suite=suite, **{**given, **options})


def test_a_steering_must_be_one_of_the_suite_and_the_model(make):
    for steering, told in (("9/1:1", "9/1"), ("1/999:1", "1/999"), ("1/x", "feature"), ("1/1:inf", "finite|1/1")):
        with pytest.raises(QwenScopeError, match=told):
            make(steering=steering)


def test_a_tokenizer_of_another_model_is_refused(make, make_model, make_tokenizer_with, suite):
    tokenizer = make_tokenizer_with()
    tokenizer.add_tokens([f"<more {n}>" for n in range(100)])
    with pytest.raises(QwenScopeError, match="ids are below 320"):
        RareNegativesTrainer(
            make_model("llama"),
            diverse,
            make().args,
            train_dataset=Dataset.from_list(INPUTS),
            processing_class=tokenizer,
            suite=suite,
        )


def test_an_adapter_that_copies_all_decoder_layers_is_refused(make_model, tokenizer):
    adapter = LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["model"], task_type="CAUSAL_LM")
    with pytest.raises(QwenScopeError, match="copies as a whole"):
        policy_backbone(get_peft_model(make_model("llama"), adapter), tokenizer)
    # A copy of one layer is what is run, and what is hooked.
    adapter = LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers.1"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model("llama"), adapter).train()
    backbone = policy_backbone(model, tokenizer)
    assert model.training
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    with backbone.editing({1: lambda x: x + 1}):
        assert not torch.allclose(model(input_ids=ids).logits, before)


def test_a_gradient_that_is_no_number_stops_before_it_reaches_the_weights(make):
    trainer = make()
    weight = next(iter(trainer.model.parameters()))
    weight.register_hook(lambda grad: grad * float("nan") if trainer.state.global_step == 1 else grad)
    with pytest.raises(QwenScopeError, match=r"finite gradient.*step 2.*checkpoint-1"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_loss_that_is_no_number_stops(make, monkeypatch):
    trainer = make(max_grad_norm=0.0)
    own = trainer._compute_loss
    monkeypatch.setattr(trainer, "_compute_loss", lambda model, inputs: own(model, inputs) * float("inf") * 0)
    with pytest.raises(QwenScopeError, match=r"finite loss.*step 1.*no checkpoint yet"):
        trainer.train()


TWO_PROCESSES = """
import json, sys, warnings
from pathlib import Path

from datasets import Dataset
from qwen_scope import Suite
from qwen_scope.backbone import Backbone
from qwen_scope.finetuning import RareNegativesConfig, RareNegativesTrainer

folder = Path(sys.argv[1])
warnings.filterwarnings("ignore", category=FutureWarning)
backbone = Backbone.from_pretrained(str(folder / "model"))
trainer = RareNegativesTrainer(
    model=backbone.model,
    reward_funcs=lambda completion_ids, **rest: [len(set(ids)) / 10 + ids[0] / 300 for ids in completion_ids],
    args=RareNegativesConfig(
        output_dir=str(folder / "out"), steering="1/5:1.5", off_policy="corrected", num_generations=4,
        per_device_train_batch_size=2, max_completion_length=6, max_steps=2, learning_rate=1e-2, bf16=False, use_cpu=True,
        report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list([{"prompt": "the capital"}, {"prompt": "Rome"}]),
    processing_class=backbone.tokenizer,
    suite=Suite.from_pretrained(folder / "suite"),
)
rows = trainer.steered_rows(2).tolist()
trainer.train()
told = {
    "steered": rows,
    "weights": float(sum(p.double().abs().sum() for p in trainer.model.parameters())),
    "history": [row for row in trainer.state.log_history if "reward" in row],
}
(folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(told))
"""


def test_two_processes_share_a_group(make_model, tokenizer, suite, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    suite.save_pretrained(tmp_path / "suite")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "train.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    # Four rollouts of one prompt, two in each process: the last of them is the second's.
    assert (first["steered"], second["steered"]) == ([False, False], [False, True])
    assert first["weights"] == second["weights"]
    for row in first["history"]:
        assert row["reward"] == pytest.approx((3 * row["ordinary/reward"] + row["steered/reward"]) / 4, rel=1e-4)
        assert "steered/log_ratio" in row
