"""Progress of long operations: a progress bar on a terminal, otherwise an occasional line."""

import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows steps, loss, images per second and remaining time on standard error."""

    def __init__(self, label: str, total: int, start: int, batch_size: int, quiet: bool = False) -> None:
        """Starts at step `start` of `total`; shows nothing if `quiet`."""
        self._quiet = quiet
        self._label, self._batch_size = label, batch_size
        self._total, self._start, self._step = total, start, start
        self._last_line = time.monotonic()
        self._begun: float | None = None
        self._skipped = 0
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", dynamic_ncols=True, leave=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows a step's metrics."""
        if self._quiet:
            return
        if self._begun is None:
            # The first step compiles; including it would distort the rate for minutes.
            self._begun, self._start = time.monotonic(), step
        rate = (step - self._start) * self._batch_size / max(1e-9, time.monotonic() - self._begun)
        shown: dict[str, str] = {name: f"{values[name]:.3f}" for name in ("loss", "top1") if name in values}
        self._skipped += int(values.get("skipped", 0))
        if self._skipped:
            shown["skipped pictures"] = str(self._skipped)
        if self._bar is not None:
            shown["images/s"] = f"{rate:.0f}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._step)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES or step == self._total:
            self._last_line = time.monotonic()
            numbers = " ".join(f"{name} {value}" for name, value in shown.items())
            if rate > 0:
                left = (self._total - step) * self._batch_size / rate
                numbers += f" images/s {rate:.0f} left {left:.0f} s"
            print(f"{self._label}: step {step}/{self._total} {numbers}", file=sys.stderr, flush=True)
        self._step = step

    def note(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(f"{self._label}: {text}", file=sys.stderr)
        else:
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)
