"""Reads every image of a data set and reports unusual and unreadable ones."""

import concurrent.futures
from dataclasses import dataclass, field

from tqdm import tqdm

from sit_jax.data.config import DataConfig
from sit_jax.data.decode import findings
from sit_jax.data.registry import open_sources
from sit_jax.data.sources import Example, Source
from sit_jax.errors import ImageDecodeError

_SHOWN_PER_KIND = 10


@dataclass
class CheckReport:
    """Result of checking one split of `pictures` images."""

    split: str
    pictures: int
    per_class: dict[str, int]
    # Unusual property and how it is handled -> names of the images.
    unusual: dict[str, list[str]] = field(default_factory=dict)
    # Messages of the images that cannot be read.
    broken: list[str] = field(default_factory=list)
    # Files that are not images by their suffix, hidden files, and folders that are not read.
    ignored: list[str] = field(default_factory=list)

    def lines(self, on_decode_error: str, everything: bool = False) -> list[str]:
        """Returns the report as text lines; at most ten names per kind unless `everything`."""
        counts = sorted(self.per_class.values())
        spread = f"{len(counts)} classes, {counts[0]} to {counts[-1]} per class" if counts else "no classes"
        fate = "training stops at them" if on_decode_error == "error" else "skipped, and counted"
        kinds = {
            "classes without an image": [name for name, count in self.per_class.items() if count == 0],
            **dict(sorted(self.unusual.items())),
            "files and folders that are not read": self.ignored,
            f"broken ({fate}; data.on_decode_error={on_decode_error})": self.broken,
        }
        lines = [f"{self.split}: {self.pictures} images, {spread}"]
        for kind, names in kinds.items():
            if names:
                shown = names if everything else names[:_SHOWN_PER_KIND]
                lines += [f"  {len(names)} {kind}", *(f"    {name}" for name in shown)]
                lines += [f"    ... {len(names) - len(shown)} more: --all"] if len(names) > len(shown) else []
        return lines if self.broken else [*lines, "  none broken"]


def check_data(data: DataConfig, threads: int) -> list[CheckReport]:
    """Checks the training and evaluation splits of a data set, with a progress bar on standard error."""
    return [_check(split, source, data.max_pixels, threads) for split, source in open_sources(data).items()]


def _check(split: str, source: Source, max_pixels: int, threads: int) -> CheckReport:
    ignored = getattr(source, "ignored", [])
    report = CheckReport(split, len(source), dict.fromkeys(source.class_names, 0), ignored=ignored)

    def look(index: int) -> tuple[Example | None, list[str] | ImageDecodeError]:
        example = None
        try:
            example = source[index]
            return example, findings(example.image, example.name, max_pixels)
        except ImageDecodeError as error:
            return example, error

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        # Submitted in batches: a million futures at once would take gigabytes.
        for start in range(0, len(source), 4096):
            looked = pool.map(look, range(start, min(start + 4096, len(source))))
            progress = tqdm(looked, desc=split, total=len(source), initial=start, unit="images", leave=False)
            for example, found in progress:
                if example is not None and example.label >= 0:
                    report.per_class[source.class_names[example.label]] += 1
                if isinstance(found, ImageDecodeError):
                    report.broken.append(str(found))
                elif example is not None:
                    for kind in found:
                        report.unusual.setdefault(kind, []).append(example.name)
    return report
