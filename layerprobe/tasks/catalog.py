"""The tasks that have a short name. A literal table; any other hub id or folder works as well."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """What must be known to load a data set by its short name.

    Attributes
    ----------
    task_id : str
        Hugging Face data set id, or the package's name for data that comes with it.
    n_classes : int
        Classes of the default label column.
    image_size : int | None
        Pixels per side; None where images differ in size.
    image, label : tuple[str, ...]
        Column names to try, the default first.
    config : str | None
        The data set's configuration on the hub, where it has several.
    origin : str
        "hub", or "package" for what is installed with layerprobe.
    note : str
        One line for `layerprobe ls tasks`.
    """

    task_id: str
    n_classes: int
    image_size: int | None
    image: tuple[str, ...] = ("image",)
    label: tuple[str, ...] = ("label",)
    config: str | None = None
    origin: str = "hub"
    note: str = ""


TASKS: dict[str, TaskEntry] = {
    "digits": TaskEntry(task_id="scikit-learn/digits", n_classes=10, image_size=8, origin="package",
                        note="1,797 handwritten digits; needs no download"),
    "mnist": TaskEntry(task_id="ylecun/mnist", n_classes=10, image_size=28, note="70,000 handwritten digits"),
    "fashion-mnist": TaskEntry(task_id="zalando-datasets/fashion_mnist", n_classes=10, image_size=28,
                               note="70,000 pieces of clothing"),
    "cifar10": TaskEntry(task_id="uoft-cs/cifar10", n_classes=10, image_size=32, image=("img",),
                         note="60,000 small photographs"),
    "cifar100": TaskEntry(task_id="uoft-cs/cifar100", n_classes=100, image_size=32, image=("img",),
                          label=("fine_label", "coarse_label"),
                          note="60,000 small photographs; cifar100:coarse_label has 20 classes"),
    "svhn": TaskEntry(task_id="ufldl-stanford/svhn", n_classes=10, image_size=32, config="cropped_digits",
                      note="99,289 house numbers"),
    "tiny-imagenet": TaskEntry(task_id="zh-plus/tiny-imagenet", n_classes=200, image_size=64,
                               note="110,000 photographs"),
    "imagenet-1k": TaskEntry(task_id="ILSVRC/imagenet-1k", n_classes=1000, image_size=None,
                             note="1.33 million photographs; ask for access on the hub"),
    "food101": TaskEntry(task_id="ethz/food101", n_classes=101, image_size=None, note="101,000 dishes"),
    "beans": TaskEntry(task_id="AI-Lab-Makerere/beans", n_classes=3, image_size=500, label=("labels",),
                       note="1,295 bean leaves, three states of health"),
    "pets": TaskEntry(task_id="timm/oxford-iiit-pet", n_classes=37, image_size=None,
                      note="7,349 cats and dogs by breed"),
}  # fmt: skip
"""Short name → data set. Sizes and class counts are those of the complete data set."""
