"""One training run from corpus to report: tokenize, then block by block read residuals and train all layers' SAEs.

A run that is stopped or killed goes on when the same command is given again: what it did since its last checkpoint is done
once more, with the same result.
"""

import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from qwen_scope.files import expanded
from qwen_scope.stopping import Stop, Stopped, stopping
from qwen_scope.suite import Suite, ranges
from qwen_scope.training.blocks import BlockCache, Residuals, read_block
from qwen_scope.training.checkpoints import Checkpoints
from qwen_scope.training.group import Group
from qwen_scope.training.layer_run import LayerRun
from qwen_scope.training.plan import Plan, agree_with_before, write_options
from qwen_scope.training.results import finish
from qwen_scope.training.run_config import RunConfig
from qwen_scope.training.tracking import History, Tracker
from qwen_scope.training.trainer import SAETrainer


def train(corpus: str | Path, folder: str | Path, config: RunConfig) -> Suite:
    """Trains SAEs of some layers of a language model on a corpus and writes a suite with its report into a folder.

    Run again with the same arguments, it goes on where it was stopped or killed. Under `torchrun`, all processes call it.

    Args:
        corpus: what `qwen_scope.corpus.documents` reads: a file, a folder or a Hugging Face dataset.
        folder: where layers, card and report go, beside those of earlier runs of the same suite; progress is kept in
            `folder/training`.

    Returns:
        The suite in the folder.

    Raises:
        QwenScopeError: a corpus that cannot be read or is too short, a run in the folder that began otherwise, a loss that is
            not finite, a disk that is full.
        Stopped: Ctrl-C; progress is saved.
    """
    folder = expanded(folder)
    work = folder / "training" / f"layers-{ranges(sorted(config.layers)).replace(', ', '_')}"
    with Group.joined() as group:
        options = {"corpus": str(corpus), "processes": group.size, **config.to_dict()}
        agree_with_before(work, options)
        plan = Plan.of(str(corpus), work, config, group, folder)
        if group.rank == 0:
            write_options(work, options)
        with stopping() as stop:
            run = Run(plan, work, group, stop)
            run.train()
        return finish(plan, {layer: of.trained for layer, of in run.layers.items()}, folder, work, group)


