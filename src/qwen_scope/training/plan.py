"""What a run will do, known before its first step: the model, the tokenized corpus, its blocks, the steps, who does what."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from qwen_scope.backbone import Backbone
from qwen_scope.bundled import MODEL_NAME
from qwen_scope.corpus import documents
from qwen_scope.devices import as_device
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import replacing
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
    def of(corpus: str, work: Path, config: RunConfig, group: Group) -> "Plan":
        """Loads the model and tokenizes the corpus into `work/corpus` unless it is there.

        Raises:
            QwenScopeError: a model or corpus that cannot be read, too little text, more processes than layers.
        """
        owners = _owners(config, group)
        backbone = Backbone.from_pretrained(config.model, dtype=config.dtype, device=_device(config, group))
        for layer in config.layers:
            backbone.check_layer(layer)
        _check_context(config, backbone)
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
        return Plan(corpus, config, backbone, pieces, train_pieces, held_out, blocks, steps, owners)


def agree_with_before(work: Path, corpus: str, config: RunConfig, group: Group) -> None:
    """Notes a run's options in `work/run.json`, which a resumed run must share.

    Raises:
        QwenScopeError: the folder holds a run with other options, or one that has ended.
    """
    path = work / "run.json"
    now = {"corpus": corpus, "processes": group.size, **config.to_dict()}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if different := differences(before, now):
            raise QwenScopeError(
                f"expected the options of the run that was begun in {work}, found that {'; '.join(different)}; give the same "
                "options, or delete that folder to begin anew"
            )
        if before.get("finished"):
            raise QwenScopeError(
                f"expected a run to go on with in {work}, found one that has ended; choose another folder, or delete this one "
                "to train again"
            )
    group.wait()
    if group.rank == 0:
        write_options(work, now)


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


def _pieces(corpus: str, folder: Path, config: RunConfig, backbone: Backbone, group: Group) -> Pieces:
    """The tokenized corpus, made by the first process."""
    if group.rank == 0 and not (folder / "about.json").exists():
        if backbone.tokenizer is None:
            raise QwenScopeError(f"expected a tokenizer beside {backbone.name}, found none; add its files")
        found = documents(corpus, column=config.column, split=config.split, config=config.subset)
        wanted = None if config.tokens is None else config.tokens + config.held_out
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
