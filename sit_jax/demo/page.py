"""The page of the demo, built from Gradio components."""

import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import gradio as gr

from sit_jax.data.sources import read_image
from sit_jax.demo.models import MAX_PIXELS, DemoModel, DemoModels, milliseconds, tokens_in_words
from sit_jax.errors import UserError
from sit_jax.visual.images import as_rgb, heat, regions
from sit_jax.visual.model_input import ModelInput
from sit_jax.visual.token_maps import TokenMaps

_MOST_TOKENS_SHOWN = 24
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Number of sessions whose images are kept in memory, and seconds for which files and sessions are kept.
SESSIONS, KEPT_SECONDS = 50, 3600
_HEAD = """# What slimming does to an image
A student keeps fewer and fewer tokens. Drop an image: {answer}, and the maps show which patches each of the student's
tokens is made of. The image stays on the machine that serves this page."""
_CLASSIFY = "both models classify it"
_COMPARE = "each model finds the most similar of {count} images by its features, with their cosine similarity"
_WHY_FEWER = """The tokens of a slimming module do not depend on each other, and other reducers have no weights: fewer
tokens need no other weights. More are not possible. A model that was not trained for fewer loses accuracy."""
_TOKENS = "Where each token looks, and how many patches it is made of"
_WHY_NOT = "No other number of tokens: each of this model's reducers makes a single one, or cannot be cut."
_SANS_SERIF = ["system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"]
_MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

# New values of the page's components.
Updates = Sequence[object]
# The last image and the student's token maps. Stages are drawn when the slider requests them: all of them together need
# tens of megabytes.
Session = tuple[ModelInput, TokenMaps]


def theme() -> gr.themes.Base:
    """Returns Gradio's default theme with the user's own fonts, which need no download."""
    fonts, monospace = [gr.themes.Font(name) for name in _SANS_SERIF], [gr.themes.Font(name) for name in _MONOSPACE]
    return gr.themes.Default(font=fonts, font_mono=monospace)


