"""Data sets by name: images in memory, and photographs from files."""

from resist.data.datasets import DATASETS, device_bytes, image_size_of, load, normalization_of, num_classes_of
from resist.data.image_folder import Photographs
from resist.data.in_memory import Images, Loader
from resist.data.mixing import Mixed
from resist.data.sampler import Sampler

__all__ = [
    "DATASETS",
    "Images",
    "Loader",
    "Mixed",
    "Photographs",
    "Sampler",
    "device_bytes",
    "image_size_of",
    "load",
    "normalization_of",
    "num_classes_of",
]
