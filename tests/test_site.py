"""The built site in a real browser: search, figures, light and dark, a phone, no other host."""

import functools
import http.server
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import matplotlib.pyplot as plt
import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
CHROMIUM = Path("/usr/bin/chromium")
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if p.name != "404.html")
if not PAGES:
    pytest.skip("no site in _docs: run `make docs`", allow_module_level=True)

sys.path.insert(0, str(ROOT / "tools"))
import check_site  # noqa: E402

sys.path.remove(str(ROOT / "tools"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not print."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def test_links_anchors_pictures_and_hosts_without_a_browser():
    found = check_site.pages()
    assert not check_site.broken(found)
    assert not check_site.other_hosts(found)
    assert not check_site.lost_pictures(found)


def test_a_figure_is_described_by_the_words_above_it():
    plots = (SITE / "report" / "plots.html").read_text()
    assert 'alt="Win, tie and lose of every pair of models as one bar each."' in plots
    assert not [p for p in PAGES if 'alt="png"' in (SITE / p).read_text()]


def test_a_broken_link_an_anchor_and_a_host_are_seen():
    page = check_site.Page(
        '<h2 id="there"></h2><a href="none.html">a</a><a href="#gone">b</a><a href="#there">c</a>'
        '<img src="https://elsewhere.example/x.png"><a href="https://elsewhere.example">d</a>'
    )
    found = {"index.html": page}
    assert [w.split(": ")[1] for w in check_site.broken(found)] == [
        "none.html leads nowhere",
        "#gone",
    ]
    assert check_site.other_hosts(found) == ["index.html: loads https://elsewhere.example/x.png"]


def test_the_search_index_knows_every_public_name():
    index = json.loads((SITE / "search" / "search_index.json").read_text())
    known = {doc["location"] for doc in index["docs"]}
    assert "commands.html#train" in known
    assert any(place.endswith(".html#winning_score") for place in known)


def test_search_lands_on_the_reference(site, browser):
    page = browser.new_page()
    page.goto(f"{site}/index.html")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").type("winning_score")
    first = page.locator(".md-search-result__link").first
    first.wait_for(timeout=60_000)
    links = page.locator(".md-search-result__link").evaluate_all("l => l.map(x => x.href)")
    near = [x for x in links[:6] if x.endswith("#winning_score")]
    assert near, links[:8]
    page.goto(near[0])
    assert "#winning_score" in page.url
    heading = page.locator("#winning_score")
    assert heading.is_visible() and "winning_score" in heading.inner_text()
    signature = page.locator("pre", has_text="def winning_score").first.inner_text()
    assert "win" in signature and "# " in signature  # a parameter and its comment
    page.close()


@pytest.mark.parametrize("option", ["cutoff_len", "learning_rate", "top_k"])
def test_search_finds_an_options_own_entry_first(site, browser, option):
    page = browser.new_page()
    page.goto(f"{site}/index.html")
    page.locator("input.md-search__input").click()
    page.locator("input.md-search__input").type(option)
    page.locator(".md-search-result__link").first.wait_for(timeout=60_000)
    entries = page.locator(".md-search-result__link[href*='#']")
    entries.first.wait_for(timeout=60_000)
    assert entries.first.inner_text().startswith(f"--{option}")
    entries.first.click()
    page.wait_for_url(f"**/commands.html**{option}")
    heading = page.locator(f"h4[id$='-{option}']:target")
    assert heading.is_visible() and heading.inner_text().startswith(f"--{option}")
    page.close()


def test_the_front_page_has_a_picture_three_lines_and_where_to_go(site, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{site}/index.html")
    hero = page.locator(".hero")
    assert len(hero.locator("pre code").inner_text().splitlines()) == 3
    assert "pip install" in hero.locator("pre code").inner_text()
    picture = hero.locator("svg.front")
    assert "tuning at all: 0.183 [0.163, 0.202]" in picture.get_attribute("aria-label")
    doors = hero.locator("a.md-button")
    assert doors.all_inner_texts() == ["Tutorial", "Open a report", "Commands"]
    for part in (hero.locator("h1"), hero.locator("pre"), picture, *doors.all()):
        box = part.bounding_box()
        assert box["y"] + box["height"] < 900, "not on the first screen"
    doors.nth(1).click()
    page.wait_for_url("**/example/index.html")
    assert page.locator("#answer .headline").inner_text().startswith("Tuning helped")
    assert page.locator("#count").inner_text() == "1 of 72"
    page.close()


def test_figures_take_the_dark_pages_colour(site, browser):
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{site}/selection.html")
        figure = page.locator("article img[src*='_files/']").first
        figure.scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector(\"article img[src*='_files/']\").complete")
        corner = plt.imread(io.BytesIO(figure.screenshot()))[1, 1, :3]
        behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
        wanted = [int(x) / 255 for x in behind.strip("rgba()").split(",")[:3]]
        assert abs(corner - wanted).max() < 0.02, scheme
        page.close()


def test_what_options_and_tables_say_fits_a_phone(site, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    hidden = """nodes => nodes.filter(n => n.getBoundingClientRect().right > innerWidth
      || n.scrollWidth > n.clientWidth + 1).map(n => n.textContent.trim().slice(0, 60))"""
    page.goto(f"{site}/commands.html")
    assert page.locator(".option").count() > 100
    assert page.eval_on_selector_all(".option, .option > *", hidden) == []
    for name in ("measured", "tutorial", "architecture"):
        page.goto(f"{site}/{name}.html")
        assert page.locator("article table").count()
        wide = ".md-typeset__scrollwrap"
        assert page.eval_on_selector_all(wide, hidden) == [], name
    page.close()


def test_every_page_asks_no_other_host_shows_its_figures_and_fits_a_phone(site, browser):
    asked: list[str] = []
    problems: list[str] = []
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.on("request", lambda r: asked.append(r.url))
    page = context.new_page()
    page.on("pageerror", lambda e: problems.append(str(e)))
    for name in PAGES:
        page.goto(f"{site}/{name}")
        images = "[...document.querySelectorAll('article img')]"
        page.wait_for_function(f"{images}.every(i => (i.loading = 'eager') && i.complete)")
        empty = page.evaluate(f"{images}.filter(i => !i.naturalWidth).map(i => i.src)")
        problems += [f"{name}: {src} shows nothing" for src in empty]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            problems.append(f"{name}: {wide} px wider than a phone")
    context.close()
    local = urlsplit(site).netloc
    problems += [u for u in asked if urlsplit(u).netloc not in (local, "") and u[:5] != "data:"]
    assert not problems


def brightness(page) -> int:
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(x) for x in color.strip("rgba()").split(",")[:3])


def test_light_and_dark_by_the_systems_wish_and_by_the_button(site, browser):
    for scheme, bright in (("light", True), ("dark", False)):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(f"{site}/index.html")
        assert (brightness(page) > 380) is bright
        page.locator("label.md-header__button[for^=__palette]:visible").first.click()
        page.wait_for_timeout(400)
        assert (brightness(page) > 380) is not bright
        context.close()
