"""What jobs that write files share: a new file, written whole, who was left out, and names told as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from nextblock.data.stream import BadSample
from nextblock.durable import flush_file, give_name
from nextblock.errors import ConfigError, DataError, RunError


def new_file(path: str | Path, suffixes: Sequence[str], option: str = "--out") -> Path:
    """`path`, when a file can be made there. Raises ConfigError for another ending, RunError when it exists or its
    folder does not."""
    path = Path(path)
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} must end in {' or '.join(suffixes)}; got {path.name}.")
    if path.exists():
        raise RunError(f"{path} exists already and is not overwritten. Choose another {option}.")
    if not path.parent.is_dir():
        raise RunError(f"The folder {path.parent} does not exist. Make it, or choose another {option}.")
    return path


@contextmanager
def written_whole(target: Path, option: str = "--out") -> Iterator[Path]:
    """A path beside `target` to write to; it is flushed and becomes `target` when all went well, and is gone otherwise.

    What the file system refuses in between is raised as a RunError; `option` is what named the target.
    """
    beside = target.with_name(f".{target.name}.partial")
    try:
        yield beside
        flush_file(beside)
        give_name(beside, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}. Choose another {option}.") from error
    finally:
        with suppress(OSError):  # of a disk that refuses all: what it said first is what is told
            beside.unlink(missing_ok=True)


def require_some(count: int, bad: Sequence[BadSample]) -> None:
    """Raise DataError when not one image could be read."""
    if not count:
        raise DataError(f"none of the {len(bad)} images can be decoded; the first: {bad[0].name}: {bad[0].reason}.")


def tell_bad(console: Console, bad: Sequence[BadSample]) -> None:
    """The first five that were left out and why, and how many more."""
    for sample in bad[:5]:
        say(console, f"left out: {sample.name}: {sample.reason}")
    if len(bad) > 5:
        say(console, f"left out: {len(bad) - 5} more")


def say(console: Console, text: str) -> None:
    """A line that holds names or paths: rich takes nothing in it for a style, a colour or an emoji, nor wraps it."""
    console.print(_printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)


def plain(text: str, style: str = "") -> Text:
    """The same for a cell of a table, or with the style "table.title" for its title."""
    return Text(_printable(text), style=style)


def _printable(text: str) -> str:
    """File names need not be UTF-8, and what is printed must; nor may they steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
