"""`qwen-scope harvest`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from qwen_scope.cli.common import quiet_loading
from qwen_scope.index.config import HarvestConfig


@dataclass(frozen=True)
class Harvest:
    """Reads a corpus through a model and its SAEs and writes what every feature does; goes on where it was stopped."""

    corpus: tyro.conf.Positional[str]
    """What to read: a text, JSONL, CSV or Parquet file, a folder of files, or a Hugging Face dataset."""
    folder: tyro.conf.Positional[Path]
    """Where the feature index goes."""
    config: tyro.conf.OmitArgPrefixes[HarvestConfig] = HarvestConfig()

    def run(self) -> None:
        """Harvests and tells where to look."""
        quiet_loading()
        from qwen_scope.index.harvest import harvest

        index = harvest(self.corpus, self.folder, self.config)
        about = index.about
        print(index)
        if about.broken:
            print(f"left out {about.broken} lines or files that cannot be read, the first: {about.broken_first[0]}")
        print(f'try it: qwen-scope search "some words" --index {self.folder}')
