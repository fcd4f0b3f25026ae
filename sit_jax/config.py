"""The configuration of a run, as frozen dataclasses.

Configs are written as `ml_collections.ConfigDict`s (one page each, in `configs/`) and become a `Config` once, at the
door, by `from_config_dict`. Everything behind the door can trust its values.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt
from ml_collections import ConfigDict
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from sit_jax.data.config import STRICT as STRICT
from sit_jax.data.config import AugmentConfig as AugmentConfig
from sit_jax.data.config import Count, Fraction, NonNegative
from sit_jax.data.config import DataConfig as DataConfig
from sit_jax.data.config import MixConfig as MixConfig
from sit_jax.errors import ConfigError
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture
from sit_jax.models.variants import get_architecture


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """A model and how it is computed.

    Attributes:
        architecture: The model's shape. In a ConfigDict its fields stand directly in the `model` section.
        name: The variant that the fields came from, if any; a label.
        drop_path: Stochastic depth of the last block, growing linearly from 0 at the first.
        dtype: Type of the products. Softmax, norms, losses and the stored weights are float32 whatever this says.
        remat: Recompute each block in the backward pass instead of keeping its activations.
        scan: Compile runs of equal blocks once in training and loop over them: the same result, compiled faster.
    """

    architecture: Annotated[Architecture | RegNetArchitecture, Field(discriminator="family")]
    name: str = ""
    drop_path: Fraction = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    scan: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """AdamW, its schedule, and what stands around it.

    Attributes:
        lr: Peak learning rate of the model.
        lr_batch_size: The batch size that `lr` is meant for: it is scaled in proportion to the run's; 0 for no scaling.
        min_lr: Where the cosine ends, for every parameter group.
        rtsm_lr_scale: Peak learning rate of the reverse modules over that of the model.
        warmup_epochs: Linear warm-up from 0, before the cosine.
        cooldown_epochs: Epochs at `min_lr` after the cosine, in addition to the run's `epochs`.
        schedule_per: Whether the rate changes every step, or every epoch as in the original.
        weight_decay: Decoupled weight decay, times the learning rate.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_norm: Gradients are scaled down to this global norm; 0 leaves them alone.
        accumulate_steps: Micro-batches that a batch is worked off in; their gradients are averaged.
        ema_decay: Decay of the exponential moving average of the weights, kept and evaluated beside them; 0 for none.
        faithful: Decay what the original decays: also the slimming scale and the reverse modules' norms and biases.
    """

    lr: Annotated[float, Gt(0)] = 4e-4
    lr_batch_size: Annotated[int, Ge(0)] = 0
    min_lr: NonNegative = 1e-5
    rtsm_lr_scale: Annotated[float, Gt(0)] = 5.0
    warmup_epochs: NonNegative = 0.0
    cooldown_epochs: Annotated[int, Ge(0)] = 0
    schedule_per: Literal["step", "epoch"] = "step"
    weight_decay: NonNegative = 0.05
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    clip_norm: NonNegative = 0.0
    accumulate_steps: Count = 1
    ema_decay: Fraction = 0.0
    faithful: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Weights of the loss terms; a term with weight 0 is not computed.

    Attributes:
        token: Weight of the token distillation (needs a teacher).
        logits: Weight of the logits distillation (needs a teacher).
        hard: Weight of the CNN teacher's hard labels (needs `cnn_teacher` and a distillation token).
        token_label: Weight of token labelling, LV-ViT's dense labels per patch (needs `data.label_maps` and
            `model.aux_head`).
        temperature: Temperature of the logits distillation.
        label_smoothing: Share of a label spread over all classes.
    """

    token: NonNegative = 0.0
    logits: NonNegative = 0.0
    hard: NonNegative = 0.0
    token_label: NonNegative = 0.0
    temperature: Annotated[float, Gt(0)] = 1.0
    label_smoothing: Fraction = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any term looks at the un-slimmed teacher."""
        return self.token > 0 or self.logits > 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """Where a teacher comes from: a finished run, or a training of its own before the student's.

    Attributes:
        model: The teacher.
        run: Folder of the run whose last checkpoint is the teacher; empty to train one with the fields below.
        init: Where that training's first weights come from: `random`, or the folder of a run.
        epochs: Epochs of the cosine.
        batch_size: Examples per step.
        optim: Optimizer and schedule.
        label_smoothing: Share of a label spread over all classes.
    """

    model: ModelConfig
    run: str = ""
    init: str = "random"
    epochs: Count = 1
    batch_size: Count = 64
    optim: OptimConfig = OptimConfig()
    label_smoothing: Fraction = 0.0

    def __post_init__(self) -> None:
        _check_training(self.epochs, self.batch_size, self.optim)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When checkpoints are written, and how many stay. The last step's is always written.

    Attributes:
        every_epochs: Epochs between two checkpoints.
        keep: The newest ones that stay; the best by accuracy stays besides.
    """

    every_epochs: Count = 1
    keep: Count = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """What is written down while a run goes on.

    Attributes:
        every_steps: Steps between two lines of training metrics.
        tensorboard: Whether TensorBoard events are written beside the JSON lines.
    """

    every_steps: Count = 20
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """One run: a model trained on a data set, with or without teachers.

    Attributes:
        model: The model that is trained.
        data: The data set and how it is read.
        augment: How training pictures are varied.
        mix: How the pictures of a batch are mixed with one another.
        seed: Everything random follows from it.
        epochs: Epochs of the cosine; `optim.cooldown_epochs` come on top.
        batch_size: Examples per step, over all devices.
        eval_batch_size: Examples per evaluation step, over all devices.
        eval_every_epochs: Epochs between two evaluations; there is always one at the end.
        init: Where the first weights come from: `teacher` (random where there is none), `random`, or the folder of
            a run.
        optim: Optimizer and schedule.
        loss: Weights of the loss terms.
        teacher: The un-slimmed teacher, if any.
        cnn_teacher: The convolutional teacher of the distillation token, if any.
        checkpoint: When checkpoints are written.
        log: What is written down.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    seed: Annotated[int, Ge(0), Lt(2**31)] = 0
    epochs: Count = 1
    batch_size: Count = 64
    eval_batch_size: Count = 64
    eval_every_epochs: Count = 1
    init: str = "teacher"
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig | None = None
    cnn_teacher: TeacherConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        arch = self.model.architecture
        _check_training(self.epochs, self.batch_size, self.optim)
        if self.loss.needs_teacher:
            _require(self.teacher is not None, "teacher", "is missing, but loss.token or loss.logits is above 0")
        if self.loss.hard > 0:
            has_token = isinstance(arch, Architecture) and arch.distillation_token
            _require(self.cnn_teacher is not None, "cnn_teacher", "is missing, but loss.hard is above 0")
            _require(has_token, "model.distillation_token", "must be True where loss.hard is above 0")
        if self.loss.token_label > 0:
            labels = isinstance(arch, Architecture) and arch.aux_head and not arch.is_slimmed
            _require(labels, "loss.token_label", "needs model.aux_head=True and a model without slimming")
            _require(bool(self.data.label_maps), "data.label_maps", "is empty, but loss.token_label is above 0")
        if self.mix.mix_token > 0:
            mixes = isinstance(arch, Architecture) and self.loss.hard == 0
            _require(mixes, "mix.mix_token", "needs a vision transformer, and no convolutional teacher")
        if self.teacher is not None:
            self._check_teacher(arch, self.teacher.model.architecture)

    def _check_teacher(self, arch: Architecture | RegNetArchitecture, teacher: object) -> None:
        is_vit = isinstance(arch, Architecture) and isinstance(teacher, Architecture) and not teacher.is_slimmed
        _require(is_vit, "teacher.model", "must be an un-slimmed vision transformer, and model one as well")
        if self.loss.token > 0 or self.init == "teacher":
            for name in ("image_size", "patch_size", "dim", "depth", "num_classes", "in_channels"):
                mine, theirs = getattr(arch, name), getattr(teacher, name)
                _require(mine == theirs, f"teacher.model.{name}", f"is {theirs}, but the student's is {mine}")

    def teacher_run(self, teacher: TeacherConfig) -> "Config":
        """The configuration of the run that trains a teacher of this one."""
        return dataclasses.replace(
            self,
            model=teacher.model,
            epochs=teacher.epochs,
            batch_size=teacher.batch_size,
            optim=teacher.optim,
            loss=LossConfig(label_smoothing=teacher.label_smoothing),
            init=teacher.init,
            teacher=None,
            cnn_teacher=None,
        )

    @property
    def grid_size(self) -> int:
        """Patches along a side of the transformer's picture."""
        arch = self.model.architecture
        assert isinstance(arch, Architecture), "only transformers have patches"
        return arch.grid_size

    @property
    def scaled_optim(self) -> OptimConfig:
        """The optimizer with its rate scaled to the run's batch."""
        optim = self.optim
        if not optim.lr_batch_size:
            return optim
        return dataclasses.replace(optim, lr=optim.lr * self.batch_size / optim.lr_batch_size, lr_batch_size=0)

    def with_classes(self, num_classes: int) -> "Config":
        """The configuration with this many classes wherever a model leaves them to the data (`num_classes` 0)."""

        def settle(model: ModelConfig) -> ModelConfig:
            arch = model.architecture
            if arch.num_classes:
                return model
            return dataclasses.replace(model, architecture=dataclasses.replace(arch, num_classes=num_classes))

        def settle_teacher(teacher: TeacherConfig | None) -> TeacherConfig | None:
            return teacher and dataclasses.replace(teacher, model=settle(teacher.model))

        return dataclasses.replace(
            self,
            model=settle(self.model),
            teacher=settle_teacher(self.teacher),
            cnn_teacher=settle_teacher(self.cnn_teacher),
        )


