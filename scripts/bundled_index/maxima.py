"""Writes the highest activation of each feature, out of the index that comes with the package, where steering looks for it
without opening the index: `python scripts/bundled_index/maxima.py`, after make.py's index has been put in place.
"""

import json

from qwen_scope.bundled import maxima_file
from qwen_scope.files import write_safetensors
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.suite import Suite


def main() -> None:
    """Writes the file."""
    index, suite = FeatureIndex.open(), Suite.from_pretrained()
    tensors = {f"layer{layer}": index.maxima.layer(layer) for layer in index.layers}
    fingerprints = {layer: fingerprint(suite, [layer]) for layer in index.layers}
    write_safetensors(maxima_file(), tensors, {"fingerprints": json.dumps(fingerprints)})


if __name__ == "__main__":
    main()
