"""One run of SASFT from one call: samples in; a fine-tuned model, its evaluation before and after, and a report out."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.files import expanded, replacing
from qwen_scope.finetuning.checkpoints import last_checkpoint, train_on
from qwen_scope.finetuning.drift import Drift, Fit, drift, fit
from qwen_scope.finetuning.evaluate import Evaluation, evaluate
from qwen_scope.finetuning.restraints import Restraints
from qwen_scope.finetuning.samples import Sample, check_tags, read_samples
from qwen_scope.finetuning.sasft_report import write_report
from qwen_scope.finetuning.sasft_run_config import SASFTRun, differences
from qwen_scope.finetuning.scripts import scripts_of, tokens_of
from qwen_scope.finetuning.specific import specific_features
from qwen_scope.stopping import Stop, Stopped, stopping
from qwen_scope.suite import Suite

if TYPE_CHECKING:
    from qwen_scope.finetuning.sasft_trainer import SASFTTrainer

LEAST_KEPT = 2
"""Samples of each tag at least: one to train on, one to evaluate on."""


def finetune_sasft(samples: str | Path, folder: str | Path, config: SASFTRun) -> dict[str, Any]:
    """Fine-tunes a model on samples with tags while features are kept down, and writes model and report into a folder.

    Run again with the same arguments, it goes on at its last checkpoint. In the folder: `model/` (or the adapter of LoRA),
    `restraints.json`, `README.md`, `report.json`, `curves.png`, and what it goes on from.

    Args:
        samples: what `qwen_scope.finetuning.samples.read_samples` reads.
        folder: where everything goes.
        config: what is kept down, and how the model is trained.

    Returns:
        The figures of `report.json`.

    Raises:
        QwenScopeError: samples, features, a tokenizer or options that cannot be used, a run in the folder that began otherwise, a
            loss or gradient that is not finite.
        Stopped: Ctrl-C; progress is saved.
    """
    folder = expanded(folder)
    options = {"samples": str(samples), **config.to_dict()}
    _agree_with_before(folder, options)
    read = read_samples(samples, config.tag_column, split=config.split, subset=config.subset)
    extra = trl_options(config.trl)
    if config.evaluate_on is None:
        train, kept = split(read, config)
    else:
        train, kept = read, read_samples(config.evaluate_on, config.tag_column)
    options["content"] = _content([*train, *kept])
    _agree_with_before(folder, options)
    backbone, suite = open_models(config)
    check_length(kept, backbone)
    restraints = _restraints(folder, train, backbone, suite, config)
    check_tags([*train, *kept], restraints.tags)
    homes = config.home or tuple(dict.fromkeys(f.home for f in restraints.features if f.home))
    trainer = make_trainer(folder, train, backbone, suite, restraints, homes, config, extra)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise QwenScopeError(
            "expected processes that hold the whole model each, found FSDP or DeepSpeed, under which the figures before and "
            "after cannot be measured; use plain data parallelism, or SASFTTrainer itself"
        )
    # Not before all that is refused: a mistake in the options should not take the folder.
    _write_json(folder / "run.json", options)
    restraints.save(folder / "restraints.json")
    first = trainer.accelerator.is_main_process
    measured = {
        name: getattr(config, name) for name in ("prompt_tokens", "new_tokens", "texts_each", "temperature", "seed")
    }
    backbone.model.eval()
    if first and not (folder / "before.json").exists():
        fit(backbone, suite, kept, restraints.layers).save(folder / "before.safetensors")
        before = evaluate(backbone, suite, kept, homes, **measured)
        _write_json(folder / "before.json", before.to_dict())
    with stopping() as stop:
        _train(trainer, stop, folder)
    if not first:
        return {}
    if not (folder / "after.json").exists():
        trained = Backbone(_whole(trainer), backbone.tokenizer)
        fit(trained, suite, kept, restraints.layers).save(folder / "after.safetensors")
        _write_json(folder / "after.json", evaluate(trained, suite, kept, homes, **measured).to_dict())
    trainer.save_model(str(folder / "model"))
    before, after = (Evaluation.from_dict(_read_json(folder / f"{name}.json")) for name in ("before", "after"))
    changed: Drift = drift(Fit.load(folder / "before.safetensors"), Fit.load(folder / "after.safetensors"))
    return write_report(
        folder, config, restraints, before, after, changed, trainer.state.log_history, len(train), len(kept)
    )


def _agree_with_before(folder: Path, options: dict[str, Any]) -> None:
    """Raises a QwenScopeError where a run in the folder began with other options."""
    place = folder / "run.json"
    if place.exists() and (found := differences(_read_json(place), options)):
        raise QwenScopeError(
            f"expected the options that the run in {folder} began with, found that {'; '.join(found[:3])}; give those, or "
            "another folder"
        )


def _content(samples: Sequence[Sample]) -> str:
    """A hash of what samples say: a run cannot go on with others, whatever their file is called."""
    rows = [(sample.row, sample.tag) for sample in samples]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]


def split(samples: Sequence[Sample], config: SASFTRun) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples kept back, of each tag at random.

    Raises:
        QwenScopeError: a tag with fewer than `LEAST_KEPT` samples.
    """
    draw = random.Random(config.seed)
    kept: set[int] = set()
    for tag in sorted({sample.tag for sample in samples}):
        of = [at for at, sample in enumerate(samples) if sample.tag == tag]
        if len(of) < LEAST_KEPT:
            raise QwenScopeError(
                f"expected at least {LEAST_KEPT} samples of each tag, found {len(of)} of {tag!r} ({samples[of[0]].place}); give "
                "more, or leave it out"
            )
        wanted = min(max(1, round(config.held_out * len(of))), config.held_out_most)
        kept |= set(draw.sample(of, wanted))
    train = [sample for at, sample in enumerate(samples) if at not in kept]
    return train, [sample for at, sample in enumerate(samples) if at in kept]


