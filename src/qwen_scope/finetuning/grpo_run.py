"""`finetune_grpo`: reinforcement learning with rare negatives, from prompts to report, resumable after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation import SAMPLE_TEXTS
from qwen_scope.files import expanded, replacing
from qwen_scope.finetuning.checkpoints import last_checkpoint, train_on
from qwen_scope.finetuning.drift import Fit, drift, fit
from qwen_scope.finetuning.grpo_config import RareNegativesConfig
from qwen_scope.finetuning.grpo_evaluation import Evaluation, evaluate
from qwen_scope.finetuning.grpo_report import GRPOReport
from qwen_scope.finetuning.grpo_run_config import GRPORun, differences
from qwen_scope.finetuning.grpo_trainer import RareNegativesTrainer
from qwen_scope.finetuning.repetition import RepetitionFeature, looping_samples, repetition_features
from qwen_scope.finetuning.rewards import reward_of
from qwen_scope.finetuning.samples import Sample
from qwen_scope.fingerprint import fingerprint
from qwen_scope.generation import Sampling
from qwen_scope.plain import finite
from qwen_scope.scope import Scope
from qwen_scope.steering import Steering
from qwen_scope.steering.recipe import model_name
from qwen_scope.stopping import Stop, Stopped, stopping
from qwen_scope.tokens import tokenize

FEWEST_PROMPTS = 4
"""Some to train on, some to evaluate on."""
WARM_UP = 2
"""Updates until the learning rate is reached."""
LOOPS_WANTED, LOOKED_AT = 16, 64
"""Samples that loop, and prompts whose texts are looked at for them, to find repetition features in."""
FEWEST_LOOPS = 3
"""With fewer, features would be found in what one text is about."""


def finetune_grpo(
    scope: Scope,
    prompts: Sequence[Any],
    folder: str | Path,
    config: GRPORun = GRPORun(),
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    evaluate_on: Sequence[Any] | None = None,
) -> GRPOReport:
    """Trains a scope's model in place, and leaves in a folder the adapter or weights (`model/`), `report.json`, `README.md` and
    `curves.png`. The same call goes on from the last checkpoint, and then ends with the same weights.

    Args:
        scope: the model to train and its SAEs.
        prompts: texts or chats (lists of messages), all of one kind.
        folder: where everything goes.
        config: what is rewarded, and how it is trained.
        columns: what else rewards are given of each prompt, by name.
        evaluate_on: prompts to evaluate on; by default some of the prompts are kept back for it.

    Raises:
        QwenScopeError: prompts, rewards or a steering that cannot be, a folder with another run, or a loss that is no number.
        Stopped: somebody asked for it; a checkpoint was saved.
    """
    prompts, columns = list(prompts), dict(columns or {})
    evaluate_on = None if evaluate_on is None else list(evaluate_on)
    _check(scope, prompts, columns, evaluate_on)
    rewards = [reward_of(name) for name in config.rewards]
    place = expanded(folder)
    about = {
        **config.to_dict(),
        "model": model_name(scope.backbone, scope.suite),
        "suite": scope.suite.name,
        "fingerprint": fingerprint(scope.suite, scope.layers),
        "prompts": _hash([prompts, columns, evaluate_on]),
    }
    _agree_with_before(place, about)
    _check_length(scope, [*prompts, *(evaluate_on or ())], config)
    held: set[int] = set()
    if evaluate_on is None:
        draw = random.Random(config.seed)
        held = set(draw.sample(range(len(prompts)), min(config.held_out, len(prompts) // 2)))
    kept_back = [prompt for at, prompt in enumerate(prompts) if at in held] or list(evaluate_on or ())
    trained = [at for at in range(len(prompts)) if at not in held]
    if len(trained) < config.prompts_per_step:
        raise QwenScopeError(
            f"expected at least as many prompts to train on as an update has, {config.prompts_per_step}, found {len(trained)} "
            f"beside {len(held)} kept back; give more, or lower prompts_per_step or held_out"
        )
    steering, features = _steering(scope, [prompts[at] for at in trained], place, config)
    texts = _ordinary_texts(scope)
    measured = place / "fit.safetensors"
    fit_before = Fit.load(measured) if measured.exists() else fit(scope.backbone, scope.suite, texts, scope.layers)
    rows = [{"prompt": prompts[at], **{name: column[at] for name, column in columns.items()}} for at in trained]
    trainer = RareNegativesTrainer(
        model=scope.backbone.model,
        reward_funcs=list(rewards),
        args=_arguments(scope, place, config, steering),
        train_dataset=Dataset.from_list(rows),
        processing_class=scope.backbone.tokenizer,
        peft_config=_adapter(config),
        suite=scope.suite,
    )
    # Not before all that is refused: a mistake in the options should not take the folder.
    _claim(place, about, features, fit_before)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    last = last_checkpoint(place / "checkpoints")
    with stopping() as stop:
        watch = _Watch(scope, kept_back, place / "evaluations.jsonl", config, trainer, stop, last[0] if last else 0)
        trainer.add_callback(watch)
        watch.evaluate(0)
        train_on(trainer, last)
        if stop.asked and trainer.state.global_step < config.steps:
            raise Stopped(
                f"stopped after {trainer.state.global_step} of {config.steps} updates; the same command goes on from there"
            )
        # Of a run that was stopped and goes on with fewer steps, the last may not have been evaluated.
        watch.evaluate(trainer.state.global_step)
        watch.bar.close()
    scope.backbone.model.eval()
    after = fit(scope.backbone, scope.suite, texts, scope.layers)
    trainer.save_model(str(place / "model"))
    report = GRPOReport(
        model=about["model"],
        suite=about["suite"],
        config=config,
        steering=steering,
        features=features,
        evaluations=[watch.found[step] for step in sorted(watch.found)],
        history=[finite(row) for row in trainer.state.log_history if "reward" in row],
        drift=drift(fit_before, after),
    )
    report.save(place)
    return report


def _check(
    scope: Scope, prompts: list[Any], columns: Mapping[str, Sequence[Any]], evaluate_on: list[Any] | None
) -> None:
    if evaluate_on is not None and not evaluate_on:
        raise QwenScopeError("expected prompts to evaluate on, found none; leave evaluate_on out to keep some back")
    if len(prompts) < FEWEST_PROMPTS or len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise QwenScopeError(
            f"expected at least {FEWEST_PROMPTS} prompts, all texts or all chats, found {len(prompts)}; half of them at most are "
            "kept back to evaluate on"
        )
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise QwenScopeError(
                f"expected a value of {name} for each of {len(prompts)} prompts, found {len(column)}; give as many"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise QwenScopeError(
            "expected a single process, found several; use RareNegativesTrainer itself under accelerate launch"
        )
    if scope.backbone.tokenizer is None:
        raise QwenScopeError("expected a model with its tokenizer, found none; build the scope with tokenizer=…")
    if hasattr(scope.backbone.model, "peft_config"):
        raise QwenScopeError(
            "expected a model without adapters, found one with; merge them first, or load the scope anew to go on with a run"
        )


def _check_length(scope: Scope, prompts: list[Any], config: GRPORun) -> None:
    limit = scope.backbone.context_length
    if limit is None:
        return
    longest = max(len(text) for text in tokenize(prompts, scope.backbone.tokenizer, reply=True)[0])
    if longest + config.max_new_tokens > limit:
        raise QwenScopeError(
            f"expected prompts that leave room for {config.max_new_tokens} tokens in the context of {limit}, found one of "
            f"{longest} tokens; shorten it or lower max_new_tokens"
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _agree_with_before(place: Path, about: dict[str, Any]) -> None:
    """Raises a QwenScopeError where a folder holds another run than this."""
    path = place / "run.json"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QwenScopeError(
            f"expected a run in {place}, found {path.name} without JSON; choose another folder"
        ) from error
    if told := differences(before, about):
        raise QwenScopeError(
            f"expected the run that {place} holds, found another: {'; '.join(told[:3])}; choose another folder"
        )


def _claim(place: Path, about: dict[str, Any], features: Sequence[RepetitionFeature], fit_before: Fit) -> None:
    """Takes a folder for this run, and keeps there what was measured on the model as it was."""
    with replacing(place / "run.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [{name: value for name, value in f.to_dict().items() if name != "feature"} for f in features]
    if rows and not (place / "features.json").exists():
        with replacing(place / "features.json") as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not (place / "fit.safetensors").exists():
        fit_before.save(place / "fit.safetensors")


def _steering(scope: Scope, prompts: list[Any], place: Path, config: GRPORun) -> tuple[str, list[RepetitionFeature]]:
    """The steering in raw units as text, and the features found for it: those of the run before it was stopped, or new ones."""
    if config.plain:
        return "", []
    path, features = place / "features.json", []
    if config.steering is None:
        if path.exists():
            features = [RepetitionFeature(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
        else:
            features = _found(scope, prompts, config)
        given: Any = [f"{feature.name}:{config.strength:g}x" for feature in features]
    else:
        given = config.steering
    ready = scope.changes(given)
    if not ready:
        raise QwenScopeError(
            "expected a steering of at least one feature, found an empty one; leave it out to find some"
        )
    raw = Steering(tuple(replace(change.edit, strength=change.strength, unit="raw") for change in ready))
    return str(raw), features


def _ordinary_texts(scope: Scope) -> list[Sample]:
    """The texts on which it is measured whether the SAEs still fit; of a model with a short context, their beginnings."""
    limit, found = scope.backbone.context_length, []
    for text in tokenize(SAMPLE_TEXTS, scope.backbone.tokenizer)[0]:
        most = len(text) if limit is None else min(limit, len(text))
        found.append(Sample.of(text.text[: text.spans[most - 1][1]], ""))
    return found


def _found(scope: Scope, prompts: list[Any], config: GRPORun) -> list[RepetitionFeature]:
    # The most likely tokens always, since that is how models loop most.
    samples = looping_samples(scope, prompts[:LOOKED_AT], Sampling(config.evaluate_tokens), most=LOOPS_WANTED)
    if len(samples) < FEWEST_LOOPS:
        raise QwenScopeError(
            f"expected at least {FEWEST_LOOPS} texts that loop, to find repetition features in, found {len(samples)} among "
            f"{min(len(prompts), LOOKED_AT)}; give more prompts, raise evaluate_tokens, or name a steering"
        )
    return repetition_features(scope, samples, config.feature_layer, config.features)


def _arguments(scope: Scope, place: Path, config: GRPORun, steering: str) -> RareNegativesConfig:
    half = str(scope.backbone.model.dtype)
    return RareNegativesConfig(
        output_dir=str(place / "checkpoints"),
        steering=steering or None,
        off_policy=config.off_policy,
        loss_type=config.loss,
        max_steps=config.steps,
        num_generations=config.rollouts,
        per_device_train_batch_size=config.rows,
        # One generation for each update, so that checkpoints fall between generations.
        gradient_accumulation_steps=config.prompts_per_step * config.rollouts // config.rows,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=float(WARM_UP),
        beta=config.beta,
        reward_weights=list(config.reward_weights) or None,
        activation_checkpointing=config.gradient_checkpointing,
        bf16=half == "torch.bfloat16",
        fp16=half == "torch.float16",
        use_cpu=scope.backbone.device.type == "cpu",
        logging_steps=1.0,
        save_strategy="steps",
        save_steps=float(config.save_every),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
    )


def _adapter(config: GRPORun) -> LoraConfig | None:
    if not config.lora_rank:
        return None
    return LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


class _Watch(TrainerCallback):
    """Evaluates now and then, shows a bar, and stops when asked."""

    def __init__(
        self,
        scope: Scope,
        prompts: list[Any],
        path: Path,
        config: GRPORun,
        trainer: RareNegativesTrainer,
        stop: Stop,
        done: int,
    ):
        self.scope, self.prompts, self.path, self.config, self.stop = scope, prompts, path, config, stop
        self.trainer = trainer
        self.found: dict[int, Evaluation] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = Evaluation(**json.loads(line))
            except (ValueError, TypeError):
                break  # cut short by a kill
            # What lies beyond the checkpoint is done again.
            if row.step <= done:
                self.found[row.step] = row
        self._write()
        self.bar = tqdm(total=config.steps, initial=done, desc="training", unit="update", disable=config.steps < 3)

    def evaluate(self, step: int) -> None:
        """Evaluates after so many updates, unless that is known."""
        if step in self.found:
            return
        model: Any = self.trainer.model
        sampling = Sampling(self.config.evaluate_tokens, self.config.evaluate_temperature, seed=self.config.seed)
        self.found[step] = evaluate(
            self.scope,
            self.prompts,
            step,
            samples=self.config.evaluate_samples,
            sampling=sampling,
            before=model.disable_adapter if isinstance(model, PeftModel) else None,
        )
        self._write()

    def _write(self) -> None:
        with replacing(self.path) as temporary:
            rows = [json.dumps(self.found[step].to_dict(), ensure_ascii=False) for step in sorted(self.found)]
            temporary.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each update."""
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step % self.config.evaluate_every == 0 or state.global_step >= self.config.steps:
            self.evaluate(state.global_step)
        if self.stop.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the end."""
        self.bar.close()
