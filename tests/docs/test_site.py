"""The built site in a real browser: pages, search, both colour schemes, desktop and phone, no console errors."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver is installed"),
    # Selenium leaves sockets to the driver to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = {"light": "default", "dark": "slate"}


class Silent(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True)
    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module", params=SIZES, ids=list(SIZES))
def browser(request, tmp_path_factory):
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    width, height = SIZES[request.param]
    for flag in (
        "headless=new",
        "no-sandbox",  # tests in containers run as root
        "disable-gpu",
        "disable-dev-shm-usage",  # where containers have little of it
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"window-size={width},{height}",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    except SessionNotCreatedException as error:
        # Installed, but not allowed to run: some sandboxes refuse what Chromium needs.
        pytest.skip(f"Chromium does not start here: {error.msg.splitlines()[0]}")
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"},
    )
    yield driver
    driver.quit()


def wait(driver, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20).until(condition)


def errors(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


def scheme_of(driver):
    return driver.find_element("tag name", "body").get_attribute("data-md-color-scheme")


def look_at(driver, page, scheme):
    """Open a page as somebody who prefers the scheme and was never here."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page)
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    wait(driver, lambda d: d.find_element("css selector", "article h1").text)
    wait(driver, lambda d: scheme_of(d) == SCHEMES[scheme])


PAGES = ["", "guides/checkpoint/", "concepts/memory/", "concepts/claims/", "reference/api/"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_without_an_error_and_fits_its_window(site, browser, page, scheme):
    look_at(browser, f"{site}/{page}", scheme)
    assert errors(browser) == []
    wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, "the page itself never scrolls sideways"
    broken = browser.execute_script(
        "return [...document.images].filter(i => i.complete && !i.naturalWidth && i.offsetParent).map(i => i.src)"
    )
    assert broken == []
    unnamed = browser.execute_script("return [...document.querySelectorAll('article img')].filter(i => !i.alt).length")
    assert unnamed == 0, "every picture has a text that stands for it"
    seen = browser.execute_script(
        "return [...document.querySelectorAll('article img')].filter(i => i.offsetParent).map(i => i.src)"
    )
    assert all(f"-{scheme}.svg" in source for source in seen), seen
    assert bool(seen) == (page in ("", "concepts/memory/"))


@pytest.mark.parametrize("browser", ["phone"], indirect=True)
def test_every_page_opens_and_fits_a_phone(site, browser):
    pages = [str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")]
    for page in pages:
        folder = page.removesuffix("index").rstrip("/")
        browser.get(f"{site}/{folder}/" if folder else f"{site}/")
        wait(browser, lambda d: d.find_element("css selector", "article h1").text)
        wide, window = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= window, page
        assert errors(browser) == [], page
    assert len(pages) > 20


def test_the_other_scheme_is_a_click_away_and_stays(site, browser):
    look_at(browser, f"{site}/", "light")
    browser.find_element("css selector", "label[title='Switch to dark mode']").click()
    wait(browser, lambda d: scheme_of(d) == "slate")
    browser.get(f"{site}/guides/checkpoint/")
    wait(browser, lambda d: scheme_of(d) == "slate")
    browser.execute_script("localStorage.clear()")
    assert errors(browser) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("words", "place"), [("autobatch", "autobatch"), ("kernel panic", "wire-memory")])
def test_search_finds_what_is_there(site, browser, words, place, scheme):
    look_at(browser, f"{site}/", scheme)
    label = browser.find_element("css selector", "label.md-header__button[for='__search']")
    if label.is_displayed():
        label.click()
    box = browser.find_element("css selector", "input.md-search__input")
    wait(browser, lambda d: box.is_displayed() and box.is_enabled())
    box.send_keys(words)
    # The list is made anew with every letter, so a link is looked for and followed in one go.
    script = f"""
        const links = [...document.querySelectorAll('.md-search-result__item a')]
        const there = links.find(link => link.href.includes('{place}') && link.offsetParent)
        if (there) there.click()
        return Boolean(there)
    """
    wait(browser, lambda d: d.execute_script(script))
    wait(browser, lambda d: place in d.current_url and d.find_element("css selector", "article h1").text)
    assert errors(browser) == []
