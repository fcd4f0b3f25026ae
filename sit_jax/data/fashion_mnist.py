"""Fashion-MNIST as a tfds data set, prepared without TensorFlow: 70,000 grey images of 28x28 pixels in 10 classes.

Source: https://github.com/zalandoresearch/fashion-mnist.
"""

import gzip
import io
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sit_jax.errors import UserError

_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FILES = {"train": "train", "test": "t10k"}
_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Prepares the data set under the name, version and features of tfds's builder, which then reads it.

    The four idx files come from `manual_dir`, compressed by gzip or not; without it, they are downloaded.
    """

    name = "fashion_mnist"
    VERSION = tfds.core.Version("3.0.1")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The four idx files, such as train-images-idx3-ubyte.gz."

    def __init__(self, manual_dir: str | None = None, **options: object) -> None:
        """Takes the folder of the idx files, and the options of a tfds builder."""
        self._manual_dir = manual_dir
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1), dtype=np.uint8, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=list(_CLASSES)),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            description=__doc__,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[object]]:
        names = {
            (split, kind): f"{prefix}-{kind}-ubyte"
            for split, prefix in _FILES.items()
            for kind in ("images-idx3", "labels-idx1")
        }
        if self._manual_dir is None:
            paths = dl_manager.download({key: f"{_URL}{name}.gz" for key, name in names.items()})
        else:
            paths = {key: _find(pathlib.Path(self._manual_dir), name) for key, name in names.items()}
        return {
            split: self._generate_examples(paths[split, "images-idx3"], paths[split, "labels-idx1"]) for split in _FILES
        }

    def _generate_examples(self, images: pathlib.Path, labels: pathlib.Path) -> Iterator[tuple[int, dict[str, object]]]:
        for index, (pixels, label) in enumerate(zip(read_idx(images), read_idx(labels), strict=True)):
            # Encoded bytes keep tfds from importing TensorFlow.
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, format="PNG")
            encoded.seek(0)
            yield index, {"image": encoded, "label": int(label)}


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads an idx file of bytes, compressed by gzip or not; raises a UserError if it is damaged.

    Format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, the sizes as big-endian int32, the
    values.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an idx file of bytes does")
        sizes = np.frombuffer(content, ">i4", content[3], 4)
        return np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError) as error:  # OSError and EOFError: gzip's.
        raise UserError(f"{path} is damaged: {error}") from None


def _find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"--manual_dir {folder}: contains neither {name} nor {name}.gz")
