"""What TRL and PEFT still call by names that transformers warns of; nothing that a user could change."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_names_allowed() -> Iterator[None]:
    """While the block runs, transformers does not warn of the old name of activation checkpointing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield
