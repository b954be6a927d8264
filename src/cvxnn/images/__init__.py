"""Image data sets: known ones, fetched or from a folder of official files, and folders with a sub-folder per class."""

from cvxnn.images.data import ImageData
from cvxnn.images.downloads import FetchedImages, fetch_images
from cvxnn.images.folders import read_image_folder
from cvxnn.images.idx import read_idx
from cvxnn.images.loading import load_images
from cvxnn.images.sources import IMAGE_SOURCES

__all__ = [
    "IMAGE_SOURCES",
    "FetchedImages",
    "ImageData",
    "fetch_images",
    "load_images",
    "read_idx",
    "read_image_folder",
]
