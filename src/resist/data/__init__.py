"""Data sets by name, and the loader of small images."""

from resist.data.images import Images, Loader
from resist.data.sets import DATASETS, load, num_classes_of

__all__ = ["DATASETS", "Images", "Loader", "load", "num_classes_of"]
