"""scikit-learn's handwritten digits as a tfds data set: 1,797 grey images of 8x8 pixels, without a download."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# Every fifth image is held out. The images are sorted by writer, so both splits contain every writer.
HELD_OUT_EVERY = 5


class SitDigits(tfds.core.GeneratorBasedBuilder):
    """tfds builder of the digits, with the splits `train` (1,438 images) and `test` (359)."""

    name = "sit_digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            description=__doc__,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, object]]]]:
        return {"train": self._generate_examples(held_out=False), "test": self._generate_examples(held_out=True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict[str, object]]]:
        from sklearn.datasets import load_digits  # Only needed to prepare the data; the import takes a second.

        digits = load_digits()
        for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out:
                # The grey levels are 0 to 16. Encoded bytes keep tfds from importing TensorFlow.
                encoded = io.BytesIO()
                Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(encoded, format="PNG")
                encoded.seek(0)
                yield index, {"image": encoded, "label": int(label)}
