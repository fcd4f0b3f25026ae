"""Image folders, with one subfolder per class or without classes, and lists of image files."""

import collections
import glob
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence

from sit_jax.data.formats import SUFFIXES
from sit_jax.data.layout import KINDS, SKIPPED, Files, Layout, contents_notes, list_classes, list_files, notes
from sit_jax.data.sources import Example, nfc, read_image, read_lines
from sit_jax.errors import ConfigError, UserError, listed

_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class _Split:
    """The part of a folder of images that a split is read from.

    `val` is held out of a lone `train` folder only if one of the `used` splits, those that the run reads, is held out.

    Attributes:
        name: Name of the split, without the part.
        layout: The splits of the folder.
        train: Name of the folder of `train`, if there is one.
        own: Name of the folder of this split, if there is one.
        base: The folder that is read.
        is_divided: Whether a fraction of the images in `base` is held out.
        wants_train: Whether the split is `train`.
        is_part: Whether it is a part of a split.
    """

    def __init__(self, root: pathlib.Path, split: str, used: Sequence[str], layout: Layout) -> None:
        """Finds a split, or a part of one, such as `train[:90%]`."""
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise UserError(f"split {split!r} is not understood: write train, val, train[:90%] or train[100:]")
        self.name, self.layout, self._root, self._bounds = match[1], layout, root, (match[2], match[3])
        if self.name.lower() not in KINDS:
            raise UserError(f"split {self.name!r} of {root}: there are {', '.join(layout.splits) or 'train, val'}")
        self.wants_train = KINDS[self.name.lower()] == "train"
        self.train, self.own = layout.folder("train"), layout.folder(self.name)
        if layout.splits and self.wants_train and self.train is None:
            raise ConfigError("data.data_dir", f"{root} has {', '.join(layout.splits)}, but no train folder")
        parts = [x[1] for x in map(_SPLIT.fullmatch, (split, *used)) if x]
        self._read = {layout.folder(x) for x in parts if x.lower() in KINDS}
        self.is_divided = not layout.splits or (self.train is not None and None in self._read)
        self.base = root / (self.own or self.train or "")
        self.is_part = any(self._bounds)

    def slice(self, files: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Returns the part of the split's files that is read."""
        start, stop = (_bound(x, len(files)) for x in self._bounds)
        return files[start:stop]

    def notes(self, held_out: str) -> list[str]:
        """Returns a line for each way in which the split may be read differently than expected."""
        own, layout = self.own, self.layout
        found = [f"{self._root}: split {self.name} is read from {own}"] if own and own not in _usual(self.name) else []
        if layout.splits and self.is_divided:
            found.append(f"{self._root}: no split but {self.train}: {held_out} is held out (data.val_fraction)")
        return [*found, *layout.notes(self._read)]


class _Files:
    """Images in files, with labels.

    Attributes:
        files: Path and label of each image.
        notes: A line for each way in which the folder may be read differently than expected.
    """

    multi_label = False
    class_names: Sequence[str]
    files: Sequence[tuple[str, int]]
    notes: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return read_image(*self.files[index])


class ImagesSource(_Files):
    """A split of a folder of images without classes: all images in it and in its subfolders, with label -1.

    The splits are those of `FolderSource`. Without them, a fraction, spread evenly over the sorted paths, is `val`.
    The root may also be a text file with the path of an image in each line, relative to the file's folder.
    """

    def __init__(
        self, root: pathlib.Path, split: str, val_fraction: float = 0.1, used: Sequence[str] = ("train", "val")
    ) -> None:
        """Lists the images of a split as `FolderSource` does."""
        self.class_names = ()
        if not root.exists():
            raise ConfigError("data.data_dir", f"there is no folder or text file {root}")
        place = _Split(root, split, used, Layout(root, labelled=False))
        found = list_files(place.base) if root.is_dir() else Files([], _read_list(root), [], [])
        images = _part(found.images, val_fraction, not place.wants_train) if place.is_divided else found.images
        self.files = place.slice([(str(path), -1) for path in images])
        if not self.files:
            raise UserError(f"split {split!r} of {root}: contains no images ({', '.join(sorted(SUFFIXES))})")
        self.ignored = sorted(str(path) for path in (*found.skipped, *found.others))
        skipped = [str(x.relative_to(place.base)) for x in found.skipped if not x.name.startswith(".")]
        self.notes = [*place.notes(f"{val_fraction:g} of the images"), *notes(place.base, {SKIPPED: skipped})]


class FolderSource(_Files):
    """A split of a folder of images with one subfolder per class.

    `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg` are the splits `train` and `val`, or other usual names: see
    `layout.Layout`. If the classes are in `root` itself, or there is no split but `train`, a fraction of each class,
    spread evenly over the sorted file names, is `val`. Classes are numbered by name. Subfolders of a class belong to
    that class.
    """

    def __init__(
        self, root: pathlib.Path, split: str, val_fraction: float = 0.1, used: Sequence[str] = ("train", "val")
    ) -> None:
        """Lists the images of a split, or of a part of one, such as `train[:90%]`; it must contain images.

        `used` are the splits that the run reads. `val` is held out of a lone `train` folder only if one is held out.
        """
        if not root.is_dir():
            raise ConfigError("data.data_dir", f"there is no folder {root.absolute()}")
        place = _Split(root, split, used, Layout(root))
        self._base, own, train = place.base, place.own, place.train
        self.class_names = tuple(list_classes(root / (train or own or "")).folders)
        contents = list_classes(self._base)
        present = {nfc(x): x for x in contents.folders if x not in self.class_names}
        # By class: its folder in this split, which may have the name in another Unicode form.
        self._folders = [x if x in contents.folders else present.get(nfc(x), x) for x in self.class_names]
        unknown = sorted(set(contents.folders) - set(self._folders))
        if unknown:
            problem = f"{self._base} has classes that train does not have: {listed(unknown)}"
            raise ConfigError("data.data_dir", f"{problem} (letter case counts)")
        found = self._list_classes(contents.folders)
        by_class = [x.images for x in found]
        if place.is_divided:
            by_class = [_part(paths, val_fraction, not place.wants_train) for paths in by_class]
        files = [(str(path), label) for label, paths in enumerate(by_class) for path in paths]
        # Sorted by class, a slice would contain only a few classes: interleave the classes.
        self.files = place.slice(_interleave(by_class) if place.is_part else files)
        if not self.files:
            why = ", ".join(sorted(SUFFIXES))
            if any(x.images for x in found) and not any(by_class):
                why = f"data.val_fraction {val_fraction} of one image per class is none"
            raise UserError(f"split {split!r} of {root}: contains no images ({why})")

        few = [len(x.images) > 1 > len(x.images) * val_fraction for x in found]
        kinds = {
            "one image is held out of each class of few images": self._select(few) if place.is_divided else [],
            f"classes without images in split {split}": self._select(not x for x in by_class),
        }
        alone = place.layout.splits and train is None
        self.notes = [f"{root}: there is no train folder; the classes are those of {own}"] if alone else []
        self.notes += place.notes(f"{val_fraction:g} of each class")
        self.notes += [*contents_notes(self._base, contents), *self._class_notes(found), *notes(self._base, kinds)]

    @property
    def ignored(self) -> list[str]:
        """Files and folders in the classes that are not read, sorted."""
        found = self._list_classes({x for x in self._folders if (self._base / x).is_dir()})
        return sorted(str(path) for files in found for path in (*files.skipped, *files.others))

    def _list_classes(self, present: Collection[str]) -> list[Files]:
        nothing = Files([], [], [], [])
        return [list_files(self._base / x) if x in present else nothing for x in self._folders]

    def _select(self, chosen: Iterable[bool]) -> list[str]:
        return [name for name, is_chosen in zip(self.class_names, chosen, strict=True) if is_chosen]

    def _class_notes(self, found: Sequence[Files]) -> list[str]:
        """Returns a line for each kind of thing inside the classes, or of classes, that may be a mistake."""
        counts = collections.Counter(x.lower() for x in self.class_names)
        skipped = [x for files in found for x in files.skipped if not x.name.startswith(".")]
        nested = [x for files in found for x in files.folders if x.name.lower() in KINDS]
        kinds = {
            SKIPPED: self._relative(skipped),
            "folders with names of splits, read as parts of their class": self._relative(nested),
            "classes that differ only in letter case": [x for x in self.class_names if counts[x.lower()] > 1],
        }
        lone = self.class_names[0] if len(self.class_names) == 1 else ""
        advice = f"; if its folders are the classes, give {self._base / lone}" if lone and found[0].folders else ""
        return notes(self._base, kinds) + ([f"{self._base}: only one class, {lone}{advice}"] if lone else [])

    def _relative(self, paths: Iterable[pathlib.Path]) -> list[str]:
        return [str(path.relative_to(self._base)) for path in paths]


def _usual(split: str) -> tuple[str, ...]:
    names = ("val", "valid", "validation")
    return names if split in names else (split,)


def _part(paths: list[pathlib.Path], val_fraction: float, wants_held_out: bool) -> list[pathlib.Path]:
    """Splits each class separately, so that both parts contain it; adding images moves few others."""
    crossed = [int((i + 1) * val_fraction) > int(i * val_fraction) for i in range(len(paths))]
    if len(paths) > 1 and not any(crossed):
        crossed[-1] = True
    return [path for path, out in zip(paths, crossed, strict=True) if out == wants_held_out]


def _read_list(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths in the lines of a text file, each once, in order; they are relative to the file's folder."""
    try:
        with path.open() as file:
            lines = [line.rstrip("\r") for line in read_lines(file)]
    except OSError as error:
        raise ConfigError("data.data_dir", f"{path} cannot be read: {error.strerror or error}") from None
    if any("\0" in line for line in lines):
        raise ConfigError("data.data_dir", f"{path} is not a text file; give a folder, or a text file of image paths")
    return [path.parent / os.path.expanduser(line) for line in dict.fromkeys(lines) if line.strip()]


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
            matches = [str(path) for path in list_files(pathlib.Path(arg)).images]
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
