"""`SASFTTrainer`: TRL's `SFTTrainer` with a loss that keeps chosen features below their normal level on chosen samples."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from trl.data_utils import pack_dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.finite import FiniteSteps
from qwen_scope.finetuning.old_names import old_names_allowed
from qwen_scope.finetuning.reduce import Rows
from qwen_scope.finetuning.residuals import caught, caught_last, trainable_below
from qwen_scope.finetuning.restraints import Restraints
from qwen_scope.finetuning.sasft_config import SASFTConfig
from qwen_scope.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

LEAST_SHARE, WANTED_SHARE = 0.01, 0.05
"""Of TRL's loss: below the first, the reduction loss changes next to nothing; the second is a weight to begin with."""
TAGS = "tag_ids"
"""The column, and the key of a batch, that holds the number of the tag of each token's sample."""
TRLS_OWN = {
    "input_ids", "labels", "attention_mask", "position_ids", "seq_lengths", "completion_mask", "assistant_masks", "text",
    "messages", "conversations", "prompt", "completion", "tools", "chat_template_kwargs", TAGS,
}  # fmt: skip
"""Columns that mean something to TRL, and so cannot hold tags."""


class SASFTTrainer(FiniteSteps, SFTTrainer):
    """`trl.SFTTrainer` that also keeps features down (SASFT, arXiv:2507.14894).

    It takes whatever that takes, but for what is named below.

    The loss of a step is TRL's own plus `reduce_weight` times

        L_reduce = 1 / (tokens * features) * sum over tokens and features s of ReLU(x @ W_enc[s] + b_enc[s] - limit[s, tag])

    where x is the residual after the feature's layer, the tokens are those that the cross-entropy is averaged over (label
    tokens but position 0) and `features` is how many are restrained. On tokens of a sample whose tag a feature has no limit for,
    such as its home, and on norm outliers, the feature adds nothing. Only the rows of the encoder of these features are used.
    Tokens are counted over all micro-batches and processes of a step, as TRL counts them for the cross-entropy: the loss does not
    depend on how a batch is cut, but for norm outliers, which are judged by the median of their own micro-batch.

    What is logged beside TRL's figures: `sft_loss`, TRL's own loss (the cross-entropy, and the router's loss of a mixture of
    experts that has one); `reduce_loss`, L_reduce unweighted; `above_limit`, the share of pairs of token and restrained feature
    above their limit; `penalised_mass` where the baseline is on, the mean probability of the penalised tokens.

    Data sets need the column `args.tag_column` beside TRL's own; packing and padding-free batches keep each token's tag.

    Args:
        model: see `SFTTrainer`.
        args: a `SASFTConfig`, or an `SFTConfig`, of which the weights are then the defaults.
        restraints: which features to keep down, or the file that holds them.
        suite: the suite they are of, or its name; by default the bundled one.
        penalised_tokens: token ids whose probability the baseline of `args.token_penalty` penalises.
        options: all other arguments of `SFTTrainer`. A `data_collator` of one's own, streamed and vision data sets,
            `skip_prepare_dataset`, `torch_compile`, `use_liger_kernel`, sequence, context and tensor parallelism, and PEFT's
            prompt learning are refused: they would lose the tags, the hooks or the places of the tokens.

    Raises:
        QwenScopeError: samples without a tag or with an unknown one, features of another suite, another tokenizer, features whose
            layers get no gradient, an option that is refused; in training, a loss or gradient that is not finite.
    """

    _tag_names = ["trl", "sft", "sasft"]  # noqa: RUF012 - as TRL declares it
    _name = "SASFT"

    args: SASFTConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    model: Any  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        restraints: Restraints | str | Path,
        suite: Suite | str | None = None,
        penalised_tokens: Sequence[int] = (),
        **options: Any,
    ):
        config = _as_config(args, model)
        _refuse_options(config, options)
        self.restraints = restraints if isinstance(restraints, Restraints) else Restraints.load(restraints)
        suite = suite if isinstance(suite, Suite) else Suite.from_pretrained(suite)
        self.restraints.check_suite(suite)
        if config.token_penalty and not penalised_tokens:
            raise QwenScopeError(
                f"expected penalised_tokens with token_penalty = {config.token_penalty}, found none; give token ids, such as "
                "qwen_scope.finetuning.scripts.tokens_of finds"
            )
        if (tokenizer := options.get("processing_class")) is not None and hasattr(tokenizer, "get_vocab"):
            self.restraints.check_tokenizer(tokenizer)
        # TRL's constructor prepares the data sets, which needs what is set above.
        with old_names_allowed():
            super().__init__(model, config, **options)
        tokenizer = self._tokenizer
        self.restraints.check_tokenizer(tokenizer)
        self.base: Any = self.model.get_base_model() if is_peft_model(self.model) else self.model
        _check_model(self.base, self.model, self.restraints, suite)
        _check_tokens(self.base, tokenizer)
        _refuse_parallelism(self.accelerator.parallelism_config)
        self.data_collator = _Tagging(self.data_collator)
        self._rows = Rows.of(self.restraints, suite)
        self._penalised = torch.tensor(sorted(penalised_tokens), dtype=torch.long)
        self._weight_judged = False
        if config.token_penalty:
            _refuse_other_logits(self.base)

    def _send_telemetry(self) -> None:
        # TRL tells Hugging Face of each trainer made; who uses this package has not been asked.
        pass

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TAGS not in (columns := self._signature_columns or []):
            self._signature_columns = [*columns, TAGS]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if isinstance(dataset, Dataset) and TAGS in dataset.column_names:
            return dataset
        self._check_tags(dataset, args.tag_column, dataset_name)
        whole = args
        if packing:
            # Packing comes after the tags are there, and cuts by itself.
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
        prepared: Any = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        numbers = {tag: n for n, tag in enumerate(self.restraints.tags)}
        options: dict[str, Any] = {"num_proc": args.dataset_num_proc}

        def tagged(ids: list[int], tag: str) -> dict[str, list[int]]:
            return {TAGS: [numbers[tag]] * len(ids)}

        columns = {"input_columns": ["input_ids", args.tag_column], "desc": f"Tagging {dataset_name} dataset"}
        prepared = prepared.map(tagged, **columns, **options)
        if packing:
            if args.max_length is None:
                raise QwenScopeError("expected a max_length with packing, found none; say how long packed rows are")
            prepared = prepared.select_columns(["input_ids", "labels", TAGS])
            if args.shuffle_dataset:
                prepared = prepared.shuffle(seed=args.seed)
            prepared = pack_dataset(prepared, args.max_length, args.packing_strategy, options)
            if args.shuffle_dataset:
                prepared = prepared.shuffle(seed=args.seed)
        return prepared

    def _check_tags(self, dataset: Any, column: str, name: str) -> None:
        if not isinstance(dataset, Dataset):
            raise QwenScopeError(
                f"expected a datasets.Dataset to {name} on, found {type(dataset).__name__}; load it whole, without streaming"
            )
        if column not in dataset.column_names:
            raise QwenScopeError(
                f"expected a column {column!r} with each sample's tag in the {name} data set, found "
                f"{', '.join(dataset.column_names)}; add it, or name it with tag_column"
            )
        if column in TRLS_OWN:
            raise QwenScopeError(
                f"expected tags in a column that TRL leaves alone, found tag_column = {column!r}, which it reads; rename it"
            )
        tags, known = dataset[column], self.restraints.tags
        unknown = [(at, tag) for at, tag in enumerate(tags) if tag not in known]
        if unknown:
            at, tag = unknown[0]
            found = "no tag" if tag is None or tag == "" else f"the tag {tag!r}"
            raise QwenScopeError(
                f"expected one of the tags {', '.join(known)} for each sample of the {name} data set, found {found} at sample "
                f"{at} and {len(unknown) - 1} more like it; fill them in, or measure the restraints with these tags"
            )
        held = {tag for feature in self.restraints.features for tag in feature.limits}
        if name == "train" and not held & set(tags):
            raise QwenScopeError(
                f"expected samples of {', '.join(sorted(held))}, on which the features are kept down, found only "
                f"{', '.join(sorted(set(tags)))}; add some, or train with trl.SFTTrainer"
            )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss plus the weighted reduction loss, and the baseline's penalty if it is on."""
        inputs = dict(inputs)
        tags = inputs.pop(TAGS)
        counted = inputs["labels"] != -100
        # What the cross-entropy leaves out too: nothing predicts the first token of a row.
        counted[:, 0] = False
        with caught(self.base, self.restraints.layers) as residuals, caught_last(self.base) as hidden:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own: Tensor = found[0] if return_outputs else found
        count = counted.sum()
        # At least 1, as TRL does: a step without label tokens has a loss of 0, and no 0 / 0.
        tokens = torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp_min(1)
        # Gradients are averaged over processes, and `tokens` are those of all of them; as TRL does.
        whole = self.args.average_tokens_across_devices and num_items_in_batch is not None
        scale = self.accelerator.num_processes // self.get_tp_size() if whole else 1
        over, above, pairs = own.new_zeros((), dtype=torch.float32), own.new_zeros(()), own.new_zeros(())
        for layer, x in residuals.items():
            if self.model.training and not x.requires_grad:
                raise QwenScopeError(
                    f"expected a gradient at the residual after layer {layer}, found none, as reentrant checkpointing leaves it; "
                    "set gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            rows = self._rows[layer] = self._rows[layer].to(x.device)
            excess = rows.excess(x, tags.to(x.device), counted.to(x.device))
            over = over + excess.total.to(over.device)
            above, pairs = above + excess.above.to(above.device), pairs + excess.pairs.to(pairs.device)
        reduce = over / (tokens * len(self.restraints.features)) * scale
        loss = own + self.args.reduce_weight * reduce
        mass = own.new_zeros((), dtype=torch.float32)
        if self.args.token_penalty:
            mass = self._mass(hidden[0], tags, counted)
            loss = loss + self.args.token_penalty * mass / tokens * scale
        self._note(own.detach() * tokens / scale, over.detach(), above, pairs, count, mass.detach())
        return (loss, found[1]) if return_outputs else loss

    def _mass(self, hidden: Tensor, tags: Tensor, counted: Tensor) -> Float[Tensor, ""]:
        """Sum over the tokens that restraints hold of the probability of the penalised tokens in their place."""
        held = torch.stack([rows.limits.to(tags.device).isfinite().any(1) for rows in self._rows.values()]).any(0)
        # The hidden state before a token is what predicts it.
        wanted = (counted & held[tags])[:, 1:]
        head = self.base.get_output_embeddings()
        logits = functional.linear(hidden[:, :-1][wanted], head.weight, head.bias).float()
        return logits.softmax(-1)[:, self._penalised.to(logits.device)].sum()

    def _note(self, own: Tensor, over: Tensor, above: Tensor, pairs: Tensor, count: Tensor, mass: Tensor) -> None:
        """Keeps the figures of all processes for the log."""
        mine = torch.stack([value.detach().float().to(own.device) for value in (own, over, above, pairs, count, mass)])
        own_sum, over_sum, above_sum, pair_sum, tokens, mass_sum = (
            self.accelerator.gather(mine[None]).sum(0).tolist()  # pyright: ignore[reportAttributeAccessIssue]
        )
        metrics = self._metrics["train" if self.model.training else "eval"]
        if tokens:
            metrics["sft_loss"].append(own_sum / tokens)
            metrics["reduce_loss"].append(over_sum / tokens / len(self.restraints.features))
            if self.args.token_penalty:
                metrics["penalised_mass"].append(mass_sum / tokens)
        if pair_sum:
            metrics["above_limit"].append(above_sum / pair_sum)
        if tokens and self.model.training and not self._weight_judged:
            self._weight_judged = True
            self._judge_weight(own_sum / tokens, over_sum / tokens / len(self.restraints.features))

    def _judge_weight(self, own: float, reduce: float) -> None:
        """Warns where the reduction loss changes next to nothing, as SASFT's own weight does where pre-activations are small."""
        if self.is_world_process_zero() and 0 < self.args.reduce_weight * reduce < LEAST_SHARE * own:
            logger.warning(
                f"reduce_weight {self.args.reduce_weight:g} times a reduction loss of {reduce:.3g} is less than "
                f"{LEAST_SHARE:.0%} of the loss {own:.3g}: this is nearly plain fine-tuning; for {WANTED_SHARE:.0%} of it choose "
                f"{WANTED_SHARE * own / reduce:.2g}"
            )


class _Tagging:
    """TRL's collator, with the tags of the tokens beside their ids."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(examples)
        rows = [torch.tensor(example[TAGS]) for example in examples]
        if self.inner.padding_free:
            rows = [torch.cat(rows)]
        width = batch["input_ids"].shape[1]
        batch[TAGS] = torch.stack([functional.pad(row, (0, width - len(row))) for row in rows])
        return batch


def _as_config(args: Any, model: Any) -> SASFTConfig:
    if isinstance(args, SASFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "name_or_path", "") or type(model).__name__
        return SASFTConfig(f"{name.split('/')[-1]}-SASFT")
    if not isinstance(args, SFTConfig):
        raise QwenScopeError(
            f"expected a SASFTConfig, or an SFTConfig of TRL, found {type(args).__name__}; make one of the two"
        )
    return SASFTConfig(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})


def _refuse_options(config: SASFTConfig, options: dict[str, Any]) -> None:
    """Raises a QwenScopeError for options under which the tags or hooks would be lost."""
    prepared = config.dataset_kwargs if isinstance(config.dataset_kwargs, dict) else {}
    refused = {
        "data_collator": options.get("data_collator") is not None,
        "dataset_kwargs['skip_prepare_dataset']": bool(prepared.get("skip_prepare_dataset")),
        "torch_compile": config.torch_compile,
        "use_liger_kernel": config.use_liger_kernel,
        "parallelism_config": getattr(config, "parallelism_config", None) is not None,
    }
    for name, given in refused.items():
        if given:
            raise QwenScopeError(
                f"expected options that SASFT can follow, found {name}, under which tags or residuals are lost; leave it out"
            )
    if options.get("train_dataset") is None:
        raise QwenScopeError("expected a train_dataset, found none; give samples with a tag each")
    if {"image", "images"} & set(getattr(options["train_dataset"], "column_names", None) or ()):
        raise QwenScopeError("expected a data set of text, found one with images; SASFT trains on text")


def _refuse_parallelism(config: Any) -> None:
    for name in ("cp", "sp", "tp"):
        if config is not None and getattr(config, f"{name}_enabled", False):
            raise QwenScopeError(
                f"expected whole rows of tokens and whole layers on each device, found accelerate's {name}_size above 1; use "
                "data parallelism, FSDP or DeepSpeed ZeRO instead"
            )


def _refuse_other_logits(base: Any) -> None:
    """Raises a QwenScopeError for a model whose logits are more than its head's product, which the penalty takes them for."""
    config = base.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1.0):
            raise QwenScopeError(
                f"expected logits that are the product of the head alone for token_penalty, found {name} = "
                f"{getattr(config, name)} in the model's config; leave the penalty out"
            )


