"""Sampling with xAR, equal steps and solver: ours beside the plain sampler.

    python -m benchmarks.sampling_speed [--device cuda] [--quick]

Both denoise with Euler-Maruyama in a float64 state, guided on the published ramp; bf16 autocast on CUDA. Ours draws its
noise from (seed, image), as `nextblock sample` does, and runs compiled layers (`sample --compile`); on CUDA its passes
are recorded as graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import Row, Target, interleaved, matmul, run_alone
from benchmarks.reference_steps import plain_sample, plain_xar
from nextblock.evaluation.inference import inference
from nextblock.training.flops import xar_sampling_flops
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.passes import FastPasses
from nextblock.xar.sampler import Guidance, sample_latents

GUIDANCE = 2.7  # published for xAR-B
QUICK = {"latent_size": 8, "latent_channels": 4, "entity_size": 4, "width": 32, "depth": 2, "num_heads": 2,
         "num_classes": 10}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The row, the model's sizes, and how much is sampled at once."""

    row: Row
    config: XARConfig
    batch: int
    steps: int
    rounds: int
    note: str


def cases(device: str) -> list[Case]:
    """The rows of a device, with their targets."""
    if device == "cpu":
        row = Row("xAR-S sampling", "images/s", device, (Target("plain", ">=", 1.3),))
        return [Case(row, XARConfig.preset("xar_s"), 2, 10, 7, "4 cells of 8×8, fp32")]
    row = Row("xAR-B sampling", "images/s", device, (Target("plain", ">=", 3.0), Target("limit", ">=", 0.35)))
    return [Case(row, XARConfig.preset("xar_b"), 64, 50, 3, "4 cells of 8×8, bf16")]


def planned(device: str) -> list[Row]:
    """The rows of a device, not measured."""
    return [case.row for case in cases(device)]


def rows(device: str, quick: bool = False) -> list[Row]:
    """Measure all of them; `quick`: in sizes that say nothing, to see that it runs."""
    return [measured(case, device, quick) for case in cases(device)]


def measured(case: Case, device: str, quick: bool = False) -> Row:
    """The row of one case."""
    if quick:
        case = replace(case, config=XARConfig(**QUICK), batch=2, steps=2, rounds=2)
    torch.manual_seed(0)
    model = XAR(case.config).to(device).eval()
    plain, labels = plain_xar(model).eval(), (torch.arange(case.batch) % model.config.num_classes).to(device)

    passes = FastPasses(model, bf16=device == "cuda", backend="eager" if quick else "inductor")

    def ours() -> None:
        with inference(model):
            sample_latents(model, labels, steps=case.steps, guidance=GUIDANCE, passes=passes)

    def other() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            plain_sample(plain, labels, steps=case.steps, guidance=GUIDANCE)

    side = 256 if quick else 8192 if device == "cuda" else 2048
    ceiling, operations = matmul(side, torch.bfloat16 if device == "cuda" else torch.float32, device)
    arms: dict[str, Callable[[], object]] = {"ours": ours, "plain": other, "limit": ceiling}
    timed = interleaved(arms, rounds=case.rounds, warmup=1, device=device)
    amounts = {"ours": float(case.batch), "plain": float(case.batch), "limit": operations / image_flops(case)}
    recorded = " and passes recorded" if device == "cuda" else ""
    note = f"layers compiled{recorded}, plain eager; batch {case.batch}, {case.steps} steps, guidance {GUIDANCE}; "
    note += case.note
    return replace(timed.row(case.row, amounts), note=note)


def image_flops(case: Case) -> float:
    """What one image needs: nothing without a class where nothing is guided."""
    entities, guide = case.config.entities.num_entities, Guidance(GUIDANCE)
    return float(xar_sampling_flops(case.config, case.steps, [guide.of(n, entities) != 1 for n in range(entities)]))


if __name__ == "__main__":
    run_alone(__doc__, rows, devices=True)