def named_model(name: str, **overrides: Any) -> ConfigDict:
    """The `model` section of a ConfigDict for a named variant, every field spelled out so that each can be overridden.

    Raises:
        ConfigError: Unknown name or field, or an impossible combination.
    """
    compute = {key: overrides.pop(key) for key in ("drop_path", "dtype", "remat", "scan") if key in overrides}
    return model_section(get_architecture(name, **overrides), name=name, **compute)


def model_section(architecture: Architecture | RegNetArchitecture, **compute: Any) -> ConfigDict:
    """The `model` section of a ConfigDict for any architecture."""
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name != "architecture"}
    return ConfigDict({**fields, **dataclasses.asdict(architecture), **compute})


def defaults(section: type) -> ConfigDict:
    """A ConfigDict of a section's defaults, for configs to write their differences into."""
    return ConfigDict({f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING})


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Checks a ConfigDict and freezes it.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of range, or values that contradict each other;
            the message begins with the key.
    """
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    for section in ("model", "teacher", "cnn_teacher"):
        holder = values if section == "model" else values.get(section)
        if isinstance(holder, dict) and isinstance(holder.get("model"), dict):
            holder["model"] = _split_model(holder["model"])
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConfigError(_describe(error)) from None


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, architecture fields standing in the model sections; the inverse of
    `from_config_dict`."""
    values = _ADAPTER.dump_python(config, mode="json")
    for holder in (values, values["teacher"], values["cnn_teacher"]):
        if holder is not None:
            holder["model"].update(holder["model"].pop("architecture"))
    return values


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def _split_model(section: dict[str, Any]) -> dict[str, Any]:
    own = {field.name for field in dataclasses.fields(ModelConfig)} - {"architecture"}
    split = {key: value for key, value in section.items() if key in own}
    shape = {key: value for key, value in section.items() if key not in own}
    split["architecture"] = {"family": "vit", **shape}
    return split


