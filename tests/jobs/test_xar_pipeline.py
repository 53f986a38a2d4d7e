"""The pipeline: its images are those of the sampler, whatever asks for them, and it speaks as diffusers' does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import nextblock.jobs.xar_pipeline_run as module
from close import assert_close
from nextblock.errors import CheckpointError, ConfigError, NextblockError, RunError
from nextblock.jobs.convert import convert
from nextblock.jobs.opening_generator import open_generator
from nextblock.jobs.sample import sample
from nextblock.jobs.xar_pipeline import XARPipeline
from nextblock.vae import Autoencoder, Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder
from small_kl16 import write_kl16

NAMES = ["apple", "Pear", "10", "fig, common"]
DATA = Path(__file__).parents[1] / "data"


def generator(**sizes: Any) -> XAR:
    torch.manual_seed(0)
    given = {"latent_size": (4, 8), "latent_channels": 3, "entity_size": (2, 4), "width": 16, "depth": 2,
             "num_heads": 2, "num_classes": 4, **sizes}  # fmt: skip
    return XAR(XARConfig(**given))


def pipeline(classes: list[str] = NAMES, channels: int = 3, **sizes: Any) -> XARPipeline:
    pipe = XARPipeline(generator(latent_channels=channels, **sizes), Pixels(channels), classes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: XARPipeline, labels: Any = (0, 1), generator: Any = 0, **options: Any) -> Tensor:
    found = pipe(labels, **{"num_inference_steps": 2, "output_type": "pt", "generator": generator, **options}).images
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official generator of latents, converted, and its VAE."""
    folder = tmp_path_factory.mktemp("latents")
    convert(file=DATA / "xar_cell8.pth", to=folder / "xar", vae=write_kl16(folder / "kl16.ckpt"), quiet=True)
    return folder


def test_images_are_those_of_the_sampler_to_the_bit() -> None:
    pipe = pipeline()
    found = images(pipe, [3, 0, 1], 5, guidance_scale=2.0)
    wanted = sample_latents(pipe.model, torch.tensor([3, 0, 1]), steps=2, guidance=2.0, seed=5)
    assert torch.equal(found, (wanted.clamp(-1, 1) + 1) / 2)
    assert not pipe.model.training


def test_a_folder_with_a_vae(latent_folder: Path) -> None:
    pipe = XARPipeline.from_pretrained(latent_folder / "xar")
    pipe.set_progress_bar_config(disable=True)
    latents = pipe([1, 0], generator=3, num_inference_steps=2, output_type="latent").images
    wanted = sample_latents(pipe.model, torch.tensor([1, 0]), steps=2, seed=3)
    assert torch.equal(torch.as_tensor(latents), wanted)
    assert isinstance(pipe.vae, Autoencoder)
    with torch.no_grad():
        decoded = pipe.vae.decode(wanted)
    assert torch.equal(images(pipe, [1, 0], 3), (decoded.clamp(-1, 1) + 1) / 2)


def test_pictures_are_those_of_the_job(tmp_path: Path) -> None:
    weights = pipeline().save_pretrained(tmp_path / "weights")
    job = sample(run=weights, classes="apple,10", n=4, seed=7, steps=2, guidance=1.5, out=tmp_path / "job", quiet=True)
    pipe = XARPipeline.from_pretrained(weights)
    made = pipe(["apple", "10"] * 2, guidance_scale=1.5, num_inference_steps=2, generator=7).images
    files = sorted((job.folder / "images").rglob("*.png"))
    assert len(files) == len(made) == 4
    wanted = {np.asarray(Image.open(file)).tobytes() for file in files}
    assert {np.asarray(image).tobytes() for image in made} == wanted


