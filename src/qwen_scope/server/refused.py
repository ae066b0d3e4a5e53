"""`Refused`: why a request gets no answer, as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from qwen_scope.errors import QwenScopeError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """Why a request gets no answer.

    Args:
        status: of HTTP.
        message: one sentence: what was expected, what was found, what to do.
        param: the field of the request that is to blame, if one is.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @staticmethod
    def of(error: QwenScopeError, param: str | None = None, status: int = 400) -> Refused:
        """What the library says of bad input."""
        return Refused(status, str(error), param)

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer: when it makes sense to ask again."""
        if self.status == 429:
            return {"Retry-After": "1"}
        # OpenAI's clients ask again after 408 by themselves, which would take as long again.
        return {"x-should-retry": "false"} if self.status == 408 else {}

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
