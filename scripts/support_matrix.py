"""Write the support matrix of docs/support.md from the tests' own results.

    python scripts/support_matrix.py build/support.json          # `make support` runs the tests first, then this
    python scripts/support_matrix.py build/support.json --check  # the page must say what tests say; .ci/run does this

The results are what `pytest --support FILE` wrote (tests/support.py). A cell says yes only where a test that passed
claims it, and a refusal only where a test checked its words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from vlmprune import registry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- support: begin (make support) -->", "<!-- support: end -->"

# column -> what tests call its models: a family's model_type, or a scene of tests/scenes.py
COLUMNS = {
    "1.5": ["llava"],
    "1.5, SigLIP": ["llava-siglip-qwen2"],
    "NeXT": ["next", "next-mistral", "llava_next"],
    "ViP": ["vip", "vipllava"],
    "OneVision": ["onevision", "llava_onevision"],
    "OneVision, large images": ["onevision-shrunk"],
    "OneVision, video": ["onevision-video"],
    "NeXT-Video, images": ["next-video", "llava_next_video"],
    "NeXT-Video, video": ["next-video-video"],
    "original": ["llava_llama", "llava_mistral"],
}
# features that every method is tested for; the others are tested with one method of each kind, or say with which
EXACT = ("exact", "batches", "right padding", "beam search", "unpatching")
KINDS = ("fopru", "fastv", "todre", "tome")  # before the LLM, inside it, both, in the tower
YES, NO, NOT_TESTED = "✓", "–", ""


class Notes:
    """Numbered footnotes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"<sup>{self.texts.index(text) + 1}</sup>"


def reason(claim: dict) -> str:
    """Why a claim is refused, as a sentence: what a method refuses follows its name."""
    refuses = registry.find(claim["method"]).refuses_inputs.values()
    return f"{claim['method']} {claim['why']}" if claim["why"] in refuses else claim["why"]


def cell(claims: list[dict], notes: Notes, wanted: set[str]) -> str:
    """What stands in one cell; methods of `wanted` that nobody tested are told by naming those that were.

    Raises:
        SystemExit: a test that claims it failed.
    """
    if failed := [claim for claim in claims if claim["outcome"] == "fails"]:
        one = failed[0]
        sys.exit(f"a test of {one['feature']!r} with {one['method']} on {one['family']} failed; see pytest.")
    refused = [claim for claim in claims if claim["outcome"] == "refused"]
    if not claims:
        return NOT_TESTED
    if not refused:
        tested = sorted({claim["method"] for claim in claims})
        return YES if wanted <= set(tested) else f"{YES} {', '.join(tested)}"
    why = "".join(notes.mark(text) for text in sorted({reason(claim) for claim in refused}))
    if len(refused) == len(claims):
        return NO + why
    return f"{YES} but {', '.join(sorted({claim['method'] for claim in refused}))}{why}"


def table(
    corner: str,
    names: Iterable[str],
    claims: list[dict],
    row: Callable[[dict], str],
    notes: Notes,
    never: Iterable[tuple] = (),
) -> str:
    """A markdown table with a row per name and a column per family.

    Args:
        never: (family, method) that cannot be had at all; in a table of features nothing is said about them.
    """
    lines = [[corner, *COLUMNS], ["---", *[":-:"] * len(COLUMNS)]]
    for name in names:
        mine = [claim for claim in claims if row(claim) == name]
        cells = []
        for families in COLUMNS.values():
            here = [c for c in mine if c["family"] in families and (c["family"], c["method"]) not in never]
            kinds = {kind for kind in KINDS if any((family, kind) not in never for family in families)}
            cells.append(cell(here, notes, kinds if corner == "feature" else set()))
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matrix(claims: list[dict]) -> str:
    """Both tables and their footnotes.

    Raises:
        SystemExit: claims about families that have no column, or of tests that failed.
    """
    known = {family for families in COLUMNS.values() for family in families}
    if strange := sorted({claim["family"] for claim in claims} - known):
        sys.exit(f"no column for {', '.join(strange)}: add it to COLUMNS in scripts/support_matrix.py.")
    exact = [claim for claim in claims if claim["feature"] in EXACT]
    never = {(claim["family"], claim["method"]) for claim in exact if claim["outcome"] == "refused"}
    others = [claim for claim in claims if claim["feature"] not in EXACT]
    methods = [name for name in registry.names() if any(claim["method"] == name for claim in exact)]
    features = sorted({claim["feature"] for claim in others}, key=str.lower)
    notes = Notes()
    parts = [
        f"Every method ({', '.join(EXACT)}; on towers without a [CLS] token by the fallback it names):",
        table("method", methods, exact, lambda claim: claim["method"], notes),
        "Every feature, with a method that cuts before the LLM, one inside it, one at both places and one in the tower "
        f"({', '.join(KINDS)}), or with those that are named; what no test claims is left empty:",
        table("feature", features, others, lambda claim: claim["feature"], notes, never),
    ]
    parts.append("\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)))
    return "\n\n".join(parts).strip()


def main(argv: list[str] | None = None) -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what pytest --support wrote")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page says something else")
    asked = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{matrix(json.loads(asked.results.read_text(encoding='utf-8')))}\n\n{END}{after}"
    if not asked.check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != text:
        sys.exit("docs/support.md is not what the tests say: run `make support` and look at the difference.")


if __name__ == "__main__":
    main()
