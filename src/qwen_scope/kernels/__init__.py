"""Encode and decode on plain tensors. This file is the one place that decides which path runs.

There is one path so far, `reference`: torch only, any device, the card's arithmetic in float32.
A faster path belongs here only if it returns the same features.
"""

from qwen_scope.kernels.reference import decode, encode

__all__ = ["decode", "encode"]
