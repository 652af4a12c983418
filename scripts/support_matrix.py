"""Write the support matrix of docs/support.md from the tests' own results.

    python scripts/support_matrix.py build/support/*.json        # `make support` runs the tests first, then this
    python scripts/support_matrix.py build/support.json --check  # the page must say what tests say; .ci/run does this

The results are what `pytest --support FILE` wrote (tests/support.py), of one run or of several pieces. A cell says yes
only where a test that passed claims it, and a refusal only where a test checked its words.

Of the LLaVA families every run has all tests, and their tables must be those that its results give. Of the others a
run has a part of the product (`make test-all` has all of it): it is checked that every claim is what its cell says, and
what is written is what the cell says now and what was run anew. Sections of which the results know nothing stay.
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

#: column -> what tests call its models: a family's model_type, or a scene of tests/scenes.py or tests/kin/
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
    "GLM-4.1V": ["glm-4v", "glm-4v-video", "glm4v"],
    "Qwen3.5": ["qwen3.5", "qwen3.5-video", "qwen3_5"],
}
# features that every method is tested for; the others are tested with one method of each kind, or say with which
EXACT = ("exact", "batches", "right padding", "beam search", "unpatching")
KINDS = ("fopru", "fastv", "todre", "tome")  # before the LLM, inside it, both, in the tower
YES, NO, PARTLY, NOT_TESTED, NOT_RUN = "✓", "–", "(✓)", "", "·"
MOST = 3  # names that a cell tells one by one


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


def cell(claims: list[dict], notes: Notes, wanted: Iterable[str], told: str) -> str:
    """What stands in one cell, of which there are claims.

    Args:
        wanted: what of `told` must have been tested: where some was not, the cell says so, and names the methods.
        told: "method" or "feature", what the claims of a cell differ in.
    """
    refused = [claim for claim in claims if claim["outcome"] == "refused"]
    why = "".join(notes.mark(text) for text in sorted({reason(claim) for claim in refused}))
    if len(refused) == len(claims):
        return NO + why
    if refused and told == "method":
        return f"{YES} but {', '.join(sorted({claim['method'] for claim in refused}))}{why}"
    tested = {claim[told] for claim in claims if claim not in refused}
    if set(wanted) <= tested:
        return YES + why
    return PARTLY + why if told == "feature" else named(tested)


def named(methods: Iterable[str]) -> str:
    """A cell of a feature that these methods have, of which others are not known."""
    names = sorted(methods)
    return f"{YES} {', '.join(names) if len(names) <= MOST else f'{len(names)} methods'}"


def names_in(text: str) -> set[str]:
    """The methods that a cell names."""
    return {part for part in text.removeprefix(YES).strip().split(", ") if part and " " not in part}


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


def method_table(section: Section, claims: list[dict], notes: Notes, said: Said) -> str:
    """Every method, under what it looks at."""
    exact = [claim for claim in claims if claim["feature"] in EXACT]
    empty = NOT_TESTED if section.whole else NOT_RUN
    shown = {
        name: {c["family"] for c in exact if c["family"] in families} for name, families in section.columns.items()
    }

    def row(name: str) -> Callable[[str], str]:
        mine = [claim for claim in exact if claim["method"] == name]

        def fill(column: str) -> str:
            here = [claim for claim in mine if section.column(claim["family"]) == column]
            made = cell(here, notes, EXACT, "feature") if here else empty
            if not section.whole and {claim["family"] for claim in here} < shown[column]:  # videos were not run
                made = made.replace(NO, NOT_RUN)
            old = said.cells.get(("method", name, column), empty)
            if not here or (made.startswith(PARTLY) and old.startswith(YES) and said.agrees(here, column)):
                return said.again(old, notes)
            return made

        return fill

    rows: dict[str, Callable[[str], str] | None] = {}
    for heading, names in groups().items():
        rows[f"**{heading}**"] = None
        rows |= {name: row(name) for name in names}
    return table("method", section, rows)


def feature_table(section: Section, claims: list[dict], notes: Notes, said: Said) -> str:
    """Every feature that is not one of `EXACT`."""
    never = never_had(claims)
    others = [c for c in claims if c["feature"] not in EXACT and (c["family"], c["method"]) not in never]

    def row(name: str) -> Callable[[str], str]:
        mine = [claim for claim in others if claim["feature"] == name]

        def fill(column: str) -> str:
            families = section.columns[column]
            kinds = [kind for kind in KINDS if any((family, kind) not in never for family in families)]
            here = [claim for claim in mine if claim["family"] in families]
            made = cell(here, notes, kinds, "method") if here else NOT_TESTED
            old = said.cells.get(("feature", name, column), NOT_TESTED)
            if not here or old == YES or (old.endswith("methods") and names_in(made)):
                return said.again(old, notes)
            some = names_in(made) and names_in(old)
            return named(names_in(made) | names_in(old)) if some and "<sup>" not in made + old else made

        return fill

    before = {row for corner, row, _ in said.cells if corner == "feature"}
    names = sorted({claim["feature"] for claim in others} | before, key=str.lower)
    return table("feature", section, {name: row(name) for name in names})


def matrix(section: Section, claims: list[dict], page: str = "") -> str:
    """Both tables of a section and their footnotes.

    Args:
        page: what it says now, where a run has a part of its tests alone.

    Raises:
        SystemExit: a test that claims something failed.
    """
    demand_passed(claims)
    notes, said = Notes(), Said.of("" if section.whole else section.read(page))
    legend = (
        ""
        if section.whole
        else (
            f" {PARTLY}: a part of these tests was run, and passed; {NOT_RUN}: none was; a note beside either, or a "
            f"{YES}, says what of it is refused."
        )
    )
    parts = [
        f"Every method ({', '.join(EXACT)}; on towers without a [CLS] token by the fallback it names), under what it "
        f"looks at.{legend}",
        method_table(section, claims, notes, said),
        "Every feature, with a method that cuts before the LLM, one inside it, one at both places and one in the tower "
        f"({', '.join(KINDS)}), or with those that are named; what no test claims is left empty:",
        feature_table(section, claims, notes, said),
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

    def again(self, text: str, notes: Notes) -> str:
        """A cell with its notes among others."""
        return re.sub(r"<sup>(\d+)</sup>", lambda found: notes.mark(self.notes[found[1]]), text)

    def agrees(self, claims: Iterable[dict], column: str) -> bool:
        """Whether a column says all that tests claim."""
        return all(self.has(claim, column) for claim in claims)

    def has(self, claim: dict, column: str) -> bool:
        """Whether a cell says what a test claims."""
        exact = claim["feature"] in EXACT
        name = claim["method"] if exact else claim["feature"]
        text = self.cells.get(("method" if exact else "feature", name, column), "")
        if claim["outcome"] == "refused":
            return reason(claim) in [self.notes.get(number) for number in re.findall(r"<sup>(\d+)</sup>", text)]
        told, _, but = re.sub("<sup>.*?</sup>", "", text).partition(" but ")
        if exact or told.startswith(PARTLY):
            return told in (YES, PARTLY)
        names = names_in(told)
        return (
            told.startswith(YES) and (not names or claim["method"] in names) and claim["method"] not in but.split(", ")
        )


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
            text = section.put(text, matrix(section, mine, text))
        elif other := differing(section, text, mine):
            sys.exit(
                f"docs/support.md is not what the tests say of {other}. Run `make support` and look at the difference."
            )
    if not asked.check:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
