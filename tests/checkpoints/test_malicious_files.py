"""No file has a side effect, through any entry point that reads it; it is refused, soon, with an error of ours."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_program import write_program

import nextblock as nb
from hostile_files import CONTAINERS, PAYLOADS, Watch, called, extension, name_of, pickled, raw_bytes, text
from nextblock.checkpoints.foreign_files import read_file, read_tensors
from nextblock.checkpoints.pretrained import load_pretrained
from nextblock.data.latents.cache import open_latents
from nextblock.data.named.arrays import cifar10
from nextblock.data.named.dataset import Columns
from nextblock.errors import NextblockError
from nextblock.evaluation.image_sets import open_image_set
from nextblock.evaluation.reconstruction import Reconstructions
from nextblock.jobs.opening import open_classifier, open_encoder, open_model
from nextblock.jobs.opening_generator import open_generator
from nextblock.recipes.config import read_recipe
from nextblock.training.checkpoint import read_checkpoint

XTRA = nb.XTRAConfig(image_size_px=8, patch_size_px=2, cell_size=2, width=8, depth=1, num_heads=1, head_hidden=8)
XAR = nb.XARConfig(latent_size=4, latent_channels=3, entity_size=2, width=8, depth=2, num_heads=1, num_classes=2)
LIMIT_S = 10.0
RECONSTRUCTIONS = tuple(field.name for field in dataclasses.fields(Reconstructions))
Open = Callable[[Path], Any]

WEIGHTS: dict[str, Open] = {
    "read_file": read_file,
    "read_tensors": read_tensors,
    "load_official_xtra": lambda path: nb.load_official_xtra(path, XTRA),
    "load_official_xar": lambda path: nb.load_official_xar(path, XAR),
    "load_official_kl16": nb.load_official_kl16,
    "open_vae": nb.open_vae,
}
XTRA_FOLDERS: dict[str, Open] = {
    "load_pretrained": load_pretrained,
    "XTRA.from_pretrained": nb.XTRA.from_pretrained,
    "Encoder.from_pretrained": nb.Encoder.from_pretrained,
    "open_model": lambda path: open_model(path, device="cpu"),
    "open_encoder": lambda path: open_encoder(path, device="cpu"),
    "open_classifier": lambda path: open_classifier(path, device="cpu"),
}
XAR_FOLDERS: dict[str, Open] = {
    "XAR.from_pretrained": nb.XAR.from_pretrained,
    "open_generator": lambda path: open_generator(path, device="cpu"),
}


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture
def refused(tmp_path: Path, watch: Watch) -> Callable[..., Any]:
    """A context in which one of our errors has to be raised, and nothing else may happen."""
    sentinel = tmp_path / "sentinel"

    @contextmanager
    def check(title: str, returns: bool = False) -> Iterator[None]:
        watch.seen.clear()
        began = time.monotonic()
        watch.active = True
        try:
            with suppress(NextblockError) if returns else pytest.raises(NextblockError):
                yield
        finally:
            watch.active = False  # also where another error comes through, which an expected failure would hide
            assert not sentinel.exists(), f"{title} ran the code in the file"
            assert not watch.seen, f"{title}: {watch.seen}"
            assert time.monotonic() - began < LIMIT_S, title

    return check


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    return tmp_path / "sentinel"


@pytest.mark.parametrize("name", PAYLOADS)
def test_each_payload_does_run_where_pickles_are_trusted(name: str, sentinel: Path) -> None:
    """Or the tests below would show nothing."""
    with extension(), suppress(Exception):
        pickle.loads(pickled(PAYLOADS[name](sentinel)))
    assert sentinel.exists()


@pytest.mark.parametrize("container", ["zip", "zip, beside tensors", "legacy, object", "legacy, magic"])
def test_each_container_does_run_where_pickles_are_trusted(container: str, sentinel: Path, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(CONTAINERS[container](PAYLOADS["exec"](sentinel)))
    with suppress(Exception):
        torch.load(tmp_path / "w.pt", weights_only=False)
    assert sentinel.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs_from_any_container(name: str, sentinel: Path, tmp_path: Path, refused: Any) -> None:
    with extension():
        for i, (title, wrap) in enumerate(CONTAINERS.items()):
            path = tmp_path / f"{i}{'.safetensors' if i % 2 else '.pt'}"
            path.write_bytes(wrap(PAYLOADS[name](sentinel)))
            with refused(f"read_file of {name} in {title}"):
                read_file(path)


@pytest.mark.parametrize("entry", WEIGHTS)
def test_no_payload_runs_through_any_reader_of_weights(
    entry: str, sentinel: Path, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "w.ckpt"
    with extension():
        for name, payload in PAYLOADS.items():
            path.write_bytes(CONTAINERS["zip, beside tensors"](payload(sentinel)))
            with refused(f"{entry} of {name}"):
                WEIGHTS[entry](path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An honest weights folder for each entry."""
    place = tmp_path_factory.mktemp("saved")
    xtra, xar = nb.XTRA(XTRA).save_pretrained(place / "xtra"), nb.XAR(XAR).save_pretrained(place / "xar")
    return dict.fromkeys(XTRA_FOLDERS, Path(xtra)) | dict.fromkeys(XAR_FOLDERS, Path(xar))


