"""What an export shows: its difference to PyTorch, and its speed and size beside it."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nextblock.checkpoints.graphs import ONNX_PACKAGES, Exportable
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.errors import CheckpointError, RunError
from nextblock.evaluation.inference import inference
from nextblock.jobs.output import say
from nextblock.xtra.classifier import Classifier, LayerMean

BATCHES = (1, 3, 8)  # of the check
TIMED_BATCHES = (1, 8)
TOLERANCE = 1e-4
# Of the timing of one batch size: turns, when no further one is begun, runs in a turn, and when a turn ends.
FEWEST_ROUNDS, MOST_ROUNDS, LAST_ROUND_S, MOST_RUNS, ROUND_S = 3, 7, 10.0, 20, 0.5

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Checked:
    """How near the graph comes to PyTorch.

    difference: the largest, relative to the largest value of PyTorch's. same_class: of how many images the most
    probable class is the same; None without classes. count: images seen, in batches of the sizes `batches`.
    """

    difference: float
    same_class: int | None
    count: int
    batches: tuple[int, ...] = BATCHES
    tolerance: float = TOLERANCE


def check(module: Exportable, graph: Run, pixels: Tensor, preprocessing: Preprocessing, where: Path) -> Checked:
    """Compare on `pixels`, uint8 [M, H, W, C], each batch size on images of its own.

    PyTorch is given what training and evaluation give it, also where the graph normalises the pixels itself.
    Raises CheckpointError when PyTorch's values are not finite, RunError when the graph's differ by more than 1e-4.
    """
    plain = Exportable(module.model, module.graph_config, module.size_px)
    difference, same = 0.0, 0
    for part in torch.split(pixels, list(BATCHES)):
        with inference(plain):
            expected = plain(normalize(part, None, preprocessing))
        if not expected.isfinite().all():
            raise CheckpointError(f"{where} gives numbers that are not finite. Did its training diverge?")
        found = graph(_input(module, part, preprocessing))
        scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        worst = float((found - expected).abs().max() / scale) if found.shape == expected.shape else float("inf")
        if not worst <= TOLERANCE:  # NaN, too
            raise RunError(
                f"the graph differs from PyTorch by {worst:.1e} of the largest value in a batch of {len(part)}; "
                f"{TOLERANCE:.0e} is allowed. Nothing was written. Try the other format, or other versions of torch "
                "and of the packages of ONNX."
            )
        difference = max(difference, worst)
        same += int((found.argmax(1) == expected.argmax(1)).sum())
    return Checked(difference, same if module.graph_config.output == "logits" else None, len(pixels))


def measure(
    module: Exportable, graph: Run, pixels: Tensor, preprocessing: Preprocessing
) -> dict[str, dict[int, float]]:
    """Median milliseconds for a batch, by batch size, of PyTorch ("eager") and of the graph, on the same input."""
    calls: dict[str, Run] = {"eager": module, "graph": graph}
    found: dict[str, dict[int, float]] = {name: {} for name in calls}
    with inference(module):
        for batch in TIMED_BATCHES:
            x = _input(module, pixels[:batch], preprocessing)
            took: dict[str, list[float]] = {name: [] for name in calls}
            # In turns, so that what else the machine does falls on both.
            start = time.perf_counter()
            for turn in range(MOST_ROUNDS):
                if turn >= FEWEST_ROUNDS and time.perf_counter() - start > LAST_ROUND_S:
                    break
                for name, call in calls.items():
                    took[name] += _seconds(call, x)
            for name, values in took.items():
                found[name][batch] = 1000 * statistics.median(values)
    return found


def _seconds(call: Run, x: Tensor) -> list[float]:
    """Of some runs. A first short one is not counted: the threads of the other call are still falling asleep."""
    took: list[float] = []
    for i in range(MOST_RUNS + 1):
        start = time.perf_counter()
        call(x)
        seconds = time.perf_counter() - start
        if i or seconds > ROUND_S:
            took.append(seconds)
        if sum(took) > ROUND_S:
            break
    return took


def _input(module: Exportable, pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    return pixels.contiguous() if module.takes_pixels else normalize(pixels, None, preprocessing).contiguous()


def table_rows(
    module: Exportable,
    format: str,
    files: Sequence[Path],
    checked: Checked,
    latency: Mapping[str, Mapping[int, float]],
) -> list[dict[str, Any]]:
    """PyTorch's row and the graph's, with the graph's time as a multiple of PyTorch's."""

    def row(name: str, size_bytes: int, difference: float, times: Mapping[int, float]) -> dict[str, Any]:
        timed = {f"batch_{b}_ms": ms for b, ms in times.items()}
        ratio = {f"batch_{b}_ratio": ms / latency["eager"][b] for b, ms in times.items()}
        return {"format": name, "size_mb": size_bytes / 1e6, "difference": difference, **timed, **ratio}

    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return [
        row("PyTorch, eager", weights, 0.0, latency["eager"]),
        row(format, sum(file.stat().st_size for file in files), checked.difference, latency["graph"]),
    ]


def described(module: Exportable, format: str, files: Sequence[Path], run: Path, sha256: str) -> dict[str, Any]:
    """config.json of the graph's folder."""
    model, config, (height, width) = module.model, module.graph_config, module.size_px
    channels, patches = module.channels, model.config.grid[0] * model.config.grid[1]
    shapes = {"tokens": [patches, model.config.width], "pooled": [model.config.width]}
    layers = LayerMean.of_last(config.last_layers, model.config.depth, config.bidirectional)
    about: dict[str, Any] = {}
    if isinstance(model, Classifier):
        shapes["logits"] = [len(model.classes)]
        layers = model.head_config.layers
        about = {"head": model.head_config.kind, "classes": list(model.classes)}
    image = [height, width, channels] if module.takes_pixels else [channels, height, width]
    packages = ("nextblock", "torch", *(ONNX_PACKAGES if format == "onnx" else ()))
    return {
        "model_type": "xtra_graph",
        "format": format,
        "files": [file.name for file in files],
        "input": {
            "name": module.input_name,
            "shape": ["batch", *image],
            "dtype": "uint8" if module.takes_pixels else "float32",
            "values": "pixels, 0 to 255" if module.takes_pixels else "(pixels / 255 - mean) / std",
        },
        "output": {"name": config.output, "shape": ["batch", *shapes[config.output]], "dtype": "float32"},
        "attention": "bidirectional" if layers.bidirectional else "block-causal",
        "layers": [layers.first, layers.last],
        "final_norm": config.final_norm,
        **about,
        "source": {"run": run.absolute().name, "sha256": sha256},
        "versions": {name: version(name) for name in packages},
    }


