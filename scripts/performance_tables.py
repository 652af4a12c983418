"""Write the tables of docs/performance.md from the results in benchmarks/, and say which targets are met.

    python scripts/performance_tables.py            # `make bench` measures first, then runs this

Results that are not there (yet) are left out and named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmprune.eval.bench.results import read
from vlmprune.eval.bench.targets import PAIRS, Verdict, judge, judge_selection

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin (scripts/performance_tables.py) -->", "<!-- tables: end -->"
FILES = {576: "cpu-576.json", 2880: "cpu-2880.json"}
SELECTION = "cpu-selection.json"
ONLY = {"globalcom2": 2880}  # methods that refuse pictures of a single view


def interval(ratio: dict[str, float], digits: int = 3) -> str:
    """A median with its 95 % interval."""
    return f"{ratio['median']:.{digits}f} [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is flush left."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(found: dict[str, Any]) -> str:
    """What numbers were measured on."""
    about = found["machine"]
    return (
        f"{about['processor']}, {about['threads']} of {about['cores']} cores, torch {about['torch']}, "
        f"transformers {about['transformers']}"
    )


def speed(patches: int, results: dict[str, Any]) -> str:
    """Every cell of one file."""
    rows = []
    for cell in results["cells"]:
        first, step = cell["first_token_ms"], cell["decode_ms"]
        rows.append(
            [
                f"`{cell['method']}` {cell['budget']}",
                f"{cell['tokens']['layer_average']:.0f}",
                f"{first['unpruned']['median']:.0f}",
                f"{first['pruned']['median']:.0f}",
                f"{cell['speedup']['median']:.2f}x",
                f"{cell['oracle_speedup']['median']:.2f}x",
                f"{cell['amdahl']['bound']:.2f}x",
                interval(cell["overhead"]),
                f"{cell['cost_share']['median']:.2%}",
                f"{step['unpruned']['median']:.0f} -> {step['pruned']['median']:.0f}",
                interval(cell["decode_overhead"]),
            ]
        )
    header = ["method, kept", "tokens", "unpruned ms", "pruned ms", "speed-up", "oracle", "Amdahl", "overhead", "drop"]
    return (
        f"**{patches} patches** (shape `{results['settings']['model']}`, {results['settings']['dtype']}; "
        f"{machine(results)}; {runs(results['cells'])})\n\n" + markdown([*header, "token ms", "token overhead"], rows)
    )


def runs(cells: list[dict[str, Any]]) -> str:
    """How many runs stand behind the figures."""

    def counts(name: str) -> str:
        found = sorted({int(cell[name]["pairs"]) for cell in cells})
        return " to ".join(map(str, dict.fromkeys((found[0], found[-1])))) if found else "no"

    return (
        f"overhead: {counts('overhead')} pairs; speed-up and its oracle's: {counts('speedup')} unpruned runs, each "
        f"paired with the pruned run beside it; drop: {counts('cost_share')} runs, each "
        "over the nearest of these unpruned ones"
    )


def lacking(found: dict[int, dict[str, Any]]) -> list[str]:
    """Methods with a budget that another file, or another budget of the same one, has and a file lacks."""
    have = {patches: {(c["method"], c["budget"]) for c in results["cells"]} for patches, results in found.items()}
    budgets: dict[str, set[str]] = {}
    for cell in (cell for results in found.values() for cell in results["cells"]):
        budgets.setdefault(cell["method"], set()).add(cell["budget"])
    usual = set().union(*budgets.values()) - {"-"}
    wanted = [(m, b) for m, mine in budgets.items() for b in sorted(usual if mine & usual else mine)]
    return [
        f"`{method}` {budget} at {patches} patches"
        for patches in found
        for method, budget in wanted
        if (method, budget) not in have[patches] and ONLY.get(method, patches) == patches
    ]


def selection(found: dict[str, Any]) -> str:
    """Greedy selection alone."""
    rows = [
        [
            f"{one['objective']} {one['tokens']} -> {one['keep']}",
            f"{one['published_ms']['median']:.0f}",
            f"{one['ours_ms']['median']:.1f}",
            interval(one["speedup"], 1),
            f"{one['same_picks']:.1%}",
        ]
        for one in found["selection"]
    ]
    header = ["objective", "published ms", "vlmprune ms", "times faster", "same picks"]
    return f"**Greedy selection alone** ({machine(found)})\n\n" + markdown(header, rows)


def judged(verdicts: list[Verdict]) -> str:
    """How many targets are met, and those that are not."""
    missed = [v for v in verdicts if not v.met]
    lines = [f"**Targets**: {len(verdicts) - len(missed)} of {len(verdicts)} are met."]
    if missed:
        rows = [
            [v.who, v.what, f"{'>=' if v.at_least else '<='} {v.limit}", interval(v.ratio), str(int(v.ratio["pairs"]))]
            for v in missed
        ]
        lines += [
            "Missed (or fewer than " + f"{PAIRS} pairs):",
            markdown(["what", "ratio", "target", "is", "pairs"], rows),
        ]
    return "\n\n".join(lines)


def main() -> None:
    """Replace the tables in the page and print the targets."""
    parts, verdicts, missing, read_in = [], [], [], {}
    for patches, name in FILES.items():
        path = ROOT / "benchmarks" / name
        if not path.exists():
            missing.append(name)
            continue
        results = read_in[patches] = read(path)
        parts.append(speed(patches, results))
        verdicts += judge(results)
    path = ROOT / "benchmarks" / SELECTION
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(selection(found))
        verdicts += judge_selection(found["selection"])
    else:
        missing.append(SELECTION)
    if verdicts:
        parts.append(judged(verdicts))
    if missing := [*missing, *lacking(read_in)]:
        parts.append(f"Not measured yet: {', '.join(missing)} (`make bench`).")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}", encoding="utf-8")
    print(parts[-1] if not verdicts else judged(verdicts))


if __name__ == "__main__":
    main()
