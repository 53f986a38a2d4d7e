"""What the replay of a batch found, as it is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nextblock.training.layer_numbers import GRADIENT, INPUT

BEFORE, AFTER = 4, 8  # rows of the table around the first that is not finite
IMAGES = 16


def verdict(found: Mapping[str, Any]) -> str:
    """Where the numbers stop being finite, in a sentence or two."""
    if found["weights"]:
        first, count = found["weights"][0], len(found["weights"])
        return f"The weights themselves are not finite: {count} of them, the first {first['name']} ({_share(first)})."
    one = found["pass"]
    first = next((row for row in one["layers"] if row["share"]), None)
    of = f" in the pass of process {one['rank']}" if found["world"] > 1 else ""
    if first is not None and first["what"] == INPUT:
        return f"The model's input is not finite{of} ({_share(first)}): look at the images and at mean and std."
    if first is not None and first["what"] == GRADIENT:
        return (
            f"The forward pass is finite{of}. The first gradient that is not is the one that comes back to "
            f"{_layer(first)} ({_share(first)}): what follows it has no finite slope here."
        )
    if first is not None:
        return f"The first numbers that are not finite{of} are the output of {_layer(first)} ({_share(first)})."
    if not found["finite"]:
        return "Every number is finite, but the gradient's norm is not: the gradient is too large for 32 bits."
    now = found["environment"]
    return (
        f"Everything is finite here: loss {found['loss']:.4g}, gradient norm {found['grad_norm']:.4g}. The training "
        f"ran on {found['ran_on']}, this on {now['device']}; another device, precision or version may be what differs."
    )


def tell_replayed(console: Console, found: Mapping[str, Any], folder: Path) -> None:
    """The verdict, the layers around it, and the images."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    first = found["step"] * found["images"]
    say(
        f"{folder}: step {found['step']}, sample positions {first} to {first + found['images'] - 1}, forward passes "
        f"{found['passes']}"
    )
    if found["since"]:
        say(f"The weights are those of {found['since']} steps later: the run had gone on before it gave up.")
    say(verdict(found))
    console.print(_layers(found["pass"]["layers"]))
    console.print(_images(found["by_image"]))
    count, wrong = len(found["by_image"]), sum(not row["finite"] for row in found["by_image"])
    if not found["finite"] and not wrong:
        say(f"Each of these {count} images is finite alone: it is the batch, or what was drawn for it.")
    elif wrong == count > 1:
        say(
            f"None of these {count} images is finite alone, so it is the weights, not the images: earlier steps have "
            "spoiled them. Start a new run with a lower training.lr."
        )
    elif wrong:
        say(f"{wrong} of these {count} images {'is' if wrong == 1 else 'are'} not finite alone: look at them first.")


def _layers(rows: list[dict[str, Any]]) -> Table:
    """Some rows before the first that is not finite, and some after it; without one, the largest."""
    at = next((i for i, row in enumerate(rows) if row["share"]), None)
    if at is None:
        shown = sorted(rows, key=lambda row: max(abs(row["least"]), abs(row["greatest"])), reverse=True)[: AFTER + 1]
        title = "the largest numbers"
    else:
        shown, title = rows[max(0, at - BEFORE) : at + AFTER + 1], "where the numbers stop being finite"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(("layer", "what", "least", "greatest", "not finite")):
        table.add_column(name, justify="right" if i > 1 else "left")
    for row in shown:
        table.add_row(row["name"] or "(the model)", row["what"], f"{row['least']:.3g}", f"{row['greatest']:.3g}",
                      f"{100 * row['share']:.3g} %" if row["share"] else "")  # fmt: skip
    return table


def _images(rows: list[dict[str, Any]]) -> Table:
    """Images that are not finite alone come first, then those of the largest losses."""
    order = sorted(rows, key=lambda row: (row["finite"], -row["loss"] if row["finite"] else 0))
    table = Table(title="each image alone", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(("loss", "gradient norm", "position", "process", "image")):
        table.add_column(name, justify="right" if i < 4 else "left", overflow="fold")
    for row in order[:IMAGES]:
        table.add_row(f"{row['loss']:.4g}", f"{row['grad_norm']:.4g}", str(row["position"]), str(row["rank"]),
                      row["name"])  # fmt: skip
    return table


def _layer(row: Mapping[str, Any]) -> str:
    return f"layer {row['name']}" if row["name"] else "the model itself, its loss"


def _share(row: Mapping[str, Any]) -> str:
    return f"{100 * row['share']:.3g} % of its numbers"