def test_images_do_not_depend_on_how_many_are_made_at_once() -> None:
    pipe, taken = pipeline(), []
    own = module.sample_latents

    def spy(*arguments: Any, **options: Any) -> Tensor:
        taken.append(len(arguments[1]))
        return own(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sample_latents", spy)
        parts = images(pipe, [0, 1, 2, 3, 0], seeded(1), images_at_once=2)
    assert taken == [2, 2, 1]
    whole = images(pipe, [0, 1, 2, 3, 0], seeded(1))
    assert_close(parts, whole, 1e-5)
    assert_close(images(pipe, [0, 1], seeded(1)), whole[:2], 1e-5)


def test_one_generator_goes_on_and_the_same_seed_repeats() -> None:
    pipe, own = pipeline(), seeded(4)
    first, second = images(pipe, generator=own), images(pipe, generator=own)
    assert not torch.equal(first, second)
    assert torch.equal(images(pipe, generator=seeded(4)), first)
    assert not torch.equal(images(pipe, generator=seeded(5)), first)
    assert not torch.equal(first[0], first[1])


def test_without_a_generator_torch_s_own_decides() -> None:
    pipe = pipeline()
    torch.manual_seed(3)
    first, second = images(pipe, generator=None), images(pipe, generator=None)
    torch.manual_seed(3)
    assert torch.equal(images(pipe, generator=None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("ordering", ["cells", "scales"])
@pytest.mark.parametrize("solver", ["euler_maruyama", "heun"])
def test_of_a_list_of_generators_each_makes_what_it_makes_alone(solver: str, ordering: str) -> None:
    pipe = pipeline(ordering=ordering)
    together = images(pipe, [0, 1, 2], [seeded(1), 9, seeded(3)], solver=solver)
    alone = [images(pipe, [i], own, solver=solver) for i, own in enumerate((seeded(1), 9, seeded(3)))]
    assert_close(together, torch.cat(alone), 1e-5)
    own = seeded(1)
    twice = images(pipe, [0, 0], [own, own], solver=solver)
    assert not torch.equal(twice[0], twice[1])


def test_a_call_that_is_refused_leaves_the_generator_alone() -> None:
    pipe, own = pipeline(), seeded(1)
    before = own.get_state()
    with pytest.raises(ConfigError):
        pipe(["apple"], guidance_scale=-1, generator=own)
    assert torch.equal(own.get_state(), before)


def test_labels_are_names_and_numbers() -> None:
    pipe = pipeline()
    wanted = images(pipe, [1, 2, 3])
    for given in (["pear", "10", "fig, common"], ["Pear", 2, np.int64(3)], torch.tensor([1, 2, 3]), "pear,10,3"):
        assert torch.equal(images(pipe, given), wanted), given
    assert torch.equal(images(pipe, 1), images(pipe, "Pear"))
    assert pipe.get_label_ids(["apple", "Pear"]) == [0, 1]
    assert pipe.get_label_ids("fig, common") == [3]
    assert pipe.labels == {"10": 2, "Pear": 1, "apple": 0, "fig, common": 3}
    assert pipe.id2label == dict(enumerate(NAMES))
    assert pipe.config is pipe.model.config


def test_several_images_of_each_label() -> None:
    pipe = pipeline()
    assert torch.equal(images(pipe, [2, 0], num_images_per_label=2), images(pipe, [2, 2, 0, 0]))


def test_every_output_type() -> None:
    pipe = pipeline()
    pt = images(pipe)
    assert pt.shape == (2, 3, 4, 8)
    assert pt.dtype == torch.float32
    assert 0 <= pt.min() < pt.max() <= 1
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": 0}
    array = pipe([0, 1], output_type="np", **options).images
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    pictures = pipe([0, 1], **options).images
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures)
    assert np.abs(np.stack([np.asarray(picture) for picture in pictures]) / 255 - array).max() <= 0.5 / 255 + 1e-6
    latents = pipe([0, 1], output_type="latent", **options).images
    assert torch.equal((torch.as_tensor(latents).clamp(-1, 1) + 1) / 2, pt)
    (alone,) = pipe([0, 1], output_type="np", return_dict=False, **options)
    assert np.array_equal(alone, array)


def test_gray_and_unconditional() -> None:
    pipe = pipeline([], channels=1, num_classes=0)
    made = pipe(batch_size=3, num_inference_steps=2).images
    assert [picture.mode for picture in made] == ["L"] * 3
    assert made[0].size == (8, 4)
    assert len(pipe(num_inference_steps=2).images) == 1
    wanted = sample_latents(pipe.model, count=2, steps=2, seed=0)
    assert torch.equal(images(pipe, None, batch_size=2), (wanted.clamp(-1, 1) + 1) / 2)
    for options, match in (
        ({"class_labels": [0]}, "unconditional: it takes no class_labels"),
        ({"guidance_scale": 2.0}, "guidance_scale 2 needs a model that knows classes"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1; got 0"),
        ({"num_images_per_label": 2}, "num_images_per_label"),
    ):
        with pytest.raises(ConfigError, match=match):
            pipe(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_labels": None}, "knows 4 classes: give class_labels"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": ["appel"]}, "Did you mean 'apple'"),
        ({"class_labels": [4]}, "class 4 is out of range"),
        ({"class_labels": [1.5]}, "class_labels must be names and whole numbers; got 1.5"),
        ({"guidance_scale": -1.0}, "guidance_scale must be 0 or more .*; got -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"num_inference_steps": -3}, "num_inference_steps must be a whole number, at least 1; got -3"),
        ({"num_images_per_label": 0}, "num_images_per_label must be a whole number, at least 1; got 0"),
        ({"images_at_once": 0}, "images_at_once must be a whole number, at least 1; got 0"),
        ({"batch_size": 2}, "batch_size is the number of images of an unconditional model"),
        ({"output_type": "pill"}, "output_type must be one of .*; got 'pill'. Did you mean 'pil'"),
        ({"solver": "eulr"}, "Did you mean 'euler'"),
        ({"generator": [1, 2]}, "generator must be one, or a list of 1, one for each image; got a list of 2"),
        ({"generator": "seven"}, "generator must be a torch.Generator, a whole number"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_the_words_of_the_call(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        pipeline()(**{"class_labels": [0], "num_inference_steps": 1, **options})


def test_a_saved_pipeline_opens_again(tmp_path: Path) -> None:
    pipe = pipeline()
    folder = pipe.save_pretrained(tmp_path / "saved")
    again = XARPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert again.classes == NAMES
    assert torch.equal(images(again), images(pipe))
    assert open_generator(folder).preprocessing.size_px == (4, 8)
    assert "XARPipeline" in (folder / "README.md").read_text()


def test_a_saved_pipeline_keeps_its_vae_and_its_origin(latent_folder: Path, tmp_path: Path) -> None:
    pipe = XARPipeline.from_pretrained(latent_folder / "xar")
    again = XARPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "saved"))
    assert again.vae.identity() == pipe.vae.identity()
    convert(file=tmp_path / "saved", to=tmp_path / "back.pth", to_official=True, quiet=True)
    assert "official file xar_cell8.pth" in (tmp_path / "saved" / "config.json").read_text()


def test_folders_that_make_no_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = XTRAConfig(image_size_px=8, patch_size_px=4, cell_size=1, width=8, depth=1, num_heads=1, predictor_heads=1,
                       predictor_width=8, predictor_depth=1, head_hidden=8)  # fmt: skip
    Encoder(sizes).save_pretrained(tmp_path / "encoder")
    generator().save_pretrained(tmp_path / "bare")
    convert(file=DATA / "xar_cell8.pth", to=tmp_path / "no_vae", quiet=True)
    for name, match in (("encoder", "makes no images"), ("bare", "what decodes"), ("no_vae", "with vae="),
                        ("nothing", "no weights folder at")):  # fmt: skip
        with pytest.raises(NextblockError, match=match) as caught:
            XARPipeline.from_pretrained(tmp_path / name)
        assert "--" not in str(caught.value).replace("nextblock train-generator", "")
    with pytest.raises(CheckpointError, match="no revisions"):
        XARPipeline.from_pretrained(tmp_path / "bare", revision="main")
    opened = XARPipeline.from_pretrained(tmp_path / "no_vae", vae=write_kl16(tmp_path / "kl16.ckpt"))
    assert isinstance(opened.vae, Autoencoder)


def test_weights_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline().save_pretrained(tmp_path / "weights")
    asked = []

    def fetch(name: str, *, revision: str | None, files: Any, token: str | None) -> Path:
        asked.append((name, revision, token))
        return folder

    monkeypatch.setattr("nextblock.checkpoints.hub.fetch", fetch)
    for name in ("someone/pears", "hf:someone/pears"):
        assert XARPipeline.from_pretrained(name, revision="v1", token="t").classes == NAMES
    assert asked == [("someone/pears", "v1", "t")] * 2


def test_parts_that_do_not_belong_together() -> None:
    with pytest.raises(ConfigError, match="decodes latents of 1 channels; this generator makes 3"):
        XARPipeline(generator(), Pixels(1), NAMES)
    with pytest.raises(ConfigError, match="knows 4 classes; classes names 2"):
        XARPipeline(generator(), Pixels(3), ["a", "b"])
    assert XARPipeline(generator(), Pixels(3)).classes == ["0", "1", "2", "3"]


def test_to_moves_and_casts() -> None:
    pipe = pipeline()
    exact = images(pipe)
    assert pipe.to("cpu", torch.bfloat16) is pipe
    assert pipe.dtype == torch.bfloat16
    assert pipe.device == torch.device("cpu")
    coarse = images(pipe)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    assert_close(coarse, exact, 0.1)


def test_a_vae_is_cast_too_and_stays_itself(latent_folder: Path, tmp_path: Path) -> None:
    exact = XARPipeline.from_pretrained(latent_folder / "xar")
    coarse = XARPipeline.from_pretrained(latent_folder / "xar", torch_dtype=torch.bfloat16)
    for pipe in (exact, coarse):
        pipe.set_progress_bar_config(disable=True)
    assert isinstance(coarse.vae, Autoencoder)
    assert coarse.vae.model.dtype == torch.bfloat16
    assert_close(images(coarse, [0]), images(exact, [0]), 0.1)
    vae = XARPipeline.from_pretrained(latent_folder / "xar").vae
    vae._sha256 = None  # as of one that was just loaded
    own = XARPipeline(exact.model, vae, exact.classes).to(torch.bfloat16)
    again = XARPipeline.from_pretrained(own.save_pretrained(tmp_path / "saved"))
    assert again.vae.identity() == exact.vae.identity()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is said where there is no CUDA")
def test_no_cuda_here() -> None:
    with pytest.raises(RunError, match="No CUDA device"):
        pipeline().to("cuda")


def test_every_step_can_be_watched(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, seen = pipeline(), []

    def watch(owner: XARPipeline, step: int, time: float, tensors: dict[str, Tensor]) -> None:
        assert owner is pipe
        seen.append((step, time, tuple(tensors["latents"].shape)))

    images(pipe, [0, 1, 2], images_at_once=2, callback_on_step_end=watch, num_inference_steps=3, solver="euler")
    entities = pipe.model.ordering.num_entities
    assert [step for step, _, _ in seen] == list(range(2 * 3 * entities))
    assert [time for _, time, _ in seen[:3]] == [1.0, 2 / 3, 1 / 3]
    assert (seen[0][2], seen[-1][2]) == ((2, 3, 4, 8), (1, 3, 4, 8))
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="apples")
    images(pipe, [0])
    assert "apples" in capsys.readouterr().err


def test_numbers_that_are_none_are_an_error() -> None:
    pipe = pipeline()
    with torch.no_grad():
        pipe.model.tokens_out.weight.fill_(float("nan"))
    for kind in ("pil", "latent"):
        with pytest.raises(CheckpointError, match="not finite"):
            pipe([0], num_inference_steps=1, output_type=kind)
