"""Reads every image of a data set and reports unusual and unreadable ones."""

import concurrent.futures
import dataclasses
from typing import Any

from tqdm import tqdm

from sit_jax.data.config import DataConfig
from sit_jax.data.decode import findings
from sit_jax.data.folder import FolderSource
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source
from sit_jax.errors import ImageDecodeError

_SHOWN_PER_KIND = 10


@dataclasses.dataclass
class CheckReport:
    """Result of checking one split.

    Attributes:
        split: The split.
        pictures: Number of images read.
        per_class: Class name -> number of images.
        unusual: Unusual property and how it is handled -> names of the images.
        broken: Messages of the images that cannot be read.
        ignored: Files in the folder that are not images by their suffix.
    """

    split: str
    pictures: int
    per_class: dict[str, int]
    unusual: dict[str, list[str]]
    broken: list[str]
    ignored: list[str]

    def lines(self, on_decode_error: str, everything: bool = False) -> list[str]:
        """Returns the report as text lines; at most ten names per kind unless `everything`."""
        counts = sorted(self.per_class.values())
        spread = f"{counts[0]} to {counts[-1]} per class" if counts else "no classes"
        lines = [f"{self.split}: {self.pictures} pictures, {len(counts)} classes, {spread}"]
        empty = [name for name, count in self.per_class.items() if count == 0]
        if empty:
            lines += _listed(f"{len(empty)} classes without a picture", empty, everything)
        for kind, names in sorted(self.unusual.items()):
            lines += _listed(f"{len(names)} {kind}", names, everything)
        if self.ignored:
            lines += _listed(
                f"{len(self.ignored)} files are no pictures by their suffix: ignored", self.ignored, everything
            )
        fate = "training stops at them" if on_decode_error == "error" else "skipped, and counted"
        if self.broken:
            lines += _listed(
                f"{len(self.broken)} broken ({fate}; data.on_decode_error={on_decode_error})", self.broken, everything
            )
        else:
            lines.append("  none broken")
        return lines


def check_data(data: DataConfig, threads: int) -> list[CheckReport]:
    """Checks the training and evaluation splits of a data set, with a progress bar on standard error.

    Raises:
        UserError: The data set cannot be opened.
    """
    splits = dict.fromkeys((data.train_split, data.eval_split))
    sources = {split: open_source(data, split) for split in splits}
    return [_check(split, source, data.max_pixels, threads) for split, source in sources.items()]


def _check(split: str, source: Source, max_pixels: int, threads: int) -> CheckReport:
    report = CheckReport(split, len(source), dict.fromkeys(source.class_names, 0), {}, [], [])
    if isinstance(source, FolderSource):
        report.ignored = source.ignored

    def look(index: int) -> tuple[str, int, list[str] | ImageDecodeError]:
        try:
            example = source[index]
        except ImageDecodeError as error:
            return "", -1, error
        try:
            return example.name, example.label, findings(example.image, example.name, max_pixels)
        except ImageDecodeError as error:
            return example.name, example.label, error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # Submitted in batches: a million futures at once would take gigabytes.
        for start in range(0, len(source), 4096):
            block = range(start, min(start + 4096, len(source)))
            looked: Any = pool.map(look, block)
            shown = tqdm(looked, desc=split, total=len(source), initial=start, unit="pictures", leave=False)
            for name, label, found in shown:
                if label >= 0:
                    report.per_class[source.class_names[label]] += 1
                if isinstance(found, ImageDecodeError):
                    report.broken.append(str(found))
                    continue
                for kind in found:
                    report.unusual.setdefault(kind, []).append(name)
    return report


def _listed(heading: str, names: list[str], everything: bool) -> list[str]:
    shown = names if everything else names[:_SHOWN_PER_KIND]
    more = len(names) - len(shown)
    return [f"  {heading}", *(f"    {name}" for name in shown), *([f"    ... {more} more: --all"] if more else [])]
