"""Official files to weights folders and back: the golden numbers after the way through our format, identical bytes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from close import assert_close
from nextblock import XAR, XTRA, Classifier, Encoder, XTRAConfig, convert, open_generator, sample_latents
from nextblock.checkpoints.pretrained import load_pretrained
from nextblock.checkpoints.recognise import official_tensors
from nextblock.cli import main
from nextblock.errors import CheckpointError, ConfigError, RunError
from nextblock.jobs import converted_folder
from nextblock.ordering import Ordering
from nextblock.vae import Autoencoder
from nextblock.xar.config import XARConfig
from nextblock.xtra.classifier import HeadConfig, LayerMean
from small_kl16 import official_state, write_kl16

DATA = Path(__file__).parents[1] / "data"
XTRA_CASES = ["base", "l1", "lookahead2", "pseudo_random", "rawpix"]


def inner(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a golden file, whatever is around them."""
    found = torch.load(path, weights_only=True)
    for wrapper in ("state_dict", "model"):
        found = found.get(wrapper, found)
    return dict(found)


def assert_identical(found: Path, wanted: dict[str, torch.Tensor]) -> None:
    tensors = inner(found)
    assert set(tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert (
            tensors[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        )


def golden(name: str) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in np.load(DATA / f"{name}.npz").items()}


@pytest.mark.parametrize("case", XTRA_CASES)
def test_xtra_golden_numbers_after_the_way_through_our_format(case: str, tmp_path: Path) -> None:
    sizes = json.loads((DATA / f"xtra_{case}.json").read_text())
    done = convert(
        file=DATA / f"xtra_{case}.ckpt", to=tmp_path / "ours", num_heads=sizes["num_heads"],
        predictor_heads=sizes["pred_heads"], quiet=True,
    )  # fmt: skip
    assert done.kind == "xtra"
    assert done.origin["num_heads"] == "you"
    assert done.origin["width"] == "the file"
    model, numbers = XTRA.from_pretrained(tmp_path / "ours").double(), golden(f"xtra_{case}")
    images = numbers["images"].double()
    with torch.no_grad():
        assert_close(model.encoder(images), numbers["encoder_tokens"], 1e-6)
        if case != "pseudo_random":  # whose predictions are made in another order
            assert_close(model.predict(images), numbers["predictions"], 1e-6)
        assert_close(Encoder.from_pretrained(tmp_path / "ours").double()(images), numbers["encoder_tokens"], 1e-6)
    convert(file=tmp_path / "ours", to=tmp_path / "back.ckpt", to_official=True, quiet=True)
    assert_identical(tmp_path / "back.ckpt", inner(DATA / f"xtra_{case}.ckpt"))


def test_the_golden_loss_needs_no_size_but_the_heads(tmp_path: Path) -> None:
    convert(file=DATA / "xtra_base.ckpt", to=tmp_path / "ours", num_heads=3, predictor_heads=4, quiet=True)
    model, numbers = XTRA.from_pretrained(tmp_path / "ours").double(), golden("xtra_base")
    assert_close(model.loss(numbers["images"].double()), numbers["loss"], 1e-6)


def test_xar_golden_numbers_after_the_way_through_our_format(tmp_path: Path) -> None:
    done = convert(file=DATA / "xar_cell8.pth", to=tmp_path / "ours", quiet=True)
    assert done.origin["num_heads"] == "the file"  # the tables of RoPE show the width of a head
    assert "mask" in done.dropped
    model, numbers = XAR.from_pretrained(tmp_path / "ours"), golden("xar_cell8")
    name = "sample_em_steps6_cfg2.7"
    found = sample_latents(
        model, numbers["labels"], steps=6, guidance=2.7, solver="euler_maruyama", draws=list(numbers[f"{name}/draws"])
    )
    assert_close(found, numbers[name], 1e-4)
    convert(file=tmp_path / "ours", to=tmp_path / "back.pth", to_official=True, quiet=True)
    assert_identical(tmp_path / "back.pth", inner(DATA / "xar_cell8.pth"))


def test_a_training_file_of_xar_has_averaged_and_last_weights(tmp_path: Path) -> None:
    bare = inner(DATA / "xar_cell8.pth")
    last = {name: value if name == "mask" else value + 1 for name, value in bare.items()}
    beside = {"epoch": 3, "args": argparse.Namespace(lr=1.0), "optimizer": {"state": {}, "param_groups": []}}
    torch.save({"model": last, "model_ema": bare, **beside}, tmp_path / "c.pth")
    for weights, wanted in (("ema", bare), ("raw", last)):
        folder = tmp_path / weights
        convert(file=tmp_path / "c.pth", to=folder, weights=weights, quiet=True)  # type: ignore[arg-type]
        model = XAR.from_pretrained(folder)
        assert torch.equal(model.class_embedding.weight, wanted["class_emb.weight"])
        assert model.about is not None
        assert model.about["generator"]["weights"] == weights


def test_kl16_golden_numbers_after_the_way_through_our_format(tmp_path: Path) -> None:
    from nextblock import open_vae

    state = official_state() | {"loss.discriminator.weight": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "kl16.ckpt")
    done = convert(file=tmp_path / "kl16.ckpt", to=tmp_path / "vae", quiet=True)
    assert done.kind == "kl16"
    assert done.dropped == ["loss.discriminator.weight"]
    vae, numbers = open_vae(tmp_path / "vae"), golden("kl16_small")
    assert isinstance(vae, Autoencoder)
    assert vae.scale_factor == 0.2325
    assert_close(vae.moments(numbers["images"]), numbers["moments"], 1e-4)
    assert_close(vae.decode_raw(numbers["moments"].chunk(2, 1)[0]), numbers["decoded"], 1e-4)
    convert(file=tmp_path / "vae", to=tmp_path / "back.ckpt", to_official=True, quiet=True)
    assert_identical(tmp_path / "back.ckpt", official_state())
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="damaged: its SHA-256"):
        open_vae(tmp_path / "vae")


