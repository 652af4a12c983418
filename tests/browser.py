"""A page in headless Chromium, as people will see it: wide and narrow, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips without one, unless VLMPRUNE_BROWSER says that there must be one."""
    if CHROMIUM is None and os.environ.get("VLMPRUNE_BROWSER") != "required":
        pytest.skip("no Chromium on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light", quiet: bool = True) -> Iterator[Any]:
    """A page that must not scroll sideways and, if `quiet`, neither warn nor fail."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    yield page
    assert said == [] or not quiet
    inside = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert inside[0] <= inside[1], f"the page scrolls sideways at {width} px"
    context.close()


def address(path: Path) -> str:
    """A file as an address."""
    return path.resolve().as_uri()
