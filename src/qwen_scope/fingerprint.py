"""A hash that tells suites apart by their weights."""

import hashlib
from collections.abc import Sequence

import torch

from qwen_scope.suite import Suite


def fingerprint(suite: Suite, layers: Sequence[int]) -> str:
    """A hash of the shapes, biases and a sample of the encoder weights of some layers: other weights give another."""
    digest = hashlib.sha256()
    for layer in sorted(layers):
        sae = suite[layer]
        rows = max(1, sae.d_sae // 64)
        digest.update(f"{layer} {sae.d_sae} {sae.d_model} {sae.k} {sae.activation}".encode())
        for tensor in (sae.b_enc, sae.b_dec, sae.W_enc[::rows]):
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
