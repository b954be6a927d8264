"""Images in folders, a sub-folder per class."""

import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cvxnn.errors import DependencyError, InvalidInputError, StorageError
from cvxnn.images import load_images, read_image_folder
from tests.image_files import (
    CIFAR,
    SHARED,
    bytes_like,
    needs_cifar,
    no_data_elsewhere,
    quietly,
)

__all__ = ["no_data_elsewhere"]


class TestFolders:
    @pytest.fixture(autouse=True)
    def _pillow(self):
        pytest.importorskip("PIL")

    @staticmethod
    def save(path, pixels, **options):
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **options)

    def fill(self, root, shape=(6, 5, 3), classes=("dog", "cat"), n=3):
        """Save images; by class and file name, their pixels."""
        saved = {}
        for i, name in enumerate(classes):
            for j in range(n):
                saved[name, j] = bytes_like(*shape, seed=10 * i + j)
                self.save(root / name / f"{j}.png", saved[name, j])
        return saved

    def test_one_folder(self, tmp_path):
        saved = self.fill(tmp_path)
        data = quietly(tmp_path)
        assert data.classes == ["cat", "dog"]
        assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.labels.dtype == np.int64
        expected = [saved[name, j].transpose(2, 0, 1) for name in ("cat", "dog") for j in range(3)]
        np.testing.assert_array_equal(data.images, expected)
        assert (data.name, data.split, data.note) == (str(tmp_path), "train", "")
        with pytest.raises(StorageError, match="no sub-folders 'train' and 'test'"):
            load_images(tmp_path, "test")

    def test_train_and_test(self, tmp_path):
        self.fill(tmp_path / "train")
        saved = self.fill(tmp_path / "test", classes=("dog",), n=1)
        assert len(quietly(tmp_path)) == 6
        test = quietly(tmp_path, "test")
        assert test.classes == ["cat", "dog"] and test.labels.tolist() == [1]
        np.testing.assert_array_equal(test.images[0], saved["dog", 0].transpose(2, 0, 1))
        self.fill(tmp_path / "test", classes=("fox",), n=1)
        with pytest.raises(StorageError, match=r"the class 'fox', which .*train lacks"):
            load_images(tmp_path, "test")

    def test_no_test_part(self, tmp_path):
        self.fill(tmp_path / "train")
        with pytest.raises(StorageError, match="no sub-folder 'test'"):
            load_images(tmp_path, "test")

    def test_other_files_are_ignored(self, tmp_path):
        self.fill(tmp_path)
        (tmp_path / "dog" / "notes.txt").write_text("x")
        (tmp_path / "dog" / ".hidden.png").write_text("x")
        (tmp_path / ".cache" / "x").mkdir(parents=True)
        (tmp_path / "dog" / ".thumbs").mkdir()
        (tmp_path / "dog" / ".thumbs" / "1.png").write_text("x")
        self.save(tmp_path / "dog" / "deeper" / "9.PNG", bytes_like(6, 5, 3))
        assert len(quietly(tmp_path)) == 7

    def test_grey_and_colour(self, tmp_path):
        saved = self.fill(tmp_path / "grey", shape=(6, 5))
        grey = quietly(tmp_path / "grey")
        np.testing.assert_array_equal(grey.images[0, 0], saved["cat", 0])
        assert grey.images.shape == (6, 1, 6, 5)
        assert quietly(tmp_path / "grey", channels=3).images.shape == (6, 3, 6, 5)
        self.save(tmp_path / "grey" / "cat" / "9.png", bytes_like(6, 5, 3))
        assert quietly(tmp_path / "grey").images.shape == (7, 3, 6, 5)
        assert quietly(tmp_path / "grey", channels=1).images.shape == (7, 1, 6, 5)

    def test_sizes(self, tmp_path):
        self.fill(tmp_path)
        self.save(tmp_path / "dog" / "9.png", bytes_like(5, 6, 3))
        with pytest.raises(
            StorageError, match=r"9.png has 5 x 6 pixels and .*0.png has 6 x 5; .*size=\(height, width\)"
        ):
            load_images(tmp_path)
        assert quietly(tmp_path, size=(4, 3)).images.shape == (7, 3, 4, 3)
        assert quietly(tmp_path, size=4).images.shape == (7, 3, 4, 4)

    def test_resizing_averages(self, tmp_path):
        checks = np.kron(np.ones((8, 8), np.uint8), np.array([[0, 200], [200, 0]], np.uint8))
        checks[:, 8:] //= 2
        self.save(tmp_path / "a" / "1.png", checks)
        images = quietly(tmp_path, size=4).images[0, 0].astype(int)
        assert np.abs(images[:, [0, 3]] - [100, 50]).max() <= 5

    def test_upright(self, tmp_path):
        from PIL import Image

        pixels = np.zeros((6, 4, 3), np.uint8)
        pixels[0] = 255
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        self.save(tmp_path / "a" / "1.png", pixels, exif=exif)
        self.save(tmp_path / "b" / "1.png", bytes_like(4, 6, 3))
        images = quietly(tmp_path).images
        assert images.shape == (2, 3, 4, 6) and (images[0, :, :, 5] == 255).all()

    def test_jpeg_is_noted(self, tmp_path):
        self.fill(tmp_path)
        self.save(tmp_path / "dog" / "9.jpg", bytes_like(6, 5, 3))
        assert "JPEG" in quietly(tmp_path).note

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
    def test_damaged_file(self, tmp_path, content):
        self.fill(tmp_path)
        (tmp_path / "dog" / "7.png").write_bytes(content)
        with pytest.raises(StorageError, match=r"7.png cannot be read as an image"):
            load_images(tmp_path)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
    def test_cut_file(self, tmp_path, suffix):
        self.save(tmp_path / "a" / f"1.{suffix}", bytes_like(60, 50, 3))
        path = tmp_path / "a" / f"1.{suffix}"
        path.write_bytes(path.read_bytes()[:-1500])
        with pytest.raises(StorageError, match="cannot be read as an image"):
            load_images(tmp_path)

    def test_sixteen_bits(self, tmp_path):
        self.save(tmp_path / "a" / "1.png", np.full((4, 4), 3000, np.uint16))
        with pytest.raises(StorageError, match="8 bits per channel"):
            load_images(tmp_path)

    def test_empty(self, tmp_path):
        with pytest.raises(StorageError, match="no sub-folders"):
            load_images(tmp_path)
        (tmp_path / "cat").mkdir()
        with pytest.raises(StorageError, match="no images in its sub-folders"):
            load_images(tmp_path)
        self.fill(tmp_path, classes=("dog",))
        with pytest.raises(StorageError, match="cat has no images"):
            load_images(tmp_path)

    @pytest.mark.parametrize("size", ["8", 0, (1, 2, 3), (4, -1), 2.5, True])
    def test_wrong_size(self, tmp_path, size):
        self.fill(tmp_path)
        with pytest.raises(InvalidInputError, match="size is"):
            read_image_folder(tmp_path, size=size)

    def test_wrong_channels(self, tmp_path):
        self.fill(tmp_path)
        with pytest.raises(InvalidInputError, match="channels is 2"):
            read_image_folder(tmp_path, channels=2)

    def test_without_pillow(self, tmp_path, monkeypatch):
        self.fill(tmp_path)
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(DependencyError, match=r"cvxnn\[images\]"):
            load_images(tmp_path)

    def test_a_folder_with_a_known_name(self, tmp_path, monkeypatch):
        self.fill(tmp_path / "cifar10")
        monkeypatch.chdir(tmp_path)
        assert len(quietly("./cifar10")) == len(quietly(Path("cifar10"))) == 6
        with pytest.raises(StorageError, match="CIFAR-10 is not in the cache"):
            load_images("cifar10")

    @needs_cifar
    def test_shared_jpeg_files(self, tmp_path):
        with tarfile.open(SHARED / "cifar10-jpeg" / "cifar10-jpeg.tar.xz", "r|xz") as archive:
            for i, member in enumerate(archive):
                if i == 60:
                    break
                archive.extract(member, tmp_path, filter="data")
        split = "train" if (tmp_path / "train").is_dir() else "test"
        data = read_image_folder(tmp_path / split)
        assert data.images.shape[1:] == (3, 32, 32)
        assert "JPEG" in data.note and set(data.classes) <= set(CIFAR.classes)
