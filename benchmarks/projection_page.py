"""The tables of docs/scaling.md, from `projection` and the measured curves."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.bench import number
from benchmarks.curves import departure
from benchmarks.projection import (
    DAY,
    GB,
    IMAGENET,
    IMAGENET_21K,
    TB,
    Assumptions,
    Measured,
    Run,
    assumed_in,
    days,
    gpus_until_waiting,
    images_a_second,
    latent_bytes,
    measured_in,
    network_until_waiting,
    runs,
    step,
)
from benchmarks.scaling import DEVICES, RESULTS, ROOT, read_curves, read_groups
from nextblock.training.flops import xtra_flops
from nextblock.xar.config import XARConfig
from nextblock.xtra.config import XTRAConfig

GPUS, SIZES = (1, 8, 64), (IMAGENET_21K, 100_000_000, 1_000_000_000)
BILLION = SIZES[-1]
PROBE_EPOCHS = 100  # published for all 15 attentive probes
MIDDLE = 0.4  # of the shares, where a table has room for one


def curves_table(results: Path) -> str:
    """Every measured curve: its exponent beside theory's, and where it is furthest from theory's line."""
    rows: list[list[object]] = []
    for device in DEVICES:
        for curve in read_curves(results / f"scaling-{device}.json"):
            xs = [point["x"] for point in curve["points"] if point["x"] > 0]
            x, share = departure(curve)
            span = f"{curve['x']}, {short(xs[0])} to {short(xs[-1])}"
            exponents = [f"{curve[key]:.2f}" for key in ("slope", "theory_slope")]
            rows.append([curve["name"], device, span, *exponents, f"{100 * share:.0f} % at {short(x)}", curve["note"]])
    table = markdown(("curve", "on", "over", "exponent", "theory's", "lowest share of the best", "with"), rows)
    return "\n".join([table, "", *(measured_on(results / f"scaling-{device}.json") for device in DEVICES)]).rstrip()


def measured_on(file: Path) -> str:
    """The device, the versions, the day, and how busy the machine was; nothing where there is no such file."""
    groups = list(read_groups(file).values())
    told = {(g["device"], g["environment"]["packages"].get("torch"), g["date"]) for g in groups if "environment" in g}
    if not told:
        return ""
    loads = [g.get("load") for g in groups]
    known = [load for load in loads if load is not None]
    busy = f"up to {max(known):.1f} processes were running when a curve began" if known else "load not noted"
    busy += f", load not noted for {len(loads) - len(known)} of {len(loads)}" if 0 < len(known) < len(loads) else ""
    where = "; ".join(f"{name}, torch {version}, {date}" for name, version, date in sorted(told, key=str))
    return f"Measured on: {where} ({busy})."


def measured_table(measured: Measured) -> str:
    rows = [
        ("images from files to batches, 256 px crops", f"{number(measured.images_a_core_s)} a second and core"),
        ("bytes of an image of the sample", number(measured.bytes_per_image)),
        ("opening a folder, for each file", f"{measured.open_s * 1e6:.2g} µs"),
        ("its index, for each file", f"{number(measured.index_bytes)} bytes"),
        ("index of Parquet, for each row", f"{number(measured.row_bytes)} bytes"),
        ("fingerprint of files, for each", f"{measured.fingerprint_s * 1e6:.2g} µs"),
        ("memory of that for its duration, for each", f"{number(measured.fingerprint_bytes)} bytes"),
        ("computed shuffle, for each image, the longest", f"{number(measured.shuffle_ns)} ns, nothing stored"),
        ("writing a checkpoint, the largest measured", f"{number(measured.checkpoint_bytes_s / 1e6)} MB/s"),
        ("a grid of 18 probe heads over one", f"{measured.probe_ratio:.3f} × the time"),
    ]
    return markdown(("measured on the CPU", ""), rows)


def assumptions_table(a: Assumptions) -> str:
    measured = a.peak != Assumptions().peak
    rows = [
        ("peak of a GPU, bf16", f"{a.peak / 1e12:,.0f} TFLOP/s", "measured" if measured else "published, H100 SXM"),
        ("share of it in training", ", ".join(f"{100 * s:.0f} %" for s in a.shares), "scenarios, not measured here"),
        ("between GPUs of a node", f"{a.inside / GB:.0f} GB/s", "published, NVLink 4, each way"),
        ("network card of a GPU", f"{a.network / GB:.0f} GB/s", "published, 400 Gbit/s"),
        ("GPUs and memory of a node", f"{a.gpus_a_node}, {a.node_memory / TB:.0f} TB", "published, DGX H100"),
        ("backward pass that hides the exchange", f"{100 * a.overlap:.0f} %", "guess"),
        ("node memory for indices", f"{100 * a.index_share:.0f} %", "guess"),
        ("sizes of files from shared storage", f"{a.files_a_second:,.0f} a second", "guess"),
        ("others wait for the first process", f"{a.wait_s / 60:.0f} min", "Fabric's default"),
        ("a tar or Parquet shard", f"{a.shard_bytes / GB:.0f} GB", "choice"),
    ]
    return markdown(("assumed", "", "from where"), rows)


def runs_table(found: Sequence[Run]) -> str:
    head = ("training", "weights, M", "GFLOP an image", "images", "epochs", "batch", "steps", "EFLOP in all")
    return markdown(
        head,
        ((r.name, round(r.parameters / 1e6), round(r.flops / 1e9), r.images, r.epochs, r.batch,
          round(r.images * r.epochs / r.batch), round(r.total / 1e18)) for r in found),
    )  # fmt: skip


def time_table(found: Sequence[Run], a: Assumptions) -> str:
    """Days at every share of the peak; and at the measured one, where there is one."""
    rows: list[list[object]] = []
    for run in found:
        for gpus in GPUS:
            at, took = step(run, gpus, MIDDLE, a), "none yet"
            if run.measured_share:
                took = f"{number(days(run, gpus, run.measured_share, a))} at {100 * run.measured_share:.0f} %"
            each = [number(days(run, gpus, share, a)) for share in a.shares]
            spent = [f"{1e3 * seconds:,.0f} ms" for seconds in (at.seconds, at.exchange_s, at.waited_s)]
            rows.append([run.name, gpus, f"{run.batch / gpus:.4g}", *each, took, *spent])
    shares = [f"days at {100 * share:.0f} %" for share in a.shares]
    step_of = f"step at {100 * MIDDLE:.0f} %"
    head = ("training", "GPUs", "images each", *shares, "days as measured", step_of, "gradients sent", "waited for")
    return markdown(head, rows)


def data_table(found: Sequence[Run], measured: Measured, a: Assumptions) -> str:
    rows: list[list[object]] = []
    for run in found:
        for gpus in GPUS:
            each = images_a_second(run, gpus, MIDDLE, a)
            cores = f"{each / measured.images_a_core_s:.2g}" if run.decoded else "none decodes"
            read = f"{each * gpus * run.bytes_per_image / 1e6:,.0f} MB/s"
            rows.append([run.name, gpus, f"{each:,.0f}", cores, read, f"{run.bytes_per_image / 1e3:,.0f} kB"])
    return markdown(("training", "GPUs", "images/s a GPU", "cores a GPU", "read in all", "read an image"), rows)


def saved_table(found: Sequence[Run], measured: Measured) -> str:
    rows = []
    for run in found:
        written = run.state_bytes / measured.checkpoint_bytes_s
        held = (run.state_bytes + run.gradient_bytes) / GB
        rows.append([run.name, f"{run.state_bytes / GB:.1f} GB", f"{written:.0f} s", f"{held:.1f} GB"])
    return markdown(("training", "a checkpoint", "written in", "on each GPU before any activation"), rows)


def probe_table(measured: Measured, a: Assumptions) -> str:
    """The frozen encoder's forward passes, all tokens, for a grid of heads that is trained at once."""
    forward = xtra_flops(XTRAConfig.preset("xtra_h14"), full_sequence=True).forward["encoder"]
    seconds = PROBE_EPOCHS * IMAGENET * forward * measured.probe_ratio / (a.peak * MIDDLE)
    apart = 18 * seconds / measured.probe_ratio
    rows = [("18 heads at once", f"{seconds / 3600:.0f}"), ("18 probes, one after the other", f"{apart / 3600:.0f}")]
    about = f"attentive probe of XTRA-H/14, ImageNet, {PROBE_EPOCHS} epochs"
    return markdown((about, f"GPU-hours at {100 * MIDDLE:.0f} %"), rows)