def test_a_generator_with_its_vae_makes_images_from_the_shell(tmp_path: Path, capsys: Any) -> None:
    vae = write_kl16(tmp_path / "kl16.ckpt")
    assert main(["convert", str(DATA / "xar_cell8.pth"), "--to", str(tmp_path / "ours"), "--vae", str(vae)]) == 0
    told = capsys.readouterr().out
    assert "an xAR generator" in told
    assert f"nextblock sample {tmp_path / 'ours'}" in told
    opened = open_generator(tmp_path / "ours", device="cpu")
    assert opened.classes[207] == "golden retriever"
    assert opened.about["image_size_px"] == [16 * opened.decoder.factor] * 2
    args = ["sample", str(tmp_path / "ours"), "--classes", "tabby", "--n", "1", "--steps", "1"]
    assert main([*args, "--out", str(tmp_path / "made"), "--device", "cpu"]) == 0
    assert list((tmp_path / "made").rglob("*.png"))


def test_without_its_vae_a_generator_says_what_to_name(tmp_path: Path) -> None:
    convert(file=DATA / "xar_cell8.pth", to=tmp_path / "ours", quiet=True)
    with pytest.raises(CheckpointError, match="--vae"):
        open_generator(tmp_path / "ours", device="cpu")
    opened = open_generator(tmp_path / "ours", vae=write_kl16(tmp_path / "kl16.ckpt"), device="cpu")
    assert isinstance(opened.decoder, Autoencoder)


