"""`vlmprune app`: what the page is told, and the page itself in headless Chromium (make test-app)."""

from __future__ import annotations

import numpy as np
import pytest
from browser import chromium, opened

from vlmprune.cli import main
from vlmprune.eval import testbed
from vlmprune.runtime import loading
from vlmprune.runtime.app import HEADER, Asker, page
from vlmprune.runtime.errors import CommandError

SHOWN = [one for one in testbed.pictures() if one["model"] == "scene-llava"]


@pytest.fixture(scope="module")
def asker():
    return Asker(loading.load(loading.find_model("scene-llava")))


def test_answers_beside_each_other(asker):
    methods = ["fopru", "fastv", "transprune"]
    table, pictures, note = asker.ask(str(SHOWN[0]["file"]), SHOWN[0]["question"], methods, 0.25)
    assert [len(row) for row in table] == [len(HEADER)] * 4
    assert [row[0] for row in table] == ["unpruned", *methods]
    assert (table[0][1], table[0][2], table[1][2]) == (SHOWN[0]["answer"], "256", "256 -> 64")
    captions = [caption for _, caption in pictures]
    assert captions[0] == "fopru, before the language model: 64 of 256 patches"
    assert sum(caption.startswith("transprune, at layer") for caption in captions) == 3  # a picture for every cut
    assert "bound by overhead" in note
    assert asker.loaded.model.generate is not None
    assert not asker.loaded.model._forward_pre_hooks  # the patch is off again


def test_another_budget_keeps_other_patches(asker):
    few, many = (
        asker.ask(str(SHOWN[0]["file"]), SHOWN[0]["question"], ["fopru"], keep)[1][0][0] for keep in (0.1, 1.0)
    )
    assert np.asarray(few).mean() < np.asarray(many).mean() - 20  # what was dropped is dark


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, "what ?", ["fopru"], 0.5), "Drop a picture first"),
        (("x", " ", ["fopru"], 0.5), "Ask something"),
        (("x", "what ?", [], 0.5), "Choose a method"),
        ((__file__, "what ?", ["fopru"], 0.5), r"test_app\.py"),
    ],
)
def test_mistakes_are_told(asker, given, said):
    with pytest.raises(CommandError, match=said):
        asker.ask(*given)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["app"]) == 2
    assert "pip install 'vlmprune[app]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def served(asker):
    pytest.importorskip("gradio")
    made = page(asker, [(str(one["file"]), one["question"]) for one in SHOWN])
    folder = str(SHOWN[0]["file"]).rpartition("/")[0]
    _, address, _ = made.launch(prevent_thread_lock=True, quiet=True, allowed_paths=[folder], server_port=None)
    yield address
    made.close()


def reads(shown, text):
    """Wait until a text can be read on the page."""
    shown.wait_for_function("text => document.body.innerText.includes(text)", arg=text, timeout=60_000)


def test_a_click_answers_and_draws(served, tmp_path):
    with chromium() as browser, opened(browser, served, quiet=False) as shown:
        ask = shown.get_by_role("button", name="Ask")
        ask.click()
        reads(shown, "64 of 256 patches")
        reads(shown, "256 -> 64")
        before = shown.locator(".thumbnail-item img, .gallery-item img").first.get_attribute("src")
        keep = shown.locator("input[type=number]").first
        keep.fill("0.1")
        keep.press("Enter")
        ask.click()
        reads(shown, "25 of 256 patches")
        assert shown.locator(".thumbnail-item img, .gallery-item img").first.get_attribute("src") != before
        broken = tmp_path / "broken.png"
        broken.write_bytes(b"no picture")
        shown.locator("input[type=file]").first.set_input_files(broken)
        ask.click()
        shown.locator(".toast-body, .error").first.wait_for(timeout=60_000)