def _weights_folder(folder: Path, honest: Path, weights: bytes) -> Path:
    """The honest folder with another model.safetensors, whose hash is right."""
    shutil.copytree(honest, folder)
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text()) | {"sha256": hashlib.sha256(weights).hexdigest()}
    vae = {"kind": "pixels", "latent_channels": 3, "scale_factor": 1.0, "sha256": None}
    config["generator"] = {"vae": vae, "classes": ["a", "b"], "image_size_px": [4, 4], "channels": 3, "weights": "raw"}
    del config["about_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("entry", sorted({*XTRA_FOLDERS, *XAR_FOLDERS} - {"open_classifier"}))
def test_an_honest_folder_opens_with_each_entry(entry: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """So that what is refused below is refused for what is wrong with it."""
    folder = _weights_folder(tmp_path / "x", saved[entry], (saved[entry] / "model.safetensors").read_bytes())
    assert (XTRA_FOLDERS | XAR_FOLDERS)[entry](folder)


@pytest.mark.parametrize("entry", [*XTRA_FOLDERS, *XAR_FOLDERS])
def test_no_payload_runs_from_a_weights_folder(
    entry: str, saved: dict[str, Path], sentinel: Path, tmp_path: Path, refused: Any
) -> None:
    for i, (title, wrap) in enumerate(CONTAINERS.items()):
        folder = _weights_folder(tmp_path / str(i), saved[entry], wrap(PAYLOADS["os.system"](sentinel)))
        (folder / "pytorch_model.bin").write_bytes(CONTAINERS["zip"](PAYLOADS["exec"](sentinel)))
        (folder / "modeling.py").write_text(f"open({str(sentinel)!r}, 'w')")
        with refused(f"{entry} of {title}"):
            (XTRA_FOLDERS | XAR_FOLDERS)[entry](folder)


def test_no_payload_runs_from_the_state_of_a_run(sentinel: Path, tmp_path: Path, refused: Any) -> None:
    for i, (name, payload) in enumerate(PAYLOADS.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        state = CONTAINERS["zip"](payload(sentinel))
        (folder / "state.pt").write_bytes(state)
        (folder / "checkpoint.json").write_text(json.dumps({"sha256": hashlib.sha256(state).hexdigest()}))
        with extension(), refused(f"read_checkpoint of {name}"):
            read_checkpoint(folder)


def test_a_program_of_torchscript_is_not_run(
    saved: dict[str, Path], sentinel: Path, tmp_path: Path, refused: Any
) -> None:
    path = write_program(tmp_path / "w.pt", sentinel)
    for entry, reader in WEIGHTS.items():
        with refused(entry):
            reader(path)
    folder = _weights_folder(tmp_path / "folder", saved["load_pretrained"], path.read_bytes())
    with refused("load_pretrained"):
        load_pretrained(folder)


def test_stand_ins_cannot_be_turned_into_something_else(sentinel: Path, tmp_path: Path, refused: Any) -> None:
    """What is allowed is called with arguments of the file's choice, made into other types, given other attributes."""
    names = ["argparse.Namespace", "pathlib.PosixPath", "numpy.dtype", "numpy.core.multiarray.scalar", "builtins.dict"]
    classes = [name_of(*name.rsplit(".", 1)) for name in names]
    rebuild = name_of("torch._tensor", "_rebuild_from_type_v2")
    state = b"}" + text("__class__") + classes[0] + b"s" + text("plain") + classes[1] + b"s"
    tensor = called(name_of("torch", "Tensor"))
    hostile = [
        *(called(each, text(str(sentinel)), text("w")) for each in classes),
        *(called(each) + state + b"b" for each in classes),
        *(each + b")\x81" + b"N" + state + b"\x86b" for each in classes),
        *(called(rebuild, each, each, b")", state) for each in classes),
        *(called(rebuild, name_of("torch", "Tensor"), each, b")", state) for each in classes),
        *(called(each, raw_bytes(b"x" * 8)) + b"(K\x01" + tensor + raw_bytes(b"|O") + b"tb" for each in classes),
called(rebuild, *2 * [name_of("torch", "Tensor")], b")", b"}" + text("detach") + classes[0] + b"s"),
        called(name_of("collections", "defaultdict"), name_of("builtins", "list")) + state + b"b",
    ]  # fmt: skip
    for i, payload in enumerate(hostile):
        (tmp_path / "w.pt").write_bytes(CONTAINERS["zip"](payload))
        with refused(f"number {i}", returns=True):
            read_file(tmp_path / "w.pt")


HEADERS: dict[str, str] = {
    "metadata of objects": '{"__metadata__": {"__class__": {"py/reduce": "os.system"}}}',
    "metadata nested": '{"__metadata__": ' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}",
    "arrays nested": "[" * 100_000,
    "overlapping": '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
    ' "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]}}',
    "twice the same name": '{"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},'
    ' "a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}',
    "a hole": '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [12, 16]}}',
    "backwards": '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [16, 0]}}',
    "negative": '{"a": {"dtype": "U8", "shape": [-4], "data_offsets": [-4, 0]}}',
    "overflow": '{"a": {"dtype": "F64", "shape": [4294967296, 4294967296], "data_offsets": [0, 16]}}',
    "unknown type": '{"a": {"dtype": "OBJECT", "shape": [2], "data_offsets": [0, 16]}}',
    "not a number": '{"a": {"dtype": "F64", "shape": [NaN], "data_offsets": [0, 1e999]}}',
    "names that are paths": '{"../../hostile": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}',
    "no JSON": "{" * 1000,
}


@pytest.mark.parametrize("title", HEADERS)
def test_headers_of_safetensors(title: str, saved: dict[str, Path], tmp_path: Path, refused: Any) -> None:
    header = HEADERS[title].encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16)
    (tmp_path / "w.safetensors").write_bytes(content)
    for entry, reader in WEIGHTS.items():
        with refused(f"{entry} of {title}", returns=entry.startswith("read_")):
            reader(tmp_path / "w.safetensors")
    for entry in ("load_pretrained", "open_encoder"):
        folder = _weights_folder(tmp_path / entry, saved[entry], content)
        with refused(f"{entry} of {title}"):
            XTRA_FOLDERS[entry](folder)


JSON: dict[str, str] = {
    "nested": '{"config":' * 100_000 + "1" + "}" * 100_000,
    "lists nested": "[" * 100_000,
    "a list": "[1, 2]",
    "a text": '"os.system"',
    "not a number": '{"model_type": "xtra", "config": {"width": NaN, "depth": Infinity}}',
    "huge": '{"model_type": "xtra", "config": {"width": 1e999, "depth": ' + "9" * 4000 + "}}",
    "endless digits": '{"format": ' + "9" * 100_000 + "}",
    "classes": '{"model_type": "xtra", "config": {"__class__": "os.system", "__reduce__": ["touch"]}}',
    "py/object": '{"py/object": "os.system", "py/reduce": [{"py/function": "os.system"}], "model_type": "xtra"}',
    "_target_": '{"_target_": "os.system", "model_type": "os.system", "config": {"_target_": "os.system"}}',
    "auto_map": '{"auto_map": {"AutoModel": "modeling.Hostile"}, "model_type": "modeling", "config": {}}',
    "bytes": "\x00\x01\x02",
}


@pytest.mark.parametrize("title", JSON)
def test_json_of_a_weights_folder(title: str, saved: dict[str, Path], tmp_path: Path, refused: Any) -> None:
    """config.json and preprocessor_config.json."""
    for entry, reader in (XTRA_FOLDERS | XAR_FOLDERS).items():
        for name in ("config.json", "preprocessor_config.json"):
            folder = shutil.copytree(saved[entry], tmp_path / entry / name)
            (folder / name).write_text(JSON[title])
            with refused(f"{entry} of {title} in {name}", returns=name != "config.json"):
                reader(folder)


@pytest.mark.parametrize("title", JSON)
def test_json_of_a_latent_cache(title: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "latents.json").write_text(JSON[title])
    with refused(f"open_latents of {title}"):
        open_latents(tmp_path)


@pytest.mark.parametrize("title", JSON)
def test_json_of_a_vae(title: str, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "config.json").write_text(JSON[title])
    with refused(f"open_vae of {title}"):
        nb.open_vae(tmp_path)


YAML: dict[str, str] = {
    "apply": "model: !!python/object/apply:os.system ['touch {}']",
    "new": "model: !!python/object/new:hostile_files.Trap ['{}']",
    "object": "model: !!python/object:hostile_files.Trap {{path: '{}'}}",
    "name": "model: {{width: !!python/name:os.system ''}}",
    "module": "model: {{width: !!python/module:os ''}}",
    "a tag": "model: !os.system 'touch {}'",
    "nested": "model: {{width: " + "[" * 2000,
    "aliases": "data: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n" for old, new in
        zip("abcdefghij", "bcdefghijk", strict=True)
    ),
}  # fmt: skip


