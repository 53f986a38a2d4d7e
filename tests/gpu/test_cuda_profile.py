"""Run with `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nextblock.jobs.profile import profile
from tiny_run import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_profile_on_the_device(tmp_path: Path, compiled: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), dtype=np.uint8)
    sections = tiny(training={"device": "cuda", "compile": compiled}, data={"train": pixels, "workers": 2})
    told = profile(config="xtra_cifar10", out=tmp_path / "p", steps=6, warmup=3, quiet=True, **sections).values
    assert told["setting"]["device"] == "cuda"
    assert told["setting"]["bf16"]
    shares = {phase["name"]: phase["share"] for phase in told["phases"]}
    assert sum(phase["mean_s"] for phase in told["phases"]) == pytest.approx(told["marked_step_s"]["mean"], rel=1e-3)
    assert all(share >= 0 for share in shares.values())
    assert shares["encoder"] > 0
    assert shares["backward"] > 0
    assert 0 < told["mfu"] < 1
    assert 0 < told["memory"]["peak"] < told["memory"]["free"]
    assert told["ceiling_flops_per_s"] > 1e12
    events = json.loads((tmp_path / "p" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
