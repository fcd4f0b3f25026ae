"""Image folders with one subfolder per class."""

import collections
import glob
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence

from sit_jax.data.formats import SUFFIXES
from sit_jax.data.layout import KINDS, Files, Layout, contents_notes, list_classes, list_files, notes
from sit_jax.data.sources import Example, nfc, read_image
from sit_jax.errors import ConfigError, UserError, listed

_SPLIT = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


class FolderSource:
    """A split of a folder of images.

    `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg` are the splits `train` and `val`, or other usual names: see
    `layout.Layout`. If the classes are in `root` itself, or there is no split but `train`, a fraction of each class,
    spread evenly over the sorted file names, is `val`. Classes are numbered by name. Subfolders of a class belong to
    that class.

    Attributes:
        files: Path and label of each image.
        notes: A line for each way in which the folder may be read differently than expected.
    """

    multi_label = False

    def __init__(
        self, root: pathlib.Path, split: str, val_fraction: float = 0.1, used: Sequence[str] = ("train", "val")
    ) -> None:
        """Lists the images of a split, or of a part of one, such as `train[:90%]`; it must contain images.

        `used` are the splits that the run reads. `val` is held out of a lone `train` folder only if one is held out.
        """
        if not root.is_dir():
            raise ConfigError("data.data_dir", f"there is no folder {root.absolute()}")
        match = _SPLIT.fullmatch(split)
        if match is None:
            raise UserError(f"split {split!r} is not understood: write train, val, train[:90%] or train[100:]")
        name, layout = match[1], Layout(root)
        if name.lower() not in KINDS:
            raise UserError(f"split {name!r} of {root}: there are {', '.join(layout.splits) or 'train, val'}")
        wants_train, train, own = KINDS[name.lower()] == "train", layout.folder("train"), layout.folder(name)
        if layout.splits and wants_train and train is None:
            raise ConfigError("data.data_dir", f"{root} has {', '.join(layout.splits)}, but no train folder")
        parts = [x[1] for x in map(_SPLIT.fullmatch, (split, *used)) if x]
        read = {layout.folder(x) for x in parts if x.lower() in KINDS}
        is_divided = not layout.splits or (train is not None and None in read)

        self._base = root / (own or train or "")
        self.class_names: Sequence[str] = tuple(list_classes(root / (train or own or "")).folders)
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
        if is_divided:
            by_class = [_part(paths, val_fraction, not wants_train) for paths in by_class]
        files = [(str(path), label) for label, paths in enumerate(by_class) for path in paths]
        # Sorted by class, a slice would contain only a few classes: interleave the classes.
        files = _interleave(by_class) if match[2] or match[3] else files
        start, stop = (_bound(match[i], len(files)) for i in (2, 3))
        self.files: Sequence[tuple[str, int]] = files[start:stop]
        if not self.files:
            why = ", ".join(sorted(SUFFIXES))
            if any(x.images for x in found) and not any(by_class):
                why = f"data.val_fraction {val_fraction} of one image per class is none"
            raise UserError(f"split {split!r} of {root}: contains no images ({why})")

        self.notes = [f"{root}: split {name} is read from {own}"] if own and own not in _usual_names(name) else []
        if layout.splits and train is None:
            self.notes.append(f"{root}: there is no train folder; the classes are those of {own}")
        elif layout.splits and is_divided:
            self.notes.append(
                f"{root}: no split but {train}: {val_fraction:g} of each class is held out (data.val_fraction)"
            )
        few = [len(x.images) > 1 > len(x.images) * val_fraction for x in found]
        kinds = {
            "one image is held out of each class of few images": self._select(few) if is_divided else [],
            f"classes without images in split {split}": self._select(not x for x in by_class),
        }
        self.notes += [*layout.notes(read), *contents_notes(self._base, contents), *self._class_notes(found)]
        self.notes += notes(self._base, kinds)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return read_image(*self.files[index])

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
            "system folders and links to folders above, not read": self._relative(skipped),
            "folders with names of splits, read as parts of their class": self._relative(nested),
            "classes that differ only in letter case": [x for x in self.class_names if counts[x.lower()] > 1],
        }
        lone = self.class_names[0] if len(self.class_names) == 1 else ""
        advice = f"; if its folders are the classes, give {self._base / lone}" if lone and found[0].folders else ""
        return notes(self._base, kinds) + ([f"{self._base}: only one class, {lone}{advice}"] if lone else [])

    def _relative(self, paths: Iterable[pathlib.Path]) -> list[str]:
        return [str(path.relative_to(self._base)) for path in paths]


def _usual_names(split: str) -> tuple[str, ...]:
    names = ("val", "valid", "validation")
    return names if split in names else (split,)


def _part(paths: list[pathlib.Path], val_fraction: float, wants_held_out: bool) -> list[pathlib.Path]:
    """Splits each class separately, so that both parts contain it; adding images moves few others."""
    crossed = [int((i + 1) * val_fraction) > int(i * val_fraction) for i in range(len(paths))]
    if len(paths) > 1 and not any(crossed):
        crossed[-1] = True
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
