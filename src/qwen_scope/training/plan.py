"""What a run will do, known before its first step: the model, the tokenized corpus, its blocks, the steps, who does what."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from qwen_scope.backbone import Backbone
from qwen_scope.bundled import MODEL_NAME
from qwen_scope.checkpoint import SuiteConfig
from qwen_scope.checkpoint.saving import joined
from qwen_scope.checkpoint.weights import read_json
from qwen_scope.corpus import documents
from qwen_scope.devices import as_device
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing
from qwen_scope.sae import Activation
from qwen_scope.suite import Suite
from qwen_scope.training.blocks import Blocks
from qwen_scope.training.group import Group
from qwen_scope.training.pieces import Pieces
from qwen_scope.training.run_config import RunConfig, differences


@dataclass(frozen=True, eq=False)
class Plan:
    """A run's fixed part, the same in all of its processes but for their device."""

    corpus: str
    """What is read."""
    config: RunConfig
    """The options."""
    backbone: Backbone
    """The language model."""
    pieces: Pieces
    """The corpus as token ids."""
    train_pieces: Int[np.ndarray, " train"]
    """Pieces trained on."""
    held_out: Int[np.ndarray, " kept_back"]
    """Pieces for the report."""
    blocks: Blocks
    """The pieces trained on, in their order."""
    steps: int
    """Optimiser steps of each layer."""
    owners: Mapping[int, int] | None
    """The process that trains each layer, None where all share every one."""

    @property
    def model(self) -> str:
        """What the model is called."""
        return MODEL_NAME if self.config.model in (None, "bundled") else self.backbone.name

    @property
    def name(self) -> str:
        """What the suite is called."""
        return self.config.name or f"SAE-Res-{Path(self.model).name}-L0_{self.config.recipe.k}"

    def residuals_depend_on(self) -> dict[str, Any]:
        """What a cache of residual blocks must agree with."""
        config = self.config
        about = {name: getattr(config, name) for name in ("dtype", "context", "buffer_tokens", "held_out")}
        return {"model": self.model, "corpus": self.pieces.fingerprint(), "seed": config.recipe.seed, **about}

    @staticmethod
    def of(corpus: str, work: Path, config: RunConfig, group: Group, folder: Path | None = None) -> "Plan":
        """Loads the model and tokenizes the corpus into `work/corpus` unless it is there.

        Args:
            folder: where the suite will go.

        Raises:
            QwenScopeError: a model or corpus that cannot be read, too little text, more processes than layers.
        """
        owners = _owners(config, group)
        backbone = Backbone.from_pretrained(config.model, dtype=config.dtype, device=_device(config, group))
        for layer in config.layers:
            backbone.check_layer(layer)
        _check_context(config, backbone)
        _check_memory(config, backbone)
        activation = _check_start(config, backbone)
        pieces = _pieces(corpus, work / "corpus", config, backbone, group)
        _check_pieces(pieces, corpus, config, backbone)
        train_pieces, held_out = pieces.split(config.held_out, config.recipe.seed)
        rows = int(pieces.rows[train_pieces].sum())
        steps = rows * config.passes // config.recipe.batch
        if not steps or not len(held_out):
            raise QwenScopeError(
                f"expected at least one batch of {config.recipe.batch} tokens and some to hold out in {corpus}, found {rows} "
                f"and {len(held_out)} pieces; give more text or a smaller batch"
            )
        blocks = Blocks(pieces, train_pieces, config.recipe.seed, config.buffer_tokens)
        plan = Plan(corpus, config, backbone, pieces, train_pieces, held_out, blocks, steps, owners)
        if folder is not None:
            # That the suite cannot go there should not be found out when all is trained.
            widths = dict.fromkeys(config.layers, config.recipe.d_sae)
            joined(folder, SuiteConfig(plan.name, plan.model, config.recipe.k, activation, backbone.d_model, widths))
        return plan


def agree_with_before(work: Path, options: Mapping[str, Any]) -> None:
    """Looks whether a run with these options can go on in a folder, which `write_options` may have been at before.

    Raises:
        QwenScopeError: the folder holds a run with other options, or one that has ended.
    """
    path = work / "run.json"
    if not path.exists():
        return
    before = read_json(path)
    if different := differences(before, dict(options)):
        raise QwenScopeError(
            f"expected the options of the run that was begun in {work}, found that {'; '.join(different)}; give the same "
            "options, or delete that folder to begin anew"
        )
    if before.get("finished"):
        raise QwenScopeError(
            f"expected a run to go on with in {work}, found one that has ended; choose another folder, or delete this one "
            "to train again"
        )


