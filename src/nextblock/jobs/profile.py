"""Where the time of a training step goes, and what follows from it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.loading import training_batches
from nextblock.errors import ConfigError, RunError
from nextblock.figures.profile import draw_profile
from nextblock.jobs.profile_config import SECTIONS, make_run, read
from nextblock.jobs.profile_replay import replayed
from nextblock.jobs.profile_replay_report import tell_replayed
from nextblock.jobs.profile_report import Measured, markdown, report, tell
from nextblock.jobs.starting import Section, given_sections, new_folder, take_objects
from nextblock.jobs.training_run import TrainingRun, compile_layers
from nextblock.recipes.config import Kind
from nextblock.training.activation_checkpointing import checkpoint_layers
from nextblock.training.launch import on_first_process
from nextblock.training.loop import Intervals, clipped_update, train
from nextblock.training.plan import Plan
from nextblock.training.profile_numbers import loader_rate, memory_used
from nextblock.training.profile_parts import Schedule
from nextblock.training.profiling import StepProfiler
from nextblock.training.replay import FOLDER as KEPT
from nextblock.training.run_record import claim_folder, to_json, write_text

PREFETCHED = 8  # batches for each worker beyond the last step, so that none is idle while the last steps are timed


@dataclass(frozen=True)
class Profile:
    """What a profile left: its folder, and what its profile.json holds (empty on other processes than the first).

    Of a replay: the batch's folder, and what was found.
    """

    folder: Path
    values: dict[str, Any]


def profile(
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    data: Section = None,
    model: Section = None,
    training: Section = None,
    watch: Section = None,
    steps: int = 20,
    warmup: int = 5,
    out: str | Path | None = None,
    replay: str | Path | None = None,
    quiet: bool = False,
) -> Profile:
    """Time a few training steps of a recipe, part by part, and tell what would make them faster.

    The recipe, preset and sections are those of `pretrain` or `train_generator`, and the steps are the same; no
    weights, checkpoints or run are written. With `replay`, a batch is run again instead, and nothing is timed.

    Args:
        config: a recipe's name or a YAML file, a run's config.yaml too. Without one, sizes and batch are chosen as
            `pretrain` does.
        preset: the sizes of a named model, over those of the recipe.
        data, model, training, watch: values of the recipe's sections, over everything else; `data["train"]` may be
            any source of images, or cached latents.
        steps: so many with the parts timed, and as many without, mixed; three more are traced.
        warmup: steps before them.
        out: the folder to make, new or empty; by default a dated one under runs/.
        replay: a batch that a training gave up on, RUN/nonfinite/step-NUMBER, or RUN for its last one: it is run again,
            forward and backward, to tell where its numbers stop being finite, and for which image. Takes sections, and
            no recipe.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, RunError: with what to do next.
    """
    console = Console(quiet=quiet)
    schedule = Schedule(steps, warmup)
    given = given_sections(data=data, model=model, training=training, watch=watch)
    if replay is not None:
        return _replayed(_kept(Path(replay)), given, {"config": config, "preset": preset, "out": out}, console)
    objects = take_objects(given)
    kind, values = read(config, preset, given)
    run = make_run(kind, values, objects, console, chosen=config is None, sized=preset is not None)
    run.require_room()
    name = Path(config).stem if config is not None else kind.verb
    folder = new_folder(run.fabric, out, f"profile-{name}")
    _claim(run, folder)
    found = measure(run, schedule, folder)
    if not run.fabric.is_global_zero:
        return Profile(folder, {})
    told = report(run, str(config or preset or name), found)
    write(folder, kind, told, found)
    tell(console, told, folder)
    return Profile(folder, told)


def _kept(folder: Path) -> Path:
    """The folder of a batch; of a run, that of the last one that it gave up on."""
    batches = sorted((folder / KEPT).glob("step-*"))
    return batches[-1] if batches else folder


def _replayed(folder: Path, given: dict[str, dict[str, Any]], clash: dict[str, Any], console: Console) -> Profile:
    for name, value in clash.items():
        if value is not None:
            raise ConfigError(f"--replay runs {folder} again as it was; leave out --{name}.")
    values = replayed(folder, given, console)
    tell_replayed(console, values, folder)
    return Profile(folder, values)


def measure(run: TrainingRun, schedule: Schedule, folder: Path) -> Measured:
    """Train for the schedule's steps as the run would, and time them; then the loader alone."""
    fabric, settings, workers = run.fabric, run.settings(), run.workers()
    plan = _lasting(run.plan, schedule.total)
    checkpoint_layers(run.model, settings.training.activation_checkpointing)
    if settings.training.compile:
        compile_layers(run.model)
    model = fabric.setup_module(run.model)
    optimizer: Any = fabric.setup_optimizers(run.make_optimizer())
    run.start_extras(None)
    loading: dict[str, Any] = {
        "workers": workers, "pin_memory": fabric.device.type == "cuda", "timeout_s": settings.timeout_s,
    }  # fmt: skip
    run.say(
        f"profiling {schedule.total} steps of {settings.training.batch_size:,} images: {schedule.warmup} to warm up, "
        f"{schedule.steps} with their parts timed and {schedule.steps} without, {schedule.traced} traced"
    )

    def left(step_s: float) -> None:
        run.say(f"a step takes {step_s:.3g} s; about {step_s * (schedule.total - schedule.warmup):.0f} s to go")

    trace_file = folder / "trace.json" if fabric.is_global_zero else None
    profiler = StepProfiler(run.model, fabric.device, schedule, trace_file, left)
    lists = _lasting(run.plan, schedule.total + PREFETCHED * workers).batches(0)
    batches = training_batches(run.stream, lists, **loading)
    try:
        with profiler:
            train(
                fabric, model, optimizer, profiler.batches(batches), profiler.loss(run.loss()), plan,
                Intervals(log=plan.total_steps), profiler, update=profiler.update(run.updater() or clipped_update),
            )  # fmt: skip
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator: its workers stop now
    times, memory, rate = profiler.times(), memory_used(fabric.device), None
    if workers and fabric.is_global_zero:
        start = schedule.total * settings.training.batch_size
        rate = loader_rate(run.stream, start=start, images=plan.largest_pass, **loading)
    return Measured(times, profiler.phases, memory, rate, profiler.bad, profiler.skipped, schedule)


def write(folder: Path, kind: Kind[Any], told: dict[str, Any], found: Measured) -> None:
    """profile.json, table.md and the picture."""
    write_text(folder / "profile.json", to_json(told))
    write_text(folder / "table.md", markdown(told))
    marked = [step.phases for step in found.steps if step.kind == "marked"]
    title = f"{told['recipe']} on {told['setting']['device']}: {told['images_per_s']:,.0f} images/s"
    draw_profile(found.phases, marked, folder / "profile.png", title=title)


def _lasting(plan: Plan, steps: int) -> Plan:
    """The plan of a run of so many steps; it is not stopped where a step is skipped."""
    config = dataclasses.replace(
        plan.config, epochs=steps * plan.config.batch_size / plan.length, max_nonfinite_steps=steps + 1
    )
    return dataclasses.replace(plan, config=config)


def _claim(run: TrainingRun, folder: Path) -> None:
    """Claim the folder on the first process; raise on every one what went wrong."""
    problem: RunError | None = None
    if run.fabric.is_global_zero:
        try:
            claim_folder(folder)
        except RunError as error:
            problem = error
    on_first_process(run.fabric, problem)


__all__ = ["SECTIONS", "Profile", "profile"]
