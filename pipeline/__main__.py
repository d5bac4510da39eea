"""`selora`, and `python -m pipeline`, the form that torchrun and deepspeed start."""

import sys


def main() -> int:
    """Run one command. Ctrl-C ends it in a line also while its modules are loaded, and without a word at its end.

    Returns:
        The exit code of `pipeline.cli.main`.
    """
    try:
        from pipeline.cli import main as command

        return command()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    finally:
        import signal  # as late as the rest: it imports other modules

        # What is left is Python's own end. Where a shell had Ctrl-C ignored, it stays so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
