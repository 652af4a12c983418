"""`python -m vlmprune` and the `vlmprune` command, which Ctrl-C ends alike while it is still being imported."""

import sys


def main() -> int:
    """Run the command and return its exit code."""
    try:
        from vlmprune.cli import main as command

        return command()
    except BaseException as error:  # imports turn Ctrl-C into errors of other kinds
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
    print("\nvlmprune: interrupted", file=sys.stderr)
    exec("pass")  # as in `vlmprune.cli.main`
    return 130


if __name__ == "__main__":
    sys.exit(main())
