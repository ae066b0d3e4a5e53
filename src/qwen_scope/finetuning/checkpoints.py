"""Which checkpoint of transformers' trainer a run goes on from."""

import json
from pathlib import Path


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Updates done and place of the last whole checkpoint in a folder: one with the trainer's state, which is written last."""
    whole = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((int(json.loads(path.read_text(encoding="utf-8"))["global_step"]), path.parent))
        except (ValueError, KeyError, TypeError):
            continue
    return max(whole, default=None)
