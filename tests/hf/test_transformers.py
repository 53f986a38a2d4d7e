"""Our folders in transformers: the same numbers, the same mask, and no way to open them as something else."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Model,
    ViTModel,
    pipeline,
)

import nextblock.hf
from nextblock.checkpoints import hub
from nextblock.checkpoints.custom_code import FILE
from nextblock.checkpoints.pretrained import file_sha256, load_pretrained, save_pretrained
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import CheckpointError, ConfigError, SampleError
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.heads import make_heads
from nextblock.xtra.model import XTRA, Encoder

TINY = XTRAConfig(
    image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=2, num_heads=2, predictor_width=16,
    predictor_depth=1, predictor_heads=2, head_hidden=32,
)  # fmt: skip
CLASSES = ("cat", "dog", "newt")
VALUES = Preprocessing((16, 16), mean=(0.4, 0.5, 0.6)).to_dict()
KINDS = ("xtra", "xtra_encoder", "xtra_classifier")


def _model(kind: str) -> Any:
    torch.manual_seed(KINDS.index(kind))
    if kind == "xtra_classifier":
        head = HeadConfig("attentive", LayerMean(1, 2, bidirectional=True), num_heads=4)
        made = Classifier(TINY, head, CLASSES)
        made(torch.randn(8, 3, 16, 16))  # the running statistics are no longer those of the start
        return made
    return XTRA(TINY) if kind == "xtra" else Encoder(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("weights")
    return {kind: save_pretrained(base / kind, _model(kind), VALUES, "a card", {"lake": "deep"}) for kind in KINDS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(3):
        pixels = generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{i}.png")
    return [str(path) for path in sorted(base.iterdir())]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_numbers_are_those_of_our_encoder(kind: str, folders: dict[str, Path], images: Tensor) -> None:
    model, ours = AutoModel.from_pretrained(folders[kind]), Encoder.from_pretrained(folders[kind])
    found = model(pixel_values=images, output_hidden_states=True)
    assert not model.training
    assert torch.equal(found.last_hidden_state, ours(images))
    assert torch.equal(found.pooler_output, ours.features(images).mean(1))
    assert len(found.hidden_states) == TINY.depth + 1
    assert torch.equal(found.hidden_states[-1], ours.features(images))
    assert torch.equal((found.hidden_states[1] + found.hidden_states[2]) / 2, ours.features(images, 2))
    assert torch.equal(ours.norm(found.hidden_states[-1]), found.last_hidden_state)
    assert torch.equal(model(images, return_dict=False)[0], found.last_hidden_state)


@torch.no_grad()
def test_the_first_hidden_state_is_what_the_first_layer_is_given(folders: dict[str, Path], images: Tensor) -> None:
    model = AutoModel.from_pretrained(folders["xtra"])
    seen: list[Tensor] = []
    model.encoder.layers.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    first = model(images, output_hidden_states=True).hidden_states[0]  # [2, 16, D], raster order
    assert torch.equal(TINY.ordering.split(first.unflatten(1, (4, 4))), seen[0])


@torch.no_grad()
def test_the_mask_is_kept_unless_it_is_taken_off(folders: dict[str, Path], images: Tensor) -> None:
    model, ours = AutoModel.from_pretrained(folders["xtra"]), Encoder.from_pretrained(folders["xtra"])
    other = images.clone()
    other[:, :, 8:, 8:] += 1  # the last cell
    before, after = (model(x).last_hidden_state.unflatten(1, (4, 4)) for x in (images, other))
    assert torch.equal(before[:, :2], after[:, :2])
    assert torch.equal(before[:, 2:, :2], after[:, 2:, :2])
    assert not torch.equal(before[:, 2:, 2:], after[:, 2:, 2:])
    free = AutoModel.from_pretrained(folders["xtra"], bidirectional=True)
    for found in (free(images), model(images, bidirectional=True)):
        assert torch.equal(found.last_hidden_state, ours(images, bidirectional=True))
        assert torch.equal(found.pooler_output, ours.features(images, bidirectional=True).mean(1))
    assert torch.equal(free(images, bidirectional=False).last_hidden_state, ours(images))


@torch.no_grad()
def test_other_sizes_are_taken_as_the_encoder_takes_them(folders: dict[str, Path]) -> None:
    model, ours = AutoModel.from_pretrained(folders["xtra"]), Encoder.from_pretrained(folders["xtra"])
    wide = torch.randn(1, 3, 16, 24)
    assert torch.equal(model(wide).last_hidden_state, ours(wide))
    with pytest.raises(ConfigError, match="interpolate_pos_encoding"):
        model(wide, interpolate_pos_encoding=False)
    with pytest.raises(ConfigError, match="attention"):
        model(wide, output_attentions=True)


@torch.no_grad()
def test_a_classifier_knows_its_classes(folders: dict[str, Path], images: Tensor) -> None:
    folder = folders["xtra_classifier"]
    model, ours = AutoModelForImageClassification.from_pretrained(folder), Classifier.from_pretrained(folder)
    assert torch.equal(model(images).logits, ours(images))
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id["newt"] == 2
    labels = torch.tensor([0, 2])
    assert torch.equal(model(images, labels=labels).loss, torch.nn.functional.cross_entropy(ours(images), labels))


def test_the_configuration_tells_the_sizes(folders: dict[str, Path]) -> None:
    config = AutoConfig.from_pretrained(folders["xtra"])
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (16, 2, 2)
    assert (config.image_size, config.patch_size, config.num_channels) == ([16, 16], [4, 4], 3)
    assert config.num_labels == 0


@torch.no_grad()
def test_folders_without_custom_code_open_after_the_import(
    folders: dict[str, Path], images: Tensor, tmp_path: Path
) -> None:
    shutil.copytree(folders["xtra"], tmp_path / "old")
    (tmp_path / "old" / FILE).unlink()
    about = json.loads((tmp_path / "old" / "config.json").read_text())
    plain = {k: v for k, v in about.items() if k not in ("auto_map", "layer_types", "about_sha256")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(plain))
    model = AutoModel.from_pretrained(tmp_path / "old")
    assert torch.equal(model(images).last_hidden_state, Encoder.from_pretrained(folders["xtra"])(images))
    assert AutoImageProcessor.from_pretrained(tmp_path / "old").size == {"height": 16, "width": 16}


@pytest.mark.parametrize("given", ["files", "pillow", "one"])
@torch.no_grad()
def test_the_pipeline_gives_our_numbers(given: str, folders: dict[str, Path], pictures: list[str]) -> None:
    folder, size = folders["xtra"], 1 if given == "one" else 3
    listed = pictures[:size]
    x = Preprocessing.from_pretrained(folder)(listed)
    ours = Encoder.from_pretrained(folder)
    work = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    asked: Any = {"files": listed, "pillow": [Image.open(p) for p in listed], "one": listed[0]}[given]
    found = work(asked, batch_size=size, return_tensors=True)
    assert torch.equal(found if given == "one" else torch.cat(found), ours(x))
    pooled = work(asked, batch_size=size, return_tensors=True, pool=True)
    pooled = pooled if given == "one" else torch.stack([torch.as_tensor(p).reshape(-1) for p in pooled])
    assert torch.equal(pooled, ours.features(x).mean(1))


@torch.no_grad()
def test_the_pipeline_names_classes(folders: dict[str, Path], pictures: list[str]) -> None:
    folder, said = folders["xtra_classifier"], list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        work = pipeline("image-classification", model=str(folder), device="cpu")
        found: Any = work(pictures, batch_size=3, top_k=3)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    ours = Classifier.from_pretrained(folder).probabilities(Preprocessing.from_pretrained(folder)(pictures))
    for rows, probabilities in zip(found, ours, strict=True):
        assert [row["label"] for row in rows] == [CLASSES[i] for i in probabilities.argsort(descending=True)]
        assert [row["score"] for row in rows] == pytest.approx(sorted(probabilities.tolist(), reverse=True), abs=1e-6)
    assert not [text for text in said if "not supported" in text]


def test_the_image_processor_makes_our_pixels(folders: dict[str, Path], pictures: list[str]) -> None:
    processor = AutoImageProcessor.from_pretrained(folders["xtra"])
    image = Image.open(pictures[0])
    pixels = np.asarray(image)
    ours = Preprocessing.from_dict(VALUES)(pixels)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for given in (image, pictures[0], pixels, tensor, tensor.numpy(), pixels[None], tensor[None], [tensor]):
        assert torch.equal(processor(given, return_tensors="pt").pixel_values, ours)
    assert torch.equal(processor(images=[image, pixels], return_tensors="pt").pixel_values, torch.cat([ours, ours]))
    assert (processor(image, return_tensors="np").pixel_values == ours.numpy()).all()
    assert (processor(image)["pixel_values"][0] == ours[0].numpy()).all()
    narrow = np.random.default_rng(0).integers(0, 256, (3, 20, 3), dtype=np.uint8)  # either side may be the channels
    chosen = processor(narrow, return_tensors="pt", input_data_format="channels_first").pixel_values
    assert torch.equal(chosen, Preprocessing.from_dict(VALUES)(np.moveaxis(narrow, 0, -1)))
    with pytest.raises(ConfigError, match="'do_resize' cannot be chosen"):
        processor(image, do_resize=False)
    with pytest.raises(SampleError, match="must be uint8"):
        processor(tensor / 255)


def test_the_image_processor_may_be_asked_for_another_size(folders: dict[str, Path], pictures: list[str]) -> None:
    processor = AutoImageProcessor.from_pretrained(folders["xtra"], size_px=[24, 16], resize_px=24)
    assert processor(pictures, return_tensors="pt").pixel_values.shape == (3, 3, 24, 16)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_saved_opens_in_both_libraries(
    kind: str, folders: dict[str, Path], images: Tensor, tmp_path: Path
) -> None:
    auto = AutoModelForImageClassification if kind == "xtra_classifier" else AutoModel
    model, processor = auto.from_pretrained(folders[kind]), AutoImageProcessor.from_pretrained(folders[kind])
    model.encoder.patch_embed.weight.mul_(1.5)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "new")
    assert Preprocessing.from_pretrained(tmp_path / "new").to_dict() == VALUES
    processor.save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert Preprocessing.from_pretrained(tmp_path / "new").to_dict() == VALUES
    assert AutoImageProcessor.from_pretrained(tmp_path / "new").preprocessing == processor.preprocessing
    again = auto.from_pretrained(tmp_path / "new")
    assert torch.equal(again(images)[0], model(images)[0])
    ours: Any = (Classifier if kind == "xtra_classifier" else Encoder).from_pretrained(tmp_path / "new")
    assert torch.equal(ours(images), model(images)[0])
    assert ours.about == {"lake": "deep"}
    assert not list((tmp_path / "new").glob(".partial*"))


def _of_size(side: int, channels: int = 3) -> Any:
    """A model of transformers for images of another size."""
    sizes = dataclasses.replace(TINY, image_size_px=side, channels=channels)
    return nextblock.hf.NextblockModel(nextblock.hf.NextblockConfig(config=sizes.to_dict()))


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (16, 1)])
def test_what_belongs_to_another_model_is_not_kept(
    side: int, channels: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["xtra_encoder"], tmp_path / "model")
    _of_size(side, channels).save_pretrained(tmp_path / "model")
    found = Preprocessing.from_pretrained(tmp_path / "model")
    assert (found.size_px, found.channels) == ((side, side), channels)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "a card" not in card
    assert f"| image_size_px | {side} |" in card


def test_what_fits_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["xtra_encoder"], tmp_path / "model")
    _of_size(16).save_pretrained(tmp_path / "model")
    assert Preprocessing.from_pretrained(tmp_path / "model").to_dict() == VALUES
    assert "a card" in (tmp_path / "model" / "README.md").read_text()
    new = tmp_path / "new"  # an image processor and a card that came first
    AutoImageProcessor.from_pretrained(folders["xtra_encoder"]).save_pretrained(new)
    (new / "README.md").write_text("mine")
    _of_size(16).save_pretrained(new)
    assert Preprocessing.from_pretrained(new).to_dict() == VALUES
    assert (new / "README.md").read_text() == "mine"
    for content in ("no", "[]", '{"size": 16}', '{"size_px": "16"}'):
        (new / "preprocessor_config.json").write_text(content)
        _of_size(16).save_pretrained(new)
        assert Preprocessing.from_pretrained(new).size_px == (16, 16)


def test_what_is_half_saved_is_not_opened(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError("the disk is full")
        original(source, target)

    original = os.replace
    monkeypatch.setattr("nextblock.hf.folders.os.replace", replace)
    shutil.copytree(folders["xtra_encoder"], tmp_path / "model")
    with pytest.raises(OSError, match="full"):
        _of_size(32).save_pretrained(tmp_path / "model")
    # all the rest is new when config.json comes, whose hash holds it together
    assert Preprocessing.from_pretrained(tmp_path / "model").size_px == (32, 32)
    with pytest.raises(CheckpointError, match="SHA-256"):
        AutoModel.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match="full"):
        _of_size(32).save_pretrained(tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Encoder.from_pretrained(tmp_path / "new")


def test_saved_again_by_us_nothing_of_transformers_sticks(folders: dict[str, Path], tmp_path: Path) -> None:
    opened = Encoder.from_pretrained(folders["xtra"])
    assert opened.about == {"lake": "deep"}
    opened.save_pretrained(tmp_path / "again")
    about = json.loads((tmp_path / "again" / "config.json").read_text())
    assert about["auto_map"]["AutoModel"] == "modeling_nextblock.NextblockModel"


@torch.no_grad()
def test_the_dtype_is_chosen_kept_and_stored(folders: dict[str, Path], images: Tensor, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folders["xtra"], dtype=torch.bfloat16)
    ours = Encoder.from_pretrained(folders["xtra"]).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    found = model(images)
    assert torch.equal(found.last_hidden_state, ours(images.bfloat16()))
    assert found.pooler_output.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "half")
    again = AutoModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(images).last_hidden_state, found.last_hidden_state)
    assert AutoModel.from_pretrained(tmp_path / "half", dtype="float32").dtype == torch.float32
    with pytest.raises(ConfigError, match="floating point"):
        nextblock.hf.NextblockModel.from_pretrained(folders["xtra"], dtype="int8")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_tensors_have_the_names_of_the_file(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    auto = AutoModelForImageClassification if kind == "xtra_classifier" else AutoModel
    model, stored = auto.from_pretrained(folders[kind]), load_file(folders[kind] / "model.safetensors")
    assert set(model.state_dict()) == set(stored)
    doubled = {name: tensor * 2 for name, tensor in stored.items()}
    assert str(model.load_state_dict(doubled)) == "<All keys matched successfully>"
    assert torch.equal(model.encoder.position, doubled["position" if kind == KINDS[1] else "encoder.position"])
    model.save_pretrained(tmp_path / "given", state_dict=stored)  # as a trainer hands over what it gathered
    found = load_pretrained(tmp_path / "given")[0].state_dict()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


def test_damaged_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["xtra"], tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        AutoModel.from_pretrained(tmp_path / "damaged")
    with pytest.raises(CheckpointError, match="SHA-256"):
        pipeline("image-feature-extraction", model=str(tmp_path / "damaged"))
    tensors = load_file(folders["xtra"] / "model.safetensors")
    tensors["encoder.stranger"] = tensors.pop("encoder.norm.bias")
    save_file(tensors, file)
    about = json.loads((tmp_path / "damaged" / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(about | {"sha256": file_sha256(file)}))
    with pytest.raises(CheckpointError, match=r"encoder\.norm\.bias"):
        AutoModel.from_pretrained(tmp_path / "damaged")


def test_a_folder_of_a_newer_version_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    newer = Path(shutil.copytree(folders["xtra"], tmp_path / "newer"))
    about = json.loads((newer / "config.json").read_text())
    about |= {"format": 99, "nextblock": "9.0", "config": about["config"] | {"new_thing": 1}}
    (newer / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"newer nextblock \(9\.0, format 99\)"):
        AutoModel.from_pretrained(str(newer))


def test_a_new_head_is_trained_and_kept(folders: dict[str, Path], images: Tensor, tmp_path: Path) -> None:
    names = {0: "dark", 1: "bright"}
    model, info = AutoModelForImageClassification.from_pretrained(
        folders["xtra"], id2label=names, drop_path=0.5, output_loading_info=True
    )
    assert info["missing_keys"] >= {"head.weight", "head.bias"}
    assert all(name.startswith("head.") for name in info["missing_keys"])
    assert torch.equal(model.encoder.position, Encoder.from_pretrained(folders["xtra"]).position)
    before = model.encoder.position.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(images, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(model.encoder.position, before)
    model.eval().save_pretrained(tmp_path / "tuned")
    ours = Classifier.from_pretrained(tmp_path / "tuned")
    assert ours.classes == ("dark", "bright")
    assert torch.equal(ours(images), model(images).logits)
    assert ours.preprocessing == VALUES


def test_drop_path_acts_in_training_alone(folders: dict[str, Path], images: Tensor) -> None:
    model = AutoModel.from_pretrained(folders["xtra"], drop_path=0.5)
    ours = Encoder.from_pretrained(folders["xtra"])
    assert torch.equal(model(images).last_hidden_state, ours(images))
    model.train()
    torch.manual_seed(0)
    runs = [model(images).last_hidden_state for _ in range(8)]
    assert not all(torch.equal(runs[0], run) for run in runs)


def test_classes_must_be_told_and_fit(folders: dict[str, Path]) -> None:
    auto = AutoModelForImageClassification
    with pytest.raises(ConfigError, match="num_labels=10"):
        auto.from_pretrained(folders["xtra"])
    with pytest.raises(ConfigError, match="tells 3 classes apart, not 5"):
        auto.from_pretrained(folders["xtra_classifier"], num_labels=5)
    other = auto.from_pretrained(folders["xtra_classifier"], num_labels=5, ignore_mismatched_sizes=True)
    assert other.inner.head.weight.shape[1] == 5
    renamed = auto.from_pretrained(folders["xtra_classifier"], id2label={0: "a", 1: "b", 2: "c"})
    assert torch.equal(renamed.inner.head.weight, Classifier.from_pretrained(folders["xtra_classifier"]).head.weight)


def test_a_plain_vit_is_refused(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        for kind in (ViTModel, Dinov2Model):
            with pytest.raises(Exception, match="block_causal_attention: AutoModel opens this"):
                kind.from_pretrained(folder)


def test_other_folders_are_refused_by_what_they_hold(tmp_path: Path) -> None:
    generator = XAR(
        XARConfig(latent_size=4, latent_channels=2, entity_size=2, width=16, depth=1, num_heads=2, num_classes=3)
    )
    save_pretrained(tmp_path / "generator", generator, {"size_px": [4, 4], "channels": 3}, "a card")
    save_pretrained(tmp_path / "head", make_heads("linear", 16, 3), VALUES, "a card")
    for name, match in (("generator", r"nextblock\.XARPipeline"), ("head", "a head without an encoder")):
        for auto in (AutoModel, AutoModelForImageClassification, AutoConfig, AutoImageProcessor):
            with pytest.raises(CheckpointError, match=match):
                auto.from_pretrained(tmp_path / name)


def test_unknown_options_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'bidirektional' is not an option.*Did you mean 'bidirectional'"):
        AutoModel.from_pretrained(folders["xtra"], bidirektional=True)
    with pytest.raises(ConfigError, match="one device"):
        AutoModel.from_pretrained(folders["xtra"], device_map={"a": 0, "b": 1})
    with pytest.raises(ConfigError, match="variant"):
        AutoModel.from_pretrained(folders["xtra"]).save_pretrained("nowhere", variant="fp16")


SCRIPT = """
import sys
import nextblock
nextblock.Encoder, nextblock.Preprocessing
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    import nextblock.hf
    raise SystemExit("it was imported")
