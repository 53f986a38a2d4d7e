from __future__ import annotations

import argparse
import collections
import io
import json
import pathlib
import pickle
import struct
import sys
import textwrap
import types
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from safetensors.torch import load_file, save_file
from torch import nn

from nextblock.checkpoints.foreign_files import read_file, read_tensors, read_weights
from nextblock.checkpoints.plain_values import ALLOWED
from nextblock.errors import CheckpointError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class _Omega:
    """Pickled as omegaconf pickles its containers and values: a new object, then its attributes."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], Any]:
    """Makes a class that pickles under the name of another package's."""

    def make(base: type, qualified: str) -> Any:
        module, _, name = qualified.rpartition(".")
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            place = ".".join(parts[:count])
            if place not in sys.modules:
                monkeypatch.setitem(sys.modules, place, types.ModuleType(place))
        made = type(name, (base,), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    return make


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


def same(found: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.bin", "w"])
def test_a_bare_state_dict_of_either_pytorch_format_whatever_its_name(tmp_path: Path, old: bool, name: str) -> None:
    path = saved(tmp_path / name, STATE, _use_new_zipfile_serialization=not old)
    found = read_weights(path)
    assert same(found.tensors)
    assert found.wrapper is None
    assert found.beside == ()


def test_safetensors_is_known_by_its_content_and_not_by_its_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.ckpt", metadata={"format": "pt"})
    assert sorted(read_tensors(tmp_path / "w.ckpt")) == sorted(STATE)
    assert same(read_tensors(saved(tmp_path / "in_truth_a_zip.safetensors", STATE)))


def test_a_lightning_and_a_deepspeed_file_and_which_wrapper_was_taken(tmp_path: Path) -> None:
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.6.6", "state_dict": STATE, "hyper_parameters": {"lr": 0.1}}
    found = read_weights(saved(tmp_path / "a.ckpt", lightning))
    assert same(found.tensors)
    assert found.wrapper == "state_dict"
    assert found.beside == ("epoch", "pytorch-lightning_version", "hyper_parameters")
    shapes = [collections.OrderedDict((n, t.shape) for n, t in STATE.items())]
    deepspeed = {"module": STATE, "param_shapes": shapes, "dp_world_size": 8, "sparse_tensor_module_names": {"x"}}
    found = read_weights(saved(tmp_path / "mp_rank_00_model_states.pt", deepspeed))
    assert same(found.tensors)
    assert found.wrapper == "module"
    assert read_file(tmp_path / "mp_rank_00_model_states.pt")["param_shapes"] == [{"a.weight": [2, 3], "a.bias": [2]}]


def test_the_first_wrapper_that_is_there_wins(tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in STATE.items()}
    path = saved(tmp_path / "x.pth", {"model": other, "model_ema": STATE, "optimizer": {"state": {0: {"step": 1}}}})
    found = read_weights(path, ("model_ema", "model"))
    assert same(found.tensors)
    assert found.wrapper == "model_ema"
    assert found.beside == ("model", "optimizer")
    assert read_weights(path, ("state_dict", "model")).wrapper == "model"


def test_options_of_training_scripts_become_plain_values(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(lr=1e-4, blocks=(1, 2), out=pathlib.Path("/runs/a")),
        "windows": pathlib.PureWindowsPath("C:/x"),
        "more": types.SimpleNamespace(a=1),
        "hyper_parameters": AttributeDict(width=8, inner=AttributeDict(depth=2)),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "kinds": {int, str},
        "loss": np.float64(0.5),
        "big_endian": np.dtype(">i4").type(7),
        "rng": np.arange(6, dtype=">i4").reshape(2, 3).T,
        "dtype": torch.float16,
        "numpy_dtype": np.dtype("f4"),
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "raw": b"\x00\xff",
        "model": STATE,
    }  # fmt: skip
    found = read_file(saved(tmp_path / "run.pth", content))
    rng = found.pop("rng")
    assert torch.equal(rng, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert same(found.pop("model"))
    assert sorted(found.pop("kinds")) == ["builtins.int", "builtins.str"]
    assert found == {
        "args": {"lr": 1e-4, "blocks": [1, 2], "out": "/runs/a"},
        "windows": "C:\\x",
        "more": {"a": 1},
        "hyper_parameters": {"width": 8, "inner": {"depth": 2}},
        "counts": {"a": [1]},
        "loss": 0.5,
        "big_endian": 7,
        "dtype": "torch.float16",
        "numpy_dtype": "float32",
        "device": "cpu",
        "size": [2, 3],
        "raw": b"\x00\xff",
    }
    assert all(type(value) in (dict, list, str, float, int, bytes) for value in found.values())


def test_omegaconf_and_deepspeed_objects_without_those_packages(tmp_path: Path, foreign: Any) -> None:
    metadata = foreign(_Omega, "omegaconf.base.ContainerMetadata")(ref_type=Any, object_type=dict, flags={})
    node = foreign(_Omega, "omegaconf.nodes.AnyNode")
    config = foreign(_Omega, "omegaconf.dictconfig.DictConfig")(_metadata=metadata, _parent=None)
    items = foreign(_Omega, "omegaconf.listconfig.ListConfig")(_metadata=metadata, _parent=config)
    items._content = [node(_val=1, _parent=items), node(_val="${lr}", _parent=items)]
    config._content = {"lr": node(_val=0.5, _parent=config), "items": items}
    scaler = foreign(_Omega, "deepspeed.runtime.fp16.loss_scaler.LossScaler")(cur_scale=1.0, dynamic=False)
    callback = foreign(object, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    content = {"config": config, "scaler": scaler, "callbacks": {callback: {"best": 0.5}}, "state_dict": STATE}
    found = read_file(saved(tmp_path / "a.ckpt", content))
    assert found["config"] == {"lr": 0.5, "items": [1, "${lr}"]}
    assert found["scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert found["callbacks"] == {"pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": {"best": 0.5}}


def test_what_is_tied_in_the_file_is_tied_here_and_extras_of_tensors_are_dropped(tmp_path: Path) -> None:
    shared = nn.Parameter(torch.ones(3))
    marked = torch.zeros(2)
    marked.note = "a"  # type: ignore[attr-defined]
    found = read_tensors(saved(tmp_path / "w.pt", {"a": shared, "b": shared, "c": marked}))
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert type(found["a"]) is torch.Tensor
    assert not found["a"].requires_grad
    assert not hasattr(found["c"], "note")


def test_the_allow_list_is_inert_and_only_ours() -> None:
    """Nothing callable in it comes from another package, and no stand-in can do more than keep what it is handed."""
    for stand_in, name in ALLOWED:
        assert stand_in is collections.OrderedDict or stand_in.__module__ == "nextblock.checkpoints.plain_values", name
        if isinstance(stand_in, type) and stand_in is not collections.OrderedDict:
            made = stand_in(1, "two")
            made.__setstate__({"title": "x", "plain": 1})
            assert vars(made) == {"args": (1, "two"), "state": {"title": "x", "plain": 1}}
    assert len({name for _, name in ALLOWED}) == len(ALLOWED)


def test_what_other_packages_allowed_is_not_allowed_here_and_is_again_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"odd": Fraction(1, 3), "x": torch.ones(1)})
    with torch.serialization.safe_globals([Fraction]):
        torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match=r"it asks for fractions\.Fraction, which"):
            read_file(path)
        torch.load(path, weights_only=True)


def test_a_refusal_names_all_the_types_and_its_lines_re_save_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: Callable[[type, str], Any]
) -> None:
    odd = [foreign(_Omega, "theirs.Options")(lr=1), foreign(_Omega, "theirs.Other")()]
    tied = torch.ones(3)
    path = saved(tmp_path / "theirs.pth", {"epoch": 1, "o": odd, "model": {"w": tied, "v": tied, "n": 1}})
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path, ("model",))
    told = str(caught.value)
    assert "it asks for theirs.Options, theirs.Other, which" in told
    assert len(told.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(line for line in told.splitlines() if line.startswith("    "))), {})
    assert sorted(read_tensors(tmp_path / "new.safetensors")) == ["v", "w"]
    assert torch.equal(load_file(tmp_path / "new.safetensors")["w"], tied)


