from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, which is imported below, and of every process a test starts

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
