"""What a finished probe leaves: the chosen heads, their numbers, a classifier to use, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nextblock.checkpoints.model_card import as_text
from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.named.published import PUBLISHED
from nextblock.errors import RunError
from nextblock.evaluation.classification import class_metrics, confusion
from nextblock.evaluation.head_log import read_heads
from nextblock.evaluation.probe import Predictions
from nextblock.figures.confusion import draw_confusion
from nextblock.figures.probe import draw_layers, draw_learning_rates, draw_probe_curves
from nextblock.jobs.output import plain, say
from nextblock.jobs.probe_run import ProbeRun
from nextblock.training.run_record import read_json, to_json, write_text
from nextblock.xtra.classifier import Classifier

METRICS = {"accuracy": "top1", "macro_f1": "macro_f1", "mean_per_class": "mean_per_class"}


@dataclass
class Probed:
    """What a probe found: its folder, the rows of the table, whether it was stopped by a signal (its number, or 0).

    rows: for each kind of head, attention and choice of layers its best head, with `val_top1`, `test_top1`,
    `mean_per_class` and `macro_f1` in percent. best: the row of the best of all; None when it was stopped.
    """

    folder: Path
    rows: list[dict[str, Any]]
    best: dict[str, Any] | None
    finished: bool = True
    signal: int = 0


def finish(run: ProbeRun, folder: Path) -> Probed:
    """Choose, measure on the test images, export, draw, tell. Does nothing but read on other processes."""
    run.prepare()
    by_test = run.config.select == "test"
    test = run.predictions("test")
    chooser = test if by_test else run.predictions("validation")
    diverged = run.trainer.diverged.cpu().numpy()
    scores = np.where(diverged, -1.0, chooser.top1())
    if (scores < 0).all():
        raise RunError(f"All {len(scores)} heads diverged. Try smaller --probe.lrs in a new folder.")
    rows = [_row(run, number, scores, test, by_test) for number in _chosen(run, scores) if scores[number] >= 0]
    best = max(rows, key=lambda row: row["chosen_by"])
    result = {
        "dataset": run.data.name, "protocol": protocol(run), "select": run.config.select,
        "training": training(run), "images": _counts(run, test), "rows": rows, "best": best,
        "metric": run.data.dataset.metric if run.data.dataset else "accuracy",
        "heads": [_head(run, number, scores) for number in range(len(scores))],
        "left_out": [list(bad) for bad in run.left_out.values()],
    }  # fmt: skip
    _export(run, best["head"], folder, result)
    _draw(run, folder, result, test, best["head"])
    write_text(folder / "result.json", to_json(result))  # last: what has it is finished
    tell(run.console, folder, result)
    return Probed(folder, rows, best)


_PARTS = ("dataset", "rows", "best")  # of every result


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished probe, else None. Raises RunError for one that cannot be read."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    return read_json(file, _PARTS, "Remove it: the probe is then measured again.")


def protocol(run: ProbeRun) -> str:
    """How the best head was chosen, in a sentence."""
    if run.config.select == "test":
        return "best of the grid on the test images themselves, as in the papers' codes: optimistic"
    return f"best of the grid on {len(run.val_rows):,} held-out training images, then measured once on the test images"


def training(run: ProbeRun) -> str:
    """How the heads were trained, in a few words: what differs from the published protocol is to be seen."""
    config = run.config
    shots = f", {config.few_shot} images of each class" if config.few_shot else ""
    augmented = {"published": "RandAugment and erasing", "flip": "crop and flip", "none": "no augmentation"}
    return f"{config.epochs:g} epochs, {augmented[config.augment]}{shots}"


def _chosen(run: ProbeRun, scores: np.ndarray[Any, Any]) -> list[int]:
    """The best head for each kind and layers; of equals the first."""
    best: dict[tuple[str, str], int] = {}
    for number, spec in enumerate(run.grid.specs):
        group = (spec.kind, spec.layers.name)
        if group not in best or scores[number] > scores[best[group]]:
            best[group] = number
    return list(best.values())


def _row(run: ProbeRun, number: int, scores: np.ndarray[Any, Any], test: Predictions, by_test: bool) -> dict[str, Any]:
    spec = run.grid.specs[number]
    said, truth = torch.from_numpy(test.classes[number]).long(), torch.from_numpy(test.labels)
    metrics = class_metrics(said, truth, len(run.data.classes))
    row = {"head": number, **spec.to_dict(), "first": spec.layers.first, "last": spec.layers.last}
    chosen_by = round(float(scores[number]), 4)
    row |= {"bidirectional": spec.layers.bidirectional, "chosen_by": chosen_by}
    row |= {"val_top1": None if by_test else chosen_by, "test_top1": round(metrics["top1"], 4)}
    return row | {name: round(metrics[name], 4) for name in ("mean_per_class", "macro_f1")}


def _head(run: ProbeRun, number: int, scores: np.ndarray[Any, Any]) -> dict[str, Any]:
    lost = bool(scores[number] < 0)
    return run.grid.specs[number].to_dict() | {
        "accuracy": None if lost else round(float(scores[number]), 4),
        "diverged": lost,
    }


def _counts(run: ProbeRun, test: Predictions) -> dict[str, int]:
    return {"training": len(run.train_rows), "validation": len(run.val_rows), "test": len(test.labels)}


def _export(run: ProbeRun, number: int, folder: Path, result: dict[str, Any]) -> None:
    """The encoder with its best head, as `nextblock predict` opens it."""
    model = Classifier(run.opened.encoder.config, run.grid.head_config(number), run.data.classes)
    model.encoder.load_state_dict(run.opened.encoder.state_dict())
    model.head.load_state_dict(run.grid.head_state(number))
    best = result["best"]
    shown = ", ".join(run.data.classes[:20]) + (", ..." if len(run.data.classes) > 20 else "")
    height, width = run.opened.preprocessing.size_px
    card = f"""# A probe of {as_text(run.target.run)} on {as_text(run.data.name)}

