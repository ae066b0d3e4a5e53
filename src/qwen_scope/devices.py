"""Names of devices and dtypes, checked once so that a wrong one is a sentence."""

import torch

from qwen_scope.errors import QwenScopeError, reason

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype that a language model can compute in, from itself or its name.

    Raises:
        QwenScopeError: another one than float32, bfloat16 and float16.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise QwenScopeError(f"expected dtype float32, bfloat16 or float16, found {dtype!r}; pass one of those")
    return found


def as_device(device: str | torch.device) -> torch.device:
    """A torch device from itself or its name.

    Raises:
        QwenScopeError: no device that this machine can compute on.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=found)
    # AssertionError: this torch was built without CUDA; ImportError: a backend that is a package of its own.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise QwenScopeError(
            f"expected a device such as cpu or cuda:0, found {str(device)!r} ({reason(error)}); pass one this machine has"
        ) from error
    return found