def write_options(work: Path, value: Mapping[str, Any]) -> None:
    """Writes `work/run.json`, atomically."""
    with replacing(work / "run.json") as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _owners(config: RunConfig, group: Group) -> dict[int, int] | None:
    if config.parallel != "layers" or group.size == 1:
        group.share(config.recipe.d_sae if config.parallel == "features" else config.recipe.batch)
        return None
    if len(config.layers) < group.size:
        raise QwenScopeError(
            f"expected at least one layer for each of the {group.size} processes, found {len(config.layers)}; start fewer, or "
            "share each layer out with --parallel data or features"
        )
    return {layer: at % group.size for at, layer in enumerate(sorted(config.layers))}


def _device(config: RunConfig, group: Group) -> torch.device:
    if config.device is None and torch.cuda.is_available():
        return as_device(f"cuda:{group.local_rank}")
    return as_device(config.device or "cpu")


def _check_context(config: RunConfig, backbone: Backbone) -> None:
    longest = backbone.context_length
    if longest is not None and config.context > longest:
        raise QwenScopeError(
            f"expected a context of at most {longest} tokens, which {backbone.name} was made for, found {config.context}; "
            "lower --context"
        )


def _check_memory(config: RunConfig, backbone: Backbone) -> None:
    needed = config.buffer_tokens * backbone.d_model * backbone.model.dtype.itemsize * len(config.layers)
    if hasattr(os, "sysconf") and needed > (there := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) * 0.8:
        raise QwenScopeError(
            f"expected blocks of residuals that fit into {there / 2**30:.0f} GiB of memory, found that they take "
            f"{needed / 2**30:.0f} GiB; lower --buffer-tokens or train fewer layers at once"
        )


def _check_start(config: RunConfig, backbone: Backbone) -> Activation:
    """The activation that the SAEs will have: that of those they begin from, if any."""
    if config.start is None:
        return "topk_relu"
    suite = Suite.from_pretrained(config.start, layers=config.layers)
    sae, recipe = suite[min(config.layers)], config.recipe
    expected, found = (recipe.d_sae, recipe.k, backbone.d_model), (sae.d_sae, sae.k, sae.d_model)
    if expected != found:
        raise QwenScopeError(
            f"expected SAEs of d_sae = {expected[0]}, k = {expected[1]} and d_model = {expected[2]} in {config.start} to begin "
            f"from, found {found[0]}, {found[1]} and {found[2]}; give --d-sae and --k as they are there, and their model"
        )
    return suite.activation


def _pieces(corpus: str, folder: Path, config: RunConfig, backbone: Backbone, group: Group) -> Pieces:
    """The tokenized corpus, made by the first process."""
    if group.rank == 0 and not (folder.parent / "run.json").exists():
        # What a run left that was refused: the corpus may have been mended since.
        for left in (folder, *folder.parent.glob(".tokens-*")):
            shutil.rmtree(left, ignore_errors=True)
    if group.rank == 0 and not (folder / "about.json").exists():
        if backbone.tokenizer is None:
            raise QwenScopeError(f"expected a tokenizer beside {backbone.name}, found none; add its files")
        found = documents(corpus, column=config.column, split=config.split, config=config.subset)
        # Never more than a tenth is held out.
        wanted = None if config.tokens is None else min(config.tokens + config.held_out, -(-10 * config.tokens // 9))
        Pieces.write(folder, found, backbone.tokenizer, context=config.context, tokens=wanted)
    group.wait()
    return Pieces.open(folder)


def _check_pieces(pieces: Pieces, corpus: str, config: RunConfig, backbone: Backbone) -> None:
    vocabulary = backbone.config.vocab_size
    if pieces.largest >= vocabulary:
        raise QwenScopeError(
            f"expected token ids below {vocabulary}, which {backbone.name} knows, found {pieces.largest}; use this model's "
            "tokenizer"
        )
    tokens = int(pieces.starts[-1])
    to_train = tokens - min(config.held_out, tokens // 10)
    if config.tokens is not None and pieces.exhausted and to_train < config.tokens:
        raise QwenScopeError(
            f"expected {config.tokens} tokens to train on in {corpus}, found {to_train} beside those held out; add text, or "
            "leave out --tokens and raise --passes"
        )
