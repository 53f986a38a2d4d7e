"""What follows from a profile: sentences, each with the number it rests on and the option to set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nextblock.training.memory import GIB

# rule -> the share of a step (for mfu: of the ceiling; for memory: of the device's) at which it speaks
THRESHOLDS = {
    "data": 0.10,  # above: the loading
    "transfer": 0.05,  # above: copies to the device
    "optimizer": 0.15,  # above: what is done once for each batch
    "other": 0.10,  # above: what the host does between the phases
    "mfu": 0.30,  # below, on CUDA: how the layers compute
    "free": 0.50,  # of the device's memory, above: room for more images in a pass
    "larger": 1.5,  # source images larger than those of training by more than this are decoded in vain
}


@dataclass(frozen=True)
class Setting:
    """What is in force.

    Attributes:
        device: "cpu" or "cuda".
        bf16, compiled, pinned: precision, compiled layers, page-locked batches.
        workers, cores, threads: loading processes, cores of this process, torch's threads.
        batch, pass_images, passes: images of a step over all devices; of the largest forward pass here; passes.
        images: in the data.
        source_side_px: shorter side of the source's images; None where nothing is decoded.
        wanted_side_px: of the training's images.
        prepared: the source was made by `nextblock prepare`.
    """

    device: str
    bf16: bool
    compiled: bool
    pinned: bool
    workers: int
    cores: int
    threads: int
    batch: int
    pass_images: int
    passes: int
    images: int
    source_side_px: int | None
    wanted_side_px: int
    prepared: bool


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        shares: phase -> its share of the step.
        step_s: seconds of a step.
        waiting: share of the step that waits for data in the long run.
        workers_needed: that would keep up; 0 where it is not known.
        mfu: while the step does not wait for data; None where unknown.
        peak, free: bytes of the device's memory.
    """

    shares: Mapping[str, float]
    step_s: float
    waiting: float
    workers_needed: int
    mfu: float | None
    peak: int
    free: int | None


def advice(setting: Setting, found: Findings) -> list[str]:
    """Sentences, the largest share first; none of them asks for what is in force."""
    rules = (_data, _transfer, _optimizer, _other, _compute, _threads)
    told = sorted((each for rule in rules for each in rule(setting, found)), key=lambda each: -each[0])
    if told:
        return [sentence for _, sentence in told]
    return ["Nothing stands out: no share of the step is above the limits that advice begins at."]


Told = Iterator[tuple[float, str]]  # how much of the step it is about, the sentence


def _data(setting: Setting, found: Findings) -> Told:
    now, later = found.shares["data"], found.waiting
    if max(now, later) <= THRESHOLDS["data"]:
        return
    told = f"The step waits for data: {_percent(max(now, later))} of its time"
    if later > now + 0.05:
        told += f" in a long run ({_percent(now)} here, where batches were loaded beforehand)"
    yield (
        max(now, later),
        f"{told}, with {_count(setting.workers, 'worker')} on {_count(setting.cores, 'core')}. "
        + (_more_workers(setting, found.workers_needed)),
    )
    if setting.source_side_px is None or setting.prepared:
        return
    command = "once with: nextblock prepare IMAGES --out SHARDS"
    if setting.source_side_px > THRESHOLDS["larger"] * setting.wanted_side_px:
        why = (
            f"The images have a shorter side of {setting.source_side_px} px, and training takes "
            f"{setting.wanted_side_px} px: decode smaller ones, made"
        )
        command += f" --short_side {math.ceil(1.25 * setting.wanted_side_px)}"
    else:
        why = "Opening and decoding files takes that time: put the images into shards that load faster,"
    yield max(now, later) - 1e-6, f"{why} {command}"


def _more_workers(setting: Setting, needed: int) -> str:
    most = max(1, setting.cores - 1)
    if setting.workers >= most:
        return "The cores are taken: more workers help only where they wait for storage (data.workers)."
    wanted = min(most, max(setting.workers + 1, needed))
    short = f"; about {needed} would keep up, but that takes more cores" if needed > most else ""
    return f"Set data.workers to {wanted}{short}."


def _transfer(setting: Setting, found: Findings) -> Told:
    share = found.shares["transfer"]
    if setting.device != "cuda" or share <= THRESHOLDS["transfer"]:
        return
    told = f"Copies to the device take {_percent(share)} of the step"
    if setting.pinned:
        yield share, f"{told}, from pinned memory: the link is slow. See whether `nvidia-smi topo -m` puts it far away."
    else:
        yield share, f"{told}: pin the batches' memory."


def _optimizer(setting: Setting, found: Findings) -> Told:
    share = found.shares["optimizer"]
    if share > THRESHOLDS["optimizer"] and 2 * setting.batch <= setting.images:
        yield (
            share,
            (
                f"The optimiser takes {_percent(share)} of the step, once for each batch however large: a larger "
                f"training.batch_size than {setting.batch:,} spreads it over more images."
            ),
        )


def _other(setting: Setting, found: Findings) -> Told:
    share, step_ms = found.shares["other"], 1000 * found.step_s
    if share > THRESHOLDS["other"] and 2 * setting.batch <= setting.images:
        yield (
            share,
            (
                f"{_percent(share)} of the step is the host's own work, and a step is short ({step_ms:.3g} ms): more "
                f"images in a step make it matter less (training.batch_size is {setting.batch:,})."
            ),
        )


def _compute(setting: Setting, found: Findings) -> Told:
    if setting.device != "cuda" or found.mfu is None or found.mfu >= THRESHOLDS["mfu"]:
        return
    share = 1 - found.shares["data"]
    told = f"The layers reach {_percent(found.mfu)} of what matrix products reach on this device"
    options = []
    if not setting.compiled:
        options.append("training.compile true")
    if not setting.bf16:
        options.append("training.precision bf16")
    if options:
        yield share, f"{told}: set {' and '.join(options)}."
    if found.free is not None and found.free > THRESHOLDS["free"] * (found.peak + found.free):
        fits = setting.pass_images * 2 ** int(math.log2((found.peak + found.free) / found.peak))
        room = f"{told}, and {found.free / GIB:.1f} GiB of its memory stay free"
        if setting.passes > 1:
            images = min(fits, setting.passes * setting.pass_images)
            yield share - 1e-6, f"{room}: raise training.per_device_batch from {setting.pass_images} to {images}."
        elif 2 * setting.batch <= setting.images:
            yield share - 1e-6, f"{room}: a larger training.batch_size than {setting.batch:,} fits in a pass."


def _threads(setting: Setting, found: Findings) -> Told:
    free = setting.cores - setting.workers
    if setting.device == "cpu" and setting.threads < free:
        yield (
            1 - found.shares["data"],
            (
                f"torch computes with {_count(setting.threads, 'thread')}, and {_count(free, 'core')} are not taken by "
                f"workers: set OMP_NUM_THREADS={free}."
            ),
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
