"""Which tars are meant: braces, folders, splits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from nextblock.data.decode import EXTENSIONS
from nextblock.data.sources.splits import HELD_OUT, TRAIN, pick_split
from nextblock.errors import DataError

MOST = 1_000_000
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # packed ones are told what to do
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join((TRAIN, *HELD_OUT))})(?:[-_.]|$)")


def is_tar(path: str) -> bool:
    """Whether `path`, or the path of an address, is called a tar."""
    return path.partition("?")[0].lower().endswith(ENDINGS) if "://" in path else path.lower().endswith(ENDINGS)


def expanded(pattern: str) -> list[str]:
    """`pattern` with braces as the shell has them: {000..099} counts, {a,b} lists. Raises DataError for wrong ones."""
    found = _BRACES.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise DataError(f"{pattern}: a brace without its other half. Shards are given as train-{{000..099}}.tar")
        return [pattern]
    before, after = pattern[: found.start()], expanded(pattern[found.end() :])
    inside = list(_inside(found[1], pattern))
    if len(inside) * len(after) > MOST:
        raise DataError(f"{pattern} stands for more than {MOST:,} tars.")
    return [before + part + rest for part in inside for rest in after]


def _inside(text: str, pattern: str) -> Iterator[str]:
    counted = _RANGE.fullmatch(text)
    if counted is None:
        if "," not in text:
            raise DataError(f"{pattern}: '{{{text}}}' is neither a range like {{000..099}} nor a list like {{a,b}}.")
        yield from text.split(",")
        return
    first, last = int(counted[1]), int(counted[2])
    if not 0 <= last - first < MOST:
        raise DataError(f"{pattern}: the range {{{text}}} must count upwards, at most {MOST:,} of them.")
    padded = any(len(end) > 1 and end.startswith("0") for end in counted.groups())
    width = max(map(len, counted.groups())) if padded else 0
    yield from (str(number).zfill(width) for number in range(first, last + 1))


def require_all(paths: Sequence[str], pattern: str) -> None:
    """Raise DataError, naming some, when tars of a pattern are not there."""
    lacking = [path for path in paths if not os.path.exists(path)]
    if lacking:
        more = ", ..." if len(lacking) > 3 else ""
        raise DataError(
            f"{len(lacking)} of the {len(paths)} tars of {pattern} are not there: {', '.join(lacking[:3])}{more}."
        )


def tars_in(folder: str, split: str) -> list[str]:
    """The tars of `split` directly in a folder; none where it holds images or other folders as well.

    Raises DataError where names tell splits apart and `split` is not among them.
    """
    try:
        seen = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []  # whoever opens it as something else says so
    names = sorted(name for name in seen if name.lower().endswith(ENDINGS))
    if not names or any(
        name.lower().endswith(EXTENSIONS) or os.path.isdir(os.path.join(folder, name)) for name in seen
    ):
        return []
    splits: dict[str, list[str]] = {}
    for name in names:
        found = _SPLIT.search(name.partition(".tar")[0])
        splits.setdefault(found[1] if found else "", []).append(os.path.join(folder, name))
    chosen = splits.pop("", [])
    return splits[pick_split(split, splits, folder)] if splits else chosen
