"""Looks for links, anchors and images of a built site that lead nowhere: `check_links.py SITE`."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page, and what it refers to with the lines where it does."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.targets: list[tuple[int, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Takes what names a place or refers to one."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src", "poster") and value is not None:
                self.targets.append((self.getpos()[0], value))


def broken(site: Path) -> list[str]:
    """A line for each reference within the site that leads nowhere."""
    site = site.resolve()
    paths = sorted(site.rglob("*.html"))
    pages = {path: Page(path) for path in paths if "_static" not in path.parts}  # no templates
    found = [] if pages else [f"{site} holds no page."]
    for path, page in pages.items():
        for line, target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            place = path if not url.path else (path.parent / unquote(url.path)).resolve()
            place = place / "index.html" if place.is_dir() else place
            where = f"{path.relative_to(site)}:{line}: {target}"
            if not place.is_file():
                found.append(f"{where}: there is no such file")
            elif place in pages and unquote(url.fragment) not in pages[place].anchors:
                found.append(f"{where}: that page has no such anchor")
    return found


if __name__ == "__main__":
    lines = broken(Path(sys.argv[1]))
    print("\n".join(lines) or "All links, anchors and images of the site are there.")
    sys.exit(1 if lines else 0)