@pytest.mark.parametrize("title", YAML)
def test_recipes(title: str, sentinel: Path, tmp_path: Path, refused: Any) -> None:
    content = YAML[title].format(sentinel)
    (tmp_path / "config.yaml").write_text(content)
    with refused(f"--config of {title}"):
        read_recipe(tmp_path / "config.yaml")


@pytest.mark.parametrize("title", YAML)
def test_config_yaml_of_a_run(title: str, sentinel: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "config.yaml").write_text(YAML[title].format(sentinel))
    for entry, reader in (("open_encoder", open_encoder), ("open_generator", open_generator)):
        with refused(f"{entry} of {title}"):
            reader(tmp_path)


NPY: dict[str, str] = {
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "fields of objects": "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (2,), }",
    "a call": "__import__('os').system('touch %s')",
    "a call inside": "{'descr': __import__('os').system('touch %s'), 'fortran_order': False, 'shape': (2,)}",
    "nested": "{'descr': " + "(" * 5000,
    "huge": "{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4), }",
}


@pytest.mark.parametrize("title", NPY)
@pytest.mark.parametrize(
    "names", [("arr_0",), ("mu", "sigma"), RECONSTRUCTIONS], ids=["samples", "statistics", "saved"]
)
def test_numpy_files(names: tuple[str, ...], title: str, sentinel: Path, tmp_path: Path, refused: Any) -> None:
    header = NPY[title].replace("%s", str(sentinel)).encode() + b"\n"
    stream = pickled(PAYLOADS["os.system"](sentinel))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + stream)
    with refused(f"{names} of {title}"):
        if names == RECONSTRUCTIONS:
            Reconstructions.load(tmp_path / "x.npz")
        else:
            open_image_set(str(tmp_path / "x.npz"), scratch=tmp_path)


def test_pickled_batches_of_cifar(sentinel: Path, tmp_path: Path, refused: Any) -> None:
    names = ["batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, payload in PAYLOADS.items():
        for file in names:
            (tmp_path / file).write_bytes(pickled(payload(sentinel)))
        with extension(), refused(f"cifar10 of {name}"):
            cifar10(tmp_path, Columns())["test"]()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_folder_of_a_vae(sentinel: Path, tmp_path: Path, refused: Any) -> None:
    import diffusers  # its import may write; that is no doing of the file

    assert diffusers.AutoencoderKL
    config = {"_class_name": "AutoencoderKL", "auto_map": {"AutoModel": "modeling.Hostile"}}
    for i, name in enumerate(PAYLOADS):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling.py").write_text(f"open({str(sentinel)!r}, 'w')")
        payload = PAYLOADS[name](sentinel)
        (folder / "diffusion_pytorch_model.bin").write_bytes(CONTAINERS["zip"](payload))
        if i % 2:
            (folder / "diffusion_pytorch_model.safetensors").write_bytes(CONTAINERS["legacy, object"](payload))
        with extension(), refused(f"open_vae of {name}"):
            nb.open_vae(folder)
