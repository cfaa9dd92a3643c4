"""Data sets by name: small images that stay in memory, and photographs that are streamed from files."""

from resist.data.folders import Photographs
from resist.data.images import Images, Loader
from resist.data.sets import DATASETS, image_size_of, load, normalisation_of, num_classes_of

__all__ = [
    "DATASETS", "Images", "Loader", "Photographs", "image_size_of", "load", "normalisation_of", "num_classes_of",
]
