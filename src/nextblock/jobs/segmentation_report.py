"""What a finished segmentation probe leaves: the chosen heads, their scores and what to read them by, pictures."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from nextblock.checkpoints.model_card import as_text
from nextblock.data.masks import MaskView
from nextblock.errors import RunError
from nextblock.evaluation.segmentation import Scores, always, ceiling, class_counts, confusions, predicted, scores
from nextblock.figures.segmentation import draw_iou, draw_masks
from nextblock.jobs.output import plain, say, written_whole
from nextblock.jobs.segmentation_run import SegmentationRun
from nextblock.training.run_record import to_json, write_text

FLOOR, CEILING = "commonest class alone", "patches known exactly"


@dataclass
class Segmented:
    """What a segmentation probe found, in percent.

    rows: for each choice of layers its best head, with `val_miou`, `test_miou` and `pixel_accuracy`. best: the row of
    the best of all. classes: for each class `name`, `iou` and `ceiling` (None where it does not occur in the test
    masks) and its `share` of their labelled pixels. commonest, ceiling: `miou` and `pixel_accuracy` of always saying
    the commonest class, and of knowing every patch exactly.
    """

    folder: Path
    rows: list[dict[str, Any]]
    best: dict[str, Any]
    classes: list[dict[str, Any]]
    commonest: dict[str, Any]
    ceiling: dict[str, Any]


def segmented(folder: Path, result: dict[str, Any]) -> Segmented:
    """A result.json as an object."""
    return Segmented(folder, *(result[name] for name in ("rows", "best", "classes", "commonest", "ceiling")))


def finish(run: SegmentationRun, folder: Path) -> Segmented:
    """Choose, measure on the test images, draw, tell."""
    count, heads = len(run.classes), range(len(run.specs))
    by_test = run.config.select == "test"
    chooser = confusions(run.grid, run.test() if by_test else run.validation(), run.size, count, heads)
    diverged = run.trainer.diverged.cpu().numpy()
    if diverged.all():
        raise RunError(f"All {len(heads)} heads diverged. Try smaller --probe.lrs in a new folder.")
    by = np.array([-1.0 if lost else scores(found).miou for lost, found in zip(diverged, chooser, strict=True)])
    chosen = [number for number in _chosen(run, by) if by[number] >= 0]
    measured = chooser[chosen] if by_test else confusions(run.grid, run.test(), run.size, count, chosen)
    found = {number: scores(each) for number, each in zip(chosen, measured, strict=True)}
    rows = [_row(run, number, by, found[number], by_test) for number in chosen]
    best = max(rows, key=lambda row: row["chosen_by"])
    result = _result(run, by, rows, best) | _read_by(run, found[best["head"]])
    _export(run, best["head"], folder)
    _draw(run, folder, result)
    write_text(folder / "table.md", _markdown(result))
    write_text(folder / "result.json", to_json(result))  # last: what has it is finished
    tell(run.console, folder, result)
    return segmented(folder, result)


def _chosen(run: SegmentationRun, by: NDArray[np.float64]) -> list[int]:
    """The best head for each choice of layers; of equals the first."""
    best: dict[str, int] = {}
    for number, spec in enumerate(run.specs):
        if spec.layers.name not in best or by[number] > by[best[spec.layers.name]]:
            best[spec.layers.name] = number
    return list(best.values())


def _row(run: SegmentationRun, number: int, by: NDArray[np.float64], found: Scores, by_test: bool) -> dict[str, Any]:
    chosen_by = round(float(by[number]), 4)
    row = {"head": number, **run.specs[number].to_dict(), "chosen_by": chosen_by}
    row |= {"val_miou": None if by_test else chosen_by, "test_miou": round(found.miou, 4)}
    return row | {"pixel_accuracy": round(found.pixel_accuracy, 4)}


def _result(
    run: SegmentationRun, by: NDArray[np.float64], rows: list[dict[str, Any]], best: dict[str, Any]
) -> dict[str, Any]:
    if run.config.select == "test":
        protocol = "best of the grid on the test images themselves: optimistic"
    else:
        protocol = f"best of the grid on {len(run.val_rows):,} held-out training images, then measured once on the "
        protocol += "test images"
    views = {"whole": "whole images, resized", "crop": "the central crop"}
    height, width = run.preprocessing.size_px
    heads = [
        spec.to_dict() | {"miou": None if value < 0 else round(float(value), 4), "diverged": bool(value < 0)}
        for spec, value in zip(run.specs, by, strict=True)
    ]
    return {
        "task": "segmentation", "dataset": run.data.name, "protocol": protocol, "select": run.config.select,
        "training": f"{run.config.epochs:g} epochs, no augmentation",
        "view": f"{views[run.options.view]}, to {height}×{width} px, {run.size[0]}×{run.size[1]} patches",
        "images": {"training": len(run.train_rows), "validation": len(run.val_rows), "test": len(run.test_data)},
        "rows": rows, "best": best, "heads": heads,
        "left_out": [list(bad) for kept in (run.train_data, run.test_data) for bad in kept.bad],
    }  # fmt: skip


def _read_by(run: SegmentationRun, best: Scores) -> dict[str, Any]:
    """The classes, and the two scores that a score is to be read by."""
    count = len(run.classes)
    pixels = class_counts(run.test_data.masks, count)
    trained = class_counts(run.train_data.masks[torch.from_numpy(run.train_rows)], count)
    most = int(trained.argmax())
    floor, top = always(pixels, most), ceiling(run.test_data.masks, run.size, count)
    classes = [
        {"name": name, "iou": _rounded(best.iou[i]), "ceiling": _rounded(top.iou[i]),
         "share": round(100 * float(pixels[i] / pixels.sum()), 4)}
        for i, name in enumerate(run.classes)
    ]  # fmt: skip
    return {
        "classes": classes,
        "commonest": {"class": run.classes[most]} | _both(floor),
        "ceiling": _both(top),
    }


def _both(found: Scores) -> dict[str, float]:
    return {"miou": round(found.miou, 4), "pixel_accuracy": round(found.pixel_accuracy, 4)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _export(run: SegmentationRun, number: int, folder: Path) -> None:
    """The chosen head's own tensors: tokens of the named layers, less mean, by deviation, times weight, plus bias."""
    state = {name: value.cpu().contiguous() for name, value in run.grid.head_state(number).items()}
    about = {"layers": dataclasses.asdict(run.specs[number].layers), "classes": list(run.classes)}
    about |= {"view": run.options.view, "preprocessing": run.preprocessing.to_dict()}
    with written_whole(folder / "head.safetensors") as beside:
        save_file(state, beside, metadata={"nextblock": json.dumps(about)})


