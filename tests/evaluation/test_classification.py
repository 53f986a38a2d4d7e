from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, recall_score

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.errors import DataError
from nextblock.evaluation.classification import class_metrics, classify, confusion
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig


def test_metrics_by_hand() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    found = class_metrics(predictions, labels, 2)
    assert found["top1"] == 75
    assert found["mean_per_class"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["macro_f1"] == pytest.approx(100 * (2 * 2 / (4 + 1) + 2 * 1 / (2 + 1)) / 2)
    assert confusion(predictions, labels, 2).tolist() == [[2, 1], [0, 1]]


def test_only_classes_that_are_true_somewhere_are_averaged() -> None:
    """The WILDS rule: scikit-learn's F1 with `labels` = the classes in the truth."""
    generator = np.random.default_rng(0)
    labels, predictions = generator.choice([0, 2, 5], 300), generator.integers(0, 7, 300)
    predictions[:200] = labels[:200]
    found = class_metrics(torch.tensor(predictions), torch.tensor(labels), 7)
    present = [0, 2, 5]
    wanted = 100 * f1_score(labels, predictions, labels=present, average="macro")
    assert found["macro_f1"] == pytest.approx(wanted)
    assert found["mean_per_class"] == pytest.approx(
        100 * recall_score(labels, predictions, labels=present, average="macro")
    )
    assert wanted > 1.2 * 100 * f1_score(labels, predictions, average="macro", zero_division=0)
    table = confusion(torch.tensor(predictions), torch.tensor(labels), 7)
    assert np.array_equal(table.numpy(), confusion_matrix(labels, predictions, labels=range(7)))


def test_percentages_are_those_of_float64() -> None:
    found = class_metrics(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 2)
    assert found["top1"] == found["mean_per_class"] == pytest.approx(200 / 3, rel=1e-12)
    assert found["macro_f1"] == pytest.approx(80, rel=1e-12)


def test_images_without_a_label_are_left_out() -> None:
    found = class_metrics(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]), 2)
    assert found == {"top1": 100.0, "mean_per_class": 100.0, "macro_f1": 100.0}
    assert int(confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, -1]), 2).sum()) == 2


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="no labelled image"):
        class_metrics(torch.tensor([0]), torch.tensor([-1]), 2)
    with pytest.raises(ValueError, match=r"0\.\.1; found 0 to 2"):
        class_metrics(torch.tensor([0, 1]), torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=r"\[2\] and labels \[1\]"):
        class_metrics(torch.tensor([0, 1]), torch.tensor([0]), 2)


def tiny_classifier() -> Classifier:
    config = XTRAConfig(image_size_px=8, patch_size_px=4, cell_size=1, width=16, depth=1, num_heads=2)
    torch.manual_seed(0)
    return Classifier(config, HeadConfig("linear", LayerMean(1, 1)), ("a", "b", "c"))


def test_classify_goes_over_every_labelled_image_once() -> None:
    model, preprocessing = tiny_classifier().train(), Preprocessing(size_px=(8, 8), resize_px=8)
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 255, (10, 8, 8, 3), dtype=np.uint8), np.arange(10) % 4 - 1

    def batches(size: int) -> object:
        return evaluation_batches(open_source((images, labels)), preprocessing, batch_size=size)

    found = classify(model, batches(3), preprocessing)  # type: ignore[arg-type]
    assert model.training
    assert len(found) == 7
    assert found.labels.tolist() == [n for n in labels.tolist() if n >= 0]
    whole = classify(model, batches(10), preprocessing)  # type: ignore[arg-type]
    assert torch.equal(whole.predictions, found.predictions)
    assert whole.loss == pytest.approx(found.loss, rel=1e-5)
    assert found.metrics(3)["top1"] == 100 * float((found.predictions == found.labels).double().mean())
    none = evaluation_batches(open_source(images), preprocessing, batch_size=4)
    with pytest.raises(DataError, match="no labelled image"):
        classify(model, none, preprocessing)
