"""Writes the testbed's shipped test split (questions.zip) and its demonstration pictures.

python scripts/make_testbed_split.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vlmprune.eval import testbed
from vlmprune.eval.testbed import split


def main() -> None:
    """Writes the archive and prints how many questions each split has of each category."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(testbed.__file__).parent)
    args = parser.parse_args()
    counts = split.write(args.out / "questions.zip", testbed.VERSION)
    for name in split.SIZES:
        mine = {category: n for (s, category), n in counts.items() if s == name}
        print(name, sum(mine.values()), json.dumps(mine))


if __name__ == "__main__":
    main()
