"""Which benchmark data sets are known, and which of them are on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nextblock.data.named import NAMED, PUBLISHED, NamedDataset, find, named
from nextblock.data.named import data_root as data_root_of

_PLAIN_WIDTH = 100  # characters, where the output is not a terminal that says how wide it is


def datasets(
    *, data_root: str | Path | None = None, name: str | None = None, quiet: bool = False
) -> list[dict[str, Any]]:
    """List the benchmark data sets that are known by name, or tell everything about one.

    Args:
        data_root: the folder of all data sets; $NEXTBLOCK_DATA, else ./datasets, when left out.
        name: of one data set; all of them when left out.
        quiet: print nothing.

    Returns one dict for each: name, title, classes, train_splits, test_split, path (None when it is not on this
    machine), tested_on, metric, batch_size, lrs, warmup_epochs, url, how, hub, folder. Raises DataError for an
    unknown name.
    """
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    chosen = [named(name)] if name is not None else list(NAMED.values())
    rows = [_row(dataset, data_root) for dataset in chosen]
    if name is not None:
        _print_one(console, rows[0])
    else:
        _print_all(console, rows, data_root_of(data_root))
    return rows


def _row(dataset: NamedDataset, root: str | Path | None) -> dict[str, Any]:
    fields = ("name", "title", "classes", "train_splits", "test_split", "metric", "batch_size", "lrs", "warmup_epochs")
    row = {field: getattr(dataset, field) for field in (*fields, "url", "how", "hub", "folder", "tested_on")}
    path = find(dataset.name, root)
    return row | {"path": None if path is None else str(path), "usual_path": str(data_root_of(root) / dataset.folder)}


def _splits(row: dict[str, Any]) -> str:
    return f"{'+'.join(row['train_splits'])} -> {row['test_split']}"


def _print_all(console: Console, rows: list[dict[str, Any]], root: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "title", "classes", "train -> test", "here?", "tested on"):
        table.add_column(heading, justify="right" if heading == "classes" else "left", overflow="fold")
    for row in rows:
        here = "no" if row["path"] is None else Path(row["path"]).name + "/"
        table.add_row(row["name"], row["title"], str(row["classes"]), _splits(row), here, row["tested_on"])
    console.print(table)
    there = sum(row["path"] is not None for row in rows)
    told = f"{there} of {len(rows)} are below {root} (another place: --data_root, or the variable NEXTBLOCK_DATA)."
    console.print(told, highlight=False, markup=False)
    console.print(
        "How to get one and everything else about it: nextblock datasets --name NAME. Layouts tested on a fixture were "
        "opened from tiny copies with the archive's file names, not from the real archive.",
        highlight=False,
        markup=False,
    )


def _print_one(console: Console, row: dict[str, Any]) -> None:
    published = [f"{r.model} {r.accuracy[row['name']]:g} ({r.source})" for r in PUBLISHED if row["name"] in r.accuracy]
    lines = {
        "title": row["title"],
        "classes": row["classes"],
        "here?": row["path"] or f"no; it is looked for in {row['usual_path']}",
        "from": row["url"],
        "on the hub": f"hf:{row['hub']}" if row["hub"] else "no copy known",
        "how to get it": row["how"],
        "train -> test": _splits(row),
        "metric": _metric(row["metric"]),
        "batch size": row["batch_size"],
        "learning rates": " ".join(f"{lr:g}" for lr in row["lrs"]),
        "warm-up": f"{row['warmup_epochs']} of 100 epochs",
        "published": "; ".join(published) + ": percent, attentive probe of a frozen encoder",
        "tested on": row["tested_on"],
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, value in {"name": row["name"], **lines}.items():
        table.add_row(heading, str(value))
    console.print(table)


def _metric(metric: str) -> str:
    if metric == "accuracy":
        return metric
    words = {"macro_f1": "macro F1", "mean_per_class": "mean of the accuracies by class"}[metric]
    return f"{words}, the benchmark's own; XTRA's evaluation takes the plain accuracy instead"
