"""Progress of a training: a progress bar on a terminal, otherwise an occasional line."""

import contextlib
import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class _Lines(tqdm):
    """Prints lines instead of redrawing a bar, since a log would keep each of its states."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # An empty message clears the bar.
            # The rate is not known before the second step.
            print(str(self).removesuffix(", ? left"), file=self.fp, flush=True)


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Shows steps, loss, images per second and remaining time on standard error."""

    def __init__(self, label: str, total: int, start: int, batch_size: int, quiet: bool = False) -> None:
        """Starts at step `start` of `total`; shows nothing if `quiet`."""
        self._label, self._batch_size = label, batch_size
        self._skipped, self._compiled = 0, False
        steps = {"desc": label, "total": total, "initial": start, "unit": "step", "disable": quiet}
        if sys.stderr.isatty():
            self._bar = tqdm(**steps, dynamic_ncols=True)
        else:
            line = "{desc}: step {n_fmt}/{total_fmt}{postfix}, {remaining} left"
            # With any delay, there is no line before the first step.
            self._bar = _Lines(**steps, leave=False, mininterval=_SECONDS_BETWEEN_LINES, bar_format=line, delay=1e-9)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows a step's metrics."""
        if self._bar.disable:
            return
        if not self._compiled:
            # The first step compiles; including it would distort the rate for minutes.
            self._compiled, self._bar.initial = True, step
            self._bar.unpause()
        shown: dict[str, str] = {name: f"{values[name]:.3f}" for name in ("loss", "top1", "cosine") if name in values}
        self._skipped += int(values.get("skipped", 0))
        if self._skipped:
            shown["skipped images"] = str(self._skipped)
        if step > self._bar.initial:
            rate = (step - self._bar.initial) / self._bar.format_dict["elapsed"]
            shown["images/s"] = f"{rate * self._batch_size:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        if not self._bar.update(step - self._bar.n) and step == self._bar.total:
            self._bar.refresh()

    def note(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if not self._bar.disable:
            write = print if isinstance(self._bar, _Lines) else tqdm.write
            write(f"{self._label}: {text}", file=sys.stderr)
