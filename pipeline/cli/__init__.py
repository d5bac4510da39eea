"""The command line; `pipeline.__main__` is the entry point of `selora`."""

from pipeline.cli.main import build_parser, main

__all__ = ["build_parser", "main"]
