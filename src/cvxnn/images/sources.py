"""The image data sets that are known by name: their files, hashes and addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["IMAGE_SOURCES", "Download", "ImageSource", "Layout"]


@dataclass(frozen=True)
class Layout:
    """One of the forms that a data set is published in.

    Attributes
    ----------
    form : {"idx", "cifar_binary", "cifar_python"}
    folder : str
        The folder that the files are in, as published.
    files : dict of str to tuple of str
        For "train" and "test", the names of the files.
    md5 : dict of str to str
        By name, the MD5 of the official file.
    archive : str
        The .tar.gz of the folder; empty where there is none.
    archive_sha256 : str
    """

    form: str
    folder: str
    files: Mapping[str, tuple[str, ...]]
    md5: dict[str, str]
    archive: str = ""
    archive_sha256: str = ""


@dataclass(frozen=True)
class Download:
    """Where the official files are: `base_url` and a name, with the SHA256 of each; and the folder to keep them in."""

    base_url: str
    sha256: dict[str, str]
    megabytes: int
    folder: str = ""


@dataclass(frozen=True)
class ImageSource:
    """A data set that is known by name.

    Attributes
    ----------
    name, title, description : str
    classes : tuple of str
    shape : tuple of int
        Channels, height and width of an image.
    counts : dict of str to int
        For "train" and "test", the number of images in the official files.
    layouts : tuple of Layout
        The forms that are read, in the order in which they are looked for.
    download : Download
    others_warn : bool
        Whether files that are not the official ones are worth a warning, or a note only.
    copies : dict of str to str
        By MD5, files that are not official but known, and what is to be said of them.
    """

    name: str
    title: str
    description: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    counts: dict[str, int]
    layouts: tuple[Layout, ...]
    download: Download
    others_warn: bool
    copies: dict[str, str] = field(default_factory=dict)


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

_FASHION_MNIST = ImageSource(
    name="fashion_mnist",
    title="Fashion-MNIST",
    description="70,000 grey images of clothing, 28 x 28; 10 classes; 60,000 for training, 10,000 for testing",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    shape=(1, 28, 28),
    counts={"train": 60_000, "test": 10_000},
    layouts=(
        Layout(
            form="idx",
            folder="fashion-mnist",
            files={split: tuple(f"{name}.gz" for name in names) for split, names in _IDX.items()},
            md5={
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
            },
        ),
        Layout(
            form="idx",
            folder="fashion-mnist",
            files=_IDX,
            md5={
                "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
                "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
                "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
            },
        ),
    ),
    download=Download(
        base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        sha256={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        megabytes=31,
        folder="fashion-mnist",
    ),
    others_warn=True,
)

_JPEG = "JPEG copies of the official images, in another order"

_CIFAR10 = ImageSource(
    name="cifar10",
    title="CIFAR-10",
    description="60,000 colour images, 32 x 32; 10 classes; 50,000 for training, 10,000 for testing",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    shape=(3, 32, 32),
    counts={"train": 50_000, "test": 10_000},
    layouts=(
        Layout(
            form="cifar_binary",
            folder="cifar-10-batches-bin",
            files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
            md5={
                "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
                "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
                "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
                "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
                "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
                "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
            },
            archive="cifar-10-binary.tar.gz",
            archive_sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        Layout(
            form="cifar_python",
            folder="cifar-10-batches-py",
            files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
            md5={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
            archive="cifar-10-python.tar.gz",
            archive_sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        ),
    ),
    download=Download(
        base_url="https://www.cs.toronto.edu/~kriz/",
        sha256={"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        megabytes=170,
    ),
    others_warn=False,
    copies={
        "7dddcdb69a04d40568863ce601a7e9dd": _JPEG,
        "e7b3fba71202f0788e6482e33d6bce2d": _JPEG,
        "8a30b486f4b29b6daf38f1a542518027": _JPEG,
        "8a24da0a02cb8f46c03c78fbc7aed6eb": _JPEG,
        "f53f61339cda872280f3dbd8e482900c": _JPEG,
        "dc7092433ec19c88685213deb4fb7459": _JPEG,
    },
)

#: By name, the data sets that :func:`cvxnn.images.load_images` and ``cvxnn datasets fetch`` know.
IMAGE_SOURCES: dict[str, ImageSource] = {source.name: source for source in (_FASHION_MNIST, _CIFAR10)}
