"""`qwen-scope vectors`: a steering as control vectors for other engines."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from qwen_scope.cli.common import Source


@dataclass(frozen=True)
class Vectors:
    """Writes a steering as control vectors for other engines, such as llama.cpp.

    Only what adds at all tokens can be one. Other engines add it at position 0 too, which our own steering leaves alone.
    """

    steering: tyro.conf.Positional[str]
    """What to add, such as "15/1037:2x 23/12:-1x"."""
    file: tyro.conf.Positional[Path]
    """File to write: .gguf for llama.cpp, or .safetensors."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()

    def run(self) -> None:
        """Makes and writes them."""
        scope = self.source.open()
        from qwen_scope.steering.vectors import save_vectors

        changes = scope.changes(self.steering)
        save_vectors(self.file, changes, scope.backbone, scope.suite)
        layers = sorted({change.edit.layer for change in changes})
        print(f"wrote control vectors of layers {', '.join(map(str, layers))} to {self.file}")
        if self.file.suffix == ".gguf":
            print(f"use them: llama-cli -m MODEL.gguf --control-vector {self.file}")
