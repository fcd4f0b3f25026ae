"""Prepares data sets for random access: converts downloads, folders and TFRecord copies to ArrayRecord.

tfds writes to a temporary folder and renames it when it is complete, so an interrupted preparation leaves no data set.
"""

import io
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds
from tqdm import tqdm

from sit_jax.data.config import DataConfig
from sit_jax.data.decode import decode
from sit_jax.data.fashion_mnist import FashionMnist
from sit_jax.data.folder import FolderSource
from sit_jax.data.registry import log_notes
from sit_jax.data.sources import writing
from sit_jax.data.tfds_source import find_builder, prepared_digits, quiet_tfds, tfds_folder
from sit_jax.errors import ConfigError, ImageDecodeError, UserError, one_line, valid_text


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A tfds builder for data sets without a builder class, which does not need TensorFlow to infer the features."""

    def _split_generators(self, dl_manager: object) -> Mapping[str, object]:
        return self._split_datasets


def _folder_examples(
    root: pathlib.Path, split: str, source: FolderSource, skip_broken: bool
) -> Iterator[tuple[str, dict[str, object]]]:
    for index in tqdm(range(len(source)), desc=split, unit="images"):
        path, label = source.files[index]
        name = valid_text(str(pathlib.Path(path).relative_to(root)))
        try:
            image = source[index].image
            decode(image, 3, name)
        except ImageDecodeError as error:
            if not skip_broken:
                raise
            tqdm.write(f"left out: {error}")
            continue
        yield name, {"image": io.BytesIO(image), "label": label, "file_name": name}


def prepare_folder(root: pathlib.Path, name: str, data: DataConfig) -> pathlib.Path:
    """Converts a folder of images to a tfds data set of ArrayRecord files in `data.data_dir`; returns its folder.

    Raises a UserError if the name is invalid or taken, an image is damaged (unless skipped), or the disk is full.
    """
    if not name.isidentifier() or name != name.lower():
        raise ConfigError("--name", f"must be lower-case letters, digits and underscores, got {name!r}")
    sources = {split: FolderSource(root, split, data.val_fraction) for split in ("train", "val")}
    log_notes(sources.values())
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=[valid_text(x) for x in sources["train"].class_names]),
        "file_name": tfds.features.Text(),
    }
    skip = data.on_decode_error == "skip"
    builder = _Builder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: _folder_examples(root, split, source, skip) for split, source in sources.items()},
        description=f"Images from a folder named {valid_text(root.name)}.",
        data_dir=tfds_folder(data.data_dir),
        file_format="array_record",
    )
    if builder.is_prepared():
        raise UserError(f"{builder.data_path} is prepared already; choose another --name or remove it")
    with quiet_tfds():
        return _prepare(builder)


def prepare_named(data: DataConfig, manual_dir: str) -> pathlib.Path:
    """Downloads and converts a data set of tfds, or prepares the digits; returns its folder.

    Files that must be downloaded manually (ImageNet's tars) are read from `manual_dir`, or from the default of tfds.
    Raises a UserError if files are missing, TensorFlow is needed and missing, or the disk is full.
    """
    if data.name == "digits":
        return pathlib.Path(prepared_digits(data.data_dir).data_path)
    if data.name == "fashion_mnist":
        builder = FashionMnist(manual_dir or None, data_dir=tfds_folder(data.data_dir), file_format="array_record")
        return _prepare(builder)
    return _prepare(find_builder(data.name, data.data_dir), manual_dir or None)


def convert_tfrecord(source: pathlib.Path, data_dir: str) -> pathlib.Path:
    """Converts a prepared tfds data set of TFRecord files to ArrayRecord, with the converter of tfds.

    `source` is the version's folder, such as `~/tensorflow_datasets/imagenet2012/5.1.0`. The copy in `data_dir`, whose
    folder is returned, has the same name and version. Raises a UserError if it already exists, the packages of the
    converter are missing, or the disk is full.
    """
    if not (source / "dataset_info.json").is_file():
        problem = f"{source} is not a prepared tfds data set: it has no dataset_info.json"
        raise ConfigError("--from_tfrecord", problem)
    builder = tfds.builder_from_directory(str(source))
    base = tfds_folder(data_dir) or pathlib.Path(tfds.core.constants.DATA_DIR)
    target = base / builder.info.full_name
    if target.exists():
        raise UserError(f"{target} already exists; choose another --data_dir")
    # The converter is correct only if the copy is in the folder of the original. Hence it runs in a folder of links to
    # the original, which becomes the data set when it is complete.
    scratch = base / f"incomplete.{builder.info.name}"
    partial = scratch / builder.info.full_name
    try:
        from tensorflow_datasets.scripts.cli import convert_format_utils

        with writing(target):
            shutil.rmtree(scratch, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in source.iterdir():
                if path.suffix in (".json", ".txt"):
                    shutil.copy(path, partial)
                elif path.is_file():
                    (partial / path.name).symlink_to(path.absolute())
            convert_format_utils.convert_dataset(
                out_dir=None, out_file_format="array_record", dataset_version_dir=str(partial), num_workers=1
            )
            for path in partial.iterdir():
                if path.is_symlink():
                    path.unlink()
            info = json.loads((partial / "dataset_info.json").read_text())
            info["fileFormat"] = "array_record"
            info.pop("alternativeFileFormats", None)
            (partial / "dataset_info.json").write_text(json.dumps(info, indent=2))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(target)
            shutil.rmtree(scratch)
    except ValueError as error:
        raise UserError(f"{source} cannot be converted: {one_line(error)}") from None
    except ImportError:
        problem = "tfds's converter needs TensorFlow and Apache Beam (reading afterwards does not)"
        raise UserError(f"{problem}: pip install tensorflow apache-beam, then try again") from None
    return target


def _prepare(builder: tfds.core.DatasetBuilder, manual_dir: str | None = None) -> pathlib.Path:
    try:
        with writing(builder.data_path):
            # Returns at once if the data set is prepared.
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except ImageDecodeError as error:
        raise UserError(f"{error}; fix or remove it, or pass --skip_broken. Nothing was written") from None
    except ImportError as error:
        if "tensorflow" not in str(error).lower():
            raise
        problem = "tfds needs TensorFlow to prepare this data set (not to read it afterwards)"
        raise UserError(f"{problem}: pip install tensorflow, then try again") from None
    except (AssertionError, tfds.download.DownloadError) as error:
        raise UserError(f"{builder.name} cannot be prepared: {one_line(error, 400)}") from None
    return pathlib.Path(builder.data_path)
