"""The numbers of the official attentive probe (see tests/data/README.md), in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from close import assert_close
from nextblock.xtra.heads import AttentiveHeads

DATA = Path(__file__).parents[1] / "data"


def test_the_attentive_probe_is_the_official_one() -> None:
    sizes = json.loads((DATA / "attentive_probe.json").read_text())
    golden = dict(np.load(DATA / "attentive_probe.npz"))
    theirs = torch.load(DATA / "attentive_probe.ckpt", weights_only=True)["state_dict"]
    theirs = {name.removeprefix("classifier."): value for name, value in theirs.items()}
    names = {"query": "cls_token", "key": "k.weight", "value": "v.weight", "weight": "linear.weight"}
    names |= {"bias": "linear.bias"}
    head = AttentiveHeads(
        sizes["dim"], sizes["num_classes"], num_heads=sizes["num_heads"], num_queries=sizes["num_queries"]
    )
    for name, parameter in head.named_parameters():
        parameter.data.copy_(theirs[names[name]].view_as(parameter))
    tokens, labels = torch.from_numpy(golden["tokens"]), torch.from_numpy(golden["labels"])
    (logits,) = head(tokens)
    assert_close(logits, golden["train_logits"], 1e-4)
    assert_close(F.cross_entropy(logits, labels), golden["loss"], 1e-4)
    assert_close(head.norm.running_mean, golden["running_mean"], 1e-4)
    assert_close(head.norm.running_var, golden["running_var"], 1e-4)
    (logits,) = head.eval()(tokens)
    assert_close(logits, golden["eval_logits"], 1e-4)