def open_models(config: SASFTRun) -> tuple[Backbone, Suite]:
    """The model to train, in float32, and its SAEs."""
    import torch

    from qwen_scope.scope import Scope

    if config.model is None:
        scope = Scope.from_pretrained(None, config.suite, device=config.device)
        return scope.backbone, scope.suite
    # Unlike reading, fine-tuning goes on from models that were changed before, which the bundled suite still reads.
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    backbone = Backbone.from_pretrained(config.model, device=device)
    return backbone, Suite.from_pretrained(config.suite, device=device)


def check_length(samples: Sequence[Sample], backbone: Backbone) -> None:
    """Raises a QwenScopeError where a sample kept back is longer than the model's context."""
    most = backbone.context_length
    for sample in samples:
        text, _ = sample.tokenized(backbone.tokenizer)
        if most is not None and len(text) > most:
            raise QwenScopeError(
                f"expected samples of at most {most} tokens, the context of {backbone.name}, found {len(text)} in "
                f"{sample.place}; split it"
            )


def _restraints(
    folder: Path, train: Sequence[Sample], backbone: Backbone, suite: Suite, config: SASFTRun
) -> Restraints:
    """Those of the run before it was stopped, those given, or those found now."""
    place = folder / "restraints.json"
    if place.exists():
        return Restraints.load(place)
    if config.restraints is not None:
        return Restraints.load(config.restraints)
    draw, some = random.Random(config.seed), []
    for tag in sorted({sample.tag for sample in train}):
        of = [sample for sample in train if sample.tag == tag]
        some += draw.sample(of, min(config.measure_on, len(of)))
    return specific_features(
        backbone,
        suite,
        some,
        config.home,
        layers=config.layers or None,
        count=config.per_layer,
        features={config.home[0]: config.features} if config.features else None,
    )


MANAGED = {
    # Set by options of the run, or by the run.
    "output_dir", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "warmup_steps", "bf16", "fp16", "gradient_checkpointing",
    "activation_checkpointing", "save_steps", "save_strategy", "save_only_model", "seed", "use_cpu", "report_to",
    "resume_from_checkpoint", "disable_tqdm",
    # Would do nothing: the run evaluates by itself, tracks nothing, uploads nothing, and has loaded the model.
    "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_packing",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "per_device_eval_batch_size",
    "prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "label_names", "model_init_kwargs",
    "trust_remote_code", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub",
    "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "dataset_text_field",
    # Would lose samples' tags, or make a run that was stopped end otherwise.
    "dataset_kwargs", "ignore_data_skip",
}  # fmt: skip
"""Options of TRL that other options of the run set, or that would do nothing or harm in it."""


def trl_options(given: Sequence[str]) -> dict[str, Any]:
    """Options as name=value for TRL's `SFTConfig`, their values as JSON, or text where they are none.

    Raises:
        QwenScopeError: an option that TRL does not have, or that would do nothing here, or a value of another type than its own.
    """
    from trl.trainer.sft_config import SFTConfig

    known, found = {field.name for field in fields(SFTConfig) if field.init}, {}
    types = get_type_hints(SFTConfig)
    for each in given:
        name, equals, text = each.partition("=")
        if not equals or name not in known:
            raise QwenScopeError(
                f"expected options of TRL's SFTConfig as name=value, found {each!r}, which TRL does not have; correct the name"
            )
        if name in MANAGED:
            raise QwenScopeError(
                f"expected options of TRL that no other option of this command sets or leaves unused, found {name}; leave it out "
                "(see --help), or use SASFTTrainer in Python"
            )
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
        if not _fits(found[name], types[name]):
            # TRL checks few of them: a text such as False would count as true.
            raise QwenScopeError(
                f"expected a value of {name} as JSON of the type that TRL takes, such as true, 0.1 or null, found {text!r}; "
                "correct it"
            )
    return found


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be of a type; where the type is none that JSON knows, whether it is at least a text."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, each) for each in get_args(kind))
    plain = get_origin(kind) or kind
    if plain is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if plain is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, plain if plain in (bool, str, dict, list, NoneType) else str)


