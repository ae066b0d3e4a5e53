"""`ServerConfig`: where the server listens, who may ask, and how much."""

import ipaddress
import os
from dataclasses import dataclass, fields

from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, who may ask, and how much; whatever asks for more is refused in a sentence."""

    host: str = "127.0.0.1"
    """Address to listen on: that of this machine alone unless told."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_variable: str | None = None
    """Name of an environment variable that holds the key clients must send. Default: no key is asked for."""
    model_name: str | None = None
    """What clients call the model. Default: its hub id, the name of its folder, or `bundled`."""
    max_rows: int = 32
    """Texts generated at once; also the most that one request may ask for."""
    max_queued: int = 256
    """Texts that wait for their turn."""
    max_batch_tokens: int = 73_728
    """Tokens of memory for all texts at once: their number times the length that the longest can reach. What would exceed it
    waits, unless it is alone."""
    max_prompt_tokens: int = 8192
    """Tokens of a prompt, and of a text whose features are read."""
    max_new_tokens: int = 2048
    """Tokens generated for a text; for chats also the number where a request names none."""
    max_edits: int = 64
    """Features that one request may steer."""
    max_traced_tokens: int = 512
    """Tokens generated for a text whose steering is to be traced."""
    max_seconds: float = 300.0
    """Seconds from a request to the end of its answer, waiting included."""
    max_body_bytes: int = 2_097_152
    """Bytes of a request's body."""
    max_texts: int = 64
    """Texts whose features one request may read."""
    max_feature_tokens: int = 16_384
    """Tokens of all of those together."""
    shutdown_seconds: float = 10.0
    """Seconds that running requests get to end when the server is asked to stop."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("max_") and not value >= 1:
                raise QwenScopeError(f"expected {field.name} of at least 1, found {value}; allow more")
        if not 0 <= self.port <= 65535:
            raise QwenScopeError(f"expected a port from 0 to 65535, found {self.port}; choose another")
        if not self.shutdown_seconds >= 0:
            raise QwenScopeError(
                f"expected shutdown_seconds of 0 or more, found {self.shutdown_seconds}; choose another"
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)

    def api_key(self) -> str | None:
        """The key that clients must send, if any.

        Raises:
            QwenScopeError: the variable that should hold it is not set.
        """
        if self.api_key_variable is None:
            return None
        if not (key := os.environ.get(self.api_key_variable, "").strip()):
            raise QwenScopeError(
                f"expected a key in the environment variable {self.api_key_variable}, found it empty; set it, or leave "
                "--api-key-variable out"
            )
        return key


def is_local(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