def test_the_lines_look_under_every_wrapper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: Callable[[type, str], Any]
) -> None:
    odd = foreign(_Omega, "theirs.Options")(lr=1)
    path = saved(tmp_path / "lightning.ckpt", {"hyper_parameters": odd, "state_dict": {"w": torch.ones(3)}})
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path, ("model_ema", "model", "state_dict", "module"))
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(line for line in str(caught.value).splitlines() if line.startswith("    "))), {})
    assert sorted(read_tensors(tmp_path / "new.safetensors")) == ["w"]


def test_the_lines_re_save_a_pickled_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "model.pth", nn.Linear(2, 3))
    with pytest.raises(CheckpointError, match=r"asks for .*torch\.nn\.modules\.linear\.Linear") as caught:
        read_tensors(path)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(line for line in str(caught.value).splitlines() if line.startswith("    "))), {})
    assert sorted(read_tensors(tmp_path / "new.safetensors")) == ["bias", "weight"]


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("keep", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_that_was_cut_off(tmp_path: Path, kind: str, keep: float) -> None:
    path = tmp_path / "w.pt"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        saved(path, STATE, _use_new_zipfile_serialization=kind == "zip")
    _cut(path, keep)
    with pytest.raises(CheckpointError, match=r"not a whole|Download it again"):
        read_tensors(path)


@pytest.mark.parametrize(("content", "told"), [
    (b"", "is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "Git LFS pointer, not the file"),
    (b"\n<!DOCTYPE html><html>", "a web page"),
    (b"\xef\xbb\xbf<html>", "a web page"),
    (b"<?xml version='1.0'?><Error/>", "server's error message"),
    (b"\x1f\x8b\x08\x00", "gunzip"),
    (b"some text", "read safely"),
    (b"\x80\x02", "read safely"),
    (b"PK\x05\x06" + bytes(18), "read safely"),
    (b"PK\x03\x04" + bytes(60), "not a whole PyTorch file"),
], ids=str)  # fmt: skip
def test_what_is_no_weights_file_is_told_for_what_it_is(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        read_file(path)


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_file(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_file(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"neither")
    with pytest.raises(CheckpointError, match="though it is named one"):
        read_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("content", "told"), [
    ({}, "is empty"),
    ({"state_dict": {}}, "under 'state_dict', no state dict of tensors: it is empty"),
    ({"epoch": 3, "weights": STATE}, r"has 'epoch' \(int\), 'weights' \(dict\)\. Looked for under 'state_dict', "),
    ({0: torch.ones(1)}, "has 0"),
    ([torch.ones(1)], "a list"),
    (torch.ones(1), "a Tensor"),
    ({"w": torch.ones(2, 2).to_sparse()}, r"w \(sparse or nested\)"),
    ({"w": torch.ones(2, 2, device="meta")}, r"w \(without numbers"),
], ids=str)  # fmt: skip
def test_a_file_without_usable_tensors(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read_tensors(saved(tmp_path / "w.pt", content))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})
    with pytest.raises(CheckpointError, match=r"w \(quantized\)"):
        read_tensors(path)


@pytest.mark.parametrize("claimed", [2**60, 2**63 + 5, 10**8 + 1, 5000])
def test_a_safetensors_header_that_claims_more_than_there_is(tmp_path: Path, claimed: int) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{" + bytes(1000))
    with pytest.raises(CheckpointError, match=f"header claims {claimed} bytes"):
        read_file(path)


def test_safetensors_that_claim_more_data_than_there_is(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_file(path)


def _rezip(path: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda name, data: data) -> None:
    with zipfile.ZipFile(path) as old:
        content = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in content.items():
            new.writestr(name, change(name, data))


def test_packed_archives_are_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", {"w": torch.zeros(2_000_000)})
    _rezip(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match=r"packed or overlap, or claim more bytes \(80"):
        read_file(path)
    path = saved(tmp_path / "fine.pt", STATE)
    _rezip(path, zipfile.ZIP_STORED)
    assert same(read_tensors(path))
    path.write_bytes(b"PK\x03\x04" + path.read_bytes())  # PyTorch and Python would find different entries
    with pytest.raises(CheckpointError, match="whole archive"):
        read_file(path)


@pytest.mark.parametrize("view", [
    torch.zeros(1).expand(2**40), torch.zeros(1).as_strided((2**20, 2**20), (0, 0)),
], ids=["expanded", "strided"])  # fmt: skip
def test_a_tensor_that_claims_more_than_the_file_has(tmp_path: Path, view: torch.Tensor) -> None:
    """Its first use would take all memory."""
    with pytest.raises(CheckpointError, match="more than the whole file"):
        read_file(saved(tmp_path / "w.pt", {"w": view}))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_values_that_unfold_hold_themselves_or_are_nested_too_deep(tmp_path: Path, old: bool) -> None:
    twice: list[Any] = []
    for _ in range(50):
        twice = [twice, twice]
    ring: list[Any] = []
    ring.append(ring)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    hidden = argparse.Namespace(a=1)
    for _ in range(15):
        hidden = argparse.Namespace(a=[hidden] * 8)
    contents = (
        (twice, "unfold"),
        (ring, "hold themselves"),
        (deep, "nested too deep"),
        (hidden, "unfolds to more than"),
    )
    for content, told in contents:
        path = saved(tmp_path / "w.pt", {"x": content}, _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=told) as caught:
            read_file(path)
        assert "torch.load" not in str(caught.value)  # no advice to run it


def _pairs(count: int) -> bytes:
    """Pickled: a pair of the pair of the pair before it, each twice."""
    steps = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(count))
    return b"K\x01\x85q\x00" + steps


@pytest.mark.parametrize("last", [
    b"}" + _pairs(60) + b"K\x01s.",  # a key, which is hashed
    _pairs(60) + b")R.",  # called, of which the reader's message would tell
    b"}" + _pairs(60) + b"K\x01s\xff",  # and then the stream breaks off
    b"}}" + _pairs(60) + b"K\x01sb.",  # inside attributes
    b"(" + _pairs(60) + b"(d.",  # left behind a mark
], ids=["key", "call", "broken", "attributes", "mark"])  # fmt: skip
def test_small_pickles_that_would_keep_the_reader_busy_for_ever(tmp_path: Path, last: bytes) -> None:
    with pytest.raises(CheckpointError, match="unfold"):
        read_file(_with_pickle(tmp_path / "w.pt", b"\x80\x02" + last))
    honest = _with_pickle(tmp_path / "w.pt", b"\x80\x02}.").read_bytes()
    (tmp_path / "w.pt").write_bytes(b"\x80\x02" + last + honest)  # a pickle to PyTorch, an archive to Python
    with pytest.raises(CheckpointError, match="unfold"):
        read_file(tmp_path / "w.pt")


def test_a_large_honest_file_does_not_unfold(tmp_path: Path) -> None:
    """An optimiser's state: many tensors, and groups that share their values."""
    state = {i: {"step": torch.ones(()), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(500)}
    groups = [{"lr": 0.1, "betas": (0.9, 0.95), "params": list(range(500))}] * 50
    found = read_file(saved(tmp_path / "w.pt", {"model": STATE, "optimizer": {"state": state, "groups": groups}}))
    assert len(found["optimizer"]["state"]) == 500


def test_numpy_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """Their bytes are pointers; numpy would follow what the file says."""
    path = saved(tmp_path / "w.pt", {"w": np.array([{}, {}], dtype=object)})
    with pytest.raises(CheckpointError, match="something else than numbers"):
        read_file(path)
    stream = (
        pickle.dumps({"w": np.arange(3)}, 2)
        .replace(b"U\x02i8", b"U\x02O8")
        .replace(b"X\x02\x00\x00\x00i8", b"X\x02\x00\x00\x00O8")
    )
    with pytest.raises(CheckpointError, match="something else than numbers"):
        read_file(_with_pickle(tmp_path / "w.pt", stream))


def _with_pickle(path: Path, stream: bytes) -> Path:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    path.write_bytes(buffer.getvalue())
    _rezip(path, zipfile.ZIP_STORED, lambda name, data: stream if name.endswith("data.pkl") else data)
    return path


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = _with_pickle(tmp_path / "w.pt", b"\x80\x02cos\x1b[2J\nsystem\x07\n.")
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)
    assert "os?[2J.system?" in str(caught.value)
