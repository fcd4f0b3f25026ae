"""Progress of a training: a progress bar on a terminal, otherwise an occasional line."""

import contextlib
import os
import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Shows steps, loss, images per second and remaining time on standard error."""

    def __init__(self, label: str, total: int, start: int, batch_size: int, quiet: bool = False) -> None:
        """Starts at step `start` of `total`; shows nothing if `quiet`."""
        self._label, self._batch_size = label, batch_size
        self._skipped, self._compiled = 0, False
        self._terminal = sys.stderr.isatty()
        # A log would keep every state of a bar that is redrawn: `update` prints some of them, each on its own line.
        self._files = contextlib.ExitStack()
        nowhere = self._files.enter_context(open(os.devnull, "w"))
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=label,
            unit="step",
            disable=quiet,
            dynamic_ncols=True,
            file=sys.stderr if self._terminal else nowhere,
            mininterval=0.1 if self._terminal else _SECONDS_BETWEEN_LINES,
            bar_format=None if self._terminal else "{desc}: step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._files.close()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows a step's metrics."""
        if self._bar.disable:
            return
        if not self._compiled:
            # The first step compiles; including it would distort the rate for minutes.
            self._compiled, self._bar.initial = True, step
            self._bar.unpause()
        shown: dict[str, str] = {name: f"{values[name]:.3f}" for name in ("loss", "top1") if name in values}
        self._skipped += int(values.get("skipped", 0))
        if self._skipped:
            shown["skipped images"] = str(self._skipped)
        if step > self._bar.initial:
            rate = (step - self._bar.initial) / self._bar.format_dict["elapsed"]
            shown["images/s"] = f"{rate * self._batch_size:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        is_due = self._bar.update(step - self._bar.n)
        if not self._terminal and (is_due or step == self._bar.total):
            print(self._bar, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if not self._bar.disable:
            tqdm.write(f"{self._label}: {text}", file=sys.stderr)
