"""The page of the demo, built from Gradio components."""

import html
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from sit_jax.data.sources import read_picture
from sit_jax.demo.fewer_tokens import Keep, tokens_in_words
from sit_jax.demo.models import MAX_PIXELS, DemoModel, DemoModels, milliseconds
from sit_jax.errors import UserError
from sit_jax.visual.model_input import ModelInput
from sit_jax.visual.pictures import as_rgb, heat, regions
from sit_jax.visual.token_maps import StageMaps, TokenMaps

_MOST_TOKENS_SHOWN = 24
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Number of sessions whose images are kept in memory, and seconds for which files and sessions are kept.
SESSIONS, KEPT_SECONDS = 50, 3600
_HEAD = """# What slimming does to a picture
A student passes on fewer and fewer tokens. Drop a picture: both models say what is on it, and below stands where the
student's tokens look. The picture stays on the machine that serves this page."""
_WHY_FEWER = """Each token is made by itself, and nothing behind a slimming module depends on how many come: so fewer
can be had with the weights as they are. More cannot, and nothing was trained for fewer."""
_TOKENS = "Where each token looks, and how many patches it is made of"
_WHY_NOT = "No other number of tokens: each of this model's slimming modules makes a single one."
_SERIF_FREE = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
_MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


class Looked(NamedTuple):
    """State of a session: its last image.

    Stages are drawn when the slider requests them: all of them together need tens of megabytes.

    Attributes:
        seen: The preprocessed image.
        maps: The student's token maps.
    """

    seen: ModelInput
    maps: TokenMaps


class _Words(gr.themes.Font):
    """A font of the user's machine, which needs no download."""

    def stylesheet(self) -> dict[str, Any]:
        return {"url": None, "css": None}


def theme() -> gr.themes.Base:
    """Returns Gradio's default theme with the user's own fonts."""
    return gr.themes.Default(font=[_Words(x) for x in _SERIF_FREE], font_mono=[_Words(x) for x in _MONOSPACE])


