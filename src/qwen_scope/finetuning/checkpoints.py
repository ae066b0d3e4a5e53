"""Which checkpoint of transformers' trainer a run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Updates done and place of the last whole checkpoint in a folder: one with the trainer's state, which is written last."""
    whole = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((int(json.loads(path.read_text(encoding="utf-8"))["global_step"]), path.parent))
        except (ValueError, KeyError, TypeError):
            continue
    return max(whole, default=None)


def train_on(trainer: Trainer, last: tuple[int, Path] | None) -> None:
    """Makes the updates that are still to be made after a checkpoint; after the last update, its weights are loaded and no more.

    Args:
        trainer: of transformers' kind.
        last: what `last_checkpoint` found.
    """
    if last is None:
        trainer.train()
        return
    from transformers import TrainerState

    done, place = last
    state = TrainerState.load_from_json(str(place / "trainer_state.json"))
    if done < (trainer.args.max_steps if trainer.args.max_steps > 0 else state.max_steps):
        trainer.train(resume_from_checkpoint=str(place))
        return
    # Asked to go on from its end, transformers makes one update more, unless that is the end of an epoch.
    trainer._load_from_checkpoint(str(place))
    trainer.state = state
