"""Opens each page of a built site in Chromium, on a phone and on a desktop: `check_pages.py SITE`.

No page may scroll sideways, miss a picture or raise an error, and the search must find things.
`--pictures FOLDER` keeps a screenshot of each page, `--dark` takes the dark theme. Needs
`pip install playwright` and `playwright install chromium`; CHROMIUM names another browser's file.
"""

import argparse
import functools
import http.server
import os
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = (390, 1280)  # CSS pixels
LOADED = "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode())))"
BROKEN = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src + ' is no picture')"
TOO_WIDE = "document.documentElement.scrollWidth - innerWidth"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        """Says nothing."""


def look(page: Page, url: str) -> list[str]:
    """What is wrong with a page."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("requestfailed", lambda request: found.append(f"{request.url} did not load"))
    page.on("response", lambda answer: answer.ok or found.append(f"{answer.status} {answer.url}"))
    page.goto(url)
    page.evaluate(f"{LOADED}.catch(() => null)")
    found += page.evaluate(BROKEN)
    if (pixels := page.evaluate(TOO_WIDE)) > 0:
        found.append(f"scrolls sideways by {pixels} pixels")
    return found


def search(page: Page, root: str) -> None:
    """Waits until the search finds `binary_relax` in the reference."""
    page.goto(f"{root}/search.html?q=binary_relax")
    page.locator("#search-results a[href*='api.html#brelax_jax.binary_relax']").first.wait_for()


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    handler = functools.partial(Quiet, directory=args.site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, wrong = f"http://127.0.0.1:{server.server_port}", 0
    paths = (path.relative_to(args.site) for path in sorted(args.site.rglob("*.html")))
    names = [path.as_posix() for path in paths if path.parts[0] != "_static"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"))
        for width in WIDTHS:
            context = browser.new_context(
                viewport={"width": width, "height": 844},
                color_scheme="dark" if args.dark else "light",
            )
            for name in names:
                page = context.new_page()
                for line in look(page, f"{root}/{name}"):
                    wrong += 1
                    print(f"{name} at {width} pixels: {line}")
                if args.pictures:
                    file = args.pictures / f"{name.removesuffix('.html')}-{width}.png"
                    page.screenshot(path=file, full_page=True)
                page.close()
            search(context.new_page(), root)
    print(f"{len(names)} pages at {len(WIDTHS)} widths: {wrong or 'nothing'} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
