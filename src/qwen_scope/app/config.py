"""`AppConfig`: where the web app listens, who may use it, and how much."""

import os
from dataclasses import dataclass, fields

from qwen_scope.errors import QwenScopeError
from qwen_scope.server.config import is_local


@dataclass(frozen=True)
class AppConfig:
    """Where the web app listens, who may use it, and how much; whatever asks for more is refused in a sentence."""

    host: str = "127.0.0.1"
    """Address to listen on: that of this machine alone unless told."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    password_variable: str | None = None
    """Name of an environment variable that holds the password visitors must give, with any name. Default: none is asked for."""
    max_tokens: int = 1024
    """Tokens of a text that is read, and of a prompt."""
    max_new_tokens: int = 256
    """Tokens generated for a text."""
    max_texts: int = 200
    """Texts of one set, where sets are compared."""
    max_sweep_texts: int = 400
    """Texts that one sweep of strengths may generate."""
    max_file_bytes: int = 20_000_000
    """Bytes of a file that is uploaded."""
    at_once: int = 4
    """Requests of a kind that run at the same time; they take turns at the model. Others wait in the queue."""
    max_queued: int = 64
    """Requests that may wait."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if (field.name.startswith("max_") or field.name == "at_once") and not value >= 1:
                raise QwenScopeError(f"expected {field.name} of at least 1, found {value}; allow more")
        if not 0 <= self.port <= 65535:
            raise QwenScopeError(f"expected a port from 0 to 65535, found {self.port}; choose another")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)

    def password(self) -> str | None:
        """The password that visitors must give, if any.

        Raises:
            QwenScopeError: the variable that should hold it is not set.
        """
        if self.password_variable is None:
            return None
        if not (password := os.environ.get(self.password_variable, "").strip()):
            raise QwenScopeError(
                f"expected a password in the environment variable {self.password_variable}, found it empty; set it, or leave "
                "--password-variable out"
            )
        return password
