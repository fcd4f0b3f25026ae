"""Image folders with one subfolder per class."""

import contextlib
import glob
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from sit_jax.data.sources import Example, read_image
from sit_jax.errors import ConfigError, UserError, listed

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_TRAIN = "train"
# Common names of the validation split.
_HELD_OUT = ("val", "valid", "validation", "test")
_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


@contextlib.contextmanager
def _listing() -> Iterator[None]:
    """Converts the error of a folder that cannot be listed to a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from None


class FolderSource:
    """A split of a folder of images.

    `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg` are the splits `train` and `val` (or `valid`, `validation`,
    `test`). If the classes are in `root` itself, a fraction of each class, spread evenly over the sorted file names, is
    `val`. Classes are numbered by name. Subfolders of a class belong to that class. `files` has paths and labels.
    """

    multi_label = False

    @_listing()
    def __init__(self, root: pathlib.Path, split: str, val_fraction: float = 0.1) -> None:
        """Lists the images of a split, or of a part of one, such as `train[:90%]`; it must contain images."""
        if not root.is_dir():
            raise ConfigError("data.data_dir", f"there is no folder {root}")
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise UserError(f"split {split!r} is not understood: write train, val, train[:90%] or train[100:]")
        name = match[1]
        present = [x for x in (_TRAIN, *_HELD_OUT) if (root / x).is_dir()]
        has_splits = _TRAIN in present
        if has_splits and name in _HELD_OUT and name not in present:
            name = next((x for x in present if x != _TRAIN), name)  # The name of the validation split in this folder.
        if name not in (present if has_splits else (_TRAIN, *_HELD_OUT)):
            raise UserError(f"split {name!r} of {root}: there are {', '.join(present) or 'train, val'}")
        self.base = root / name if has_splits else root
        self.class_names: Sequence[str] = _classes(root / _TRAIN if has_splits else root)
        by_class = [images_in(self.base / x) for x in self.class_names]
        why = ", ".join(sorted(SUFFIXES))
        if has_splits:
            unknown = sorted(set(_classes(self.base)) - set(self.class_names))
            if unknown:
                problem = f"{self.base} has classes that train does not have: {listed(unknown)}"
                raise ConfigError("data.data_dir", problem)
        else:
            if name != _TRAIN and any(by_class):
                why = f"data.val_fraction {val_fraction} of each class is less than one"
            by_class = [_part(paths, val_fraction, name != _TRAIN) for paths in by_class]
        files = [(str(path), label) for label, paths in enumerate(by_class) for path in paths]
        # Sorted by class, a slice would contain only a few classes: interleave the classes.
        files = _interleave(by_class) if match[2] or match[3] else files
        start, stop = (_bound(match[i], len(files)) for i in (2, 3))
        self.files: Sequence[tuple[str, int]] = files[start:stop]
        if not self.files:
            raise UserError(f"split {split!r} of {root}: contains no images ({why})")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def ignored(self) -> list[str]:
        """Files in the folder that are not images by their suffix, sorted."""
        found = (path for name in self.class_names for path in (self.base / name).rglob("*"))
        return sorted(str(path) for path in found if path.is_file() and not _is_image(path.name))

    def __getitem__(self, index: int) -> Example:
        return read_image(*self.files[index])


def _classes(base: pathlib.Path) -> tuple[str, ...]:
    names = sorted(x.name for x in base.iterdir() if x.is_dir() and not x.name.startswith("."))
    if not names:
        raise ConfigError("data.data_dir", f"{base} has no folder per class (CLASS/image.jpg)")
    return tuple(names)


@_listing()
def images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the images in a folder and its subfolders, sorted and without hidden files."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # `val` may lack a class of `train`.
            raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(x for x in folders if not x.startswith("."))
        found += [pathlib.Path(place, x) for x in names if _is_image(x)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return pathlib.PurePath(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def _part(paths: list[pathlib.Path], val_fraction: float, wants_held_out: bool) -> list[pathlib.Path]:
    """Splits each class separately, so that both parts contain small classes; adding images moves few others."""
    crossed = [int((i + 1) * val_fraction) > int(i * val_fraction) for i in range(len(paths))]
    return [path for path, out in zip(paths, crossed, strict=True) if out == wants_held_out]


def _interleave(by_class: list[list[pathlib.Path]]) -> list[tuple[str, int]]:
    ranked = []
    for label, paths in enumerate(by_class):
        ranked += [((rank + 0.5) / len(paths), label, str(path)) for rank, path in enumerate(paths)]
    return [(path, label) for _, label, path in sorted(ranked)]


def _bound(text: str | None, length: int) -> int | None:
    if text is None:
        return None
    return int(length * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def find_images(args: Sequence[str], lines: Iterable[str] = ()) -> list[str]:
    """Returns the images that command-line arguments refer to, in order.

    An argument is a file, a folder (all images within, sorted), a glob pattern (`**` for any depth), or `-` for the
    files in `lines`. Raises a UserError if one matches no file.
    """
    found: list[str] = []
    for arg in args:
        if arg == "-":
            matches = [line for line in (x.rstrip("\r\n") for x in lines) if line]
        elif os.path.isdir(arg):
            matches = [str(path) for path in images_in(pathlib.Path(arg))]
            if not matches:
                raise UserError(f"{arg}: contains no images")
        elif os.path.lexists(arg):  # Also a dangling link: reading it fails, as it does for one in a folder.
            matches = [arg]
        else:
            # A pattern that the shell did not expand. Checked last, as file names may contain brackets.
            matches = sorted(x for x in glob.glob(arg, recursive=True) if not os.path.isdir(x))
            if not matches:
                raise UserError(f"{arg}: there is no such file, folder or match")
        found += matches
    return found
