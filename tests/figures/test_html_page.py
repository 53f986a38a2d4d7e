from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from nextblock.errors import ConfigError
from nextblock.figures.html_page import Picture, Section, write_page

EVIL = "<script>alert(1)</script>\"'&.png"


class Reader(HTMLParser):
    """The elements and the text of a page; complains when a tag is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Path:
    for name, width in (("small", 20), ("wide", 900)):
        Image.new("RGB", (width, 10), "red").save(tmp_path / f"{name}.png")
    pictures = [
        Picture(tmp_path / "small.png", EVIL),
        Picture(tmp_path / "wide.png", "two"),
        Picture(tmp_path / "small.png"),
    ]
    sections = [Section("One & two", ["words"]), Section("Pictures", [EVIL], pictures, unfolded=1)]
    return write_page(tmp_path / "page.html", EVIL, ["about \udcff"], sections)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_text_is_shown_and_does_nothing(page: Path) -> None:
    found = read(page)
    assert not [tag for tag, _ in found.elements if tag == "script"]
    assert found.text.count(EVIL) == 4  # title, heading, words, caption
    assert next(attrs["alt"] for tag, attrs in found.elements if tag == "img") == EVIL
    assert "about ?" in found.text


def test_nothing_comes_from_outside(page: Path) -> None:
    found = read(page)
    for _, attrs in found.elements:
        assert not {"href", "srcset", "onload", "style"} & set(attrs)
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    text = page.read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_lets_the_style_pass_and_no_script(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policies = [a["content"] for t, a in read(page).elements if a.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    ]


def test_pictures_are_inside_and_the_later_ones_folded(page: Path) -> None:
    found = read(page)
    images = [attrs for tag, attrs in found.elements if tag == "img"]
    assert [base64.b64decode(str(i["src"]).partition(",")[2]) for i in images] == [
        (page.parent / f"{name}.png").read_bytes() for name in ("small", "wide", "small")
    ]
    assert [i["width"] for i in images] == ["20", "900", "20"]
    assert ["class" in i for i in images] == [False, True, False]
    assert sum(tag == "details" for tag, _ in found.elements) == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("<svg onload=...>")
    with pytest.raises(ConfigError, match="PNG"):
        write_page(tmp_path / "page.html", "t", [], [Section("s", pictures=[Picture(tmp_path / "x.png")])])
    assert not (tmp_path / "page.html").exists()
