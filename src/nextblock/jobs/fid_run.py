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
from nextblock.evaluation.generation import Watch, compare, inception_score, real_against_real
from nextblock.evaluation.image_sets import ImageSet, OneSize
from nextblock.evaluation.npz_files import KeptStatistics, require_same_features, write_statistics
from nextblock.jobs.fid_report import Judged, SetReport, bars, notes_on
from nextblock.jobs.output import require_some, tell_bad, written_whole
from nextblock.training.run_folder import environment

SIDES = ("samples", "reference")


@dataclass(frozen=True)
class FidSettings:
    """How the job runs: seed of all draws, images of a forward pass, loading processes, device."""

    seed: int
    batch_size: int
    workers: int
    device: str


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
    with bars(console) as watch:
        for side in SIDES:
            source = sets[side].source
            if source is not None and extractor is not None and size_px is not None:
                extracted[side] = _extract(source, side, extractor, size_px, how, scratch, watch)
        numbers = _numbers(kept, extracted, how, watch)
        own = numbers.pop("reference_statistics")
    if target is not None and extractor is not None and own is not None:
        with written_whole(target) as beside:
            write_statistics(beside, KeptStatistics(own, extractor.identity, size_px))
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
    found = extract_to(scratch, side, extractor, shown, len(source), classify=side == "samples")
    require_some(len(found.features), found.bad)
    if len(found.features) < 2:
        raise DataError(f"the {side}: only one of {len(source)} images can be read; a distribution needs two.")
    return found


def _shown(batches: Iterable[Batch], what: str, total: int, watch: Watch) -> Iterator[Batch]:
    watch(what, 0, total)
    for done, batch in enumerate(batches, 1):
        yield batch
        watch(what, done, total)


def _numbers(
    kept: dict[str, KeptStatistics], extracted: dict[str, Extracted], how: FidSettings, watch: Watch
) -> dict[str, Any]:
    """results, floor and inception_score of `Judged`, and the statistics of the reference images."""
    settings: dict[str, Any] = {"seed": how.seed, "device": how.device}
    own: dict[str, Statistics] = {}
    watch("mean and covariance", 0, len(extracted))
    for done, (side, found) in enumerate(extracted.items(), 1):
        own[side] = statistics(found.features)
        watch("mean and covariance", done, len(extracted))
    used = own | {side: each.statistics for side, each in kept.items()}
    results: dict[str, Any] = {
        "frechet": frechet_distance(used["samples"], used["reference"]),
        "frechet_counts": [used[side].count for side in SIDES],
        "dimensions": used["samples"].dimensions,
    }
    if len(extracted) == 2:
        both = [extracted[side].features for side in SIDES]
        results |= compare(*both, metrics=("kid", "precision_recall"), watch=watch, **settings)
    floor, score = None, None
    if "reference" in extracted:
        halves: Watch = lambda what, done, total: watch(f"{what} of the halves", done, total)  # noqa: E731
        floor = real_against_real(extracted["reference"].features, watch=halves, **settings)
    if "samples" in extracted and (probabilities := extracted["samples"].probabilities) is not None:
        mean, deviation = inception_score(probabilities, seed=how.seed)
        score = {"mean": mean, "std": deviation, "images": len(probabilities)}
    return {
        "results": results, "floor": floor, "inception_score": score, "reference_statistics": own.get("reference"),
    }  # fmt: skip


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
