"""Lets `python -m qwen_scope.cli` stand for `qwen-scope`."""

from qwen_scope.cli import main

main()
