"""ONNX files: exported from the PyTorch module with torch's exporter, checked, and run with onnxruntime."""

import contextlib
import importlib
import json
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from sit_jax.errors import UserError, one_line
from sit_jax.io.atomic_write import atomic_create
from sit_jax.io.convert.sit_names import state_dict
from sit_jax.io.model import Model
from sit_jax.io.model_folder import describe
from sit_jax.models.features import Grid

Dtype = Literal["float32", "float16"]
# The first opset with Gelu as one operator.
OPSET = 20
# Key of the description in the file's metadata properties.
PROPERTY = "sit_jax"
# Size limit of protocol buffers.
_LARGEST_FILE = 2**31 - 2**20
# Largest accepted difference from PyTorch's outputs, relative to the largest value.
_TOLERANCE = {"float32": 1e-4, "float16": 5e-2}


def save(path: pathlib.Path, model: Model, dtype: Dtype, raw_input: bool, grid: Grid | None = None) -> None:
    """Writes a model with BatchNorm folded, for any batch size, after checking it with onnx and onnxruntime.

    The input is `pixels`, uint8 (batch, height, width, channels), or `images`, normalized float32 (batch, channels,
    height, width). The output is `logits`, float32 (batch, classes), for all types of weights. Without a head, it is
    `pooled`, `prefix_tokens` (if there are any) and `patch_tokens`, those of the full grid if `grid` is given.

    Raises a UserError if the optional packages are missing, the model is too large for a file, the file exists or
    cannot be written, or its output differs from the model's.
    """
    torch, *_ = map(_import, ("torch", "onnx", "onnxruntime", "onnxscript"))
    served = _served(torch, model, dtype, raw_input, grid)
    size = sum(parameter.nbytes for parameter in served.parameters())
    if size > _LARGEST_FILE:
        raise UserError(f"{path}: the weights' {size / 1e9:.1f} GB do not fit into one ONNX file; try --dtype float16")
    shape = (2, *model.vit.image_shape, model.vit.in_channels)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    images = pixels if raw_input else served.model.normalize(pixels).float().contiguous()
    description = {**describe(model.vit, model.metadata), "input": "pixels" if raw_input else "images"}
    with atomic_create(path) as part:
        with _quiet():
            program = torch.onnx.export(
                served,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[description["input"]],
                output_names=list(served.names),
                opset_version=OPSET,
                verbose=False,
            )
            program.model.metadata_props[PROPERTY] = json.dumps(description)
            _strip(program.model)
            program.save(str(part), external_data=False)
        _check(path, part, served, images, dtype)


def load(path: pathlib.Path) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], dict[str, Any]]:
    """Returns the function from a file's input to its outputs by name, and its description.

    Raises a UserError if onnxruntime is missing, or the file is damaged or was not written by `save`.
    """
    ort = _import("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # It warns of every constant that the CPU provider cannot fold in float16.
    with _told_in_one_line(path, "cannot be read"):
        # Without the fallback, which prints banners about damaged files.
        providers = ort.get_available_providers()
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
        text = session.get_modelmeta().custom_metadata_map.get(PROPERTY, "null")
        description, name = json.loads(text), session.get_inputs()[0].name
    if not isinstance(description, dict):
        raise UserError(f"{path}: was not written by sit export: it does not say what model it holds")

    outputs = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with _told_in_one_line(path, "cannot be run"):
            return dict(zip(outputs, session.run(outputs, {name: images}), strict=True))

    return run, description


def _served(torch: Any, model: Model, dtype: Dtype, raw_input: bool, grid: Grid | None) -> Any:
    """Returns the PyTorch module for deployment; `names` are those of its outputs."""
    from sit_jax.io.export import torch_layers, torch_model

    rtsm, reducer = model.rtsm if grid == "rtsm" else {}, model.vit.reducer
    if reducer not in torch_layers.REDUCERS:
        raise UserError(f"PyTorch does not support the reducer {reducer}; StableHLO and model folders take any")
    state = state_dict({**model.variables, "rtsm": rtsm}, model.vit)
    module = torch_model.SiT(describe(model.vit, model.metadata), reverse=bool(rtsm))
    module.load_state_dict({key: torch.from_numpy(np.array(x, np.float32)) for key, x in state.items()}, strict=True)
    module = torch_model.fold_batch_norm(module.eval()).to(getattr(torch, dtype))

    class Served(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module
            has_prefix = model.vit.num_prefix_tokens > 0
            features = ("pooled", "prefix_tokens", "patch_tokens") if has_prefix else ("pooled", "patch_tokens")
            self.names = ("logits",) if model.vit.num_classes else features

        def forward(self, images: Any) -> tuple[Any, ...]:
            """Returns the float32 outputs of images, in the order of `names`."""
            x = module.normalize(images) if raw_input else images.to(module.norm.weight.dtype)
            found = {"logits": module(x)} if model.vit.num_classes else module.features(x, grid)
            return tuple(found[name].float() for name in self.names)

    return Served().eval()


def _strip(model: Any) -> None:
    """Removes the source locations that the exporter adds to every node."""
    nodes = list(model.graph.all_nodes())
    outputs = (value for node in nodes for value in node.outputs)
    for part in (*nodes, *outputs, *model.graph.inputs, *model.graph.initializers.values()):
        part.metadata_props.clear()
        part.doc_string = None


def _check(path: pathlib.Path, part: pathlib.Path, served: Any, images: Any, dtype: Dtype) -> None:
    """Raises a UserError if the file is invalid, or if its output differs from the module's for any batch size."""
    onnx, torch = _import("onnx"), _import("torch")
    onnx.checker.check_model(str(part), full_check=True)
    run, _ = load(part)
    for batch in (images, images[:1], images.repeat(2, 1, 1, 1)[:3]):
        with torch.no_grad():
            expected = dict(zip(served.names, (x.numpy() for x in served(batch)), strict=True))
        found = run(batch.numpy())
        for name, values in expected.items():
            error = np.abs(found[name] - values).max() / max(1e-6, np.abs(values).max())
            if not error <= _TOLERANCE[dtype]:
                raise UserError(f"{path}: the exported model's {name} differ by {error:.1e}; it was not written")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'ONNX needs the package {name}, which is not installed: pip install ".[onnx]"') from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the messages of torch's exporter and its libraries about deprecations and optional packages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _told_in_one_line(path: pathlib.Path, problem: str) -> Iterator[None]:
    """Converts onnxruntime's exceptions, which are not public and have many lines, to a one-line UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: {problem}: {one_line(error)}") from None
