"""Write the support matrix of docs/support.md from the tests' own results.

    python scripts/support_matrix.py build/support/*.json        # `make support` runs the tests first, then this
    python scripts/support_matrix.py build/support.json --check  # the page must say what tests say; .ci/run does this

The results are what `pytest --support FILE` wrote (tests/support.py), of one run or of several pieces. A cell says yes
only where a test that passed claims it, and a refusal only where a test checked its words.

Of the LLaVA families every run has all tests, and their tables must be those that its results give. Of the others a
run has a part of the product (`make test-all` has all of it): every claim must be what its cell says, and the other
cells stay. A section of which the results know nothing stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vlmprune import registry
from vlmprune.methods.base import LOOKS_AT

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "support.md"

#: column -> what tests call its models: a family's model_type, or a scene of tests/scenes.py or tests/kin.py
LLAVA = {
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
OTHERS = {
    "Qwen2-VL": ["qwen2-vl", "qwen2-vl-video", "qwen2_vl"],
    "Qwen2.5-VL": ["qwen2.5-vl", "qwen2.5-vl-video", "qwen2_5_vl"],
    "Qwen3-VL": ["qwen3-vl", "qwen3-vl-video", "qwen3_vl"],
    "Qwen3-VL MoE": ["qwen3-vl-moe", "qwen3_vl_moe"],
    "InternVL": ["internvl", "internvl-qwen3"],
    "Mistral 3": ["mistral3"],
    "Pixtral": ["llava-pixtral"],
    "DeepSeek-VL": ["deepseek_vl"],
    "Aya Vision": ["aya_vision"],
    "Command A Vision": ["cohere2_vision"],
    "SmolVLM": ["smolvlm"],
    "Idefics3": ["idefics3"],
    "Ovis2": ["ovis2"],
    "Gemma 3": ["gemma3"],
    "PaliGemma": ["paligemma"],
    "Video-LLaVA": ["video_llava", "video_llava-video"],
}
# features that every method is tested for; the others are tested with one method of each kind, or say with which
EXACT = ("exact", "batches", "right padding", "beam search", "unpatching")
KINDS = ("fopru", "fastv", "todre", "tome")  # before the LLM, inside it, both, in the tower
YES, NO, NOT_TESTED, NOT_RUN = "✓", "–", "", "·"


@dataclass(frozen=True)
class Section:
    """Tables of some families, between two marks of the page.

    Attributes:
        columns: as `LLAVA`.
        whole: whether every run has all of its tests.
    """

    name: str
    columns: dict[str, list[str]]
    whole: bool

    @property
    def marks(self) -> tuple[str, str]:
        """Where it begins and ends."""
        return f"<!-- support: {self.name} begin (make support) -->", f"<!-- support: {self.name} end -->"

    def column(self, family: str) -> str | None:
        """The column of a family, None if it is of another section."""
        return next((name for name, families in self.columns.items() if family in families), None)

    def mine(self, claims: Iterable[dict]) -> list[dict]:
        """The claims about its families."""
        return [claim for claim in claims if self.column(claim["family"])]

    def read(self, text: str) -> str:
        """What the page says between the marks."""
        begin, end = self.marks
        return text.partition(begin)[2].partition(end)[0].strip()

    def put(self, text: str, new: str) -> str:
        """The page with something else there."""
        begin, end = self.marks
        before, _, rest = text.partition(begin)
        return f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"


SECTIONS = (Section("LLaVA", LLAVA, whole=True), Section("others", OTHERS, whole=False))


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


def never_had(claims: Iterable[dict]) -> set[tuple[str, str]]:
    """(family, method) that cannot be had at all; in a table of features nothing is said about them."""
    return {(c["family"], c["method"]) for c in claims if c["feature"] in EXACT and c["outcome"] == "refused"}


def demand_passed(claims: Iterable[dict]) -> None:
    """Raise SystemExit where a test that claims something failed."""
    if failed := [claim for claim in claims if claim["outcome"] == "fails"]:
        one = failed[0]
        sys.exit(f"a test of {one['feature']!r} with {one['method']} on {one['family']} failed; see pytest.")


def cell(claims: list[dict], notes: Notes, wanted: Iterable[str], told: str, empty: str) -> str:
    """What stands in one cell.

    Args:
        wanted: what of `told` must have been tested: where some was not, the cell names what was.
        told: "method" or "feature", the key of the claims that a cell names.
        empty: where nothing was claimed.
    """
    if not claims:
        return empty
    refused = [claim for claim in claims if claim["outcome"] == "refused"]
    why = "".join(notes.mark(text) for text in sorted({reason(claim) for claim in refused}))
    if len(refused) == len(claims):
        return NO + why
    if refused and told == "method":
        return f"{YES} but {', '.join(sorted({claim['method'] for claim in refused}))}{why}"
    tested = {claim[told] for claim in claims if claim not in refused}
    few = "" if set(wanted) <= tested else " " + ", ".join(sorted(tested))
    return YES + few + why


def groups() -> dict[str, list[str]]:
    """The methods under what they look at, as `vlmprune ls methods` lists them."""
    found: dict[str, list[str]] = {heading: [] for heading in LOOKS_AT}
    for name in registry.names():
        found[looks if (looks := registry.find(name).looks_at) in found else ""].append(name)
    return {LOOKS_AT[heading]: names for heading, names in found.items() if names}


def table(corner: str, section: Section, rows: dict[str, Callable[[str], str] | None]) -> str:
    """A markdown table with a column per family; a row without cells is a heading."""
    columns = list(section.columns)
    lines = [[corner, *columns], ["---", *[":-:"] * len(columns)]]
    lines += [[name, *(fill(column) if fill else "" for column in columns)] for name, fill in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def method_table(section: Section, claims: list[dict], notes: Notes) -> str:
    """Every method, under what it looks at."""
    exact = [claim for claim in claims if claim["feature"] in EXACT]
    empty = NOT_TESTED if section.whole else NOT_RUN

    def row(name: str) -> Callable[[str], str]:
        mine = [claim for claim in exact if claim["method"] == name]
        return lambda column: cell(
            [c for c in mine if section.column(c["family"]) == column], notes, EXACT, "feature", empty
        )

    rows: dict[str, Callable[[str], str] | None] = {}
    for heading, names in groups().items():
        rows[f"**{heading}**"] = None
        rows |= {name: row(name) for name in names}
    return table("method", section, rows)


def feature_table(section: Section, claims: list[dict], notes: Notes) -> str:
    """Every feature that is not one of `EXACT`."""
    never = never_had(claims)
    others = [c for c in claims if c["feature"] not in EXACT and (c["family"], c["method"]) not in never]

    def row(name: str) -> Callable[[str], str]:
        mine = [claim for claim in others if claim["feature"] == name]

        def fill(column: str) -> str:
            families = section.columns[column]
            kinds = [kind for kind in KINDS if any((family, kind) not in never for family in families)]
            here = [claim for claim in mine if claim["family"] in families]
            return cell(here, notes, kinds, "method", NOT_TESTED)

        return fill

    names = sorted({claim["feature"] for claim in others}, key=str.lower)
    return table("feature", section, {name: row(name) for name in names})


def matrix(section: Section, claims: list[dict]) -> str:
    """Both tables of a section and their footnotes.

    Raises:
        SystemExit: a test that claims something failed.
    """
    demand_passed(claims)
    notes = Notes()
    legend = "" if section.whole else f" {NOT_RUN} was not run; a note beside a {YES} says what of it is refused."
    parts = [
        f"Every method ({', '.join(EXACT)}; on towers without a [CLS] token by the fallback it names), under what it "
        f"looks at.{legend}",
        method_table(section, claims, notes),
        "Every feature, with a method that cuts before the LLM, one inside it, one at both places and one in the tower "
        f"({', '.join(KINDS)}), or with those that are named; what no test claims is left empty:",
        feature_table(section, claims, notes),
        "\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)),
    ]
    return "\n\n".join(parts).strip()


@dataclass(frozen=True)
class Said:
    """What the tables of a section on the page say.

    Attributes:
        cells: by (corner of the table, row, column).
        notes: by number.
    """

    cells: dict[tuple[str, str, str], str]
    notes: dict[str, str]

    @classmethod
    def of(cls, text: str) -> Said:
        cells, head = {}, []
        for line in text.splitlines():
            parts = [part.strip() for part in line.strip("|").split("|")] if line.startswith("|") else []
            if not parts or parts[0] in ("method", "feature"):
                head = parts
            elif parts[0] != "---":
                cells |= {(head[0], parts[0], column): part for column, part in zip(head[1:], parts[1:], strict=True)}
        return cls(cells, dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)))

    def has(self, claim: dict, column: str) -> bool:
        """Whether a cell says what a test claims."""
        exact = claim["feature"] in EXACT
        name = claim["method"] if exact else claim["feature"]
        text = self.cells.get(("method" if exact else "feature", name, column), "")
        if claim["outcome"] == "refused":
            return reason(claim) in [self.notes.get(number) for number in re.findall(r"<sup>(\d+)</sup>", text)]
        told, _, but = re.sub("<sup>.*?</sup>", "", text).partition(" but ")
        named = {part for part in told.removeprefix(YES).strip().split(", ") if part}
        mine = claim["feature"] if exact else claim["method"]
        return told.startswith(YES) and (not named or mine in named) and mine not in but.split(", ")


def differing(section: Section, text: str, claims: list[dict]) -> str | None:
    """What the page says that the results do not, in words; None if nothing."""
    if section.whole:
        return None if section.read(text) == matrix(section, claims) else f"the tables of the {section.name} families"
    demand_passed(claims)
    said, never = Said.of(section.read(text)), never_had(claims)
    for claim in claims:
        here = claim["feature"] in EXACT or (claim["family"], claim["method"]) not in never
        if here and not said.has(claim, column := section.column(claim["family"])):
            return f"{claim['feature']!r} with {claim['method']} on {column} ({claim['family']}): {claim['outcome']}"
    strange = {row for corner, row, _ in said.cells if corner == "method" and not row.startswith("**")}
    return f"methods that there are not: {', '.join(gone)}" if (gone := sorted(strange - {*registry.names()})) else None


def main(argv: list[str] | None = None) -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what pytest --support wrote")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the page says something else")
    asked = parser.parse_args(argv)
    claims = [claim for file in asked.results for claim in json.loads(file.read_text(encoding="utf-8"))]
    if strange := sorted({c["family"] for c in claims if not any(part.column(c["family"]) for part in SECTIONS)}):
        sys.exit(f"no column for {', '.join(strange)}: add it to a table in scripts/support_matrix.py.")
    text = PAGE.read_text(encoding="utf-8")
    for section in SECTIONS:
        if not (mine := section.mine(claims)):
            continue
        if not asked.check:
            text = section.put(text, matrix(section, mine))
        elif other := differing(section, text, mine):
            sys.exit(
                f"docs/support.md is not what the tests say of {other}. Run `make support` and look at the difference."
            )
    if not asked.check:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
