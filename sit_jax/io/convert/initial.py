"""Initial weights of a run, and whether their architecture is that of the model that they are loaded into."""

import dataclasses
import pathlib
from collections.abc import Collection

from sit_jax.config import JsonObject
from sit_jax.errors import ConfigError, UserError
from sit_jax.io.convert.read import SLIMMED, Log, Options, silent
from sit_jax.io.load import read_weights
from sit_jax.io.model import Model
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

AnyArchitecture = Architecture | RegNetArchitecture

# Fields in which a model may differ from its initial weights: heads, and modules that are new by design.
_NEW = ("num_classes", "aux_head", "distillation_token", *SLIMMED)


def initial_weights(path: str | pathlib.Path, arch: Architecture, log: Log = silent, rtsm: bool = False) -> Model:
    """Returns initial weights for a model, from any source that `read_weights` reads.

    Hyperparameters that the file does not determine are those of the new model. Position embeddings are interpolated to
    its resolution; heads for other classes are set to zero. Parameters that the file's model lacks, such as a student's
    slimming modules, are absent. With `rtsm`, reverse modules are read too, if there are any for this resolution.
    Raises a ConfigError if the file cannot be read or is of another model.
    """
    changes = Options(image_size=arch.image_size, num_classes=arch.num_classes, rtsm=rtsm, like=arch)
    try:
        model = read_weights(path, options=changes, log=log)
    except UserError as error:
        raise ConfigError("init", str(error)) from None
    check_start(model.vit, arch, str(path))
    return model


def differences(theirs: AnyArchitecture, mine: AnyArchitecture, ignored: Collection[str] = ()) -> str:
    """Returns the fields in which two architectures differ (`depth is 2 there and 4 here, ...`), or an empty string."""
    mine_fields, their_fields = _fields(mine), _fields(theirs)
    names = [name for name in mine_fields if name not in ignored]
    if type(theirs) is not type(mine):
        names = ["family"]
    return ", ".join(
        f"{name} is {getattr(theirs, name)!r} there and {getattr(mine, name)!r} here"
        for name in names
        if mine_fields[name] != their_fields[name]
    )


def _fields(arch: AnyArchitecture) -> JsonObject:
    """Returns the fields by their effect: `mlp_ratio` as hidden width; stem width only for the stem that has one."""
    fields = dataclasses.asdict(arch)
    if isinstance(arch, Architecture):
        fields["mlp_ratio"] = int(arch.dim * arch.mlp_ratio)
        fields["stem_width"] = arch.conv_stem_layers if arch.stem == "conv7" else None
    return fields


def check_start(theirs: AnyArchitecture, mine: AnyArchitecture, where: str) -> None:
    """Raises a ConfigError, which names the fields, if a model cannot start from the weights of another model.

    Both must be the same except for what is new by design: heads for other classes, slimming modules if the weights
    have none, an auxiliary head, a distillation token. For a convolutional network, the image size may also differ.
    """
    if not isinstance(theirs, Architecture) or not isinstance(mine, Architecture):
        problems = [differences(theirs, mine, ("num_classes", "image_size"))]
    else:
        problems = [differences(theirs, mine, _NEW)]
        if theirs.distillation_token and not mine.distillation_token:
            problems.append("distillation_token is True there and False here")
        if theirs.is_slimmed and theirs.stage_blocks != mine.stage_blocks:
            problems.append(f"stage_blocks is {theirs.stage_blocks} there and {mine.stage_blocks} here")
        elif theirs.is_slimmed and theirs.reducer != mine.reducer:
            problems.append(f"reducer is {theirs.reducer} there and {mine.reducer} here")
        elif theirs.is_slimmed and theirs.slimming != mine.slimming:
            problems.append(f"kept_tokens is {theirs.token_counts} there and {mine.token_counts} here")
    text = ", ".join(problem for problem in problems if problem)
    if text:
        raise ConfigError("init", f"{where} is of another model: {text}")
