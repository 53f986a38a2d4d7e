"""A generator as a pipeline: called with classes, it answers with images, under the names that diffusers uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nextblock.checkpoints.pretrained import find_folder, read_about
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import ConfigError, NextblockError, nearest
from nextblock.evaluation.inference import device_of
from nextblock.jobs.opening_generator import Weights, open_generator
from nextblock.jobs.sample_classes import chosen_classes
from nextblock.jobs.xar_pipeline_run import (
    Generators,
    Images,
    Labels,
    PipelineRun,
    checked_guidance,
    images_of,
    plain_labels,
    require_count,
    require_generators,
    seeds_of,
)
from nextblock.training.launch import pick_device
from nextblock.vae import Autoencoder, Pixels
from nextblock.xar import solvers
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
KEPT = ("origin", "official")  # of config.json, beside "generator"

OnStep = Callable[["XARPipeline", int, float, dict[str, Tensor]], object]


class XARPipelineOutput(NamedTuple):
    """images: as `output_type` says."""

    images: Images


class XARPipeline:
    """A generator, what decodes its latents, and the names of its classes.

        pipe = XARPipeline.from_pretrained("runs/mine").to("cuda")
        pipe(class_labels=[207, "tabby"], guidance_scale=2.7, num_inference_steps=40).images[0].save("dog.png")

    Attributes:
        model: the generator, in eval mode.
        vae: what decodes; pixels decode themselves.
        classes: names by number; empty for an unconditional model. Also as `id2label`, and as `labels`, the number of
            every name.
        preprocessing: of the images it learned from.

    Args of the constructor are the first three, and where the model is from, for messages. A model without named
    classes gets their numbers as names.

    Raises ConfigError when vae or classes are not those of the model.
    """

    def __init__(
        self, model: XAR, vae: Autoencoder | Pixels, classes: Sequence[str] = (), *, where: object = "the model"
    ) -> None:
        config = model.config
        if vae.latent_channels != config.latent_channels:
            raise ConfigError(
                f"this VAE decodes latents of {vae.latent_channels} channels; this generator makes "
                f"{config.latent_channels}."
            )
        if classes and len(classes) != config.num_classes:
            raise ConfigError(f"{where} knows {config.num_classes} classes; classes names {len(classes)}.")
        self.model, self.vae, self.where = model.eval(), vae.eval(), where
        self.classes = list(classes) or [str(i) for i in range(config.num_classes)]
        height, width = (side * vae.factor for side in config.latent)
        channels = vae.image_channels
        half = (0.5,) * channels
        self.preprocessing = Preprocessing((height, width), min(height, width), channels, half, half)
        self._weights: str = "raw"
        self._autocast = True  # until a precision is asked for
        self._bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        revision: str | None = None,
        weights: Weights = "ema",
        vae: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        token: str | None = None,
    ) -> XARPipeline:
        """Open a run (finished, or still going), a folder of weights, or weights on the Hugging Face hub.

        Args:
            where: the folder, or "owner/name" on the hub ("hf:owner/name" where a folder here has that name too).
            revision: branch, tag or commit on the hub.
            weights: "ema", the average, where there is one, or "raw", the last ones.
            vae: where the VAE is, if not where the weights say: the KL-16 file, a folder of diffusers' AutoencoderKL,
                or its name on the hub. Weights from the hub know where it was on the machine that they are from.
            torch_dtype: to which weights are cast. None: float32, and on CUDA computed in bf16 autocast, as
                `nextblock sample` does; torch.float32 asks for float32 there, too.
            device: "cpu", "cuda", "auto", or as torch names one.
            token: for private repositories.

        Raises CheckpointError or RunError, saying what is there instead.
        """
        path = Path(where).expanduser()
        # a run that is still going is a folder without weights: its newest checkpoint is opened
        folder = path if path.is_dir() and revision is None else find_folder(where, revision, token)
        try:
            opened = open_generator(folder, weights=weights, vae=vae, device="cpu")
        except NextblockError as error:  # from the words of the shell to those of this call
            told = str(error).replace("with --vae", "with vae=PATH").replace("--vae", "vae")
            raise type(error)(told) from error
        pipe = cls(opened.model, opened.decoder, opened.classes, where=opened.where)
        pipe.preprocessing, pipe._weights = opened.preprocessing, str(opened.about["weights"])
        return pipe.to(device, torch_dtype)

    @property
    def config(self) -> XARConfig:
        """Sizes and choices of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return self.model.tokens_in.weight.dtype

    @property
    def id2label(self) -> dict[int, str]:
        """Name by number."""
        return dict(enumerate(self.classes))

    @property
    def labels(self) -> dict[str, int]:
        """Number by name, names sorted."""
        return dict(sorted((name, number) for number, name in enumerate(self.classes)))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of classes by name, in the order given. Raises ConfigError, with the nearest name."""
        return list(chosen_classes(label, self.classes, self.where))

    def to(self, *wanted: str | torch.device | torch.dtype | None) -> XARPipeline:
        """Move to a device, cast to a dtype, or both; returns itself. Raises RunError for CUDA where there is none."""
        for one in wanted:
            if isinstance(one, torch.dtype):
                self._autocast = False
                self.vae.identity()  # kept by the VAE: rounded weights would have another hash
                self.model.to(one)
                self.vae.to(one)
            elif one is not None:
                place = pick_device(one) if one in ("auto", "cuda") else one
                self.model.to(place)
                self.vae.to(place)
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """What the progress bar, tqdm's, is made with: `disable=True`, `desc`, `leave`, ..."""
        self._bar = options

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights, classes, and which VAE (not the VAE itself) into a new folder; `from_pretrained` opens it.

        Raises CheckpointError when there is something in the folder already.
        """
        self._tell_model()
        return self.model.save_pretrained(folder)

    def push_to_hub(self, name: str, **options: Any) -> str:
        """What `save_pretrained` writes, to the hub; options as in `XAR.push_to_hub`. Returns the address."""
        self._tell_model()
        return self.model.push_to_hub(name, **options)

    def _tell_model(self) -> None:
        """What `open_generator` reads, on the model, which writes it."""
        before: dict[str, Any] = dict(self.model.about or {})
        folder = Path(str(self.where))
        if not before and (folder / "config.json").is_file():
            before = {name: value for name, value in read_about(folder).items() if name in KEPT}
        sizes = {"image_size_px": list(self.preprocessing.size_px), "channels": self.preprocessing.channels}
        told = {"vae": self.vae.identity(), "classes": self.classes, **sizes, "weights": self._weights}
        self.model.about, self.model.preprocessing = before | {"generator": told}, self.preprocessing.to_dict()

    def __call__(
        self,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        *,
        num_images_per_label: int = 1,
        batch_size: int | None = None,
        images_at_once: int = 64,
        solver: str = "euler_maruyama",
        time_grid: str | Sequence[float] = "auto",
        guidance_schedule: str = "linear",
        guidance_interval: Sequence[float] = (0.0, 1.0),
        callback_on_step_end: OnStep | None = None,
    ) -> XARPipelineOutput | tuple[Images]:
        """Make images.

        The defaults are those of `nextblock sample`. Published (arXiv 2502.20388 and its code, 256 px): guidance_scale
        2.7 with num_inference_steps 40 for xAR-B, 2.3 with 50 for xAR-L, 2.2 with 50 for xAR-H.

        Args:
            class_labels: numbers and names mixed, one for each image; "all" = one of each class. Needed by a model
                that knows classes; an unconditional one takes none.
            guidance_scale: 1 = no guidance, more insists on the class, 0 = as if no class were given.
            generator: what decides the images, together with the place of each in the list of labels:
                a whole number, the seed: image i is image i of `nextblock sample --seed`;
                a torch.Generator: one number drawn from it is the seed, so the next call makes others, and the same
                state the same ones;
                a list of either, one for each image: each makes what it makes in a call of its own;
                None: a seed from torch's own generator, which torch.manual_seed sets.
            num_inference_steps: solver steps for each entity.
            output_type: "pil": a list of Pillow images; "np": float32 [B, H, W, C] in 0..1; "pt": float32
                [B, C, H, W] in 0..1, on the model's device; "latent": what the model made, [B, C, h, w], for
                `pipe.vae.decode`.
            return_dict: False = a tuple with the images in it.
            num_images_per_label: so many images of every label, side by side.
            batch_size: images of an unconditional model (1 when left out), as in diffusers.
            images_at_once: more take more memory. An image does not depend on it: its noise is the same to the bit, the
                image to rounding.
            solver, time_grid, guidance_schedule, guidance_interval: see `sample_latents`.
            callback_on_step_end: called as (pipeline, step, time, {"latents": [b, C, h, w]}) after every step; step
                goes on through entities and batches, time was that at its start (1 = noise, 0 = image), entities not
                begun are zeros. It may raise; what it returns is not looked at.

        Raises ConfigError for what cannot work, CheckpointError when the numbers that come out are not finite.
        """
        labels, count = self._numbers(class_labels, num_images_per_label, batch_size)
        guidance = checked_guidance(guidance_scale, guidance_schedule, guidance_interval, bool(self.classes))
        require_count("num_inference_steps", num_inference_steps)
        require_count("images_at_once", images_at_once)
        if output_type not in OUTPUT_TYPES:
            hint = nearest(str(output_type), OUTPUT_TYPES)
            raise ConfigError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}.{hint}")
        solvers.solver_named(solver)
        times = solvers.time_grid(time_grid, num_inference_steps, solver)
        told = callback_on_step_end
        on_step = None if told is None else lambda step, time, latents: told(self, step, time, {"latents": latents})
        run = PipelineRun(self.model, solver, times, guidance, images_at_once, self._autocast, on_step, self._bar)
        require_generators(generator, count)  # the last check: what is refused leaves generators as they were
        images = images_of(self.vae, run.latents(labels, count, seeds_of(generator)), output_type)
        return XARPipelineOutput(images) if return_dict else (images,)

    def _numbers(self, given: Labels | None, each: int, batch_size: int | None) -> tuple[list[int] | None, int]:
        """The class of every image, or None, and how many there are."""
        require_count("num_images_per_label", each)
        if not self.classes:
            if given is not None or each != 1:
                wrong = "num_images_per_label" if given is None else "class_labels"
                raise ConfigError(f"{self.where} is unconditional: it takes no {wrong}, but batch_size.")
            count = 1 if batch_size is None else batch_size
            require_count("batch_size", count)
            return None, count
        if batch_size is not None:
            raise ConfigError(
                "batch_size is the number of images of an unconditional model, and this one knows classes. Give "
                "class_labels and num_images_per_label; how many are made together is images_at_once."
            )
        if given is None:
            raise ConfigError(
                f"{self.where} knows {len(self.classes)} classes: give class_labels, as in [0, {self.classes[-1]!r}], "
                f'or "all" for one image of each.'
            )
        found = chosen_classes(plain_labels(given), self.classes, self.where)
        labels = [number for number in found for _ in range(each)]
        return labels, len(labels)

    def __repr__(self) -> str:
        classes = f"{len(self.classes)} classes" if self.classes else "unconditional"
        height, width = self.preprocessing.size_px
        count = sum(p.numel() for p in self.model.parameters())
        return f"XARPipeline({self.where}: {count:,} parameters, {classes}, {height}×{width} px, {self.device})"