def _describe(error: ValidationError) -> str:
    """One line for all that is wrong: `optim.lrr: there is no such key; did you mean lr?`."""
    lines = []
    for problem in error.errors():
        parts = [str(p) for p in problem["loc"] if str(p) not in ("architecture", "vit", "regnet")]
        key = ".".join(parts)
        match problem["type"]:
            case "unexpected_keyword_argument":
                lines.append(f"{key}: there is no such key{_hint(parts)}")
            case "value_error":
                message = str(problem["ctx"]["error"])
                lines.append(f"{key}.{message}" if key else message)
            case _:
                lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, is {problem['input']!r}")
    return "; ".join(dict.fromkeys(lines))


def _hint(parts: list[str]) -> str:
    models = (Config, ModelConfig, Architecture, OptimConfig, LossConfig, TeacherConfig)
    others = (DataConfig, AugmentConfig, MixConfig, CheckpointConfig, LogConfig)
    names = {field.name for section in (*models, *others) for field in dataclasses.fields(section)}
    close = difflib.get_close_matches(parts[-1], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _check_training(epochs: int, batch_size: int, optim: OptimConfig) -> None:
    problem = f"{batch_size} does not divide by optim.accumulate_steps {optim.accumulate_steps}"
    _require(batch_size % optim.accumulate_steps == 0, "batch_size", problem)
    problem = f"{optim.warmup_epochs} must be below epochs, {epochs}"
    _require(optim.warmup_epochs < epochs, "optim.warmup_epochs", problem)


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: {problem}")
