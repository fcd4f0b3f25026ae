"""Fashion-MNIST, prepared from idx files."""

import gzip
import pathlib
import struct

import numpy as np
import pytest

from sit_jax.cli import app as cli
from sit_jax.data.config import DataConfig
from sit_jax.data.decode import decode
from sit_jax.data.registry import open_source

COUNTS = {"train": ("train", 5), "t10k": ("test", 3)}


def write_idx(folder: pathlib.Path, compressed: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the four files, as the format says: two zeros, type 8, dimensions, big-endian sizes, values."""
    rng, written = np.random.default_rng(0), {}
    for prefix, (split, count) in COUNTS.items():
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        written[split] = images, labels
        for name, array in {"images-idx3": images, "labels-idx1": labels}.items():
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if compressed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return written


@pytest.mark.parametrize("compressed", [True, False])
def test_prepare(compressed: bool, tmp_path: pathlib.Path) -> None:
    (files := tmp_path / "files").mkdir()
    written = write_idx(files, compressed)
    words = ["data", "prepare", "--name", "fashion_mnist", "--data_dir", str(tmp_path / "data")]
    assert cli.main([*words, "--manual_dir", str(files)]) == 0
    for split, (images, labels) in written.items():
        source = open_source(DataConfig(name="fashion_mnist", data_dir=str(tmp_path / "data")), split)
        assert source.class_names[9] == "Ankle boot"
        examples = [source[index] for index in range(len(source))]
        # tfds shuffles the training examples.
        found = {decode(x.image, 1, "image").tobytes(): x.label for x in examples}
        assert found == {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def test_files_that_are_missing_or_damaged(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(tmp_path, compressed=True)
    words = ["data", "prepare", "--name", "fashion_mnist", "--data_dir", str(tmp_path / "data")]
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    contents = [b"", whole[:-20], gzip.compress(b"\0\0\x0d\x03"), gzip.compress(gzip.decompress(whole)[:-1])]
    for content in contents:
        file.write_bytes(content)
        assert cli.main([*words, "--manual_dir", str(tmp_path)]) == 2
        assert str(file) in capsys.readouterr().err.splitlines()[-1]
    file.unlink()
    assert cli.main([*words, "--manual_dir", str(tmp_path)]) == 2
    assert file.stem in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "data" / "fashion_mnist" / "3.0.1").exists()