A frozen encoder with a trained head, by nextblock.

- head: {run.grid.specs[number].name}; {result["training"]}
- classes: {len(run.data.classes)} ({as_text(shown)})
- images: {height}×{width} px
- {best["test_top1"]:.2f} % of {result["images"]["test"]:,} test images right; {result["protocol"]}

```python
import nextblock

rows = nextblock.predict(run="PATH_TO_THIS_FOLDER", images=["photo.jpg"])
```
"""
    save_pretrained(folder / "exported", model, run.opened.preprocessing.to_dict(), card)


def _draw(run: ProbeRun, folder: Path, result: dict[str, Any], test: Predictions, number: int) -> None:
    figures, name = folder / "figures", run.data.name
    where = "test" if run.config.select == "test" else "validation"
    draw_learning_rates(
        result["heads"], figures / "learning_rates.png", title=f"{name}: {where} accuracy", chosen=number
    )
    draw_probe_curves(read_heads(folder / "heads.csv"), figures / "curves.png", title=f"{name}: the heads' training")
    matrix = confusion(
        torch.from_numpy(test.classes[number]).long(), torch.from_numpy(test.labels), len(run.data.classes)
    )
    title = f"{name}: the best head on the test images"
    draw_confusion(matrix.numpy(), run.data.classes, figures / "confusion.png", title=title)
    if run.config.each_layer:
        single = [row | {"layer": row["last"], "accuracy": row["test_top1"]} for row in result["rows"]]
        single = [row for row in single if row["first"] == row["last"]]
        draw_layers(single, figures / "layers.png", title=f"{name}: accuracy by layer")


def tell(console: Console, folder: Path, result: dict[str, Any]) -> None:
    """The table of a finished probe."""
    own = METRICS[result["metric"]]
    columns = ["probe", "layers", "lr", "weight decay", "validation %", "test top-1 %"]
    columns += [] if own == "top1" else [f"{own.replace('_', ' ')} % (its own metric)"]
    table = Table(*columns, title=plain(f"{result['dataset']}, frozen encoder", "table.title"))
    for row in result["rows"]:
        val = "-" if row["val_top1"] is None else f"{row['val_top1']:.2f}"
        cells = [row["kind"], row["layers"], f"{row['lr']:g}", f"{row['weight_decay']:g}", val]
        cells.append(f"{row['test_top1']:.2f}")
        table.add_row(*map(plain, cells), *([] if own == "top1" else [f"{row[own]:.2f}"]))
    console.print(table)
    known = [(row.model, row.accuracy[result["dataset"]]) for row in PUBLISHED if result["dataset"] in row.accuracy]
    if known:
        told = ", ".join(f"{model} {percent:.1f} %" for model, percent in known)
        say(console, f"published attentive probes: {told}")
    counts = result["images"]
    told = f"{counts['training']:,} training and {counts['test']:,} test images, {result['training']}; "
    told += result["protocol"]
    say(console, told)
    if edge := _at_the_edge(result):
        say(console, edge)
    if result["left_out"]:
        name, reason, _ = result["left_out"][0]
        told = f"{len(result['left_out'])} broken images left out; the first: {name}: {reason}"
        say(console, told)
    lost = sum(head["diverged"] for head in result["heads"])
    if lost:
        say(console, f"{lost} of {len(result['heads'])} heads diverged and were left where they were")
    say(console, f"everything is in {folder}; look at {folder / 'figures'}")


def _at_the_edge(result: dict[str, Any]) -> str:
    """A hint where the largest or the smallest of several learning rates was better than all others."""
    found = []
    for row in result["rows"]:
        same = [h for h in result["heads"] if all(h[x] == row[x] for x in ("kind", "layers", "weight_decay"))]
        lrs, equal = sorted({head["lr"] for head in same}), [h for h in same if h["accuracy"] == row["chosen_by"]]
        if len(lrs) > 2 and len(equal) == 1 and row["lr"] in (lrs[0], lrs[-1]):
            found.append(f"{row['kind']} {row['lr']:g}")
    if not found:
        return ""
    told = ", ".join(dict.fromkeys(found))
    return f"the best learning rate lies at the edge of the grid ({told}); a wider one may do better: --probe.lrs"
