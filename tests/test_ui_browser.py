"""The page of ``dittfast ui`` in headless Chromium, at desktop and phone width, light and dark."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import flux_pipeline

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
SECONDS = 240


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of its own, with a tiny model."""
    pytest.importorskip("gradio", reason="the page is made of Gradio: pip install dittfast[ui]")
    folder = tmp_path_factory.mktemp("ui") / "tiny-flux"
    flux_pipeline().save_pretrained(folder)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "dittfast", "ui", "--model", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as server:
        try:
            for line in server.stderr:
                found = re.search(r"dittfast ui is at (http://127\.0\.0\.1:\d+);", line)
                if found:
                    break
            else:
                pytest.fail(f"the server ended with {server.wait()}")
            # A pipe that nobody reads would stop the server once it is full.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            yield found[1]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser, address, tmp_path):
    """``(width, height, scheme) -> page``; at the end, no request may have left this machine."""
    asked, contexts = [], []

    def go(width=1280, height=900, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Draw").wait_for()
        return page

    yield go
    for context in contexts:
        context.close()
    elsewhere = [x for x in asked if not x.startswith((address, "data:", "blob:"))]
    assert asked and not elsewhere


def option(page, name: str):
    """The field of an option: its meaning follows the name in the label."""
    return page.get_by_label(re.compile(rf"^\s*{name}\b"))


def filled(page, **fields):
    given = {"Height, px": "64", "Width, px": "96", "Steps": "3"} | fields
    for label, value in given.items():
        page.get_by_label(label, exact=True).fill(value)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_it_draws_and_shows_the_difference(opened, width, scheme, tmp_path):
    page = opened(width, 844, scheme)
    filled(page)
    page.get_by_role("button", name="Options of the method").click()
    option(page, "window").fill("3")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Done in").wait_for()
    # The buttons are above the options: what was asked for and what came are seen together.
    assert page.get_by_text("Done in").bounding_box()["y"] < 844
    pictures = page.locator(".dittfast img").all()
    assert len(pictures) == 5
    for picture in pictures:
        assert len(picture.get_attribute("alt").split()) > 5
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        box = picture.locator("xpath=ancestor::figure").bounding_box()  # a drawing scrolls in it
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
    words = page.locator(".dittfast").all_inner_texts()
    assert any("PSNR" in text for text in words) and any("of dense attention" in x for x in words)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot = tmp_path / "page.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 10_000
    for name in ("Draw", "Cancel"):
        assert page.get_by_role("button", name=name).bounding_box()["height"] >= 24


def test_an_error_is_a_sentence_and_the_next_try_works(opened):
    page = opened()
    filled(page, **{"Height, px": "sixty"})
    page.get_by_role("button", name="Draw").click()
    alert = page.get_by_role("alert").filter(has_text="That did not work")
    alert.wait_for()
    assert "Height, px takes a whole number, got 'sixty'" in alert.inner_text()
    filled(page, **{"Height, px": "64"})
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Done in").wait_for()


def test_a_job_is_cancelled_and_the_next_one_runs(opened):
    page = opened()
    filled(page, Steps="500")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text(re.compile(r"step \d+ of 500")).first.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled").first.wait_for()
    filled(page)
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("Done in").wait_for()


def test_a_preset_brings_its_own_values(opened):
    page = opened()
    page.get_by_role("button", name="Options of the method").click()
    field = option(page, "Method")
    field.fill("radial/wan2.1")
    field.press("Enter")
    decay = option(page, "decay_factor")
    decay.wait_for()
    assert decay.get_attribute("placeholder") == "0.2"
    assert option(page, "dense_first_steps").get_attribute("placeholder") == "12"
