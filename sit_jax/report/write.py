"""Implementation of `sit report`."""

import datetime
import functools
import pathlib
import sys
from collections.abc import Sequence

from sit_jax.errors import UserError
from sit_jax.io.atomic_write import atomic_replace
from sit_jax.io.runs import COMPARE, COMPARE_PAGE, is_comparison, read_object

REPORT, COMPARISON = "report.html", "comparison.html"


def output_of(folders: Sequence[pathlib.Path], output: pathlib.Path | None) -> pathlib.Path:
    """Returns the path of the page: `output` if given, otherwise in the run directory, or in the working directory."""
    if output is None and len(folders) == 1:
        return folders[0] / (COMPARE_PAGE if is_comparison(folders[0]) else REPORT)
    if output is None:
        return pathlib.Path(COMPARISON)
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise UserError(f"--output: {output} is not a file name of a page; it must end in .html")
    return output


def make_report(folders: Sequence[pathlib.Path], output: pathlib.Path, examples: int, with_model: bool) -> None:
    """Writes a page about one run, or that compares several runs, with up to `examples` images of each kind.

    `with_model` also evaluates the newest checkpoints on the whole evaluation split. Raises a UserError if a folder is
    not a run directory, or the page cannot be written. The page of a folder of `sit compare` is written from its
    `compare.json`, and the page of one of its runs links to it.
    """
    if len(folders) == 1 and is_comparison(folders[0]):
        from sit_jax.report.compare_page import write_page

        write_page(read_object(folders[0] / COMPARE), output, key="--output")
        return
    from sit_jax.data.sources import writing
    from sit_jax.report.evaluation import evaluate
    from sit_jax.report.load_run import attempt, read_runs
    from sit_jax.report.page import RunView, render

    views = []
    for index, run in enumerate(read_runs(list(folders)), start=1):
        evaluation = None
        if not with_model:
            run.missing.append("The model was not evaluated (--no_model): no classes, no images, no token maps.")
        elif run.config is not None and run.checkpoints:
            read = functools.partial(evaluate, run, examples)
            evaluation = attempt(read, None, run.missing, "The model, or its evaluation split,")
        views.append(RunView(f"run-{index}", run, evaluation))
    print("report: writing the page", file=sys.stderr)
    above = folders[0].resolve().parent
    is_inside = len(folders) == 1 and output.resolve().parent == folders[0].resolve()
    overview = is_inside and is_comparison(above) and (above / COMPARE_PAGE).is_file()
    page = render(views, datetime.datetime.now(datetime.UTC), overview)
    with writing(output, key="--output"), atomic_replace(output) as part:
        # Names of folders, images and classes may contain bytes that are not valid UTF-8.
        part.write_text(page, encoding="utf-8", errors="replace")
