"""The command `qwen-scope`: parses, calls one thing of the library, prints. Bad input ends in one sentence, status 1."""

import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper

from qwen_scope.errors import QwenScopeError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; `arguments` default to those of the process."""
    import tyro

    from qwen_scope.cli import commands

    command = tyro.cli(
        commands.Command,
        prog="qwen-scope",
        description="Look inside a language model through sparse autoencoders: text in, features out.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    finish(command.run)


def finish(run: Callable[[], None]) -> None:
    """Runs a command; what is wrong is told in a sentence, and ends the process with a status."""
    # A terminal without a character should show its number, not end the command.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run()
        sys.stdout.flush()
    except QwenScopeError as error:
        sys.stderr.write(f"qwen-scope: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"qwen-scope: {str(interrupt) or 'interrupted'}\n")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; Python would complain again while closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # What nobody foresaw of files and disks is still no reason for a traceback.
        sys.stderr.write(
            f"qwen-scope: expected to read and write files, found that it failed ({error}); check the path\n"
        )
        sys.exit(1)
