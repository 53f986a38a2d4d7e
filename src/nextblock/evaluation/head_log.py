"""heads.csv: how each head of a grid went."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextblock.evaluation.probe import HeadSpec
from nextblock.training.run_record import write_text

HEAD_COLUMNS = ("step", "epoch", "head", "kind", "lr", "weight_decay", "layers", "train_loss", "val_loss", "val_top1")


class HeadLog:
    """For every look at the heads, a row for each: losses, and accuracy in percent. Rows after `start` go."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        rows = [row for row in read_heads(path) if int(row["step"]) <= start] if path.is_file() else []
        lines = [",".join(HEAD_COLUMNS), *(",".join(str(row[c]) for c in HEAD_COLUMNS) for row in rows)]
        write_text(path, "\n".join(lines) + "\n")

    def add(
        self, step: int, epoch: float, specs: Sequence[HeadSpec], train: Sequence[float], val: Sequence[float],
        top1: Sequence[float],
    ) -> None:  # fmt: skip
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for number, spec in enumerate(specs):
                about = (spec.kind, repr(spec.lr), repr(spec.weight_decay), spec.layers.name)
                numbers = (repr(float(x[number])) for x in (train, val, top1))
                writer.writerow((step, repr(epoch), number, *about, *numbers))


def read_heads(path: Path) -> list[dict[str, Any]]:
    """The rows of a heads.csv, numbers as numbers; a last line that was being written is left out."""
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()
    texts, whole_numbers = {"kind", "layers"}, {"step", "head"}
    convert: dict[str, Callable[[str], Any]] = {
        column: str if column in texts else int if column in whole_numbers else float for column in HEAD_COLUMNS
    }
    rows = (row for row in csv.DictReader(whole) if None not in row.values())
    return [{column: convert[column](row[column]) for column in HEAD_COLUMNS} for row in rows]
