"""The contents of a folder of images: splits, class folders, image files, and what is not read."""

import contextlib
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from sit_jax.data.formats import SUFFIXES
from sit_jax.errors import ConfigError, UserError, listed

# Names of split folders, in any letter case -> the kind of split.
KINDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "eval": "eval",
}
# Folders of file servers, archives and operating systems, in lower case.
_SYSTEM = frozenset(
    {"@eadir", "@recycle", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information"}
    | {"lost+found", "__pycache__"}
)
# What is said about folders that are skipped.
SKIPPED = "system folders and links to folders above, not read"
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
# Device and inode of a folder.
_Id = tuple[int, int]


class Contents(NamedTuple):
    """The contents of one folder, sorted: folders to enter, images, folders that are not read, and other files."""

    folders: dict[str, _Id]
    images: list[str]
    skipped: list[str]
    others: list[str]


class Files(NamedTuple):
    """The contents of a folder and its subfolders: as `Contents`, with paths."""

    folders: list[pathlib.Path]
    images: list[pathlib.Path]
    skipped: list[pathlib.Path]
    others: list[pathlib.Path]


@contextlib.contextmanager
def listing() -> Iterator[None]:
    """Converts the error of a folder that cannot be listed to a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from None


@listing()
def list_folder(folder: pathlib.Path, seen: set[_Id] | None = None) -> Contents:
    """Lists one folder. Hidden and system folders are skipped, and links to `seen`, by default the folders above."""
    found = Contents({}, [], [], [])
    seen = _above(folder) if seen is None else seen
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda x: x.name):
            is_folder = False
            with contextlib.suppress(OSError):  # A link to itself.
                is_folder = entry.is_dir()
            if is_folder:
                identity = _identity(entry.path)
                if entry.name.startswith(".") or entry.name.lower() in _SYSTEM or identity in seen:
                    found.skipped.append(entry.name)
                else:
                    found.folders[entry.name] = identity
            elif pathlib.PurePath(entry.name).suffix.lower() in SUFFIXES and not entry.name.startswith("."):
                found.images.append(entry.name)
            else:
                found.others.append(entry.name)
    return found


@listing()
def list_files(folder: pathlib.Path) -> Files:
    """Lists a folder and its subfolders. Each is read once: links to one above, or to one read before, are skipped."""
    found = Files([], [], [], [])
    seen, rest = _above(folder), [folder]
    while rest:
        place = rest.pop()
        here = list_folder(place, seen)
        for paths, names in zip(found, here, strict=True):
            paths.extend(place / x for x in names)
        for name, identity in here.folders.items():
            if identity not in seen:
                seen.add(identity)
                rest.append(place / name)
    return Files(*(sorted(x) for x in found))


def list_classes(base: pathlib.Path) -> Contents:
    """Lists the folder whose folders are the classes; raises a ConfigError if there are none."""
    found = list_folder(base)
    if not found.folders:
        problem = f"{base} has no folder per class (CLASS/image.jpg)"
        archives = [x for x in found.others if x.lower().endswith(_ARCHIVES)]
        problem += f"; it contains {len(found.images)} images without a class" if found.images else ""
        problem += f"; unpack {listed(archives)}" if archives else ""
        raise ConfigError("data.data_dir", problem)
    return found


class Layout:
    """The splits of a folder of images.

    A split folder has one of the names in `KINDS` and contains class folders, at least as many as images. If there is
    one, or if no other folder contains images, the folder has splits. Otherwise its folders are the classes. If it has
    no classes (not `labelled`), images in the folder itself count as another folder's. A file has no splits.

    Attributes:
        splits: Names of the split folders; empty if the classes are in the folder itself.
    """

    def __init__(self, root: pathlib.Path, labelled: bool = True) -> None:
        """Raises a ConfigError if the only folder in `root` is one with splits."""
        self._root, self._top = root, list_folder(root) if root.is_dir() else Contents({}, [], [], [])
        folders = list(self._top.folders)
        self._named = [x for x in folders if x.lower() in KINDS]
        self._others = [x for x in folders if x not in self._named]
        inside = [list_folder(root / x) for x in self._named]
        self._has_classes = any(0 < len(x.folders) >= len(x.images) for x in inside)
        is_mixed = bool(self._top.images) and not labelled
        # Other folders are listed only if a name of a split, but not its contents, may be that of a class.
        has_splits = self._has_classes or (
            bool(self._named) and not (is_mixed or any(list_files(root / x).images for x in self._others))
        )
        self.splits = self._named if has_splits else []
        if len(self._others) == len(folders) == 1:
            inner = Layout(root / folders[0], labelled)
            if inner._has_classes or (inner.splits and not labelled and not is_mixed):
                problem = f"{root} contains only {folders[0]}, which has {', '.join(inner.splits)}"
                raise ConfigError("data.data_dir", f"{problem}; give {root / folders[0]}")

    def folder(self, split: str) -> str | None:
        """Returns the name of the folder of a split, or None if there is none.

        The folder with the same name comes first, then one of the same kind, then, unless it is `train`, any other.
        """
        kind = KINDS[split.lower()]
        ranked = [
            (x != split, x.lower() != split.lower(), KINDS[x.lower()] != kind, [*KINDS].index(x.lower()), x)
            for x in self.splits
            if (KINDS[x.lower()] == "train") == (kind == "train")
        ]
        return min(ranked)[-1] if ranked else None

    def notes(self, read: Collection[str | None]) -> list[str]:
        """Returns a line for each kind of folder that may be read differently than expected; `read` are the splits."""
        kinds = {
            "splits that are not used": [x for x in self.splits if x not in read],
            "folders beside the splits, not read": self._others if self.splits else [],
            "names of splits, not read as splits, because of the images in or beside them": []
            if self.splits
            else self._named,
        }
        return [*notes(self._root, kinds), *(contents_notes(self._root, self._top) if self.splits else [])]


def contents_notes(base: pathlib.Path, contents: Contents) -> list[str]:
    """Returns a line for each kind of thing that is not read in a folder whose folders are splits or classes."""
    broken = [x for x in contents.others if (base / x).is_symlink() and not (base / x).exists()]
    kinds = {
        "images beside the folders, not read": contents.images,
        SKIPPED: [x for x in contents.skipped if not x.startswith(".")],
        "links that lead nowhere, not read": broken,
    }
    return notes(base, kinds)


def notes(folder: pathlib.Path, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns a line for each kind that has names."""
    return [f"{folder}: {kind}: {listed(names)}" for kind, names in kinds.items() if names]


def _identity(folder: str | pathlib.Path) -> _Id:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _above(folder: pathlib.Path) -> set[_Id]:
    """Returns a folder and those above it, by its path and by the path that its links lead to."""
    paths = {path for x in (folder.absolute(), folder.resolve()) for path in (x, *x.parents)}
    return {_identity(path) for path in paths}
