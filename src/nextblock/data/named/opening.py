"""From a folder with a copy of a known data set to its training and its test images."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextblock.data.named.dataset import Columns, NamedDataset, Splits
from nextblock.data.sources import Source
from nextblock.data.sources.views import Joined, class_names, renumbered
from nextblock.errors import DataError, nearest

# one split, written differently
_SPELLINGS = {
    "train": ("training", "id_train"),
    "val": ("validation", "valid", "ood_val"),
    "test": ("testing", "ood_test"),
}
_STAND_INS = ("test", "testing", "val", "validation", "valid")


@dataclass(frozen=True)
class ChosenSplits:
    """Names of the splits to train on and to test on (None: there is none), and what the person should know."""

    train: tuple[str, ...]
    test: str | None
    notes: tuple[str, ...] = ()


def open_named(
    dataset: NamedDataset,
    folder: Path,
    columns: Columns | None = None,
    train_splits: Sequence[str] = (),
    test_split: str | None = None,
) -> tuple[Source, Source, tuple[str, ...]]:
    """Training images, test images, and notes, of `dataset` in `folder`.

    `train_splits` and `test_split` are those of the data set where they are not given. Raises DataError when the
    folder is laid out in no known way, lacks a split, or has more classes than the data set.
    """
    found = find_layout(dataset, folder, columns or Columns())
    return open_splits(dataset, found, str(folder), train_splits, test_split)


def open_splits(
    dataset: NamedDataset, found: Splits, where: str, train_splits: Sequence[str] = (), test_split: str | None = None
) -> tuple[Source, Source, tuple[str, ...]]:
    """As `open_named`, from splits already found; `where` is what messages call their place."""
    to_train, to_test = train_splits or dataset.train_splits, test_split or dataset.test_split
    chosen = choose_splits(found, to_train, to_test, exactly=bool(train_splits or test_split))
    if chosen is None or chosen.test is None:
        raise DataError(
            f"{dataset.title} in {where} has the splits {', '.join(found)}; needed are {' + '.join(to_train)} to train "
            f"and {to_test} to test.{nearest(test_split or '', found)} {dataset.how}"
        )
    try:
        train, test = join_splits(found, chosen.train), found[chosen.test]()
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"the lists of {dataset.title} in {where} are damaged or of another version: {type(error).__name__}: "
            f"{error}. {dataset.how}"
        ) from error
    count = len(class_names(train))
    if count > dataset.classes:
        raise DataError(
            f"{dataset.title} has {dataset.classes} classes, but {count} were found in {where}: "
            f"{', '.join(class_names(train)[:5])} ... Is it another data set, or another label column?"
        )
    few = f"{dataset.title} has {dataset.classes} classes, only {count} were found"
    return train, test, chosen.notes + ((few,) if count < dataset.classes else ())


def find_layout(dataset: NamedDataset, folder: Path, columns: Columns) -> Splits:
    """The splits of the first layout that has those the data set needs; else of the first that has any."""
    candidates = []
    for layout in dataset.layouts:
        found = layout(folder, columns)
        chosen = choose_splits(found, dataset.train_splits, dataset.test_split)
        if chosen is not None and chosen.test is not None:
            return found
        candidates += [found] if found else []
    if candidates:
        return candidates[0]
    here = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else []
    raise DataError(
        f"{folder} is not laid out in a way known for {dataset.title}; it holds {', '.join(here) or 'nothing'}. "
        f"{dataset.how}"
    )


def choose_splits(
    found: Collection[str], train: Sequence[str], test: str, *, exactly: bool = False
) -> ChosenSplits | None:
    """Which of the splits `found` are meant by the wanted ones; None when one to train on is missing.

    Spellings are matched (valid, validation, ood_val for val). Unless `exactly` these are wanted: `trainval` may be
    train and val, all to train on but the first may be missing, and a missing test split is replaced by the only
    other held-out one that is not trained on. The notes say so.
    """
    notes: list[str] = []
    here = spelled(test, found)
    chosen: list[str] = []
    for wanted in train:
        parts = [wanted] if wanted != "trainval" or spelled(wanted, found) else ["train", "val"]
        there = [name for part in parts if (name := spelled(part, found)) and name != here]
        if not there and (exactly or not chosen):
            return None
        chosen += [name for name in there if name not in chosen]
        missing = [] if there else [wanted]
        notes += [f"there is no split '{name}': trained on {', '.join(chosen)} alone" for name in missing]
    if here is None and not exactly:
        others = [name for name in found if name in _STAND_INS and name not in chosen]
        here = others[0] if len(others) == 1 else None
        notes += [f"tested on '{here}': there is no split '{test}'"] if here else []
    return ChosenSplits(tuple(chosen), here, tuple(notes))


def spelled(wanted: str, found: Collection[str]) -> str | None:
    """The split of `found` that is called `wanted`, or is another spelling of it."""
    return next((name for name in (wanted, *_SPELLINGS.get(wanted, ())) if name in found), None)


def join_splits(found: Splits, names: Sequence[str]) -> Source:
    """The splits `names` as one source. Their classes are matched by name."""
    parts = [found[name]() for name in names]
    if len(parts) == 1:
        return parts[0]
    classes = parts[0].classes
    if any(part.classes != classes for part in parts):
        known = {name: None for part in parts for name in class_names(part)}
        parts = [renumbered(part, sorted(known)) for part in parts]
    return Joined(parts, titles=names)