def build_page(contest: DemoModels, max_mb: int) -> gr.Blocks:
    """Builds the page without serving it.

    Args:
        contest: The models.
        max_mb: Largest file size, for the label; the server enforces it.
    """
    students, teachers = list(contest.students), list(contest.teachers)
    with gr.Blocks(title="sit demo", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        looked = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.Markdown(_HEAD)
        with gr.Row():
            with gr.Column(scale=1):
                label = f"Picture, up to {max_mb} MB and {MAX_PIXELS // 10**6} megapixels"
                file = gr.File(label=label, file_types=["image"], type="filepath", elem_id="picture", height=140)
                teacher = gr.Dropdown(teachers, value=teachers[0], label="Teacher", elem_id="teacher")
                student = gr.Dropdown(students, value=students[0], label="Student", elem_id="student")
                keep = gr.Radio(
                    **_keep_control(contest.students[students[0]]), label="Tokens passed on", elem_id="keep"
                )
                why = gr.Markdown(_keep_reason(contest.students[students[0]]))
            with gr.Column(scale=2):
                with gr.Row():
                    answers = [gr.Label(label=who, elem_id=f"{who.lower()}-says") for who in ("Teacher", "Student")]
                costs = gr.Markdown(elem_id="costs")
        slider = gr.Slider(0, 1, step=1, value=0, label="Stage", elem_id="stage", interactive=False)
        text = gr.Markdown("Stage 0 is the picture; each further one stands behind a slimming module.", elem_id="text")
        with gr.Row():
            quiet: dict[str, Any] = {"buttons": [], "format": "png", "interactive": False}
            picture = gr.Image(label="Which patches go together", elem_id="map", scale=1, **quiet)
            tokens = gr.Gallery(
                label=_TOKENS, elem_id="tokens", columns=4, scale=2, height="auto", buttons=[], format="png"
            )

        def answer(path: str | None, left: str, right: str, chosen: str | None) -> Sequence[Any]:
            if path is None:
                nothing = gr.Slider(maximum=1, value=0, interactive=False)
                return None, None, "", None, nothing, "", None, []
            try:
                return _answer(path, contest.teachers[left], contest.students[right], chosen)
            except UserError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from None

        def choose(name: str) -> Sequence[Any]:
            return gr.Radio(**_keep_control(contest.students[name])), _keep_reason(contest.students[name])

        # If the user proceeds during a prediction, only the result of the last request is shown.
        private: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last"}
        inputs, shown = [file, teacher, student, keep], [slider, text, picture, tokens]
        outputs = [*answers, costs, looked, *shown]
        gr.on([file.upload, file.clear, teacher.input, keep.input], answer, inputs, outputs, **private)
        student.input(choose, student, [keep, why], **private).then(answer, inputs, outputs, **private)
        slider.input(_at, [looked, slider], [text, picture, tokens], show_progress="hidden", **private)
    return page


def _answer(path: str, teacher: DemoModel, student: DemoModel, chosen: str | None) -> Sequence[Any]:
    """Returns the values of all components for one image; the keep control is given by its label."""
    file = pathlib.Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{file.name}: is no picture; give one of {', '.join(_SUFFIXES)}")
    example = read_picture(path, name=file.name)  # Messages on the page must not contain folders of the server.
    keep = next((keep for keep in student.keeps if keep.label == chosen), student.keeps[0])
    ways: list[tuple[DemoModel, Keep | None]] = [(teacher, None), (student, keep)]
    seen = [model.preprocess(example) for model, _ in ways]
    maps = [model.maps(view, way) for (model, way), view in zip(ways, seen, strict=True)]
    times = milliseconds([model.forward(view, way) for (model, way), view in zip(ways, seen, strict=True)])
    says = [model.most_likely(own) for (model, _), own in zip(ways, maps, strict=True)]
    looked, last = Looked(seen[1], maps[1]), len(maps[1].stages)
    costs = f"One picture, forward pass on this machine: **teacher {times[0]:.2f} ms, student {times[1]:.2f} ms**"
    slider = gr.Slider(maximum=last, value=last, interactive=True)
    return *says, f"{costs} ({times[0] / times[1]:.2f} times as fast).", looked, slider, *_at(looked, last)


def _at(looked: Looked | None, index: float) -> Sequence[Any]:
    """Returns the number of tokens at a slider position, their image, and image and caption of each token.

    The image is the input or, after slimming, the tokens' patches as regions. The tokens are sorted by class attention,
    in decreasing order.
    """
    if looked is None:
        return "", None, []
    seen, maps = looked
    place = min(int(index), len(maps.stages))
    if place < 1:
        return f"**Stage 0**: the picture, {maps.grid**2} patches of {maps.grid} x {maps.grid}.", as_rgb(seen.shown), []
    stage = maps.stages[place - 1]
    drawn = regions(seen.shown, stage.hard[0], maps.grid, stage.overlooked[0])
    text = f"**Stage {place}**: {tokens_in_words((stage.kept,))} behind block {stage.after_block}."
    order = maps.most_attended(place - 1, 0, _MOST_TOKENS_SHOWN)
    if stage.kept > len(order):
        text += f" Shown are the {len(order)} that the class token attends to most."
    return text, drawn, [_token(seen, maps, stage, token) for token in order]


def _token(seen: ModelInput, maps: TokenMaps, stage: StageMaps, token: int) -> tuple[np.ndarray, str]:
    patches = stage.effective_patches[0, token]
    return heat(seen.shown, stage.cumulative[0, token], maps.grid), f"{patches:.1f} patches"


def _keep_control(student: DemoModel) -> dict[str, Any]:
    labels = [keep.label for keep in student.keeps]
    return {"choices": labels, "value": labels[0], "visible": len(labels) > 1}


def _keep_reason(student: DemoModel) -> str:
    return _WHY_FEWER if len(student.keeps) > 1 else _WHY_NOT
