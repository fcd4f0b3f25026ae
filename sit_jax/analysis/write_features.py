"""`sit predict --features`: writes the pooled features of image files to one file."""

import pathlib
from collections.abc import Sequence

import numpy as np

from sit_jax.analysis.predict import run_batches
from sit_jax.errors import ImageDecodeError, NotFiniteError, UserError, check_all_read, valid_text
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.model import Model
from sit_jax.training.progress import Progress

_SUFFIXES = (".npz", ".parquet")


def write_features(model: Model, images: Sequence[str], path: pathlib.Path, batch_size: int) -> None:
    """Writes the pooled features of images, in order; unreadable ones are reported on standard error and left out.

    A `.npz` file has the arrays `images` (paths) and `features` (images, width), float32; a `.parquet` file has these
    as columns, with a list of numbers per image. The file is written when all features are computed.

    Raises:
        UserError: The file exists, cannot be written or has another suffix, or the model has no features.
        NotFiniteError: A feature is not finite.
        PartialFailureError: Some images could not be read.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"--features {path}: must be a {' or a '.join(_SUFFIXES)} file")
    names, rows = [], []
    with atomic_create(path) as part:
        with Progress("features", len(images), 0, 1) as progress:
            batches = run_batches(model, images, lambda pixels: np.asarray(model.features(pixels).pooled), batch_size)
            for done, (name, row) in enumerate(batches, start=1):
                if isinstance(row, ImageDecodeError):
                    progress.note(f"skipped {row}")
                elif not np.isfinite(row).all():
                    raise NotFiniteError(f"{model.source}: the features of {name} are not finite")
                else:
                    names.append(valid_text(name))
                    rows.append(row)
                if done % batch_size == 0 or done == len(images):
                    progress.update(done, {})
        if not rows:
            raise UserError(f"--features {path}: none of {len(images)} images could be read; nothing was written")
        _write(part, suffix, names, np.stack(rows))
    check_all_read(len(rows), len(images))


def _write(path: pathlib.Path, suffix: str, names: list[str], features: np.ndarray) -> None:
    if suffix == ".npz":
        with path.open("wb") as file:  # An open file keeps NumPy from appending a suffix.
            np.savez(file, images=np.array(names), features=features)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq  # These imports take a second.

    column = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), features.shape[1])
    pq.write_table(pa.table({"image": names, "features": column}), path)