def build_page(models: DemoModels, max_mb: int) -> gr.Blocks:
    """Builds the page without serving it; `max_mb`, for the label, is enforced by the server."""
    students, teachers = list(models.students), list(models.teachers)
    first = models.students[students[0]]
    gallery = first.gallery
    answer_text = _CLASSIFY if gallery is None else _COMPARE.format(count=len(gallery.examples))
    with gr.Blocks(title="sit demo", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        session = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.Markdown(_HEAD.format(answer=answer_text))
        with gr.Row():
            with gr.Column(scale=1):
                label = f"Image, up to {max_mb} MB and {MAX_PIXELS // 10**6} megapixels"
                file = gr.File(label=label, file_types=["image"], type="filepath", elem_id="image", height=140)
                teacher = gr.Dropdown(
                    teachers,
                    value=next(iter(teachers), None),
                    label="Teacher",
                    elem_id="teacher",
                    visible=bool(teachers),
                )
                student = gr.Dropdown(students, value=students[0], label="Student", elem_id="student")
                keep, why = _keep_choice(first)
            with gr.Column(scale=2):
                with gr.Row():
                    answers = [
                        _answer_part(who, gallery is not None, visible)
                        for who, visible in (("Teacher", bool(teachers)), ("Student", True))
                    ]
                costs = gr.Markdown(elem_id="costs")
        slider = gr.Slider(0, 1, step=1, value=0, label="Stage", elem_id="stage", interactive=False)
        text = gr.Markdown("Stage 0 is the image; each further one follows a slimming module.", elem_id="text")
        with gr.Row():
            image = gr.Image(
                label="Patches of each token", elem_id="map", scale=1, buttons=[], format="png", interactive=False
            )
            tokens = gr.Gallery(
                label=_TOKENS, elem_id="tokens", columns=4, scale=2, height="auto", buttons=[], format="png"
            )

        def answer(path: str | None, left: str | None, right: str, chosen: str | None) -> Updates:
            if path is None:
                nothing = gr.Slider(maximum=1, value=0, interactive=False)
                return None, None, "", None, nothing, "", None, []
            try:
                return classify(path, models.teachers[left] if left else None, models.students[right], chosen)
            except UserError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from None

        # If the user proceeds during a prediction, only the result of the last request is shown.
        private: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last"}
        inputs, shown = [file, teacher, student, keep], [slider, text, image, tokens]
        outputs = [*answers, costs, session, *shown]
        gr.on([file.upload, file.clear, teacher.input, keep.input], answer, inputs, outputs, **private)
        student.input(lambda name: _keep_choice(models.students[name]), student, [keep, why], **private).then(
            answer, inputs, outputs, **private
        )
        slider.input(_show_stage, [session, slider], [text, image, tokens], show_progress="hidden", **private)
    return page


def _answer_part(who: str, similar: bool, visible: bool) -> gr.Label | gr.Gallery:
    """Returns the component of a model's answer: similar images, or classes."""
    name = f"{who.lower()}-says"
    if not similar:
        return gr.Label(label=who, elem_id=name, visible=visible)
    return gr.Gallery(label=who, elem_id=name, columns=3, height="auto", buttons=[], format="png", visible=visible)


def classify(path: str, teacher: DemoModel | None, student: DemoModel, chosen: str | None) -> Updates:
    """Returns the values of all components for one file; raises a UserError if it is not an image.

    `chosen` is the label of one of the student's `keeps`; for another label, the trained token counts are used.
    """
    file = pathlib.Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{file.name}: is not an image; give one of {', '.join(_SUFFIXES)}")
    example = read_image(path, name=file.name)  # Messages on the page must not contain folders of the server.
    keep = student.keeps.get(chosen or "")
    shown = {"student": (student, student.preprocess(example), keep)}
    if teacher is not None:
        shown = {"teacher": (teacher, teacher.preprocess(example), None), **shown}
    found = {name: model.maps(inputs, counts) for name, (model, inputs, counts) in shown.items()}
    times = milliseconds([model.forward(inputs, counts) for model, inputs, counts in shown.values()])
    answers = {
        name: model.most_likely(found[name]) if model.gallery is None else model.most_similar(inputs, counts)
        for name, (model, inputs, counts) in shown.items()
    }
    costs = ", ".join(f"{name} {took:.2f} ms" for name, took in zip(shown, times, strict=True))
    costs = f"One image, forward pass on this machine: **{costs}**"
    costs += f" ({times[0] / times[1]:.2f} times as fast)." if teacher is not None else "."
    maps, own = found["student"], shown["student"][1]
    session, last = (own, maps), len(maps.stages)
    slider = gr.Slider(maximum=last, value=last, interactive=True)
    return answers.get("teacher"), answers["student"], costs, session, slider, *_show_stage(session, last)


def _show_stage(session: Session | None, index: float) -> Updates:
    """Returns the number of tokens at a slider position, their image, and image and caption of each token.

    The image is the input or, after slimming, the tokens' patches as regions. The tokens are sorted by attention, in
    decreasing order.
    """
    if session is None:
        return "", None, []
    shown, maps = session[0].shown, session[1]
    place = min(int(index), len(maps.stages))
    if place < 1:
        return (
            f"**Stage 0**: the image, {math.prod(maps.grid)} patches, {maps.grid[0]} x {maps.grid[1]}.",
            as_rgb(shown),
            [],
        )
    stage = maps.stages[place - 1]
    text = f"**Stage {place}**: {tokens_in_words((stage.kept,))} after block {stage.after_block}."
    order = maps.most_attended(place - 1, 0, _MOST_TOKENS_SHOWN)
    if stage.kept > len(order):
        text += f" Shown are the {len(order)} with the most attention of {maps.attending}."
    tokens = [
        (heat(shown, stage.cumulative[0, token], maps.grid), f"{stage.effective_patches[0, token]:.1f} patches")
        for token in order
    ]
    return text, regions(shown, stage.hard[0], maps.grid, stage.overlooked[0]), tokens


def _keep_choice(student: DemoModel) -> tuple[gr.Radio, gr.Markdown]:
    labels = list(student.keeps)
    radio = gr.Radio(labels, value=labels[0], visible=len(labels) > 1, label="Kept tokens", elem_id="keep")
    return radio, gr.Markdown(_WHY_FEWER if len(labels) > 1 else _WHY_NOT)
