"""The data sets of the frozen-encoder benchmark, one row each. Splits, batch sizes, learning rates and warm-ups are
those of XTRA's evaluation; a hub copy marked so was used there, the others were looked up or are from memory."""

from __future__ import annotations

from nextblock.data.named import arrays, copies, lists, wilds
from nextblock.data.named.dataset import LR7, LR9, LR10, Layout, NamedDataset

_COPIES: tuple[Layout, ...] = (copies.prepared, copies.parquet, copies.saved, copies.split_folders)
_ANY_COPY = "Copies as Parquet files named by split, or as train/CLASS/... and {}/CLASS/..., open as well."

_ROWS = (
    NamedDataset(
        name="imagenet1k", title="ImageNet-1K", classes=1000, train_splits=("train",), test_split="val",
        batch_size=4096, lrs=LR7, warmup_epochs=10, url="https://image-net.org/download.php",
        how="Register, download ILSVRC2012's training and validation archives, and unpack them to train/WNID/... and "
        "val/WNID/... (the validation images sorted into class folders).",
        hub="ILSVRC/imagenet-1k", folder="imagenet1k", also=("imagenet", "ILSVRC2012", "imagenet-1k"),
        layouts=_COPIES,
    ),
    NamedDataset(
        name="inat18", title="iNaturalist 2018", classes=8142, train_splits=("train",), test_split="val",
        batch_size=4096, lrs=LR10, warmup_epochs=10, url="https://github.com/visipedia/inat_comp/tree/master/2018",
        how="Download train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz from there and unpack all "
        "three into one folder. " + _ANY_COPY.format("val"),
        folder="inat18", also=("inaturalist2018", "iNat2018"), layouts=(lists.inat18, *_COPIES),
    ),
    NamedDataset(
        name="cifar10", title="CIFAR-10", classes=10, train_splits=("train",), test_split="test", batch_size=512,
        lrs=LR9, url="https://www.cs.toronto.edu/~kriz/cifar.html",
        how="Download the Python version and unpack it: cifar-10-batches-py/. " + _ANY_COPY.format("test"),
        hub="uoft-cs/cifar10", folder="cifar10", also=("cifar-10-batches-py",), layouts=(arrays.cifar10, *_COPIES),
        tested_on="real data (Parquet)",
    ),
    NamedDataset(
        name="cifar100", title="CIFAR-100", classes=100, train_splits=("train",), test_split="test", batch_size=512,
        lrs=LR9, url="https://www.cs.toronto.edu/~kriz/cifar.html",
        how="Download the Python version and unpack it: cifar-100-python/. " + _ANY_COPY.format("test"),
        hub="uoft-cs/cifar100", folder="cifar100", also=("cifar-100-python",), layouts=(arrays.cifar100, *_COPIES),
    ),
    NamedDataset(
        name="food101", title="Food-101", classes=101, train_splits=("train",), test_split="test", batch_size=512,
        lrs=LR9, url="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        how="Download food-101.tar.gz and unpack it: food-101/ with images/ and meta/. " + _ANY_COPY.format("test"),
        hub="ethz/food101",  # from memory; its test split is called validation
        folder="food101", also=("food-101",), layouts=(lists.food101, *_COPIES),
    ),
    NamedDataset(
        name="dtd", title="DTD", classes=47, train_splits=("train", "val"), test_split="test", batch_size=128,
        lrs=LR9, url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        how="Download dtd-r1.0.1.tar.gz and unpack it: dtd/ with images/ and labels/; partition 1 is used. "
        + _ANY_COPY.format("test"),
        hub="tanganke/dtd",  # from memory; its train split holds train and val
        folder="dtd", layouts=(lists.dtd, *_COPIES),
    ),
    NamedDataset(
        name="pets", title="Oxford-IIIT Pets", classes=37, train_splits=("trainval",), test_split="test",
        metric="mean_per_class", batch_size=128, lrs=LR9, url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        how="Download images.tar.gz and annotations.tar.gz and unpack both into one folder: images/, annotations/. "
        + _ANY_COPY.format("test"),
        hub="timm/oxford-iiit-pet",  # looked up; its train split is trainval
        folder="pets", also=("oxford-iiit-pet",), layouts=(lists.pets, *_COPIES),
    ),
    NamedDataset(
        name="cars", title="Stanford Cars", classes=196, train_splits=("train",), test_split="test", batch_size=128,
        lrs=LR10, url="https://huggingface.co/datasets/tanganke/stanford_cars",
        how="The original site is gone. Download the hub copy, its Parquet files in data/; or cars_train/, "
        "cars_test/, devkit/ and cars_test_annos_withlabels.mat as torchvision has them.",
        hub="tanganke/stanford_cars",  # used by XTRA
        folder="cars", also=("stanford_cars",), layouts=(lists.cars, *_COPIES),
    ),
    NamedDataset(
        name="iwildcam", title="iWildCam 2020 (WILDS)", classes=182, train_splits=("train",), test_split="val",
        metric="macro_f1", batch_size=512, lrs=LR9, url="https://wilds.stanford.edu/datasets/",
        how="Download version 2.0 of WILDS and unpack it: iwildcam_v2.0/ with metadata.csv and train/. The test split "
        "is WILDS' out-of-distribution val. " + _ANY_COPY.format("val"),
        folder="iwildcam", also=("iwildcam_v2.0",), layouts=(wilds.iwildcam, *_COPIES),
    ),
    NamedDataset(
        name="camelyon17", title="Camelyon17 (WILDS)", classes=2, train_splits=("train",), test_split="val",
        batch_size=512, lrs=LR9, url="https://wilds.stanford.edu/datasets/",
        how="Download version 1.0 of WILDS and unpack it: camelyon17_v1.0/ with metadata.csv and patches/; or the hub "
        "copy, its Parquet files (id_train, ood_val) in data/. " + _ANY_COPY.format("val"),
        hub="jxie/camelyon17",  # used by XTRA
        folder="camelyon17", also=("camelyon17_v1.0",), layouts=(wilds.camelyon17, *_COPIES),
    ),
    NamedDataset(
        name="pcam", title="PatchCamelyon", classes=2, train_splits=("train",), test_split="val", batch_size=4096,
        lrs=LR9, url="https://github.com/basveeling/pcam",
        how="Download the hub copy, its Parquet files in data/; or the HDF5 files, unpacked, for which h5py must be "
        "installed. " + _ANY_COPY.format("val"),
        hub="1aurent/PatchCamelyon",  # looked up; its splits are train, valid, test
        folder="pcam", also=("pcamv1",), layouts=(arrays.pcam, *_COPIES),
    ),
    NamedDataset(
        name="rxrx1", title="RxRx1 (WILDS)", classes=1139, train_splits=("train",), test_split="val", batch_size=512,
        lrs=LR9, url="https://wilds.stanford.edu/datasets/",
        how="Download version 1.0 of WILDS and unpack it: rxrx1_v1.0/ with metadata.csv and images/. The test split is "
        "WILDS' out-of-distribution val. " + _ANY_COPY.format("val"),
        folder="rxrx1", also=("rxrx1_v1.0",), layouts=(wilds.rxrx1, *_COPIES),
    ),
    NamedDataset(
        name="eurosat", title="EuroSAT", classes=10, train_splits=("train",), test_split="test", batch_size=512,
        lrs=LR9, url="https://github.com/phelber/eurosat",
        how="Download the hub copy, its Parquet files in data/: it has the splits XTRA used. The official archive "
        "(2750/CLASS/...) opens too, with a split of our own, as it has none.",
        hub="tanganke/eurosat",  # used by XTRA
        folder="eurosat", also=("EuroSAT",), layouts=(*_COPIES, copies.class_folders),
    ),
    NamedDataset(
        name="fmow", title="fMoW", classes=62, train_splits=("train",), test_split="val", batch_size=512, lrs=LR9,
        url="https://github.com/fMoW/dataset",
        how="Download the hub copy, its Parquet files in data/; or version 1.1 of WILDS: fmow_v1.1/ with "
        "rgb_metadata.csv and images/, of which fMoW's own splits are used. " + _ANY_COPY.format("val"),
        hub="danielz01/fMoW",  # used by XTRA; its splits and columns are from memory
        folder="fmow", also=("fmow_v1.1",), layouts=(wilds.fmow, *_COPIES),
    ),
    NamedDataset(
        name="infograph", title="Infograph (DomainNet)", classes=345, train_splits=("train",), test_split="test",
        batch_size=256, lrs=LR10, url="https://ai.bu.edu/M3SDA/",
        how="Download infograph.zip, infograph_train.txt and infograph_test.txt, and unpack the images beside the "
        "lists: infograph/CLASS/... Of the Parquet files of hf:wltjr1007/DomainNet the rows of infograph are used. "
        + _ANY_COPY.format("test"),
        folder="infograph", also=("domainnet", "DomainNet"),
        layouts=(lists.infograph, copies.infograph_parquet, copies.split_folders),
    ),
)  # fmt: skip

NAMED = {row.name: row for row in _ROWS}
