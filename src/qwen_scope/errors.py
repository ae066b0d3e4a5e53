"""The one exception that bad input raises."""


class QwenScopeError(ValueError):
    """Input that cannot be used.

    The message is one sentence for a person: what was expected, what was found, what to do.
    The command line prints it without a traceback and exits with status 1.
    """


def reason(error: BaseException) -> str:
    """The first sentence of another library's error, to quote inside one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__