def table_cells(row: Mapping[str, Any]) -> list[str]:
    """A row as it is shown."""
    times = [f"{row[f'batch_{b}_ms']:.1f} ({row[f'batch_{b}_ratio']:.2f}×)" for b in TIMED_BATCHES]
    return [row["format"], f"{row['size_mb']:.1f}", f"{row['difference']:.1e}" if row["difference"] else "0", *times]


def table_heads() -> list[str]:
    """What stands above the cells."""
    return ["format", "size, MB", "difference", *(f"batch {b}, ms" for b in TIMED_BATCHES)]


def table_conditions(checked: Checked) -> str:
    """On what it was measured."""
    threads = torch.get_num_threads()
    told = (
        f"Difference: the largest to PyTorch, relative to the largest value, on {checked.count} images in batches of "
        f"{', '.join(map(str, checked.batches))}. Times: medians on the CPU ({platform.machine()}), {threads} "
        f"thread{'s' if threads > 1 else ''}; in brackets as a multiple of PyTorch's."
    )
    if checked.same_class is not None:
        told += f" The same most probable class for {checked.same_class} of {checked.count} images."
    return told


def show(console: Console, rows: Sequence[Mapping[str, Any]], checked: Checked, folder: Path, about: Any) -> None:
    """The table, and what was written."""
    table = Table(*table_heads())
    for row in rows:
        table.add_row(*table_cells(row))
    console.print(table)
    say(console, table_conditions(checked))
    shape = ", ".join(map(str, about["input"]["shape"]))
    say(
        console,
        f"{folder}: {' and '.join(about['files'])}, {about['input']['dtype']} [{shape}] to {about['output']['name']}, "
        f"{about['attention']}; README.md there runs it",
    )