except ImportError as error:
    assert "pip install 'nextblock[transformers]'" in str(error), error
del sys.modules["transformers"]
import torch
from transformers import AutoImageProcessor, AutoModel
folder = sys.argv[1]
try:
    AutoModel.from_pretrained(folder)
    raise SystemExit("it was opened without a word")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
assert "nextblock.hf" not in sys.modules
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
x = processor(sys.argv[2], return_tensors="pt").pixel_values
ours = nextblock.Encoder.from_pretrained(folder)(nextblock.Preprocessing.from_pretrained(folder)(sys.argv[2]))
assert torch.equal(model(x).last_hidden_state, ours)
assert "torchvision" not in sys.modules and "timm" not in sys.modules
print("well")
"""


def test_the_custom_code_opens_a_folder_without_our_import(
    folders: dict[str, Path], pictures: list[str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folders["xtra"]), pictures[0]],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.stdout.strip().endswith("well"), done.stdout + done.stderr


@torch.no_grad()
def test_the_model_survives_a_copy(folders: dict[str, Path], images: Tensor, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folders["xtra"])
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again(images).last_hidden_state, model(images).last_hidden_state)


@torch.no_grad()
def test_a_model_made_of_a_configuration_has_the_mask(folders: dict[str, Path], images: Tensor) -> None:
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(folders["xtra"])).eval()
    ours = Encoder(TINY).eval()
    ours.load_state_dict(fresh.state_dict())
    assert torch.equal(fresh(images).last_hidden_state, ours(images))


def test_names_on_the_hub_are_fetched_by_us(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> Path:
        asked.append((name, options["revision"], options["token"]))
        return folders["xtra"]

    monkeypatch.setattr(hub, "fetch", fetch)
    model = nextblock.hf.NextblockModel.from_pretrained("somebody/model", revision="v1", token="secret")
    assert asked == [("somebody/model", "v1", "secret")]
    assert torch.equal(model.encoder.position, Encoder.from_pretrained(folders["xtra"]).position)
    with pytest.raises(ConfigError, match="set HF_HOME"):
        nextblock.hf.NextblockModel.from_pretrained("somebody/model", cache_dir="elsewhere")


def test_pushing_goes_the_way_of_our_own_models(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, Any] = {}

    def push(folder: Path, name: str, **options: Any) -> str:
        pushed.update(options, name=name, card=(folder / "README.md").read_text())
        return f"https://example.org/{name}"

    monkeypatch.setattr(hub, "push", push)
    model = AutoModel.from_pretrained(folders["xtra"])
    assert model.push_to_hub("somebody/model", private=True) == "https://example.org/somebody/model"
    assert (pushed["name"], pushed["private"]) == ("somebody/model", True)
    assert {FILE, "config.json", "model.safetensors"} <= set(pushed["files"])
    assert "library_name: nextblock" in pushed["card"]
    model.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="somebody/other")
    assert pushed["name"] == "somebody/other"
    assert Encoder.from_pretrained(tmp_path / "new").config == TINY
