"""EleutherAI sparsify's format: a folder per hookpoint, such as `layers.15`, with `cfg.json` and `sae.safetensors`.

sparsify encodes `relu(W_enc @ (x - b_dec) + b)`, so its encoder bias and ours differ by `W_enc @ b_dec`; it decodes as
we do, from rows. Read and checked against eai-sparsify 1.3.3 (`sparse_coder.py`, `config.py`, `fused_encoder.py`).
"""

import re
from pathlib import Path

from qwen_scope.checkpoint.weights import (
    ForeignConfig,
    Weights,
    check_keys,
    checked,
    read_json,
    subtracting_bias,
    write_json,
)
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.sae import Activation

WEIGHTS = "sae.safetensors"
_HOOKPOINT = re.compile(r"(?:[\w]+\.)*?(?:layers|h)\.(\d+)")
_KEYS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def layer_of(hookpoint: str) -> int | None:
    """The layer whose output a hookpoint names: 15 for `layers.15`, None for `layers.15.mlp` or `embed_tokens`."""
    match = _HOOKPOINT.fullmatch(hookpoint)
    return int(match[1]) if match else None


def read_config(path: Path, backbone: str | None) -> ForeignConfig:
    """What a sparsify `cfg.json` says; the backbone is written elsewhere, so it is given.

    Raises:
        QwenScopeError: a kind of SAE that a TopK SAE cannot express, or a config that lacks a field.
    """
    cfg = read_json(path)
    for key, plain in (("activation", "topk"), ("signed", False), ("transcode", False), ("skip_connection", False)):
        if cfg.get(key, plain) != plain:
            raise QwenScopeError(
                f"expected {key} = {plain!r} in {path}, found {cfg[key]!r}, which a TopK SAE cannot express; use "
                "sparsify for this one"
            )
    try:
        k, d_model = int(cfg["k"]), int(cfg["d_in"])
        d_sae = int(cfg.get("num_latents") or d_model * int(cfg["expansion_factor"]))
    except (KeyError, TypeError, ValueError) as error:
        raise QwenScopeError(
            f"expected k, d_in and num_latents or expansion_factor in {path}, found one missing or no number "
            f"({error}); check the file"
        ) from error
    activation: Activation = cfg.get("qwen_scope_activation", "topk_relu")
    return ForeignConfig(path, k, activation, d_model, d_sae, backbone, subtracts_b_dec=True)


def read(path: Path, config: ForeignConfig) -> Weights:
    """The weights in the published convention; the folded bias is float32.

    Raises:
        QwenScopeError: see `checked`.
    """
    tensors = read_safetensors(path)[0]
    check_keys(tensors, _KEYS, path)
    weights = checked(
        {
            "W_enc": tensors["encoder.weight"],
            "W_dec": tensors["W_dec"].T,
            "b_enc": tensors["encoder.bias"],
            "b_dec": tensors["b_dec"],
        },
        path,
    )
    return weights._replace(b_enc=subtracting_bias(weights, -1))


def write(folder: Path, weights: Weights, layer: int, k: int, activation: Activation) -> None:
    """Writes `folder/layers.{layer}`, each file atomically, the config last."""
    target = folder / f"layers.{layer}"
    tensors = {
        "encoder.weight": weights.W_enc,
        "encoder.bias": subtracting_bias(weights, +1),
        "W_dec": weights.W_dec.T,
        "b_dec": weights.b_dec,
    }
    write_safetensors(target / WEIGHTS, tensors, {"format": "pt"})
    config = {
        "activation": "topk",
        "expansion_factor": max(1, weights.d_sae // weights.d_model),
        # Decoder directions need not have unit norm here.
        "normalize_decoder": False,
        "num_latents": weights.d_sae,
        "k": k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": weights.d_model,
        # sparsify ignores this; it lets us read back which convention the SAE has.
        "qwen_scope_activation": activation,
    }
    write_json(target / "cfg.json", config)