def test_the_attentive_probe_alone_and_on_its_encoder(tmp_path: Path) -> None:
    sizes = json.loads((DATA / "attentive_probe.json").read_text())
    numbers = golden("attentive_probe")
    done = convert(file=DATA / "attentive_probe.ckpt", to=tmp_path / "head", head_heads=sizes["num_heads"], quiet=True)
    assert done.kind == "xtra_head"
    head: Any = load_pretrained(tmp_path / "head")[0]
    (logits,) = head.eval()(numbers["tokens"])  # with the running statistics in the file
    assert_close(logits, numbers["eval_logits"], 1e-4)
    (logits,) = head.train()(numbers["tokens"])
    assert_close(logits, numbers["train_logits"], 1e-4)
    convert(file=tmp_path / "head", to=tmp_path / "back.ckpt", to_official=True, quiet=True)
    assert_identical(tmp_path / "back.ckpt", inner(DATA / "attentive_probe.ckpt"))
    Encoder(_config()).save_pretrained(tmp_path / "encoder")
    on_encoder = convert(
        file=DATA / "attentive_probe.ckpt", to=tmp_path / "both", encoder=tmp_path / "encoder", last_layers=2,
        head_heads=sizes["num_heads"], quiet=True,
    )  # fmt: skip
    assert on_encoder.kind == "xtra_classifier"
    model = Classifier.from_pretrained(tmp_path / "both")
    assert torch.equal(model.head.query, load_pretrained(tmp_path / "head")[0].query)
    assert model.classes == ("0", "1", "2", "3", "4")


