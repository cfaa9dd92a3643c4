"""Data sets by name, and the loader of small images."""

from resist.data.images import Images, Loader
from resist.data.sets import DATASETS, image_size_of, load, normalisation_of, num_classes_of

__all__ = ["DATASETS", "Images", "Loader", "image_size_of", "load", "normalisation_of", "num_classes_of"]
