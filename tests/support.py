"""What the tests say works: tests that use the `support` fixture put their results into the support matrix.

    pytest --support FILE [--support-only]

writes a JSON list of claims, sorted, one for each (feature, family, method) that any test claimed, with what came of
all the tests that claim it; `scripts/support_matrix.py` draws docs/support.md from it. A test claims in its body:

    support("beam search", model, "fopru")                        # works, if this test passes
    support("attentions", model, "fopru", refused="layers see different sequences")      # refused in these words

A failing test makes its claims "fails", whatever other tests say. Of a test that is skipped only refusals count: it
has checked no more than these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROPERTY = "support"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("support")
    group.addoption("--support", type=Path, metavar="FILE", help="write what the tests say works as JSON")
    group.addoption("--support-only", action="store_true", help="run the tests that --support is made of, no others")


def pytest_configure(config: pytest.Config) -> None:
    # with -n, processes that run tests hand their reports to the one that writes
    if config.getoption("--support") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(config.getoption("--support")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--support-only"):
        chosen = [item for item in items if "support" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


@pytest.fixture
def support(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`support(feature, family, method, refused=None)`; `family` is a name, or a scene or a model that has one."""
    made: list[tuple] = []

    def claim(feature: str, family: object, method: str, refused: str | None = None) -> None:
        label = getattr(family, "label", None) or getattr(getattr(family, "config", None), "model_type", family)
        made.append((feature, label, method, refused))

    yield claim
    request.node.user_properties += [(PROPERTY, claim) for claim in made]


class Collector:
    """Gathers the claims of all tests, and writes them when the last has run."""

    def __init__(self, file: Path) -> None:
        self.file, self.claims, self.failed, self.skipped = file, {}, set(), set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)
        if report.skipped:
            self.skipped.add(report.nodeid)
        if report.when == "teardown":
            for name, claim in report.user_properties:
                if name == PROPERTY and (claim[3] or report.nodeid not in self.skipped):
                    self.claims.setdefault(tuple(claim[:3]), []).append((report.nodeid, claim[3]))

    def pytest_sessionfinish(self) -> None:
        rows = []
        for (feature, family, method), made in sorted(self.claims.items()):
            refusals = sorted({refused for _, refused in made if refused})
            tests = sorted({test for test, _ in made})
            outcome = "fails" if self.failed.intersection(tests) else "refused" if refusals else "works"
            rows.append(
                {"feature": feature, "family": family, "method": method, "outcome": outcome, "tests": len(tests)}
                | ({"why": "; ".join(refusals)} if refusals else {})
            )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
