"""One page with words and pictures, in one file: nothing is loaded from anywhere, so it can be kept and sent."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nextblock.errors import ConfigError

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #161616; --faint: #999; --line: #3a3a3a; } }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; }
.about, figcaption { color: var(--faint); font-size: .9rem; }
figure { margin: 1rem 0 1.4rem; }
figure div { overflow-x: auto; border-radius: .4rem; background: #fff; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
summary { cursor: pointer; padding: .3rem 0; }
@media (max-width: 44rem) { img.wide { max-width: none; width: 44rem; } }
"""
WIDE_PX = 700  # a picture wider than that is scrolled on a phone instead of made too small to read


@dataclass(frozen=True)
class Picture:
    """A PNG file and the words under it."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, then pictures; beyond the first `unfolded` ones each is opened by a click."""

    title: str
    words: Sequence[str] = ()
    pictures: Sequence[Picture] = field(default=())
    unfolded: int = 1000


def write_page(path: str | Path, title: str, about: Sequence[str], sections: Sequence[Section]) -> Path:
    """Write the page with every picture inside it.

    Args:
        path: of the page; overwritten, returned.
        title: heading and title.
        about: lines under the heading.
        sections: in order.

    All text is shown as it is: what looks like HTML in the name of a file does nothing. A content security policy
    forbids scripts and anything from outside. Raises ConfigError for a picture that is no PNG file.
    """
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy, quote=False)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{escaped(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{escaped(title)}</h1>",
        *(f'<p class="about">{escaped(line)}</p>' for line in about),
        *(line for section in sections for line in _section(section)),
        "</body>",
        "</html>",
    ]
    path = Path(path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def escaped(text: str) -> str:
    """Text as HTML that shows it; what is no valid Unicode (in names of files) as a question mark."""
    return html.escape(text.encode(errors="replace").decode(), quote=True)


def _section(section: Section) -> list[str]:
    lines = [f"<h2>{escaped(section.title)}</h2>", *(f"<p>{escaped(words)}</p>" for words in section.words)]
    for number, picture in enumerate(section.pictures):
        if number < section.unfolded:
            lines.append(_figure(picture, with_caption=True))
        else:
            lines += ["<details>", f"<summary>{escaped(picture.caption)}</summary>", _figure(picture), "</details>"]
    return lines


def _figure(picture: Picture, *, with_caption: bool = False) -> str:
    content = picture.path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ConfigError(f"the page takes PNG files; {picture.path} is none.")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    data = base64.b64encode(content).decode()
    wide = ' class="wide"' if width > WIDE_PX else ""
    caption = f"<figcaption>{escaped(picture.caption)}</figcaption>" if with_caption and picture.caption else ""
    image = f'<img{wide} width="{width}" height="{height}" alt="{escaped(picture.caption)}"'
    return f'<figure><div>{image} src="data:image/png;base64,{data}"></div>{caption}</figure>'