class Run:
    """The training itself, in one of its processes.

    Args:
        plan: what is done.
        work: where progress is kept.
        group: the processes that work on it.
        stop: whether to save and end.
    """

    def __init__(self, plan: Plan, work: Path, group: Group, stop: Stop):
        self.plan, self.work, self.group, self.stop = plan, work, group, stop
        config, self.batch = plan.config, plan.config.recipe.batch
        self.shared = group.size > 1 and config.parallel != "layers"
        mine = group.share(self.batch) if self.shared and config.parallel == "data" else slice(None)
        self.layers = {
            layer: LayerRun(layer, plan.steps, self.batch, mine)
            for layer in sorted(config.layers)
            if plan.owners is None or plan.owners[layer] == group.rank
        }
        self.checkpoints = Checkpoints(work)
        self.visit = 0
        self.saved_at = time.monotonic()

    def train(self) -> None:
        """All steps of all layers that are still to be done.

        Raises:
            QwenScopeError: see `train`.
            Stopped: somebody asked for it.
        """
        self._restore()
        steps = {layer: run.steps_done for layer, run in self.layers.items()}
        # Processes that share all layers have the same to tell.
        told_here = self.group.rank == 0 or not self.shared
        self.history = History(self.work / f"metrics-{self.group.rank}.jsonl", steps) if told_here else None
        tracked = self.plan.config.track if self.group.rank == 0 else "none"
        self.tracker = Tracker(tracked, self.plan.name, self.plan.config.to_dict())
        self.started, self.steps_at_start = time.monotonic(), min(steps.values())
        quiet = self.group.rank > 0
        with tqdm(
            total=self.plan.steps * self.batch,
            initial=self.steps_at_start * self.batch,
            desc="training",
            unit="token",
            unit_scale=True,
            smoothing=0,
            disable=quiet,
        ) as self.bar:
            self._visit_blocks()
        self.tracker.finish()
        # What comes after, such as the report, may fail.
        self._save()

    def _visit_blocks(self) -> None:
        """Until all layers in all processes have had enough; saves between visits."""
        while self.group.any(not all(run.finished for run in self.layers.values())):
            # Not named here, so that two blocks are never in memory.
            self._train_on(self._block(self.plan.blocks.number(self.visit)))
            if self.group.any(self.stop.asked):
                self._stop()
            for run in self.layers.values():
                run.end_visit()
            self.visit += 1
            if self.group.any(time.monotonic() - self.saved_at > 60 * self.plan.config.save_minutes):
                self._save()

    def _block(self, number: int) -> Residuals:
        """A block's residuals at this process's layers, out of the cache or through the model."""
        plan, layers = self.plan, self.plan.config.layers
        cache = None if plan.config.cache is None else BlockCache(plan.config.cache, plan.residuals_depend_on())
        found = {} if cache is None else cache.load(number, layers)
        # All processes read the same layers, though one may look before another has written.
        missing = set().union(*self.group.gather_objects([layer for layer in layers if layer not in found]))
        if missing:
            read = self._read(number, sorted(missing), None if cache else plan.owners)
            if cache is not None and self.group.rank == 0:
                cache.save(number, read)
            self.group.wait()
            found |= read
        return {layer: found[layer] for layer in self.layers}

    def _read(self, number: int, layers: list[int], owners: Mapping[int, int] | None) -> Residuals:
        plan, numbers = self.plan, self.plan.blocks.of(number)
        bar = tqdm(
            total=int(plan.pieces.rows[numbers].sum()),
            desc=f"reading block {number + 1} of {len(plan.blocks)}",
            unit="token",
            unit_scale=True,
            leave=False,
            disable=self.group.rank > 0,
        )

        def told(tokens: int) -> None:
            bar.update(tokens * self.group.size)
            # Several processes finish reading, since each waits for the others' part.
            if self.stop.asked and self.group.size == 1:
                self._stop()

        with bar:
            return read_block(
                plan.backbone,
                plan.pieces,
                numbers,
                layers,
                forward_tokens=plan.config.forward_tokens,
                group=self.group,
                owners=owners,
                told=told,
            )

    def _train_on(self, residuals: Residuals) -> None:
        """Trains all layers on a block, a batch of each in turn."""
        for layer, run in self.layers.items():
            if run.trainer is None:
                run.trainer = self._new_trainer(layer, run.sample(residuals[layer], self._shuffled))
        visits = [run.visit(residuals[layer], self._shuffled) for layer, run in self.layers.items()]
        for _ in zip_longest(*visits):
            self.bar.update(min(run.steps_done for run in self.layers.values()) * self.batch - self.bar.n)
            self._tell()
            # Those that share a layer must take the same steps; others leave their own at once and meet after the visit.
            if self.group.any(self.stop.asked) if self.shared else self.stop.asked:
                return

    def _shuffled(self, kept: Tensor) -> Tensor:
        return self.plan.blocks.shuffled(kept, self.visit)

    def _new_trainer(self, layer: int, sample: Tensor) -> SAETrainer:
        config, device = self.plan.config, self.plan.backbone.device
        sample = sample.to(device).float()
        if config.start is None:
            return SAETrainer(config.recipe, sample, self.plan.steps, **self._sharing())
        sae = Suite.from_pretrained(config.start, layers=[layer], device=device)[layer]
        return SAETrainer.adapting(config.recipe, sae, sample, self.plan.steps, **self._sharing())

    def _sharing(self) -> dict[str, Any]:
        return {"group": self.group, "parallel": self.plan.config.parallel} if self.shared else {}

    def _tell(self) -> None:
        """Notes the figures of the layers for which it is time."""
        found = {layer: figures for layer, run in self.layers.items() if (figures := run.figures())}
        if not found:
            return
        speed = (min(run.steps_done for run in self.layers.values()) - self.steps_at_start) * self.batch
        speed /= time.monotonic() - self.started
        for layer, figures in found.items():
            steps = self.layers[layer].steps_done
            if self.history is None:
                continue
            self.history.add(
                {"layer": layer, "step": steps, "tokens": steps * self.batch, **figures, "tokens_per_second": speed}
            )
        self.tracker.log(
            {f"layer{layer}/{name}": value for layer, figures in found.items() for name, value in figures.items()}
            | {"tokens": self.bar.n, "tokens_per_second": speed}
        )
        self.bar.set_postfix(
            fvu="/".join(f"{figures['fvu']:.4f}" for figures in found.values()),
            dead="/".join(f"{figures['dead']:.0f}" for figures in found.values()),
        )

    # Progress on disk

    def _stop(self) -> None:
        self._save()
        steps = min(run.steps_done for run in self.layers.values())
        raise Stopped(
            f"stopped after {steps} of {self.plan.steps} steps and saved in {self.work}; run the same command again to go on"
        )

    def _save(self) -> None:
        if any(run.trainer is None for run in self.layers.values()):
            return
        each = self.plan.owners is not None or self._sharded
        mine = self.layers if each or self.group.rank == 0 else {}
        tensors = {self._file(layer): run.state() for layer, run in mine.items()}
        done = self.group.gather_objects({layer: run.done_in_visit for layer, run in self.layers.items()})
        state = {"visit": self.visit, "done_in_visit": {str(layer): n for part in done for layer, n in part.items()}}
        self.checkpoints.save(state, tensors, self.group)
        self.saved_at = time.monotonic()

    @property
    def _sharded(self) -> bool:
        return self.shared and self.plan.config.parallel == "features"

    def _file(self, layer: int) -> str:
        return f"layer{layer}-{self.group.rank}" if self._sharded else f"layer{layer}"

    def _restore(self) -> None:
        state = self.checkpoints.load_state()
        if state is None:
            return
        self.visit = state["visit"]
        device, recipe = self.plan.backbone.device, self.plan.config.recipe
        for layer, run in self.layers.items():
            tensors = self.checkpoints.load_tensors(self._file(layer))
            run.take_up(tensors, state["done_in_visit"][str(layer)])
            on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
            run.trainer = SAETrainer.restored(recipe, on_device, self.plan.steps, **self._sharing())
