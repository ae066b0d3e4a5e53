"""`RareNegativesTrainer`: TRL's GRPO, with one rollout of each group generated under steering."""

from __future__ import annotations

import math
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.grpo_trainer import GRPOTrainer

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.finite import FiniteSteps
from qwen_scope.finetuning.grpo_config import RareNegativesConfig
from qwen_scope.finetuning.old_names import old_names_allowed
from qwen_scope.steering import Steering
from qwen_scope.steering.around import steered
from qwen_scope.steering.changes import Change, Changes, Layout, changes
from qwen_scope.steering.maxima import maxima_of
from qwen_scope.suite import Suite

SHAPING = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_length",
    "min_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale",
    "exponential_decay_length_penalty", "watermarking_config",
)  # fmt: skip
"""Of a model's own generation_config, which transformers follows where TRL sets nothing: what changes the distribution."""


class RareNegativesTrainer(FiniteSteps, GRPOTrainer):
    """GRPO in which a group of G rollouts has G - 1 ordinary ones and one that was generated under steering (the report,
    section 8), such as one that loops: a bad example that the policy itself would hardly ever give.

    Everything is as in TRL's `GRPOTrainer` but this. In training, the last row of each group is generated under
    `args.steering`, in the same batch and forward passes as all others; rewards, their mean and spread, and advantages are over
    all G rows. Evaluation steers nothing. Without `args.steering` this is TRL's trainer, with its finite-loss check.

    A steered rollout y of prompt x is drawn from the steered policy s, not from the policy p that is trained (both at the
    temperature of training). With A its advantage and r_t the ratio by which its token t enters TRL's loss, `args.off_policy`
    says what is done about that:

    - `as_reported`: nothing, "the objective is unchanged". r_t = p(y_t | x, y_<t) / p_old(y_t | x, y_<t), as if the policy before
      the update had drawn it, which is 1 in the first update: the loss pushes its probability down by A whatever it was. A KL
      term (`beta`) is estimated on it too.
    - `corrected`: r_t = p(y_t | x, y_<t) / s(y_t | x, y_<t), the importance ratio, where s is read anew in one more forward pass
      of the steered rows, with their steering. TRL's clipping holds as ever: where A < 0 and r_t < 1 - epsilon, that is where the
      policy is already that much less likely to say it than the steered one, there is no gradient. Where the policy is more
      likely, r_t is not clipped for A < 0 unless `delta` is set.
    - `excluded`: its tokens are left out of the loss, of the KL and entropy terms and of the token count that `dapo` divides by.
      All it does is to shift the mean and spread of its group, and so the advantages of the others. Losses that are means over
      rollouts (`grpo`, `dr_grpo`) still count it, as 0.

    The model that is trained is the one that is steered: hooks sit on the decoder layers of `self.model` itself, beneath PEFT and
    whatever accelerate wraps around it.

    Args:
        suite: the SAEs whose features are steered, or their name; the bundled ones unless given. For the other arguments see
            `GRPOTrainer`.

    Raises:
        QwenScopeError: something that steered rollouts do not go with (tools, a rollout function, environments, images, prompt
            tuning, an adapter around all decoder layers), a tokenizer of another model, a steering that the suite or model does
            not have, or, while training, a loss or gradient that is not finite.
    """

    _tag_names = [*GRPOTrainer._tag_names, "qwen-scope"]  # noqa: RUF012 - as TRL declares it

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RareNegativesConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        suite: Suite | str | None = None,
    ):
        if not isinstance(args, RareNegativesConfig):
            raise QwenScopeError(
                f"expected args as a RareNegativesConfig, found a {type(args).__name__}; use it in place of GRPOConfig"
            )
        steering = Steering.of(args.steering)
        if steering:
            _refuse(model, processing_class, peft_config, tools, rollout_func, environment_factory)
        with old_names_allowed():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        _check_tokenizer(self.model, self._tokenizer)
        wanted = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < wanted:
            # TRL drops a batch that is not full, and would end without an update.
            raise QwenScopeError(
                f"expected at least {wanted} prompts, as many as are generated for at once, found {len(self.train_dataset)}; "
                "give more, or lower generation_batch_size"
            )
        # What TRL and transformers declare is wider than what is there.
        self._policy: Any = self.model
        self._group = int(args.num_generations or 0)
        self._off_policy = args.off_policy
        self._changes: list[Change] = []
        self._corrected: dict[str, Any] | None = None
        if not steering:
            return
        if args.off_policy == "corrected":
            _refuse_shaped(self.model)
        if self._is_vlm:
            _refuse(self.model, self.processing_class, None, None, None, None)
        self.suite = suite if isinstance(suite, Suite) else Suite.from_pretrained(suite)
        self.backbone = policy_backbone(self.model, self._tokenizer)
        if self.suite.d_model != self.backbone.d_model:
            raise QwenScopeError(
                f"expected SAEs of width d_model = {self.backbone.d_model}, found {self.suite.d_model} in {self.suite.name}; use "
                "the model they were trained on"
            )
        self._changes = changes(steering, self.suite, lambda: maxima_of(self.backbone, self.suite))
        for change in self._changes:
            self.backbone.check_layer(change.edit.layer)

    def _send_telemetry(self) -> None:
        # TRL tells Hugging Face of each trainer made; who uses this package has not been asked.
        pass

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL's."""
        # TRL reads an attribute of the model at every step.
        with old_names_allowed():
            return super().train(*args, **kwargs)

    def steered_rows(self, count: int) -> Bool[Tensor, " count"]:
        """Which of this process's rows of a generation batch are steered: the last of each group, counted over all processes."""
        if not self._changes:
            return torch.zeros(count, dtype=torch.bool)
        rows = self.accelerator.process_index * count + torch.arange(count)
        return rows % self._group == self._group - 1

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not self._changes or not self._policy.training:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rows = [self._changes if chosen else [] for chosen in self.steered_rows(len(prompt_ids)).tolist()]
        try:
            with steered(self.backbone, rows, self.suite):
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise QwenScopeError(
                f"expected probabilities of the next token, found none that are numbers in step {self.state.global_step + 1}; "
                "steer less strongly"
            ) from error

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args, **kwargs)
        if self._changes and self._policy.training:
            # Of all processes, in the order of groups.
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(1).view(-1, self.num_generations)
            self._metrics["train"]["steered/reward"].append(total[:, -1].mean().item())
            self._metrics["train"]["ordinary/reward"].append(total[:, :-1].mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        training = self._policy.training
        output = super()._generate_and_score_completions(inputs)
        if not (self._changes and training):
            return output
        chosen = self.steered_rows(len(inputs)).to(output["completion_mask"].device)
        if self._off_policy == "excluded":
            # What TRL leaves out of the loss where tools have spoken, and nowhere else.
            output["tool_mask"] = (~chosen)[:, None].expand_as(output["completion_mask"]).long()
            left: Any = self.accelerator.gather((output["completion_mask"] * output["tool_mask"]).sum())
            output["num_items_in_batch"] = left.sum()
        elif self._off_policy == "corrected":
            output["steered"] = chosen
            output["steered_logps"] = self._steered_logps(output, chosen)
        return output

    @torch.no_grad()
    def _steered_logps(self, batch: dict[str, Any], chosen: Bool[Tensor, " rows"]) -> Float[Tensor, "rows tokens"]:
        """The logarithm of the steered policy's probability of each token of the chosen rows; 0 in all others."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1).cpu()
        lengths = batch["prompt_mask"].sum(1).tolist()
        kept = batch["completion_ids"].shape[1]
        rows = chosen.nonzero()[:, 0].tolist()
        # As many in every process, since those that share a model's weights must run as many passes.
        rows += [0] * (math.ceil(len(ids) / self._group) - len(rows))
        found = torch.zeros(len(ids), kept, device=ids.device)
        size = self.args.per_device_train_batch_size
        checkpointing: Any = self.args.gradient_checkpointing_kwargs
        with disable_gradient_checkpointing(self._policy, checkpointing):
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                layout = Layout(positions[some], [lengths[row] for row in some])
                writers = Changes([self._changes] * len(some), self.suite).writers(layout)
                with self.backbone.editing(writers):
                    logps, _, _ = self._get_per_token_logps_and_entropies(self._policy, ids[some], mask[some], kept)
                found[some] = logps.float()
        return found * chosen[:, None]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._corrected = dict(inputs) if "steered_logps" in inputs else None
        try:
            loss = super()._compute_loss(model, inputs if self._corrected is None else self._corrected)
        finally:
            self._corrected = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        batch = self._corrected
        if batch is not None:
            # TRL asks for these once in each loss, and only then for what the ratio is taken to.
            logps, chosen = found[0], batch["steered"]
            old = batch.get("old_per_token_logps")
            old = logps.detach() if old is None else old
            batch["old_per_token_logps"] = torch.where(chosen[:, None], batch["steered_logps"].to(old.dtype), old)
            self._told(logps.detach(), batch)
        return found

    def _told(self, logps: Float[Tensor, "rows tokens"], batch: dict[str, Any]) -> None:
        mask = batch["completion_mask"] * batch["steered"][:, None]
        ratio = (logps - batch["old_per_token_logps"]) * mask
        sums = torch.stack([ratio.sum(), ((ratio < math.log(1 - self.epsilon_low)) & (mask > 0)).sum(), mask.sum()])
        told: Any = self.accelerator.reduce(sums.float(), reduction="sum")
        total, low, tokens = told.tolist()
        if tokens:
            self._metrics["train"]["steered/log_ratio"].append(total / tokens)
            self._metrics["train"]["steered/share_below_clip"].append(low / tokens)


def policy_backbone(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Backbone:
    """The backbone of a model that is being trained, beneath PEFT, left in the mode (training or not) it was in.

    Raises:
        QwenScopeError: decoder layers within a copy that an adapter made, so that hooks on them would see or change nothing.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was = model.training
    backbone = Backbone(base, tokenizer)
    model.train(was)
    for path, module in base.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and any(child is backbone.layers for child in module.modules()):
            raise QwenScopeError(
                f"expected decoder layers that the model runs, found them inside {path}, which the adapter copies as a whole "
                "(modules_to_save); name modules inside the layers instead"
            )
    return backbone


def _check_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a QwenScopeError for a tokenizer whose tokens the model does not have."""
    known, largest = model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values(), default=0)
    if largest >= known:
        raise QwenScopeError(
            f"expected a tokenizer whose ids are below {known}, which the model knows, found ids up to {largest}; use the "
            "model's own tokenizer, or resize its embeddings first"
        )


def _refuse_shaped(model: Any) -> None:
    """Raises a QwenScopeError for a model whose own generation options draw tokens from another distribution than its logits'."""
    for name in SHAPING:
        if (value := getattr(model.generation_config, name, None)) not in (None, 0, 1.0):
            raise QwenScopeError(
                f"expected tokens drawn from the model's own distribution where off_policy is corrected, found {name} = {value} "
                "in its generation_config; set it to None"
            )


def _refuse(model: Any, processing: Any, peft_config: Any, tools: Any, rollout_func: Any, environments: Any) -> None:
    """Raises a QwenScopeError for what steered rollouts do not go with."""
    adapters = [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]
    for found, what in (
        (bool(tools), "tools, whose answers would be steered too"),
        (rollout_func is not None, "a rollout function, which generates without steering"),
        (environments is not None, "environments, whose turns would be steered too"),
        (
            processing is not None and not isinstance(processing, PreTrainedTokenizerBase),
            f"a {type(processing).__name__} as processing class, which puts more than text into prompts",
        ),
        (
            any(config is not None and config.is_prompt_learning for config in adapters),
            "prompt tuning, which shifts every position",
        ),
    ):
        if found:
            raise QwenScopeError(
                f"expected text prompts and one answer each with steered rollouts, found {what}; leave it out"
            )