def _check_model(base: Any, model: Any, restraints: Restraints, suite: Suite) -> None:
    """Raises a QwenScopeError for a model that the features do not read, or cannot change."""
    from qwen_scope.backbone import find_decoder_layers

    d_model, layers = base.config.get_text_config().hidden_size, len(find_decoder_layers(base))
    if suite.d_model != d_model or restraints.layers[-1] >= layers:
        raise QwenScopeError(
            f"expected features of a model of d_model = {d_model} with {layers} layers, found features of {suite.name}, of "
            f"d_model = {suite.d_model}, at layer {restraints.layers[-1]}; fine-tune the model the SAEs were trained on"
        )
    for config in getattr(model, "peft_config", {}).values() if is_peft_model(model) else ():
        if config.is_prompt_learning:
            raise QwenScopeError(
                f"expected PEFT to change weights, as LoRA does, found {config.peft_type}, which puts tokens of its own before "
                "the text; choose another method"
            )
    for layer in restraints.layers:
        if not trainable_below(base, layer):
            names = ", ".join(f.feature for f in restraints.features if f.layer == layer)
            raise QwenScopeError(
                f"expected weights to train in layers 0 to {layer}, which the features {names} read, found that all are frozen "
                "there; widen PEFT's target_modules or layers_to_transform, unfreeze some, or choose features of later layers"
            )


def _check_tokens(base: Any, tokenizer: Any) -> None:
    known, largest = base.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if largest >= known:
        raise QwenScopeError(
            f"expected a tokenizer whose ids are below {known}, which the model knows, found ids up to {largest}; use the "
            "model's own tokenizer, or resize its embeddings first"
        )
