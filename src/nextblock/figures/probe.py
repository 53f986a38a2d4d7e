"""How probes went: over learning rates, over epochs, over layers, over data sets."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, BLUE, COLOURS, FAINT, ORANGE, save

Row = Mapping[str, Any]

KINDS = {"linear": BLUE, "attentive": ORANGE}
MARKS = ("o", "s", "^", "v", "P", "X")
STYLES = ("-", "--", ":", "-.")
ACCURACY = "accuracy (%)"


def draw_learning_rates(rows: Sequence[Row], path: str | Path, *, title: str = "", chosen: int | None = None) -> Path:
    """Accuracy over learning rate on a logarithmic axis: a line for each (kind, weight_decay, layers).

    Args:
        rows: one for each head, of kind, lr, weight_decay, layers (a name, such as "layers 7-12") and accuracy in
            percent; a head whose accuracy is None or not finite diverged, and is a cross at the foot.
        path: of the picture; returned.
        title: above it.
        chosen: the number of the row to be marked with a ring.

    Raises DataError when there are no rows.
    """
    require(rows, "head to draw")
    groups = _grouped(rows, "kind", "weight_decay", "layers")
    figure = Figure(figsize=(8.5, 4.6 + 0.1 * len(groups)), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(str(row["kind"]) for row in rows))
    settings = list(dict.fromkeys(key[1:] for key in groups))
    colours = _distinct(len(settings))
    for key, members in groups.items():
        mark, style = (marks[kinds.index(str(key[0])) % len(marks)] for marks in (MARKS, STYLES))
        good = [(float(row["lr"]), a) for row in members if (a := number(row["accuracy"])) is not None]
        axes.plot(
            *zip(*sorted(good), strict=True) if good else ([], []),
            color=colours[settings.index(key[1:])], marker=mark, linestyle=style, markersize=5,
            label=_setting(key, list(groups)),
        )  # fmt: skip
    diverged = sorted({float(row["lr"]) for row in rows if number(row["accuracy"]) is None})
    if diverged:
        foot = axes.get_xaxis_transform()
        axes.plot(diverged, [0.03] * len(diverged), "x", color=FAINT, transform=foot, label="diverged")
    axes.set_xscale("log")
    _rate_ticks(axes, sorted({float(row["lr"]) for row in rows}))
    if chosen is not None:
        _ring(axes, rows[chosen])
    axes.margins(y=0.12)
    if all(number(row["accuracy"]) is None for row in rows):
        axes.set_ylim(0, 100)
    axes.set_xlabel("learning rate")
    axes.set_ylabel(ACCURACY)
    axes.set_title(title)
    plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def _setting(key: tuple[Hashable, ...], keys: Sequence[tuple[Hashable, ...]]) -> str:
    """The kind, and of weight decay and layers what is not the same everywhere."""
    kind, decay, layers = key
    said = [str(kind)]
    if len({other[2] for other in keys}) > 1:
        said.append(str(layers))
    if len({other[1] for other in keys}) > 1:
        said.append(f"weight decay {decay:g}" if isinstance(decay, int | float) else f"weight decay {decay}")
    return ", ".join(said)


def _rate_ticks(axes: Axes, rates: Sequence[float]) -> None:
    """A tick for each rate tried, while there are few; a single rate gets room on both sides."""
    if len(rates) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(list(rates)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(
            rates, [f"{rate:g}" for rate in rates], rotation=45, fontsize=8, ha="right", rotation_mode="anchor"
        )
    if len(rates) == 1:
        axes.set_xlim(rates[0] / 10, rates[0] * 10)


def _ring(axes: Axes, row: Row) -> None:
    accuracy = number(row["accuracy"])
    if accuracy is None:
        return
    rate = float(row["lr"])
    told = f"chosen: {rate:g}, {accuracy:.1f} %"
    axes.plot([rate], [accuracy], "o", markersize=12, markerfacecolor="none", color=BLACK, label=told)


def draw_probe_curves(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Training loss and validation accuracy over epochs: a thin line for each head, the lighter the lower its rate.

    The head of each kind with the highest last accuracy (without any, the lowest last loss) is drawn thick and
    named with its rate. `rows` hold epoch, head (its number), kind, lr, val_top1 in percent and train_loss, of which
    a row may have only one. Values that are not finite are passed over; a loss far above those of
    most heads is cut off. Returns the path. Raises DataError when there is nothing to draw.
    """
    panels = {
        column: heads
        for column in ("train_loss", "val_top1")
        if (
            heads := {
                head: pairs for head, members in _grouped(rows, "head").items() if (pairs := _line(members, column))
            }
        )
    }
    require(panels, "loss or accuracy to draw")
    about = {(row["head"],): row for row in rows}
    best = _best_heads(panels, about)
    figure = Figure(figsize=(1.4 + 4.6 * len(panels), 4.2), layout="constrained")
    for axes, (column, heads) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for head, pairs in heads.items():
            thick = head in best
            axes.plot(
                *zip(*pairs, strict=True), color=_shade(about[head], list(about.values()), thick),
                linewidth=2.4 if thick else 0.9, zorder=3 if thick else 2, label=best.get(head),
                marker="o" if len(pairs) == 1 else "",
            )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy" if column == "train_loss" else ACCURACY)
        axes.set_title("Training loss" if column == "train_loss" else "Validation accuracy", fontsize=11)
        if column == "train_loss":
            highest = _top([max(loss for _, loss in pairs) for pairs in heads.values()])
            lowest = min(loss for pairs in heads.values() for _, loss in pairs)
            axes.set_ylim(lowest - 0.05 * max(highest - lowest, 0.1), highest)
        plain(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(panels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def _line(members: Sequence[Row], column: str) -> list[tuple[float, float]]:
    """(epoch, value) wherever there is a value, in the order of the epochs."""
    found = ((float(row["epoch"]), number(row.get(column))) for row in members)
    return sorted((epoch, value) for epoch, value in found if value is not None)


def _top(highest: Sequence[float]) -> float:
    """Where a loss axis ends: up to a quarter of the heads may diverge, and the others are still told apart."""
    return min(1.05 * max(highest), 1.5 * sorted(highest)[(3 * len(highest) - 1) // 4])


def _best_heads(
    panels: Mapping[str, Mapping[Any, list[tuple[float, float]]]], about: Mapping[Any, Row]
) -> dict[Any, str]:
    """head -> its label, for the best head of each kind."""
    column = "val_top1" if "val_top1" in panels else "train_loss"
    sign = 1 if column == "val_top1" else -1
    best: dict[str, Any] = {}
    for head, pairs in panels[column].items():
        kind = str(about[head]["kind"])
        if kind not in best or sign * pairs[-1][1] > sign * panels[column][best[kind]][-1][1]:
            best[kind] = head
    told = "{:.2f} %" if column == "val_top1" else "last loss {:.3g}"
    count = {kind: sum(str(row["kind"]) == kind for row in about.values()) for kind in best}
    rate = {head: f"lr {float(about[head]['lr']):g}" for head in best.values()}
    last = {head: told.format(panels[column][head][-1][1]) for head in best.values()}
    return {
        head: f"{kind}: " + (f"best of {count[kind]}, " if count[kind] > 1 else "") + f"{rate[head]}, {last[head]}"
        for kind, head in best.items()
    }


def _shade(row: Row, everyone: Sequence[Row], full: bool) -> str:
    """The colour of the kind, unless in `full` the lighter the lower the rate among those of all heads."""
    rates = sorted({float(other["lr"]) for other in everyone})
    strength = 1 if full else 0.3 + 0.5 * (rates.index(float(row["lr"])) + 1) / len(rates)
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(_kind_colour(str(row["kind"]))))
    return to_hex((red, green, blue))


def draw_layers(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Accuracy over the layer that a probe reads, a line for each (kind, attention), named with its best layer.

    `rows` hold kind, layer (from 1), bidirectional and accuracy in percent; None is left out. Returns the path.
    Raises DataError when there are no rows.
    """
    require(rows, "layer to draw")
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for (kind, bidirectional), members in _grouped(rows, "kind", "bidirectional").items():
        pairs = sorted((int(row["layer"]), a) for row in members if (a := number(row["accuracy"])) is not None)
        if not pairs:
            continue
        layer, accuracy = max(pairs, key=lambda pair: pair[1])
        attention = "bidirectional" if bidirectional else "causal"
        axes.plot(
            *zip(*pairs, strict=True), color=_kind_colour(str(kind)), linestyle="--" if bidirectional else "-",
            marker="o", markersize=4, markerfacecolor="white" if bidirectional else None,
            label=f"{kind}, {attention}: best at layer {layer}, {accuracy:.1f} %",
        )  # fmt: skip
        axes.plot([layer], [accuracy], "o", markersize=11, markerfacecolor="none", color=_kind_colour(str(kind)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.set_xlabel("layer")
    axes.set_ylabel(ACCURACY)
    axes.set_title(title)
    plain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return save(figure, path)


def require(found: Sequence[Any] | Mapping[Any, Any], what: str) -> None:
    if not found:
        raise DataError(f"There is no {what} yet.")


def _grouped(rows: Sequence[Row], *columns: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def number(value: Any) -> float | None:
    """None for what is absent, blank (from a CSV) or not finite."""
    if value is None or value == "":
        return None
    return float(value) if math.isfinite(float(value)) else None


def _kind_colour(kind: str) -> str:
    return KINDS.get(kind, COLOURS[2])


def _distinct(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colour) for colour in matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
