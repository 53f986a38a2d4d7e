"""From two opened sets of images and a kind of features to all numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.loading import evaluation_batches
from nextblock.data.sources import Source
from nextblock.data.stream import Batch
from nextblock.errors import DataError
from nextblock.evaluation.extractors import Extracted, Extractor, extract_to, metric_name
from nextblock.evaluation.frechet import Statistics, frechet_distance, statistics
from nextblock.evaluation.generation import METRICS, NEIGHBOURS, Watch, compare, inception_score, real_against_real
from nextblock.evaluation.image_sets import ImageSet, OneSize
from nextblock.evaluation.neighbours import expected_seconds
from nextblock.evaluation.npz_files import KeptStatistics, require_same_features, write_statistics
from nextblock.jobs.fid_report import Judged, SetReport, bars, notes_on
from nextblock.jobs.output import require_some, tell_bad, written_whole
from nextblock.training.run_record import environment

SIDES = ("samples", "reference")
TOLD_FROM_S = 60  # what takes longer is told before it begins


@dataclass(frozen=True)
class FidSettings:
    """How the job runs: seed of all draws, images of a forward pass, loading processes, device; which numbers (of
    METRICS), and of how many images precision and recall are (0: all)."""

    seed: int
    batch_size: int
    workers: int
    device: str
    metrics: tuple[str, ...]
    precision_count: int

    @property
    def two_sets(self) -> dict[str, Any]:
        """The arguments of `compare`, but for its metrics."""
        return {"seed": self.seed, "device": self.device, "precision_count": self.precision_count}


def judge(
    sets: dict[str, ImageSet],
    extractor: Extractor | None,
    size_px: tuple[int, int] | None,
    how: FidSettings,
    scratch: Path,
    target: Path | None,
    console: Console,
) -> Judged:
    """Extract the features of both sets into `scratch` and compare them.

    Args:
        sets: "samples" and "reference".
        extractor: None when both are statistics.
        size_px: height and width that images are judged at.
        target: a new file for the statistics of the reference.

    Raises DataError or ConfigError for images and statistics that cannot be compared.
    """
    kept, notes = _usable_statistics(sets, extractor, size_px)
    extracted: dict[str, Extracted] = {}
    if extractor is not None:
        _tell_time(sets, extractor.identity["dimensions"], how, console)
    with bars(console) as watch:
        for side in SIDES:
            source = sets[side].source
            if source is not None and extractor is not None and size_px is not None:
                extracted[side] = _extract(source, side, extractor, size_px, how, scratch, watch)
        wanted = {*(SIDES if "frechet" in how.metrics else ()), *(["reference"] if target is not None else [])}
        own = _statistics({side: found for side, found in extracted.items() if side in wanted}, watch)
        numbers = _numbers(own | {side: each.statistics for side, each in kept.items()}, extracted, how, watch)
    if target is not None and extractor is not None:
        with written_whole(target) as beside:
            write_statistics(beside, KeptStatistics(own["reference"], extractor.identity, size_px))
    for found in extracted.values():
        tell_bad(console, found.bad)
    identity = extractor.identity if extractor else next((k.identity for k in kept.values() if k.identity), {})
    samples, reference = (_report(sets[side], extracted.get(side), kept.get(side)) for side in SIDES)
    return Judged(
        metric=metric_name(identity), features=identity,
        told=extractor.told if extractor else _told(identity), samples=samples, reference=reference, size_px=size_px,
        notes=notes + notes_on(samples, reference, numbers["results"], numbers["floor"], size_px), **numbers,
        environment=environment(how.seed, how.device),
    )  # fmt: skip


def _usable_statistics(
    sets: dict[str, ImageSet], extractor: Extractor | None, size_px: tuple[int, int] | None
) -> tuple[dict[str, KeptStatistics], list[str]]:
    """The statistics from files that the Fréchet distance takes, by side, and what the person should know of them.

    Images are preferred to statistics that lie beside them, but for Inception: ADM's reference files hold 10,000
    images and the Inception statistics of all that the papers compare with.
    """
    usable, notes = {}, list[str]()
    identity = extractor.identity if extractor else None
    for side, found in sets.items():
        kept = found.kept
        if kept is None:
            continue
        if found.source is not None:
            fits = identity is not None and kept.statistics.dimensions == identity["dimensions"]
            if not (fits and identity is not None and identity["kind"] == "inception"):
                notes.append(f"The {side} hold statistics beside their images. Only the images are used.")
                continue
            notes.append(
                f"The Fréchet distance takes the statistics that lie beside the {side}' images, everything else the "
                "images."
            )
        if identity is not None:
            require_same_features(kept, identity, f"the file of the {side}")
        if kept.identity is None:
            notes.append(f"The statistics of the {side} do not say of which features they are.")
        if kept.size_px and size_px and kept.size_px != size_px:
            notes.append(
                f"The statistics of the {side} are of images at {kept.size_px[0]} x {kept.size_px[1]} pixels, the "
                f"other set is judged at {size_px[0]} x {size_px[1]}."
            )
        usable[side] = kept
        identity = identity or kept.identity
    return usable, notes


def _extract(
    source: Source, side: str, extractor: Extractor, size_px: tuple[int, int], how: FidSettings, scratch: Path,
    watch: Watch,
) -> Extracted:  # fmt: skip
    """The features of one set; class probabilities too for samples. Raises DataError when under two can be read."""
    loading = extractor.loading(size_px)
    sized = OneSize(source, size_px, loading.channels, loading.exif_orientation)
    batches = evaluation_batches(sized, loading, batch_size=how.batch_size, workers=how.workers)
    total = -(-len(source) // how.batch_size)
    shown = _shown(batches, f"features of the {side}", total, watch)
    classify = side == "samples" and "inception_score" in how.metrics
    found = extract_to(scratch, side, extractor, shown, len(source), classify=classify)
    require_some(len(found.features), found.bad)
    if len(found.features) < 2:
        raise DataError(f"the {side}: only one of {len(source)} images can be read; a distribution needs two.")
    return found


def _shown(batches: Iterable[Batch], what: str, total: int, watch: Watch) -> Iterator[Batch]:
    watch(what, 0, total)
    for done, batch in enumerate(batches, 1):
        yield batch
        watch(what, done, total)


def _tell_time(sets: dict[str, ImageSet], width: int, how: FidSettings, console: Console) -> None:
    """Say how long precision and recall will take, where that is minutes."""
    samples, reference = (0 if (source := sets[side].source) is None else len(source) for side in SIDES)
    if "precision_recall" not in how.metrics or not reference:
        return
    most = how.precision_count or max(samples, reference)
    halves = min(reference // 2, most), min(reference - reference // 2, most)
    pairs = [(min(samples, most), min(reference, most))] if samples else []
    seconds = expected_seconds([*pairs, halves], width, k=NEIGHBOURS, device=how.device)
    if seconds < TOLD_FROM_S:
        return
    took = f"{seconds / 3600:.2g} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
    of = [f"{n:,} to {m:,} images" for n, m in pairs] + [f"the floor {halves[0]:,} to {halves[1]:,}"]
    others = ",".join(name for name in how.metrics if name != "precision_recall")
    console.print(
        f"precision and recall will take about {took} ({', '.join(of)}). A smaller --precision_count shortens it by "
        "the square" + (f"; --metrics {others} leaves them out." if others else "."),
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _statistics(extracted: dict[str, Extracted], watch: Watch) -> dict[str, Statistics]:
    found = {}
    for done, (side, each) in enumerate(extracted.items(), 1):
        watch("mean and covariance", done - 1, len(extracted))
        found[side] = statistics(each.features)
        watch("mean and covariance", done, len(extracted))
    return found


def _numbers(
    used: dict[str, Statistics], extracted: dict[str, Extracted], how: FidSettings, watch: Watch
) -> dict[str, Any]:
    """results, floor and inception_score of `Judged`; the Fréchet distance is that of the statistics `used`."""
    results: dict[str, Any] = {}
    if "frechet" in how.metrics:
        results["frechet"] = frechet_distance(used["samples"], used["reference"])
        results["frechet_counts"] = [used[side].count for side in SIDES]
        results["dimensions"] = used["samples"].dimensions
    of_two_sets = [name for name in how.metrics if name in METRICS]
    if len(extracted) == 2:
        both = [extracted[side].features for side in SIDES]
        others = [name for name in of_two_sets if name != "frechet"]
        results |= compare(*both, metrics=others, watch=watch, **how.two_sets)
    floor, score = None, None
    if "reference" in extracted:
        halves: Watch = lambda what, done, total: watch(f"{what} of the halves", done, total)  # noqa: E731
        floor = real_against_real(extracted["reference"].features, metrics=of_two_sets, watch=halves, **how.two_sets)
    if "samples" in extracted and (probabilities := extracted["samples"].probabilities) is not None:
        mean, deviation = inception_score(probabilities, seed=how.seed)
        score = {"mean": mean, "std": deviation, "images": len(probabilities)}
    return {"results": results, "floor": floor, "inception_score": score}


def _report(found: ImageSet, extracted: Extracted | None, kept: KeptStatistics | None) -> SetReport:
    bad = [] if extracted is None else extracted.bad
    return SetReport(
        what=found.description,
        images=None if extracted is None else len(extracted.features),
        statistics_of=None if kept is None else kept.statistics.count,
        left_out=len(bad),
        of_another_size=0 if extracted is None else extracted.resized,
    )


def _told(identity: dict[str, Any]) -> str:
    if not identity:
        return "features that neither file names"
    return (
        f"features of kind {identity.get('kind')}, {identity.get('name', '')} {identity.get('sha256', '')[:16]}".strip()
    )


__all__ = ["SIDES", "FidSettings", "judge"]
