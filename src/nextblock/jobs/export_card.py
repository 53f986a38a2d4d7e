"""The README.md of an exported graph: what it takes and gives, and code that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nextblock.checkpoints.model_card import as_text
from nextblock.data.preprocess import Preprocessing
from nextblock.jobs.export_report import Checked, table_cells, table_conditions, table_heads


def graph_card(
    about: Mapping[str, Any], preprocessing: Preprocessing, rows: Sequence[Mapping[str, Any]], checked: Checked
) -> tuple[str, str]:
    """README.md of the folder, with code that runs the graph, and the table alone (both Markdown)."""
    heads = table_heads()
    lines = [heads, ["---"] * len(heads), *(table_cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{table_conditions(checked)}\n"
    shape, result = (", ".join(map(str, about[side]["shape"])) for side in ("input", "output"))
    mask = (
        "every token sees all others"
        if about["attention"] == "bidirectional"
        else "the block-causal mask is part of the graph: a token sees its own cell and earlier cells only"
    )
    first, last = about["layers"]
    layers = f"layer {last}" if first == last else f"the mean of layers {first} to {last}"
    norm = "after" if about["final_norm"] else "before"
    card = f"""# {as_text(about["source"]["run"])}: {about["output"]["name"]}, as {about["format"]}

Exported by nextblock; runs without it. The number of images is free, their size is not.

- input `{about["input"]["name"]}`: {about["input"]["dtype"]} [{shape}], {about["input"]["values"]}
- output `{about["output"]["name"]}`: float32 [{result}], from {layers}, {norm} the final norm
- attention: {mask}

```python
{_snippet(about, preprocessing)}
```

This is for photographs of 8 bits; nextblock's own decoding also defines transparency, 16 bits and odd files.

{table}
`config.json` has names, shapes and the SHA-256 of the weights, `preprocessor_config.json` how an image becomes the
input, `result.json` the measurements.
"""
    return card, table


def _view(height: int, width: int, resize: int) -> list[str]:
    """The lines for the central part of `photo`: the numbers of `resize_and_crop`, so the same pixels."""
    lines = [
        "w, h = photo.size",
        f"across, down = ({resize} if side == min(w, h) else int({resize} * side / min(w, h)) for side in (w, h))",
    ]
    if resize < max(height, width):  # or no photograph is too small when its shorter side is resized
        lines += [
            f"if across < {width} or down < {height}:",
            f"    scale = max({height} / h, {width} / w)",
            f"    across, down = max({width}, round(w * scale)), max({height}, round(h * scale))",
        ]
    return [
        *lines,
        f"left, top = round((across - {width}) / 2), round((down - {height}) / 2)",
        "x, y = w / across, h / down  # pixels of the photograph to one",
        f"box = (left * x, top * y, min(w, (left + {width}) * x), min(h, (top + {height}) * y))",
        f"photo = photo.resize(({width}, {height}), Image.Resampling.BICUBIC, box=box)",
    ]


def _snippet(about: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    """Python that reads photo.jpg and runs the graph, with NumPy, Pillow and the graph's own runtime."""
    (height, width), channels, resize = preprocessing.size_px, preprocessing.channels, preprocessing.shorter_side_px
    onnx, name, output = about["format"] == "onnx", about["input"]["name"], about["output"]["name"]
    lines = ["import json", ""] if output == "logits" else []
    lines += ["import numpy as np", "import onnxruntime" if onnx else "import torch"]
    if channels in (1, 3):
        turned = "ImageOps.exif_transpose(photo)" if preprocessing.exif_orientation else "photo"
        mode, axes = ("RGB", "None") if channels == 3 else ("L", "None, ..., None")
        lines += [
            f"from PIL import Image{', ImageOps' if preprocessing.exif_orientation else ''}",
            "",
            'photo = Image.open("photo.jpg")',
            f'photo = {turned}.convert("{mode}")',
            *_view(height, width, resize),
            f"pixels = np.asarray(photo)[{axes}]  # uint8 [1, {height}, {width}, {channels}]",
        ]
    else:
        lines += ["", f"pixels = np.zeros((1, {height}, {width}, {channels}), np.uint8)  # your images, of this size"]
    if name == "images":
        mean, std = (list(values or ()) for values in (preprocessing.mean, preprocessing.std))
        lines.append(f"images = ((pixels / 255 - {mean}) / {std}).transpose(0, 3, 1, 2).astype(np.float32)")
    if onnx:
        lines += [
            'session = onnxruntime.InferenceSession("model.onnx")',
            f'({output},) = session.run(None, {{"{name}": {name}}})',
        ]
    else:
        lines += [
            'graph = torch.export.load("model.pt2").module()',
            "with torch.no_grad():",
            f"    {output} = graph(torch.from_numpy({name}.copy())).numpy()",
        ]
    if output == "logits":
        lines += ['classes = json.load(open("config.json"))["classes"]', "print(classes[int(logits[0].argmax())])"]
    else:
        lines.append(f"print({output}.shape)")
    return "\n".join(lines)