def _config(**changes: Any) -> XTRAConfig:
    values = {"image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 48, "depth": 3, "num_heads": 4}
    return XTRAConfig(**(values | {"head_hidden": 8} | changes))


@pytest.mark.parametrize("kind", ["linear", "attentive", "linear without BatchNorm"])
def test_a_classifier_comes_back(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = HeadConfig(kind.split()[0], LayerMean(3, 3), num_heads=4)
    model = Classifier(_config(), head, [str(i) for i in range(5)])
    wanted = official_tensors(model, {"batch_norm": "without" not in kind})
    torch.save({"state_dict": wanted, "hyper_parameters": {"lr": 1e-3}}, tmp_path / "c.ckpt")
    assert ("classifier.weight" in wanted) == ("without" in kind)
    done = convert(
        file=tmp_path / "c.ckpt", to=tmp_path / "ours", num_heads=4, cell_size=[2], head_heads=4, last_layers=1,
        quiet=True,
    )  # fmt: skip
    assert done.kind == "xtra_classifier"
    images = torch.rand(2, 3, 16, 16)
    again = Classifier.from_pretrained(tmp_path / "ours")
    assert_close(again(images), model.eval()(images), 1e-6)
    convert(file=tmp_path / "ours", to=tmp_path / "back.ckpt", to_official=True, quiet=True)
    assert_identical(tmp_path / "back.ckpt", wanted)


@pytest.mark.parametrize("wrapping", ["module.", "_forward_module.", "module", "half"])
def test_what_trainers_put_around_the_tensors(wrapping: str, tmp_path: Path) -> None:
    wanted = inner(DATA / "xtra_base.ckpt")
    if wrapping.endswith("."):
        wanted = {wrapping + name: value for name, value in wanted.items()}
    if wrapping == "half":
        wanted = {name: value.half() for name, value in wanted.items()}
    file = tmp_path / "epoch=3.ckpt" / "checkpoint" / "mp_rank_00_model_states.pt"
    file.parent.mkdir(parents=True)
    torch.save({"module": wanted, "ds_version": "0.9", "dp_world_size": 8, "lr_scheduler": None}, file)
    convert(file=tmp_path / "epoch=3.ckpt", to=tmp_path / "ours", num_heads=3, predictor_heads=4, quiet=True)
    convert(file=tmp_path / "ours", to=tmp_path / "back.ckpt", to_official=True, quiet=True)
    written = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert set(written) == {"module"}
    torch.save(written["module"], tmp_path / "bare.ckpt")
    assert_identical(tmp_path / "bare.ckpt", wanted)


def test_own_weights_leave_in_the_official_layout(tmp_path: Path) -> None:
    model = XTRA(_config())
    model.save_pretrained(tmp_path / "ours")
    convert(file=tmp_path / "ours", to=tmp_path / "theirs.ckpt", to_official=True, quiet=True)
    convert(file=tmp_path / "theirs.ckpt", to=tmp_path / "again", num_heads=4, predictor_heads=1, quiet=True)
    again = XTRA.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_presets_tell_what_tensors_do_not_show(tmp_path: Path) -> None:
    from nextblock.checkpoints.official import xtra_sizes
    from nextblock.checkpoints.official_xar import xar_sizes
    from nextblock.xar.config import XARConfig

    with torch.device("meta"):
        for name in ("xtra_b16", "xtra_h14"):
            config = XTRAConfig.preset(name)
            sizes = xtra_sizes(official_tensors(XTRA(config), {}), "FILE")
            assert XTRAConfig(**sizes.values) == config
            assert sizes.origin["num_heads"] == f"preset {name}"
            sizes = xtra_sizes(official_tensors(Encoder(config), {}), "FILE")
            assert (sizes.values["cell_size"], sizes.origin["cell_size"]) == (4, f"preset {name}")
        for name in ("xar_b", "xar_l", "xar_h"):
            generator = XARConfig.preset(name)
            made = official_tensors(XAR(generator), {"buffers": False})
            assert XARConfig(**xar_sizes(made, "FILE").values) == generator


def test_what_cannot_be_known_is_asked_for(tmp_path: Path) -> None:
    def told(**options: Any) -> str:
        with pytest.raises((CheckpointError, ConfigError, RunError)) as error:
            convert(**({"file": DATA / "xtra_base.ckpt", "to": tmp_path / "ours", "quiet": True} | options))
        assert not (tmp_path / "ours").exists()
        return str(error.value)

    assert "do not show num_heads and predictor_heads" in told()
    assert "--num_heads N --predictor_heads N" in told()
    heads = {"num_heads": 3, "predictor_heads": 4}
    assert "is not of preset xtra_b16: width 48 there, 768 in the preset" in told(preset="xtra_b16")
    assert "Did you mean 'xtra_b16'" in told(preset="xtra_b6")
    assert "cells of" in told(cell_size=[3], **heads)
    assert "position embeddings" in told(image_size_px=[8, 8], **heads)
    assert "No such file" in told(file=tmp_path / "none.ckpt")
    assert "without mp_rank_00" in told(file=tmp_path)
    assert "--encoder is for a head that comes without one; this is an XTRA model" in told(encoder=DATA, **heads)
    assert "--vae is for a generator" in told(vae="kl16.ckpt", **heads)
    assert "which takes no --entity_size. Its options: --preset, --num_heads" in told(entity_size=4, **heads)
    assert "takes no --cell_size" in told(file=DATA / "xar_cell8.pth", cell_size=[2])
    assert "is not of preset xar_b: width 48 there, 768" in told(file=DATA / "xar_cell8.pth", preset="xar_b")
    own = Encoder(_config()).save_pretrained(tmp_path / "own")
    assert "is a weights folder or a run already. Open it as it is; --to_official" in told(file=own)
    assert "holds a xtra_encoder model, not a VAE" in told(file=DATA / "xar_cell8.pth", vae=own)
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, tmp_path / "vit.pth")
    assert "vision transformer of another kind" in told(file=tmp_path / "vit.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "odd.pth")
    assert "its first tensors are a" in told(file=tmp_path / "odd.pth")
    tensors = inner(DATA / "xtra_base.ckpt")
    tensors["enc.extra"] = tensors.pop("enc.norm.bias")
    torch.save({"state_dict": tensors}, tmp_path / "wrong.ckpt")
    message = told(file=tmp_path / "wrong.ckpt", **heads)
    assert "missing (1): enc.norm.bias" in message
    assert "unexpected (1): enc.extra" in message
    assert "classes; --classes names 2" in told(file=DATA / "xar_cell8.pth", classes=["a", "b"])
    assert "No such file" in told(file=DATA / "xar_cell8.pth", classes="nowhere.txt")
    assert "pixels" in told(file=DATA / "xar_cell8.pth", vae="pixels")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        convert(file=DATA / "xar_cell8.pth", to=tmp_path / "ours", quiet=True)
    (tmp_path / "there.pth").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        convert(file=tmp_path, to=tmp_path / "there.pth", to_official=True, quiet=True)
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_the_mask_shows_the_entities(tmp_path: Path) -> None:
    config = XARConfig.from_dict({**XARConfig.preset("xar_ti").to_dict(), "width": 48, "depth": 2, "num_classes": 3})
    for size in (4, 2):
        model = XAR(dataclasses.replace(config, entity_size=size))
        model.save_pretrained(tmp_path / f"own{size}")
        convert(file=tmp_path / f"own{size}", to=tmp_path / f"{size}.pth", to_official=True, quiet=True)
        done = convert(file=tmp_path / f"{size}.pth", to=tmp_path / f"again{size}", quiet=True)
        again = XAR.from_pretrained(tmp_path / f"again{size}")
        assert again.config.entities == Ordering.cells((16, 16), size)
        assert done.origin["entity_size"] == "the file"
        assert torch.equal(again.position1, model.position1)
    with pytest.raises(CheckpointError, match="shows entity_size 4; 8 was asked for"):
        convert(file=tmp_path / "4.pth", to=tmp_path / "wrong", entity_size=8, quiet=True)
    tensors = inner(tmp_path / "4.pth")
    torch.save(tensors | {"mask": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="not entity-causal"):
        convert(file=tmp_path / "odd.pth", to=tmp_path / "wrong", quiet=True)
    bare = {name: tensor for name, tensor in tensors.items() if name != "mask"}
    torch.save(bare, tmp_path / "bare.pth")
    done = convert(file=tmp_path / "bare.pth", to=tmp_path / "bare", quiet=True)
    assert done.origin["entity_size"] == "what was published"
    convert(file=tmp_path / "bare.pth", to=tmp_path / "said", entity_size=4, quiet=True)
    assert XAR.from_pretrained(tmp_path / "said").config.entity_size == 4
    XAR(dataclasses.replace(config, ordering="subsamples", entity_size=4)).save_pretrained(tmp_path / "spread")
    with pytest.raises(CheckpointError, match="knows cells alone: a generator of subsamples"):
        convert(file=tmp_path / "spread", to=tmp_path / "spread.pth", to_official=True, quiet=True)


def test_what_a_head_does_not_show_is_told(tmp_path: Path, capsys: Any) -> None:
    convert(file=DATA / "attentive_probe.ckpt", to=tmp_path / "head", quiet=True)
    sizes = ["--num_heads", "4", "--cell_size", "2"]
    model = Classifier(_config(), HeadConfig("attentive", LayerMean(1, 3), num_heads=4), ["a", "b"])
    torch.save({"state_dict": official_tensors(model, {})}, tmp_path / "c.ckpt")
    assert main(["convert", str(tmp_path / "c.ckpt"), "--to", str(tmp_path / "ours"), *sizes]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "head_heads 16 from what was published" in told
    assert "last_layers 3 from what was published" in told
    assert main(["convert", str(tmp_path / "ours"), "--to", str(tmp_path / "b.ckpt"), "--to_official"]) == 0
    assert "say them when you convert it back (--head_heads, --last_layers)" in capsys.readouterr().out


def test_any_hidden_width_comes_back(tmp_path: Path) -> None:
    from nextblock.checkpoints.sizes import ratio_of

    for width in range(16, 400, 16):
        for hidden in range(1, 700, 7):
            assert int(width * ratio_of(hidden, width)) == hidden
            assert int(width * ratio_of(hidden, width, 2) * 2 / 3) == hidden


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    torch.save({n: t.double() for n, t in inner(DATA / "xtra_base.ckpt").items()}, tmp_path / "d.ckpt")
    with pytest.raises(CheckpointError, match="kind float64 cannot be kept"):
        convert(file=tmp_path / "d.ckpt", to=tmp_path / "ours", num_heads=3, predictor_heads=4, quiet=True)


def test_the_published_resolution_goes_along(tmp_path: Path) -> None:
    Encoder(_config(image_size_px=256, patch_size_px=64)).save_pretrained(tmp_path / "own")
    convert(file=tmp_path / "own", to=tmp_path / "e.ckpt", to_official=True, quiet=True)
    convert(file=tmp_path / "e.ckpt", to=tmp_path / "ours", num_heads=4, cell_size=[2], quiet=True)
    assert json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())["resize_px"] == 300


def test_what_came_into_the_folder_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tmp_path / "ours", converted_folder.save_pretrained

    def slow(*args: Any, **options: Any) -> Any:
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        return read(*args, **options)

    monkeypatch.setattr(converted_folder, "save_pretrained", slow)
    with pytest.raises(CheckpointError, match="is not overwritten"):
        convert(file=DATA / "xar_cell8.pth", to=folder, quiet=True)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_origin_is_told_of_these_weights_only(tmp_path: Path) -> None:
    convert(file=DATA / "xtra_base.ckpt", to=tmp_path / "ours", num_heads=3, predictor_heads=4, quiet=True)
    model = XTRA.from_pretrained(tmp_path / "ours")
    assert "xtra_base.ckpt" in (model.save_pretrained(tmp_path / "same") / "README.md").read_text()
    model.heads[0].fc1.bias.data += 1
    other = model.save_pretrained(tmp_path / "trained")
    assert "xtra_base.ckpt" not in (other / "README.md").read_text() + (other / "config.json").read_text()
    part = Encoder.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "part")
    assert "official" not in json.loads((part / "config.json").read_text())
    done = convert(file=part, to=tmp_path / "part.ckpt", to_official=True, quiet=True)
    assert done.kind == "xtra_encoder"


@pytest.mark.parametrize(
    "names", [["enc.blocks.20000.attn.qkv.weight"], ["encoder.down.50000000.block.0.conv1.weight"]]
)
def test_numbers_in_names_make_no_layers(names: list[str], tmp_path: Path) -> None:
    tensors = inner(DATA / "xtra_base.ckpt") if names[0].startswith("enc.") else official_state()
    torch.save(tensors | {name: torch.zeros(1) for name in names}, tmp_path / "bomb.ckpt")
    heads = {"num_heads": 3, "predictor_heads": 4} if names[0].startswith("enc.") else {}
    with pytest.raises(CheckpointError, match="without a gap"):
        convert(file=tmp_path / "bomb.ckpt", to=tmp_path / "ours", quiet=True, **heads)


def test_names_in_a_file_do_not_steer_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b]0;pwned\x07": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as error:
        convert(file=tmp_path / "odd.pth", to=tmp_path / "ours", quiet=True)
    assert str(error.value).isprintable()


def test_paths_with_brackets_are_told_as_they_are(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(DATA / "xar_cell8.pth"), "--to", "run[bold]3"]) == 0
    assert "run[bold]3" in capsys.readouterr().out


def test_bad_places_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        convert(file=DATA / "xar_cell8.pth", to=tmp_path / "ours", classes=tmp_path / "names.txt", quiet=True)
    with pytest.raises((CheckpointError, RunError), match="cannot write"):
        convert(file=DATA / "xar_cell8.pth", to="/proc/nothing/here", quiet=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(file=DATA / "xar_cell8.pth", to=".", quiet=True)
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_from_the_shell_a_missing_target_is_asked_for(capsys: Any) -> None:
    assert main(["convert", "somewhere.ckpt"]) == 2
    assert "convert needs --to" in capsys.readouterr().err
