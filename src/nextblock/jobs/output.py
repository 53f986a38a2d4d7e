"""What the jobs that write one file about many images share: a new file, written whole, and who was left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from nextblock.data.stream import BadSample
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
def written_whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it becomes `target` when all went well, and is gone otherwise.

    What the file system refuses in between is raised as a RunError.
    """
    beside = target.with_name(f".{target.name}.partial")
    try:
        yield beside
        beside.rename(target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}. Choose another --out.") from error
    finally:
        beside.unlink(missing_ok=True)


def require_some(count: int, bad: Sequence[BadSample]) -> None:
    """Raise DataError when not one image could be read."""
    if not count:
        raise DataError(f"none of the {len(bad)} images can be decoded; the first: {bad[0].name}: {bad[0].reason}.")


def tell_bad(console: Console, bad: Sequence[BadSample]) -> None:
    """The first five that were left out and why, and how many more."""
    for sample in bad[:5]:
        console.print(f"left out: {sample.name}: {sample.reason}", highlight=False, markup=False)
    if len(bad) > 5:
        console.print(f"left out: {len(bad) - 5} more", highlight=False)