def _draw(run: SegmentationRun, folder: Path, result: dict[str, Any]) -> None:
    figures, best = folder / "figures", result["best"]
    title = f"{run.data.name}: the best head on the test images"
    classes = result["classes"]
    draw_iou(
        run.classes, [row["iou"] for row in classes], [row["ceiling"] for row in classes], figures / "iou.png",
        title=f"{title}, mIoU {best['test_miou']:.1f} %",
    )  # fmt: skip
    if not run.options.pictures:
        return
    total = len(run.test_data)
    rows = np.unique(np.linspace(0, total - 1, min(run.options.pictures, total)).round().astype(np.int64))
    at = run.test_data.indices[rows].tolist()
    pairs = run.data.test
    shown = MaskView(pairs.images, pairs.masks, run.preprocessing, run.options, len(run.classes)).load(at)
    batches = run.batches(pairs, run.test_data, [rows])
    ((batch, (said,)),) = predicted(run.grid, batches, run.size, [best["head"]])
    draw_masks(
        shown.images.numpy(), batch.masks.cpu().numpy(), said.cpu().numpy(), run.classes, figures / "predictions.png",
        names=[pairs.images.name(index).rsplit("/", 1)[-1] for index in at], title=title,
    )  # fmt: skip


def _lines(result: dict[str, Any]) -> list[list[str]]:
    """The table's lines: heads, then what they are to be read by."""
    lines = []
    for row in result["rows"]:
        val = "-" if row["val_miou"] is None else f"{row['val_miou']:.2f}"
        cells = [f"linear head, {row['layers']}", f"{row['lr']:g}", f"{row['weight_decay']:g}", val]
        lines.append([*cells, f"{row['test_miou']:.2f}", f"{row['pixel_accuracy']:.2f}"])
    for told, found in ((FLOOR, result["commonest"]), (CEILING, result["ceiling"])):
        lines.append([told, "", "", "", f"{found['miou']:.2f}", f"{found['pixel_accuracy']:.2f}"])
    return lines


