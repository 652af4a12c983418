"""`python -m vlmprune`: the same as the `vlmprune` command."""

import sys

from vlmprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
