"""Models pushed to a hub and had back by name, in a process of its own with a user's environment variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import WRITER, HubServer

_USER = """
import json, sys
import torch
import nextblock as nb
from nextblock.errors import NextblockError
from nextblock.jobs.opening import open_encoder

sizes = dict(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=2, num_heads=2, head_hidden=8)
model = nb.XTRA(nb.XTRAConfig(**sizes)).eval()
images = torch.rand(2, 3, 16, 16)
told = {"address": model.push_to_hub("me/model", private=True)}
again = nb.XTRA.from_pretrained("me/model")
told["same"] = bool(torch.equal(again.loss(images), model.loss(images)))
told["encoder"] = bool(torch.equal(nb.Encoder.from_pretrained("me/model")(images), model.encoder(images)))
told["preprocessing"] = list(nb.Preprocessing.from_pretrained("me/model").size_px)
opened = open_encoder("hf:me/model", "cpu")
told["job"] = bool(torch.equal(opened.encoder(images), model.encoder(images)))
nb.XTRA(nb.XTRAConfig(**sizes)).push_to_hub("me/model", revision="second")
other = nb.XTRA.from_pretrained("me/model", revision="second")
told["revision"] = not torch.equal(other.loss(images), model.loss(images))
for name, call in {
    "absent": lambda: nb.XTRA.from_pretrained("me/none"),
    "kind": lambda: nb.XAR.from_pretrained("me/model"),
    "run": lambda: open_encoder("me/model", "cpu"),
}.items():
    try:
        call()
    except NextblockError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


def test_push_and_fetch(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub").running() as server:
        variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
        variables |= {"HF_HUB_DISABLE_XET": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", _USER], capture_output=True, text=True, cwd=tmp_path, check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["address"].endswith("/me/model")
    assert told["same"]
    assert told["encoder"]
    assert told["job"]
    assert told["revision"]
    assert told["preprocessing"] == [16, 16]
    assert "me/none" in told["absent"]
    assert "holds an encoder with its predictor, not a generator" in told["kind"]
    assert "For weights on the Hugging Face hub write hf:me/model." in told["run"]