COLUMNS = ("", "lr", "decay", "val mIoU %", "test mIoU %", "pixels right %")


def _notes(result: dict[str, Any]) -> list[str]:
    counts = result["images"]
    present = sum(row["iou"] is not None for row in result["classes"])
    floor = f"{FLOOR[0].upper()}{FLOOR[1:]}: {result['commonest']['class']} is said everywhere. "
    found = [
        f"{counts['training']:,} training and {counts['test']:,} test images, {result['training']}; "
        f"{result['protocol']}.",
        f"Seen: {result['view']}. mIoU: over the {present} classes that occur in the test masks, from one confusion "
        "matrix of all their labelled pixels.",
        f"{floor}{CEILING[0].upper()}{CEILING[1:]}: each patch is given its true share of every class; what is lost "
        "are edges inside patches. A head may be a little better.",
    ]
    if edge := _at_the_edge(result):
        found.append(edge)
    if result["left_out"]:
        name, reason, _ = result["left_out"][0]
        found.append(f"{len(result['left_out'])} broken images or masks left out; the first: {name}: {reason}.")
    lost = sum(head["diverged"] for head in result["heads"])
    if lost:
        found.append(f"{lost} of {len(result['heads'])} heads diverged and were left where they were.")
    return found


def _at_the_edge(result: dict[str, Any]) -> str:
    """A hint where the largest or the smallest of several learning rates was better than all others."""
    best = result["best"]
    same = [h for h in result["heads"] if all(h[x] == best[x] for x in ("layers", "weight_decay"))]
    lrs, equal = sorted({head["lr"] for head in same}), [h for h in same if h["miou"] == best["chosen_by"]]
    if len(lrs) < 3 or len(equal) > 1 or best["lr"] not in (lrs[0], lrs[-1]):
        return ""
    told = f"The best learning rate lies at the edge of the grid ({best['lr']:g})"
    return f"{told}; a wider one may do better: --probe.lrs"


def _markdown(result: dict[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def rows(lines: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(as_text(cell) for cell in line)} |" for line in lines)

    heads = rows([list(COLUMNS), ["---"] * len(COLUMNS), *_lines(result)])
    each = [
        [row["name"], f"{row['share']:.2f}", percent(row["iou"]), percent(row["ceiling"])] for row in result["classes"]
    ]
    classes = rows([["class", "% of test pixels", "IoU %", "with every patch known"], ["---"] * 4, *each])
    return f"# {as_text(result['dataset'])}: segmentation, frozen encoder\n\n{heads}\n\n" + "\n\n".join(
        [*map(as_text, _notes(result)), classes, ""]
    )


def tell(console: Console, folder: Path, result: dict[str, Any]) -> None:
    """The table of a finished segmentation probe."""
    table = Table(title=plain(f"{result['dataset']}: segmentation, frozen encoder", "table.title"))
    for i, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=i == 0, justify="left" if i == 0 else "right")
    for line in _lines(result):
        table.add_row(*map(plain, line))
    console.print(table)
    for note in _notes(result):
        say(console, note)
    say(console, f"everything is in {folder}; look at {folder / 'figures'}")
