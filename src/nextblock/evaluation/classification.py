"""How good are a classifier's predictions? Accuracy, mean over classes, macro F1, and what is taken for what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_stat_scores

from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import DataError
from nextblock.evaluation.inference import device_of, inference
from nextblock.xtra.classifier import Classifier


def class_metrics(predictions: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Percent, each from 0 to 100.

    top1: of the images. mean_per_class: the recall of each class, averaged. macro_f1: the F1 of each class, averaged.
    Both averages are over the classes that occur in `labels`: a class that is predicted but nowhere true costs the
    precision of nobody else, and is no class of the average. Source of that rule: WILDS (arXiv 2012.07421).

    Args:
        predictions, labels: class numbers int64 [M], on any one device; images with label -1 are left out.
        num_classes: at least 2; predictions and labels are below it.

    Raises DataError when there is no labelled image, ValueError for numbers that are no class or other shapes.
    """
    predictions, labels = _known(predictions, labels, num_classes)
    counts = multiclass_stat_scores(predictions, labels, num_classes, average=None, validate_args=False)
    counts = counts.reshape(num_classes, 5).double()  # of each class: tp, fp, tn, fn, support
    right, wrong, _, missed, support = counts[counts[:, 4] > 0].unbind(1)
    return {
        "top1": 100 * float(right.sum() / support.sum()),
        "mean_per_class": 100 * float((right / support).mean()),
        "macro_f1": 100 * float((2 * right / (2 * right + wrong + missed)).mean()),
    }


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many images of each class are taken for each: int64 [classes, classes], rows the truth.

    Arguments and errors as of `class_metrics`.
    """
    predictions, labels = _known(predictions, labels, num_classes)
    table: Tensor = multiclass_confusion_matrix(predictions, labels, num_classes, validate_args=False)
    return table.long()


@dataclass
class Classified:
    """What a classifier said of M labelled images.

    predictions, labels: int64 [M], on the host. loss: mean cross entropy. bad: the samples that could not be read and
    are not among the M.
    """

    predictions: Tensor
    labels: Tensor
    loss: float
    bad: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def metrics(self, num_classes: int) -> dict[str, float]:
        """See `class_metrics`."""
        return class_metrics(self.predictions, self.labels, num_classes)


def classify(model: Classifier, batches: Iterable[Batch], preprocessing: Preprocessing) -> Classified:
    """Run `model` where it is over `batches`, as from `evaluation_batches`; it is left in the mode it came in.

    Images without a label are left out. bfloat16 autocast on CUDA only. Raises DataError when no image is left.
    """
    device = device_of(model)
    total = torch.zeros((), dtype=torch.float64, device=device)
    predicted, true, bad = [], [], list[BadSample]()
    for batch in batches:
        bad += batch.bad
        known = batch.labels >= 0
        if not known.any():
            continue
        labels = batch.labels[known].to(device)
        with inference(model):
            logits = model(normalize(batch.images[known].to(device), None, preprocessing)).float()  # [B, classes]
        total += F.cross_entropy(logits, labels, reduction="sum")
        predicted.append(logits.argmax(1))
        true.append(labels)
    if not true:
        first = f"; {len(bad)} could not be read, the first of them {bad[0].name}: {bad[0].reason}" if bad else ""
        raise DataError(f"There is no labelled image to judge the classifier by{first}.")
    labels = torch.cat(true)
    return Classified(torch.cat(predicted).cpu(), labels.cpu(), float(total) / len(labels), bad)


def _known(predictions: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Both [M] where there is a label, after their numbers have been checked."""
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise ValueError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} must both be [M]")
    known = labels >= 0
    predictions, labels = predictions[known], labels[known]
    if not len(labels):
        raise DataError("There is no labelled image to judge predictions by.")
    least, most = int(predictions.min()), int(torch.maximum(predictions.max(), labels.max()))
    if least < 0 or most >= num_classes:
        raise ValueError(f"class numbers must lie in 0..{num_classes - 1}; found {least} to {most}")
    return predictions, labels
