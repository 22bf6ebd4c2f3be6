"""The pages in a real browser: they load, follow hand and keyboard, say nothing wrong and ask no network."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import pyrovae as pv
from tests.report.conftest import pyrovae

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 800}}


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian's package chromium), on the PATH or in $CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a page in a window; whatever it logs, raises or asks of a network is an error."""
    wrong, asked, contexts = [], [], []

    def opened(path, size="desktop", scheme="light", **options):
        phone = size == "phone"
        contexts.append(
            chromium.new_context(viewport=SIZES[size], color_scheme=scheme, is_mobile=phone, has_touch=phone, **options)
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on(
            "request", lambda r: wrong.append(f"asked for {r.url}") if not r.url.startswith(("file:", "data:")) else 0
        )
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def pixels(page):
    """The grey values that the explorer shows, row by row."""
    return page.evaluate(
        """() => { const shown = document.getElementById("decoded"), copy = document.createElement("canvas");
             Object.assign(copy, { width: shown.width, height: shown.height });
             const context = copy.getContext("2d", { willReadFrequently: true });
             context.drawImage(shown, 0, 0);
             const values = context.getImageData(0, 0, copy.width, copy.height).data;
             return Array.from(values).filter((_, i) => i % 4 === 0); }"""
    )


def code(page):
    """Where the sliders stand."""
    return [float(v) for v in page.eval_on_selector_all("#sliders input", "all => all.map((one) => one.value)")]


def settle(page):
    """Wait until what was asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def drag(page, *shares):
    """Press in the plane at one share of its sides, and move to the others."""
    box = page.locator("#plane").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in shares]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
    settle(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [*SIZES])
@pytest.mark.parametrize("kind", ["conditional", "vqvae"])
def test_a_page_fits_its_window(visit, written, kind, size, scheme):
    page = visit(written(kind)[0], size, scheme)
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 380) == (scheme == "light")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != background


def test_a_drag_decodes_as_pytorch_does(visit, written, made):
    page = visit(written("plane")[0])
    page.locator("#plane").scroll_into_view_if_needed()
    before = pixels(page)
    drag(page, (0.5, 0.5), (0.3, 0.7), (0.2, 0.25))
    found, z = torch.tensor(pixels(page)), torch.tensor([code(page)])
    assert found.tolist() != before
    vae = pv.load(made("plane"))
    with torch.no_grad():
        # the sliders' own steps are a two-hundredth of their range, by which the code is read here
        near = torch.stack([vae.decode(z + torch.tensor(d)).flatten() for d in [(0.0, 0.0), (0.03, 0.0), (0.0, 0.03)]])
    room = 1 + 255 * (near - near[0]).abs().sum(0)
    assert ((found - 255 * near[0]).abs() <= room).all()


def test_colours_are_shown_as_decoded(visit, tmp_path):
    torch.manual_seed(0)
    vae = pv.models.VAE((3, 5, 7), latent_dim=2, hidden=(8,), likelihood="gaussian")
    pv.fit(
        vae.model, vae.guide, torch.rand(60, 3, 5, 7), objective=pv.ELBO(), epochs=1, run_dir=tmp_path, compile=False
    )
    pyrovae("report", tmp_path)
    page = visit(tmp_path / "report.html")
    settle(page)
    shown = page.evaluate(
        """() => { const c = document.getElementById("decoded");
             return [c.width, c.height, ...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]; }"""
    )
    assert shown[:2] == [7, 5]
    z = json.loads(page.locator("#explorer-data").text_content())["starts"][0]["code"]
    with torch.no_grad():
        wanted = 255 * vae.eval().decode(torch.tensor([z]))[0].clamp(0, 1).permute(1, 2, 0)
    assert (torch.tensor(shown[2:]).view(5, 7, 4)[..., :3] - wanted).abs().max() < 1


def test_a_page_on_a_run_made_in_python_shows_the_data_it_is_given(visit, tmp_path, digits):
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=2, hidden=(8,))
    pv.fit(vae.model, vae.guide, digits[:200].round(), objective=pv.ELBO(), epochs=1, run_dir=tmp_path, compile=False)
    page = visit(pv.report(tmp_path, (digits[200:260].round(), torch.arange(60) % 3), num_samples=50))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".notes").count() == 0
    before = pixels(page)
    drag(page, (0.5, 0.5), (0.2, 0.25))
    assert pixels(page) != before
    page.locator("#decoded[aria-label*='nearest test image is of label']").wait_for()


def test_a_finger_moves_in_the_plane(visit, written):
    page = visit(written("plane")[0], "phone")
    page.locator("#plane").scroll_into_view_if_needed()
    box, before = page.locator("#plane").bounding_box(), pixels(page)
    page.touchscreen.tap(box["x"] + 0.2 * box["width"], box["y"] + 0.8 * box["height"])
    settle(page)
    assert pixels(page) != before
    units = json.loads(page.locator("#explorer-data").text_content())["units"]
    shares = [(v - u["low"]) / (u["high"] - u["low"]) for u, v in zip(units, code(page), strict=True)]
    assert shares == pytest.approx([0.2, 0.2], abs=0.02)


def test_the_pages_decoder_is_equal_to_pytorchs(visit, written, made):
    page = visit(written("sliders")[0])
    z = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    script = """(codes) => { const data = JSON.parse(document.getElementById("explorer-data").textContent);
        const decode = pyrovae.load(data.decoder); return codes.map((z) => Array.from(decode(0, z))); }"""
    found = torch.tensor(page.evaluate(script, z.tolist()))
    vae = pv.load(made("sliders"))
    with torch.no_grad():
        assert (found - vae.decode(z).flatten(1)).abs().max() < 1e-3


def test_keys_move_in_the_plane(visit, written):
    page = visit(written("plane")[0])
    page.locator("#centre").click()
    start = code(page)
    page.locator("#plane").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    settle(page)
    moved = code(page)
    assert moved[0] > start[0]
    assert moved[1] > start[1]
    page.keyboard.press("Shift+ArrowLeft")
    settle(page)
    assert code(page)[0] < start[0]
    scrolled = page.evaluate("scrollY")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("scrollY") == scrolled


def test_sliders_move_every_unit(visit, written):
    page = visit(written("sliders")[0])
    assert page.locator("#sliders input").count() == 5
    for slider in page.locator("#sliders input").all():
        before = pixels(page)
        slider.focus()
        page.keyboard.press("End")
        settle(page)
        assert pixels(page) != before


def test_the_plane_shows_the_units_that_are_chosen(visit, written):
    page = visit(written("sliders")[0])
    across, up = page.locator("#axes select").all()
    across.select_option("3")
    assert across.input_value() == "3"
    up.select_option("3")
    assert across.input_value() != up.input_value()
    before = code(page)
    page.locator("#plane").focus()
    page.keyboard.press("ArrowUp")
    settle(page)
    assert [i for i, (a, b) in enumerate(zip(before, code(page), strict=True)) if a != b] == [3]


def test_a_label_switches_the_image_alone(visit, written):
    page = visit(written("conditional")[0])
    drag(page, (0.5, 0.5), (0.6, 0.4))
    at, seen = code(page), set()
    for button in page.locator("#classes button").all():
        button.click()
        settle(page)
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("#classes button[aria-pressed=true]").count() == 1
        assert code(page) == at
        seen.add(tuple(pixels(page)))
    assert len(seen) == 10


def test_one_begins_at_a_datum(visit, written):
    page = visit(written("sliders")[0])
    starts = json.loads(page.locator("#explorer-data").text_content())["starts"]
    page.locator("#starts button").nth(3).click()
    settle(page)
    units = json.loads(page.locator("#explorer-data").text_content())["units"]
    for unit, value in zip(units, code(page), strict=True):
        assert value == pytest.approx(starts[3]["code"][unit["index"]], abs=(unit["high"] - unit["low"]) / 199)


def test_a_walk_goes_on_until_it_is_stopped(visit, written):
    page = visit(written("plane")[0])
    walk, before = page.locator("#walk"), code(page)
    walk.click()
    frames = 0
    while code(page) == before and (frames := frames + 1) < 100:
        settle(page)
    assert code(page) != before
    assert walk.get_attribute("aria-pressed") == "true"
    walk.click()
    settle(page)
    stopped = code(page)
    settle(page)
    assert code(page) == stopped


def test_who_wants_no_motion_walks_by_steps(visit, written):
    page = visit(written("plane")[0], reduced_motion="reduce")
    page.locator("#walk").click()
    settle(page)
    stopped = code(page)
    settle(page)
    assert code(page) == stopped
    assert page.locator("#walk").get_attribute("aria-pressed") == "false"


def test_what_a_screen_reader_meets(visit, written):
    page = visit(written("conditional")[0])
    page.locator("#status", has_text="unit").wait_for()
    assert "nearest test image is of label" in page.locator("#decoded").get_attribute("aria-label")
    assert page.locator("#plane").get_attribute("role") == "application"
    nameless = """() => [...document.querySelectorAll("button, input, select, svg, canvas, img, [role], [tabindex]")]
        .filter((one) => one.checkVisibility() && !one.closest("[aria-hidden]") && !(one.ariaLabel || one.title ||
            one.textContent.trim() || one.labels?.length || one.closest("#plane") || one.hasAttribute("alt")))
        .map((one) => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(nameless) == []
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_a_comparison_loads(visit, made, tmp_path):
    pyrovae("compare", made("plane"), made("sliders"), "--output", tmp_path / "compare.html")
    for size in SIZES:
        page = visit(Path(tmp_path / "compare.html"), size)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("svg").count() == 2
