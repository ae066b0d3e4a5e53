"""What a run leaves behind: the suite in its folder, and the report on text it has not seen."""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from qwen_scope import hub
from qwen_scope.bundled import GGUF_SHA256
from qwen_scope.checkpoint.weights import read_json
from qwen_scope.evaluation.check import check
from qwen_scope.suite import Suite
from qwen_scope.training.checkpoints import Checkpoints
from qwen_scope.training.group import Group
from qwen_scope.training.plan import Plan, write_options
from qwen_scope.training.report import write_report
from qwen_scope.training.tracking import rows_of
from qwen_scope.training.trainer import SAETrainer


def finish(plan: Plan, trainers: Mapping[int, SAETrainer], folder: Path, work: Path, group: Group) -> Suite:
    """Writes the SAEs of a finished run beside those of earlier ones, then the report on all of them.

    All processes of the group call this together; each gets the suite.

    Raises:
        QwenScopeError: a folder that holds another suite or cannot be written; the run's checkpoint is kept then.
    """
    saes = {layer: trainer.sae() for layer, trainer in trainers.items()}
    # One after the other, since they share a config.json; where they share all layers, the first writes them.
    for rank in range(group.size if plan.owners is not None else 1):
        if rank == group.rank:
            Suite.of(saes, plan.name, plan.model, _provenance(plan, list(saes))).save_pretrained(folder)
        group.wait()
    suite = Suite.from_pretrained(folder, device=plan.backbone.device)
    if group.rank == 0:
        _report(suite, plan, folder, work)
        if plan.config.push_to_hub is not None:
            hub.upload(folder, plan.config.push_to_hub, None, "Upload SAEs with qwen-scope", ["training/*", ".*"])
        write_options(work, read_json(work / "run.json") | {"finished": True})
        Checkpoints(work).clear()
    group.wait()
    return suite


def _provenance(plan: Plan, layers: list[int]) -> dict[str, Any]:
    config = plan.config
    facts = {
        "corpus": Path(plan.corpus).name,
        "tokens": int(plan.pieces.rows[plan.train_pieces].sum()),
        "steps": plan.steps,
        **{name: getattr(config, name) for name in ("passes", "context", "dtype", "start")},
        **asdict(config.recipe),
    }
    own = {"model_file_sha256": GGUF_SHA256} if config.model in (None, "bundled") else {}
    return {**own, **{f"layer{layer}": facts for layer in layers}}


def _report(suite: Suite, plan: Plan, folder: Path, work: Path) -> None:
    found = check(plan.backbone, suite, plan.pieces.texts([int(n) for n in plan.held_out]), suite.layers)
    # The bundled model lies in a folder that means nothing to others.
    found = replace(found, model=plan.model)
    history = [row for path in sorted(work.parent.glob("*/metrics-*.jsonl")) for row in rows_of(path)]
    config = plan.config
    about = {
        "model": plan.model,
        "suite": suite.name,
        "dtype of the model": config.dtype,
        **suite.provenance,
        "held out": f"{len(plan.held_out)} pieces of at most {config.context} tokens",
        "seed": config.recipe.seed,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_report(folder, found, history, json.loads(json.dumps(about)))
