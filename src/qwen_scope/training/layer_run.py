"""`LayerRun`: one layer's part of a run: its trainer, the rows left over from the last block, and where it stands."""

from collections.abc import Callable, Iterator
from itertools import islice

from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError
from qwen_scope.training.blocks import drawn, kept_rows, left_over
from qwen_scope.training.trainer import SAMPLE, SAETrainer

MOMENTS = 200
"""Figures are taken about this often in a run."""

EVERY = slice(None)

Shuffled = Callable[[Int[Tensor, " kept"]], Int[Tensor, " kept"]]
"""Puts row numbers into the order of a visit."""


class LayerRun:
    """One layer of a run.

    Args:
        layer: its number.
        steps: optimiser steps of the whole run.
        batch: residuals in one step.
        mine: which rows of each batch this process trains on.
    """

    def __init__(self, layer: int, steps: int, batch: int, mine: slice = EVERY):
        self.layer, self.steps, self.batch = layer, steps, batch
        self.trainer: SAETrainer | None = None
        self.done_in_visit = 0
        self._mine = mine
        self._carried: Tensor | None = None
        self._carried_next: Tensor | None = None
        self._fvus: list[float] = []

    @property
    def trained(self) -> SAETrainer:
        """The trainer, which is there once the first block has been visited."""
        assert self.trainer is not None
        return self.trainer

    @property
    def steps_done(self) -> int:
        """Optimiser steps taken."""
        return 0 if self.trainer is None else self.trainer.steps_done

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.steps_done >= self.steps

    def sample(self, x: Float[Tensor, "tokens d_model"], shuffled: Shuffled) -> Float[Tensor, "some d_model"]:
        """Residuals of the first block to begin from."""
        return x[shuffled(kept_rows(x))[:SAMPLE]]

    def visit(self, x: Float[Tensor, "tokens d_model"], shuffled: Shuffled) -> Iterator[int]:
        """Trains on a block's residuals, giving the steps done after each; goes on where the visit was left.

        Raises:
            QwenScopeError: see `SAETrainer.step`.
        """
        if self.finished:
            return
        order = shuffled(kept_rows(x))
        carried = x[:0] if self._carried is None else self._carried
        self._carried_next = left_over(x, order, carried, self.batch)
        for rows in islice(drawn(x, order, carried, self.batch), self.done_in_visit, None):
            self._fvus.append(self._step(rows[self._mine].to(self.trained.last_fired.device)))
            self.done_in_visit += 1
            yield self.steps_done
            if self.finished:
                return

    def _step(self, rows: Tensor) -> float:
        try:
            return self.trained.step(rows)
        except QwenScopeError as error:
            raise QwenScopeError(
                f"at layer {self.layer}, step {self.steps_done + 1} of {self.steps}: {error} (the last checkpoint is kept)"
            ) from error

    def end_visit(self) -> None:
        """Takes the rows left over to the next block; to be called when all layers have ended the visit."""
        self._carried, self._carried_next, self.done_in_visit = self._carried_next, None, 0

    def figures(self) -> dict[str, float] | None:
        """FVU (mean since the last figures), dead features and learning rate; None if it is not time for them."""
        due = self.steps_done % max(1, self.steps // MOMENTS) == 0 or self.finished
        if not self._fvus or not due:
            return None
        fvu, self._fvus = sum(self._fvus) / len(self._fvus), []
        rate = self.trained.learning_rate(self.steps_done - 1)
        return {"fvu": fvu, "dead": self.trained.dead_count, "learning_rate": rate}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return self.trained.state() | ({} if self._carried is None else {"carried": self._carried})

    def take_up(self, tensors: dict[str, Tensor], done_in_visit: int) -> None:
        """Goes on from what is this class's own in a `state`, which is taken out of it."""
        self._carried, self.done_in_visit = tensors.pop("carried", None), done_in_visit
