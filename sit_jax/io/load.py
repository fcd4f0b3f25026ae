"""Loads models: runs, model folders, weights of other programs, and exported files."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sit_jax.errors import RunError, UserError
from sit_jax.io.checkpoint import load_rtsm, load_variables
from sit_jax.io.convert.adapt import replace_heads, resize
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.convert.read import Log, Options, read_file, silent
from sit_jax.io.export import onnx_file, stablehlo
from sit_jax.io.metadata import complete_metadata, run_metadata
from sit_jax.io.model import Exported, Model
from sit_jax.io.model_folder import is_model_folder, read_description, read_folder
from sit_jax.io.runs import find_checkpoint, is_run, read_config
from sit_jax.io.suffixes import ONNX, STABLEHLO
from sit_jax.models import abstract_variables


def load(
    path: str | pathlib.Path,
    ema: bool = False,
    step: int | None = None,
    with_rtsm: bool = False,
    kept_tokens: Sequence[int] = (),
) -> Model:
    """Loads the model at a path: the only way to open one.

    Args:
        path: A run directory or one of its checkpoints (`RUN/checkpoints/STEP`), a model folder, a folder or file of
            weights of another program (see `read_weights`), an ONNX file or a StableHLO artifact.
        ema: Use the moving average instead of the weights.
        step: Step of a run's checkpoint; the newest if None.
        with_rtsm: Also read the reverse modules.
        kept_tokens: Patch tokens of each stage that a slimmed model is cut to, without training; see `Model.cut`. The
            first is the whole grid. Empty for the tokens that it has.

    Returns:
        The model, with its arrays on the default device, and all entries of `preprocessing` set in its metadata.

    Raises:
        UserError: The path is none of these or is damaged, an option does not apply to it, or a package is missing.
        ConfigError: `kept_tokens` does not fit the model.
    """
    model = _load(pathlib.Path(os.path.expanduser(path)), ema, step, with_rtsm)
    return model.cut(kept_tokens) if len(kept_tokens) else model


def _load(path: pathlib.Path, ema: bool, step: int | None, with_rtsm: bool) -> Model:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if is_run(path):
        return load_run(path, ema, step, with_rtsm)
    exported = path.is_file() and path.suffix.lower() in (ONNX, STABLEHLO)
    if step is not None or (ema and (exported or is_model_folder(path))):
        raise UserError(f"{path}: is not a run; --ema and --step select one of a run's checkpoints")
    if exported:
        model = _load_exported(path)
    elif is_model_folder(path):
        model = Model(*read_folder(path), source=str(path))
    else:
        try:
            model = read_file(path, Options(ema=ema, rtsm=with_rtsm))
        except UserError as error:
            # An option of sit convert alone.
            advice = " to sit convert, and open what it writes" if "--model." in str(error) else ""
            raise UserError(f"{error}{advice}") from None
    if with_rtsm and not model.rtsm:
        raise UserError(f"{path}: has no reverse modules")
    metadata = complete_metadata(model.metadata, model.arch.in_channels)
    return dataclasses.replace(model, variables=jax.device_put(model.variables), metadata=metadata)


def load_run(path: pathlib.Path, ema: bool = False, step: int | None = None, with_rtsm: bool = False) -> Model:
    """Loads the model of a run; takes the arguments of `load`.

    Raises:
        RunError: There is no run, no such checkpoint, no moving average in it, or the run has no reverse modules.
    """
    folder, named = find_checkpoint(path)
    step = named if step is None else step
    config = read_config(folder)
    if ema and config.optim.ema_decay == 0:
        raise RunError(f"{folder}: has no moving average because optim.ema_decay=0")
    arch = config.model.architecture
    variables, step = load_variables(folder, {"batch_stats": {}, **abstract_variables(arch)}, ema, step)
    rtsm = {}
    if with_rtsm:
        if config.recovered is None:
            raise UserError(f"{folder}: was trained without reverse modules")
        rtsm = load_rtsm(folder, expected_shapes(config.recovered, rtsm=True)["rtsm"], step)
    metadata = run_metadata(config, folder, step, ema)
    return Model(arch, variables, metadata, rtsm, config.model.dtype, config, source=str(path))


def read_weights(
    path: str | pathlib.Path,
    overrides: Mapping[str, Any] | None = None,
    options: Options | None = None,
    log: Log = silent,
) -> Model:
    """Reads the weights of a vision transformer to convert them, or to start a training from them.

    Args:
        path: A `.pth`, `.pt`, `.pth.tar`, `.safetensors` or `.npz` file, a folder with `model.safetensors`, or a run.
        overrides: Architecture fields that the tensors do not determine, such as `num_heads`; else those of `options`.
        options: The other options.
        log: Called with each line about what was found and changed.

    Returns the model: NumPy float32 with Linen's names and layouts; its metadata has only what the source says. Raises
    a UserError that names the file and the problem or the missing option.
    """
    path, options = pathlib.Path(path), options or Options()
    if overrides is not None:
        options = options._replace(fields=overrides)
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if is_run(path):
        if options.fields:
            words = ", ".join(f"--model.{name}" for name in options.fields)
            raise UserError(f"{path}: is a run, whose config.json says what its model is; leave {words} out")
        model = _read_run(path, options, log)
    else:
        model = read_file(path, options, log)
    if options.licence is not None:
        model = dataclasses.replace(model, metadata={**model.metadata, "licence": options.licence})
    if options.num_classes is not None:
        model = replace_heads(model, options.num_classes, log)
    if options.image_size is not None:
        model = resize(model, options.image_size, log)
    return model


def _read_run(path: pathlib.Path, options: Options, log: Log) -> Model:
    config = read_config(find_checkpoint(path)[0])
    arch = Model(config.model.architecture, {}, source=str(path)).vit
    model = load_run(path, options.ema, with_rtsm=options.rtsm and config.recovered is not None)
    kind = f"{'student' if arch.is_slimmed else 'model'} {config.model.name}".strip()
    having = " with RTSMs" if model.rtsm else ""
    log(f"found: a run of sit_jax, {kind}{having}, {arch.num_classes} classes, {arch.image_size_text} px")
    if config.recovered and not options.rtsm:
        log("changed: RTSMs left out")
    return model


def _load_exported(path: pathlib.Path) -> Model:
    run: Callable[[np.ndarray], Any]
    is_onnx = path.suffix.lower() == ONNX
    run, description = (onnx_file if is_onnx else stablehlo).load(path)
    arch, metadata = read_description(description, path)
    takes = metadata.pop("input", None)
    if takes not in ("pixels", "images"):
        raise UserError(f"{path}: does not say whether it takes pixels or normalized images")
    by_name = run if is_onnx or not arch.num_classes else lambda inputs: {"logits": run(inputs)}
    exported = Exported(by_name, takes, channels_last=not is_onnx)
    return Model(arch, {}, metadata, exported=exported, source=str(path))