def size_table(run: Run, measured: Measured, a: Assumptions) -> str:
    latents = latent_bytes(XARConfig.preset("xar_h"))

    def row(what: str, *values: str) -> tuple[str, ...]:
        return what, *values

    def over(said: str, factor: float) -> list[str]:
        return [said.format(n * factor) for n in SIZES]

    epoch = [n / run.batch * step(run, 64, MIDDLE, a).seconds / 3600 for n in SIZES]
    rows = [
        row("the images themselves", *over("{:,.1f} TB", measured.bytes_per_image / TB)),
        row(f"as shards of {a.shard_bytes / GB:.0f} GB", *over("{:,.0f}", measured.bytes_per_image / a.shard_bytes)),
        row("of Parquet, `datasets`' copy in Arrow", *over("{:,.1f} TB", measured.bytes_per_image / TB)),
        row("as latents", *over("{:,.1f} TB", latents / TB)),
        row("index of files, a process", *over("{:,.1f} GB", measured.index_bytes / GB)),
        row(f"the same, {a.gpus_a_node} processes", *over("{:,.1f} GB", a.gpus_a_node * measured.index_bytes / GB)),
        row("index of Parquet rows, a process", *over("{:,.1f} GB", measured.row_bytes / GB)),
        row("opening the files, cached", *over("{:,.0f} s", measured.open_s)),
        row("fingerprint, cached", *over("{:,.0f} s", measured.fingerprint_s)),
        row("fingerprint, from shared storage", *over("{:,.0f} min", 1 / a.files_a_second / 60)),
        row("fingerprint, memory for its duration", *over("{:,.1f} GB", measured.fingerprint_bytes / GB)),
        row("computed shuffle, one epoch, one core", *over("{:,.0f} s", measured.shuffle_ns * 1e-9)),
        row(f"an epoch of XTRA-H on 64 GPUs at {100 * MIDDLE:.0f} %", *(f"{hours:,.1f} h" for hours in epoch)),
    ]
    return markdown(("", *(f"{n / 1e6:,.4g} M images" for n in SIZES)), rows)


