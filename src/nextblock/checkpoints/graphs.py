"""An encoder or a classifier as one graph file that runs without this package: ONNX, or torch.export's archive."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import ConfigError, RunError, nearest
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.model import Encoder

FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
OUTPUTS = ("tokens", "pooled", "logits")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# A protobuf file ends at 2 GiB. Larger weights go into a second file, with room left for the graph itself.
ONE_FILE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class GraphConfig:
    """What a graph computes.

    Attributes:
        output: "tokens" [B, N, D] in raster order; "pooled" [B, D], their mean; "logits" [B, classes] of a classifier,
            whose head has its own layers and attention: the three fields below are then left alone.
        last_layers: mean over the outputs of so many last layers, before the final norm.
        final_norm: after the encoder's final norm instead; requires last_layers = 1.
        bidirectional: without the block-causal mask.

    Raises ConfigError for values that cannot work.
    """

    output: str = "tokens"
    last_layers: int = 1
    final_norm: bool = False
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.output not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise ConfigError(f"output must be one of {known}; got {self.output!r}.{nearest(self.output, OUTPUTS)}")
        if self.last_layers < 1:
            raise ConfigError(f"last_layers must be at least 1; got {self.last_layers}.")
        if self.final_norm and self.last_layers != 1:
            raise ConfigError(
                f"final_norm works on the last layer alone; got last_layers {self.last_layers}. "
                "Set last_layers to 1, or leave final_norm out."
            )
        if self.output == "logits" and (self.last_layers != 1 or self.final_norm or self.bidirectional):
            raise ConfigError(
                "a head reads the layers and the attention that it was trained on: with output 'logits' leave out "
                "last_layers, final_norm and bidirectional, or take output 'tokens' or 'pooled'."
            )


class Exportable(nn.Module):
    """Images to one output, float32, in eval mode, on the CPU.

    Args:
        model: a Classifier for logits, else the encoder.
        config: which output.
        size_px: (height, width) of the images; fixed in the graph.
        pixels: (mean, std) per channel, of pixels in 0..1, to take uint8 pixels [B, H, W, C] and normalise them inside;
            None: normalised images, float32 [B, C, H, W].

    Raises ConfigError when config and model do not fit.
    """

    def __init__(
        self,
        model: Encoder | Classifier,
        config: GraphConfig,
        size_px: tuple[int, int],
        pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if (config.output == "logits") != isinstance(model, Classifier):
            wanted = "a Classifier" if config.output == "logits" else "an Encoder"
            raise ConfigError(f"output '{config.output}' needs {wanted}; got model {type(model).__name__}.")
        if config.last_layers > model.config.depth:
            depth = model.config.depth
            raise ConfigError(f"last_layers must be between 1 and the depth ({depth}); got {config.last_layers}.")
        self.model, self.graph_config, self.size_px = model, config, size_px
        self.channels, self.takes_pixels = model.config.channels, pixels is not None
        mean, std = pixels or ((0.0,), (1.0,))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @property
    def input_name(self) -> str:
        return "pixels" if self.takes_pixels else "images"

    def example(self, batch: int) -> Tensor:
        """Zeros of the input's shape and kind."""
        if self.takes_pixels:
            return torch.zeros(batch, *self.size_px, self.channels, dtype=torch.uint8)
        return torch.zeros(batch, self.channels, *self.size_px)

    def forward(self, images: Tensor) -> Tensor:
        if self.takes_pixels:
            # The same operations in the same order as where batches are normalised, to give the same bits.
            images = (images.permute(0, 3, 1, 2).to(torch.float32) / 255 - self.mean) / self.std
        config = self.graph_config
        if isinstance(self.model, Classifier):
            return self.model(images)
        if config.final_norm:
            tokens = self.model(images, bidirectional=config.bidirectional)
        else:
            tokens = self.model.features(images, config.last_layers, bidirectional=config.bidirectional)
        return tokens.mean(1) if config.output == "pooled" else tokens


def require_format(format: str) -> None:
    """Raise ConfigError for a format that is not known, RunError when a package that it needs is missing."""
    if format not in FILES:
        raise ConfigError(f"format must be one of {', '.join(FILES)}; got {format!r}.{nearest(format, FILES)}")
    missing = [name for name in ONNX_PACKAGES if format == "onnx" and not _installed(name)]
    if missing:
        raise RunError(
            f"format onnx needs {', '.join(missing)}. Get what is missing with: pip install 'nextblock[onnx]'. "
            "Format torch needs nothing more."
        )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported in an unusual way, or forbidden
        return False


def write_graph(module: Exportable, folder: Path, format: str) -> list[Path]:
    """Write the graph into `folder`, for every batch size and the one image size.

    Returns the files: model.onnx (beside it model.onnx.data where the weights are more than 2 GB), or model.pt2.
    Raises ConfigError or RunError as `require_format` does.
    """
    require_format(format)
    target = folder / FILES[format]
    # Two images: of one, torch would take that there is never another number.
    with _without_noise(), torch.no_grad():
        if format == "torch":
            _write_torch(module, target)
        else:
            _write_onnx(module, target)
    return sorted(folder.glob(f"{target.name}*"))


def _write_torch(module: Exportable, target: Path) -> None:
    program = torch.export.export(
        module, (module.example(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )  # fmt: skip
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of this machine's files
    program.example_inputs = None
    torch.export.save(program, target)


def _write_onnx(module: Exportable, target: Path) -> None:
    program = torch.onnx.export(
        module,
        (module.example(2),),
        dynamo=True,
        verbose=False,
        input_names=[module.input_name],
        output_names=[module.graph_config.output],
        dynamic_shapes=({0: "batch"},),
    )
    assert program is not None
    _strip(program.model.graph)
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    program.save(target, external_data=weights > ONE_FILE_BYTES)


def _strip(graph: Any) -> None:
    """Take out the notes of torch's exporter: stack traces with this machine's paths, as large as a small model."""
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def open_graph(folder: Path, format: str, threads: int) -> Callable[[Tensor], Tensor]:
    """The written graph as a function of the input, on the CPU with so many threads (of torch: those it has)."""
    path = folder / FILES[format]
    if format == "torch":
        loaded = torch.export.load(path).module()

        def in_torch(x: Tensor) -> Tensor:
            with torch.no_grad():
                return loaded(x)

        return in_torch
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3  # errors only
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@contextmanager
def _without_noise() -> Iterator[None]:
    """torch's exporters without notes on their own insides; what they say of the model still comes through."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):  # of calls between torch's parts, not of ours
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        log.setLevel(level)
