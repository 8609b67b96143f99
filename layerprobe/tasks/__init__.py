"""Image-classification tasks: from a name, or from images in memory, to images with labels in three splits."""

from layerprobe.tasks.load import load_task
from layerprobe.tasks.own_images import make_task
from layerprobe.tasks.task import ImageSplit, Task

__all__ = ["ImageSplit", "Task", "load_task", "make_task"]