def limits(found: Sequence[Run], measured: Measured, a: Assumptions) -> list[tuple[float, str, str]]:
    """What gives way at how many images, the first one first: (images, what, why)."""
    node = a.index_share * a.node_memory
    both = [
        (a.wait_s * a.files_a_second, "starting on single files in shared storage",
         f"at {a.files_a_second:,.0f} sizes a second, the fingerprint outlasts the wait of {a.wait_s / 60:.0f} min"),
        (a.wait_s / measured.fingerprint_s, "starting on single files, their sizes cached",
         f"as fast as measured here, the fingerprint outlasts the wait of {a.wait_s / 60:.0f} min"),
        (node / (a.gpus_a_node * measured.index_bytes), "memory, indices of files",
         f"{a.gpus_a_node} processes of a node hold {100 * a.index_share:.0f} % of its memory"),
        (node / (a.gpus_a_node * measured.row_bytes), "memory, indices of Parquet rows",
         f"{a.gpus_a_node} processes of a node hold {100 * a.index_share:.0f} % of its memory"),
        (node / measured.fingerprint_bytes, "memory of the fingerprint", f"{100 * a.index_share:.0f} % of a node's"),
        (float(a.inodes), "single files on ext4", "its numbers for files have 32 bits"),
    ]  # fmt: skip
    days_each = found[0].flops / (64 * a.peak * MIDDLE) / DAY
    both.append(
        (30 / days_each, "one epoch of XTRA-H on 64 GPUs", f"takes 30 days at {100 * MIDDLE:.0f} % of the peak")
    )
    return sorted(both)


def limits_table(found: Sequence[Run], measured: Measured, a: Assumptions) -> str:
    rows = [(f"{images / 1e6:,.0f} M", what, why) for images, what, why in limits(found, measured, a)]
    return markdown(("images", "what gives way", "because"), rows)


def speed_table(found: Sequence[Run], measured: Measured, a: Assumptions) -> str:
    """What gives way as GPUs are added, at the recipe's batch."""
    rows: list[list[object]] = []
    for run in found:
        gpus = gpus_until_waiting(run, MIDDLE, a)
        slow = network_until_waiting(run, 64, MIDDLE, a)
        network = f"{slow / GB:.1f} GB/s" if slow < float("inf") else "any"
        small = a.peak * MIDDLE / (16 * measured.images_a_core_s) / 1e9
        rows.append([run.name, gpus or f"more than {run.batch:,}", network, f"{small:.0f}" if run.decoded else ""])
    head = (
        "training", "GPUs at which 10 % of a step waits for gradients", "a network card that makes 64 GPUs wait, below",
        "GFLOP an image below which 16 loading processes a GPU are too few",
    )  # fmt: skip
    return markdown(head, rows)


def tables(results: Path) -> dict[str, str]:
    """Marker -> table."""
    measured, assumed = measured_in(results), assumed_in(results)
    found = runs(measured, results, assumed)
    return {
        "curves": curves_table(results),
        "measured": measured_table(measured),
        "assumed": assumptions_table(assumed),
        "trainings": runs_table(found),
        "time": time_table(found, assumed),
        "data": data_table(found, measured, assumed),
        "saved": saved_table(found, measured),
        "probe": probe_table(measured, assumed),
        "gpus": speed_table(found, measured, assumed),
        "sizes": size_table(found[0], measured, assumed),
        "limits": limits_table(found, measured, assumed),
    }


def short(x: float) -> str:
    return f"{x:,.0f}" if x < 1e6 else f"{x:.3g}".replace("e+0", "e")


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def rewrite(text: str, found: dict[str, str]) -> str:
    """`text` with each table between its two markers. Raises ValueError for a table without markers."""
    for name, table in found.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, opened, rest = text.partition(f"{begin}\n")
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"the page has no lines {begin} and {end}.")
        text = f"{before}{opened}{table}\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    options = parser.parse_args(argv)
    found = tables(options.results)
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    options.page.write_text(rewrite(options.page.read_text(), found))
    return 0
