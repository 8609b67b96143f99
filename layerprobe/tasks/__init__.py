"""Image-classification tasks: from a name to images with labels in three splits."""

from layerprobe.tasks.load import load_task
from layerprobe.tasks.task import ImageSplit, Task

__all__ = ["ImageSplit", "Task", "load_task"]