def make_trainer(
    folder: Path,
    train: Sequence[Sample],
    backbone: Backbone,
    suite: Suite,
    restraints: Restraints,
    homes: Sequence[str],
    config: SASFTRun,
    extra: dict[str, Any],
) -> SASFTTrainer:
    """The trainer of a run.

    Raises:
        QwenScopeError: what `SASFTTrainer` refuses, or TRL does.
    """
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig

    from qwen_scope.finetuning.sasft_config import SASFTConfig
    from qwen_scope.finetuning.sasft_trainer import SASFTTrainer

    disable_progress_bars()
    penalised: list[int] = []
    if config.method == "token-penalty":
        if backbone.tokenizer is None:
            raise QwenScopeError(f"expected a tokenizer beside {backbone.name}, found none; add its files")
        penalised = tokens_of(backbone.tokenizer, [script for home in homes for script in scripts_of(home)])
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    try:
        args = SASFTConfig(
            output_dir=str(folder / "checkpoints"),
            learning_rate=config.learning_rate,
            num_train_epochs=config.epochs,
            max_steps=config.steps or -1,
            per_device_train_batch_size=config.rows,
            gradient_accumulation_steps=config.accumulate,
            max_length=config.max_length,
            packing=config.packing,
            warmup_steps=config.warmup,
            bf16=config.bf16,
            gradient_checkpointing=config.gradient_checkpointing,
            save_steps=float(config.save_every),
            seed=config.seed,
            reduce_weight=config.reduce_weight if config.method == "sasft" else 0.0,
            token_penalty=config.token_penalty if config.method == "token-penalty" else 0.0,
            tag_column="language",
            use_cpu=backbone.device.type == "cpu",
            report_to="none",
            **{"logging_steps": 5.0, "save_total_limit": 2, **extra},
        )
        # Under a name of our own: the column of the user's may be called like one of TRL's.
        rows = [{**sample.row, "language": sample.tag} for sample in train]
        return SASFTTrainer(
            backbone.model,
            args,
            restraints=restraints,
            suite=suite,
            penalised_tokens=penalised,
            train_dataset=Dataset.from_list(rows),
            processing_class=backbone.tokenizer,
            peft_config=lora if config.lora_rank else None,
        )
    except QwenScopeError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        # What TRL, PEFT or transformers refuse, they say in one sentence or two.
        raise QwenScopeError(
            f"expected options that TRL takes together, found that {reason(error)}; change them"
        ) from error


def _train(trainer: SASFTTrainer, stop: Stop, folder: Path) -> None:
    """All updates that are still to be done.

    Raises:
        QwenScopeError: no samples to make an update of.
        Stopped: somebody asked for it; progress is saved.
    """
    import torch
    from transformers import TrainerCallback

    class Asked(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
            if trainer.accelerator.num_processes > 1:
                # All stop at the same update: one that went on alone would wait for the others for ever.
                asked: Any = trainer.accelerator.reduce(torch.tensor(float(stop.asked), device=args.device))
                stop.asked = bool(asked)
            if stop.asked and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True
            return control

    trainer.add_callback(Asked())
    train_on(trainer, last_checkpoint(folder / "checkpoints"))
    if trainer.state.global_step < trainer.state.max_steps:
        if not stop.asked:
            raise QwenScopeError(
                f"expected samples for {trainer.state.max_steps} updates, found that they ended after "
                f"{trainer.state.global_step}; give more, or raise max_length if it cuts all of their completions off"
            )
        raise Stopped(
            f"stopped after {trainer.state.global_step} of {trainer.state.max_steps} updates; the same command goes on from there"
        )


def _whole(trainer: SASFTTrainer) -> Any:
    """The trained model as it is read: with LoRA, its weights merged, for what comes after knows no adapters."""
    from accelerate.utils import is_peft_model

    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        model.merge_adapter()
        model = model.get_base_model()
    return model


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + os.linesep, encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QwenScopeError(
            f"expected JSON that an earlier run wrote in {path}, found none that reads ({error}); give another folder"
        ) from error
