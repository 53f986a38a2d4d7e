"""What a profile found: as numbers, as a table, and as it is told."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nextblock.data.sources import Source
from nextblock.data.stream import BadSample
from nextblock.errors import SampleError
from nextblock.jobs.choose import typical_image
from nextblock.jobs.profile_advice import Findings, Setting, advice
from nextblock.jobs.training_run import TrainingRun
from nextblock.training.flops import matmul_ceiling, model_flops, xtra_flops
from nextblock.training.launch import processes_here
from nextblock.training.memory import GIB
from nextblock.training.profile_numbers import Memory, phase_times, spread, waiting_share
from nextblock.training.profile_parts import Schedule, StepTime
from nextblock.training.run_record import environment
from nextblock.xtra.model import XTRA

MEANING = {
    "data": "waiting for a batch",
    "transfer": "its way to the device",
    "inputs": "normalised, mirrored; order, times and noise drawn",
    "encoder": "forward",
    "projection and predictor": "forward",
    "pixel heads": "forward",
    "tokens in": "forward: noising, tokens, class and time",
    "layers": "forward",
    "tokens out": "forward",
    "loss": "forward: targets and error",
    "backward": "gradients; over processes, their exchange too",
    "optimizer": "clipping, AdamW, average of the weights",
    "other": "what is between them",
}
PREPARED = "nextblock.data.prepared"


@dataclass(frozen=True)
class Measured:
    """Of one process: its steps, their phases' names in order, memory, images per second of the loader alone (None
    without workers), broken images, steps skipped for a loss that is not finite, and which steps there were."""

    steps: list[StepTime]
    phases: tuple[str, ...]
    memory: Memory
    loader_rate: float | None
    bad: list[BadSample]
    skipped: int
    schedule: Schedule


def report(run: TrainingRun, recipe: str, found: Measured) -> dict[str, Any]:
    """The content of profile.json; measures what matrix products reach, so it takes a second or two."""
    setting = _setting(run)
    marked = [step for step in found.steps if step.kind == "marked"]
    bare, timed = ([s.total_s for s in found.steps if s.kind == kind] for kind in ("bare", "marked"))
    phases = phase_times(marked, found.phases)
    shares = {phase.name: phase.share for phase in phases}
    images = sum(map(len, run.plan.micro_batches(0)))  # of this process
    step_s = mean(bare)
    busy_s = mean(step.total_s - step.phases["data"] for step in marked)
    loading_s = images / found.loader_rate if found.loader_rate else busy_s * shares["data"] / (1 - shares["data"])
    waiting = waiting_share(busy_s, loading_s) if found.loader_rate else shares["data"]
    flops = model_flops(run.model)
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    ceiling = matmul_ceiling(run.fabric.device, dtype)
    needed = math.ceil(max(1, setting.workers) * loading_s / busy_s)
    findings = Findings(
        shares, step_s, waiting, needed, flops.training * images / busy_s / ceiling, found.memory.peak,
        found.memory.free,
    )  # fmt: skip
    count = {kind: sum(step.kind == kind for step in found.steps) for kind in ("warmup", "marked", "bare", "traced")}
    return {
        "recipe": recipe,
        "verb": run.verb,
        "steps": count,
        "setting": dataclasses.asdict(setting),
        "step_s": spread(bare),
        "marked_step_s": spread(timed),
        # Of the pairs of a schedule, as shares of a step without its parts timed.
        "overhead": spread([(a - b) / median(bare) for a, b in zip(timed, bare, strict=True)]),
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "images_per_s": setting.batch / step_s,
        "loader_images_per_s": found.loader_rate,
        "waiting_in_a_long_run": waiting,
        "waited_s": mean(step.waited_s for step in marked),
        **_computing(run, flops.training, images / step_s, ceiling),
        "forward_flops_per_image": dict(flops.forward),
        "memory": dataclasses.asdict(found.memory),
        "bad_samples": len({sample.name for sample in found.bad}),
        "skipped_steps": found.skipped,
        "advice": advice(setting, findings),
        "environment": environment(run.settings().training.seed, run.fabric.device.type),
    }


def _computing(run: TrainingRun, per_image: int, images_per_s: float, ceiling: float) -> dict[str, Any]:
    """Operations per image and second, of one device."""
    achieved = per_image * images_per_s
    whole: dict[str, int] = {}
    if isinstance(run.model, XTRA):
        config = run.model.config
        whole = {
            "tokens": config.ordering.num_patches,
            "flops_per_image_of_all_tokens": xtra_flops(config, full_sequence=True).training,
        }
    return {
        "flops_per_image": per_image,
        **whole,
        "achieved_flops_per_s": achieved,
        "ceiling_flops_per_s": ceiling,
        "mfu": achieved / ceiling,
    }


def _setting(run: TrainingRun) -> Setting:
    training, plan, device = run.settings().training, run.plan, run.fabric.device.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted: Sequence[int] = getattr(getattr(run.stream, "crop", None), "size_px", (0,))
    source = getattr(run.stream, "source", None)  # a stream of latents has none
    return Setting(
        device=device,
        bf16=training.precision == "bf16" or (training.precision == "auto" and device == "cuda"),
        compiled=training.compile,
        pinned=device == "cuda",
        workers=run.workers(),
        cores=max(1, cores // processes_here(run.fabric)),
        threads=torch.get_num_threads(),
        batch=training.batch_size,
        pass_images=plan.largest_pass,
        passes=len(plan.micro_batches(0)),
        images=plan.length,
        source_side_px=typical_image(source)[0] if source is not None and _is_encoded(source) else None,
        wanted_side_px=min(wanted),
        prepared=_is_prepared(source),
    )


def _is_encoded(source: Source) -> bool:
    """Whether images have to be decoded."""
    try:
        return not isinstance(source[0].content, np.ndarray)
    except SampleError:  # a file that cannot be read
        return True


def _is_prepared(source: Any) -> bool:
    """Whether the images come from prepared shards, whatever views are put over them."""
    while source is not None:
        if type(source).__module__.startswith(PREPARED):
            return True
        source = getattr(source, "_source", None)
    return False


def _rows(told: dict[str, Any]) -> list[list[str]]:
    return [
        [
            phase["name"],
            _ms(phase["mean_s"]),
            f"{100 * phase['share']:.1f} %",
            _ms(phase["median_s"]),
            f"{_ms(phase['low_s'])} to {_ms(phase['high_s'])}",
            MEANING[phase["name"]],
        ]
        for phase in told["phases"]
    ]


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


HEADER = ["phase", "ms", "share", "median", "quartiles", "what"]


def facts(told: dict[str, Any]) -> list[str]:
    """Everything but the phases, a line each."""
    setting, memory = told["setting"], told["memory"]
    step, overhead, giga = told["step_s"], told["overhead"], 1e9
    lines = [
        f"step: {_ms(step['mean'])} ms (median {_ms(step['median'])}, quartiles {_ms(step['low'])} to "
        f"{_ms(step['high'])}), {told['images_per_s']:,.1f} images/s",
        f"timing the parts changes a step by {100 * overhead['median']:+.1f} % (median of pairs; quartiles "
        f"{100 * overhead['low']:+.1f} to {100 * overhead['high']:+.1f} %)",
    ]
    if told["loader_images_per_s"] is not None:
        lines.append(f"loader alone: {told['loader_images_per_s']:,.1f} images/s of one process's workers")
    others = ""
    if "tokens" in told:
        whole = told["flops_per_image_of_all_tokens"] / giga
        others = f" ({whole:,.4g} if all {told['tokens']} tokens were computed; the last cell need not be)"
    lines += [
        f"operations: {told['flops_per_image'] / giga:,.4g} GFLOP per image, forward and backward{others}",
        f"MFU: {100 * told['mfu']:.1f} %, {told['achieved_flops_per_s'] / giga:,.4g} of "
        f"{told['ceiling_flops_per_s'] / giga:,.4g} GFLOP/s, which matrix products reach here "
        f"({'bf16' if setting['bf16'] else 'fp32'})",
        f"memory: {memory['peak'] / GIB:.2f} GiB at most"
        + ("" if memory["free"] is None else f", {memory['free'] / GIB:.2f} GiB free"),
    ]
    if told["bad_samples"]:
        lines.append(f"broken images: {told['bad_samples']}, replaced")
    if told["skipped_steps"]:
        lines.append(f"not finite: the loss or its gradient in {told['skipped_steps']} steps, which were skipped")
    return lines


def markdown(told: dict[str, Any]) -> str:
    """The table as table.md."""
    about, setting = told["environment"], told["setting"]
    lines = [HEADER, ["---"] * len(HEADER), *_rows(told)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    head = (
        f"{about['device']}, torch {about['packages']['torch']}; {setting['batch']:,} images in a step, "
        f"forward passes {setting['passes']}, workers {setting['workers']}, cores {setting['cores']}; "
        f"{told['steps']['marked']} steps with their parts timed. The means add up to the step."
    )
    bullets = "\n".join(f"- {line}" for line in facts(told))
    said = "\n".join(f"- {line}" for line in told["advice"])
    return f"# {told['recipe']}\n\n{head}\n\n{table}\n\n{bullets}\n\n## Advice\n\n{said}\n"


def tell(console: Console, told: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"a training step of {told['recipe']}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, title in enumerate(HEADER[:-1]):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in _rows(told):
        table.add_row(*row[:-1])
    console.print(table)
    for line in (*facts(told), "", *(f"-> {line}" for line in told["advice"]), ""):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    files = "profile.json, table.md, profile.png, trace.json (open it at ui.perfetto.dev)"
    console.print(f"everything is in {folder}: {files}", highlight=False, markup=False, soft_wrap=True)
