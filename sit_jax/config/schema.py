"""The configuration of a run, as frozen dataclasses.

Configs are `ml_collections.ConfigDict`s (one file each, in `configs/`), which `from_config_dict` validates once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from sit_jax.data.config import (
    STRICT,
    AugmentConfig,
    Count,
    DataConfig,
    Fraction,
    InputSpec,
    MixConfig,
    NonNegative,
    Positive,
    UserPath,
)  # fmt: skip
from sit_jax.errors import require
from sit_jax.models.architecture import Architecture
from sit_jax.models.regnet import RegNetArchitecture

# An object of a JSON file.
JsonObject = dict[str, Any]
# A word or a path.
InitialWeights = Annotated[UserPath, BeforeValidator(lambda value: "" if value is None else value)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """A model and its computation.

    Attributes:
        architecture: The model's architecture. In a ConfigDict, its fields are directly in the `model` section.
        name: Name of the variant that the fields are from, if any; only a label.
        drop_path: Stochastic depth rate of the last block; it grows linearly from 0 in the first block.
        dtype: Type of the matrix products. Softmax, norms, losses and the stored weights are always float32.
        remat: Whether to recompute each block in the backward pass to save activation memory.
        attention: Implementation of softmax attention: `xla`, `cudnn` (fused, on NVIDIA GPUs, in bfloat16), `plain`
            (with autodiff, also in forward mode), or `auto`: `cudnn` if the GPU supports it, otherwise `xla`.
    """

    architecture: Annotated[Architecture | RegNetArchitecture, Field(discriminator="family")]
    name: str = ""
    drop_path: Fraction = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: Literal["auto", "xla", "cudnn", "plain"] = "auto"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """AdamW, its schedule, gradient processing and weight averaging.

    Attributes:
        lr: Peak learning rate of the model.
        lr_batch_size: Batch size that `lr` is meant for; the rate is scaled in proportion. 0 for no scaling.
        min_lr: Final learning rate of the cosine, for every parameter group.
        rtsm_lr_scale: Peak learning rate of the reverse modules, relative to that of the model.
        warmup_epochs: Epochs of linear warm-up from 0, before the cosine.
        cooldown_epochs: Epochs at `min_lr` after the cosine, in addition to the run's `epochs`.
        schedule_per: Whether the rate changes every `step`, or every `epoch` as in the original.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the square root of the second moment.
        clip_norm: Largest global norm of the gradients, which are scaled down to it; 0 for no clipping.
        grad_dtype: Type in which devices exchange kernels' gradients; `bfloat16` needs `model.dtype` bfloat16.
        accumulate_steps: Gradient-accumulation steps: micro-batches per batch, whose gradients are averaged.
        ema_decay: Decay of the moving average of the weights, which is stored and evaluated; 0 for none.
        decay_like_original: Whether to also decay the TSM scale, and the norms and biases of the RTSMs.
    """

    lr: Positive = 4e-4
    lr_batch_size: Annotated[int, Ge(0)] = 0
    min_lr: NonNegative = 1e-5
    rtsm_lr_scale: Positive = 5.0
    warmup_epochs: NonNegative = 0.0
    cooldown_epochs: Annotated[int, Ge(0)] = 0
    schedule_per: Literal["step", "epoch"] = "step"
    weight_decay: NonNegative = 0.05
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: Positive = 1e-8
    clip_norm: NonNegative = 0.0
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate_steps: Count = 1
    ema_decay: Fraction = 0.0
    decay_like_original: bool = False


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Weights of the loss terms; a term with weight 0 is not computed.

    Attributes:
        classification: Weight of the cross entropy with the labels. With 0, labels are not used at all: the data may
            have none, a model with `num_classes` 0 has no head, and evaluation compares features with the teacher's.
        token: Weight of token distillation (needs a teacher).
        feature: Weight of the error of the pooled features, CLIP's and SigLIP's embeddings (needs a teacher).
        feature_error: The error of the pooled features: mean squared error, or one minus the cosine similarity.
        logits: Weight of logits distillation (needs a teacher and a head).
        hard: Weight of the CNN teacher's hard labels (needs `cnn_teacher` and a distillation token).
        token_label: Weight of LV-ViT's token labelling (needs `data.label_maps` and `model.aux_head`).
        temperature: Temperature of logits distillation.
        label_smoothing: Fraction of each label that is spread over all classes.
        extra: Weights of custom loss terms, by name; see `sit_jax.train`.
    """

    classification: NonNegative = 1.0
    token: NonNegative = 0.0
    feature: NonNegative = 0.0
    feature_error: Literal["mse", "cosine"] = "mse"
    logits: NonNegative = 0.0
    hard: NonNegative = 0.0
    token_label: NonNegative = 0.0
    temperature: Positive = 1.0
    label_smoothing: Fraction = 0.0
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term uses the un-slimmed teacher."""
        return self.token > 0 or self.feature > 0 or self.logits > 0

    @property
    def uses_labels(self) -> bool:
        """Whether the labels of the data are used."""
        return self.classification > 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TeacherConfig:
    """The source of a teacher: a finished run, or a training before the student's.

    Attributes:
        model: The teacher's model.
        run: Run directory whose last checkpoint is the teacher; empty to train one with the fields below.
        init: Initial weights of that training: `random`, or a run directory.
        epochs: Epochs of the cosine.
        batch_size: Number of examples per step.
        optim: Optimizer and schedule of that training.
        label_smoothing: Fraction of each label that is spread over all classes.
        match_classes: How to match the classes of a given teacher with those of the data: by `names`, if both have
            names, or by `index`, for the same classes with other names.
    """

    model: ModelConfig
    run: UserPath = ""
    init: InitialWeights = "random"
    epochs: Count = 1
    batch_size: Count = 64
    optim: OptimConfig = OptimConfig()
    label_smoothing: Fraction = 0.0
    match_classes: Literal["names", "index"] = "names"

    def __post_init__(self) -> None:
        _check_training(self)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Sizes of the device mesh; one of them may be -1, for the remaining devices.

    Attributes:
        data: Number of groups of devices that replicate the weights and split the batch.
        fsdp: Number of devices that split the batch and every large array of the state and the teachers.
        tensor: Number of devices that split attention heads and the hidden units of MLPs.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, name, f"must be at least 1, or -1 for the rest, got {size}")
        require(list(sizes.values()).count(-1) <= 1, "data", "only one of data, fsdp and tensor can be -1, the rest")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When to write checkpoints, and how many to keep. The last step is always saved.

    Attributes:
        every_epochs: Epochs between two checkpoints; 0 for none at the end of epochs.
        every_steps: Steps between two checkpoints; 0 for none.
        every_minutes: Minutes between two checkpoints; 0 for none.
        keep: Number of newest checkpoints to keep; the best one by accuracy is also kept.
    """

    every_epochs: Annotated[int, Ge(0)] = 1
    every_steps: Annotated[int, Ge(0)] = 0
    every_minutes: NonNegative = 0.0
    keep: Count = 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogConfig:
    """Logging during a run.

    Attributes:
        every_steps: Steps between two lines of training metrics.
        tensorboard: Whether to write TensorBoard events in addition to the JSON lines.
    """

    every_steps: Count = 20
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A run: a model trained on a data set, with or without teachers.

    Attributes:
        model: The model to train.
        data: The data set and how it is read.
        augment: Augmentation of training images.
        mix: How the images of a batch are mixed with each other.
        seed: Seed of all random choices.
        epochs: Epochs of the cosine; `optim.cooldown_epochs` are added.
        batch_size: Global batch size.
        eval_batch_size: Global batch size of the evaluation, which is rounded up to a multiple of the devices.
        eval_every_epochs: Epochs between two evaluations; the last step is always evaluated.
        init: Initial weights: `teacher` (random if there is none), `random`, or a run directory.
        elastic_rule: Which of `model.kept_tokens_choices` a step trains: `random`, one; `sandwich`, the largest, the
            smallest and one between: three passes of the student.
        optim: Optimizer and schedule.
        loss: Weights of the loss terms.
        teacher: The un-slimmed teacher, if any.
        cnn_teacher: The convolutional teacher of the distillation token, if any.
        mesh: Sizes of the device mesh.
        checkpoint: When to write checkpoints.
        log: Logging during the run.
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
    init: InitialWeights = "teacher"
    elastic_rule: Literal["random", "sandwich"] = "random"
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig | None = None
    cnn_teacher: TeacherConfig | None = None
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        arch = self.model.architecture
        _check_training(self)
        is_elastic = isinstance(arch, Architecture) and bool(arch.kept_tokens_choices)
        require(is_elastic or self.elastic_rule == "random", "elastic_rule", "needs model.kept_tokens_choices")
        if self.loss.needs_teacher:
            problem = "must be set if loss.token, loss.feature or loss.logits is above 0"
            require(self.teacher is not None, "teacher", problem)
        if not self.loss.uses_labels:
            self._check_without_labels()
        if self.loss.hard > 0:
            has_token = isinstance(arch, Architecture) and arch.distillation_token
            require(self.cnn_teacher is not None, "cnn_teacher", "must be set if loss.hard is above 0")
            require(has_token, "model.distillation_token", "must be True where loss.hard is above 0")
        if self.loss.token_label > 0:
            labels = isinstance(arch, Architecture) and arch.aux_head and not arch.is_slimmed
            require(labels, "loss.token_label", "needs model.aux_head=True and a model without slimming")
            require(bool(self.data.label_maps), "data.label_maps", "is empty, but loss.token_label is above 0")
        if self.mix.mix_token > 0:
            mixes = isinstance(arch, Architecture) and self.loss.hard == 0
            require(mixes, "mix.mix_token", "needs a vision transformer, and no convolutional teacher")
            steps = self.optim.accumulate_steps
            pairs = steps == 1 or self.batch_size % (2 * steps) == 0
            require(pairs, "optim.accumulate_steps", "must divide half of the batch size if mix.mix_token is above 0")
        if self.teacher is not None:
            self._check_teacher(arch, self.teacher.model.architecture)

    def _check_without_labels(self) -> None:
        loss = self.loss
        has_terms = bool(loss.needs_teacher or loss.hard or loss.token_label or loss.extra)
        require(has_terms, "loss.classification", "is 0, and so is every other weight")
        problem = "must be set if loss.classification is 0: evaluation compares features with the teacher's"
        require(self.teacher is not None, "teacher", problem)
        for name, teacher in self.teachers.items():
            require(bool(teacher.run), f"{name}.run", "must name trained weights if loss.classification is 0")
        for name in ("logits", "hard", "token_label") if not self.model.architecture.num_classes else ():
            require(getattr(loss, name) == 0, f"loss.{name}", "needs a head, but model.num_classes is 0")

    def _check_teacher(self, arch: Architecture | RegNetArchitecture, teacher: object) -> None:
        is_vit = isinstance(arch, Architecture) and isinstance(teacher, Architecture) and not teacher.is_slimmed
        require(is_vit, "teacher.model", "must be an un-slimmed vision transformer, and model a vision transformer")
        assert isinstance(arch, Architecture)
        assert isinstance(teacher, Architecture)
        if self.loss.feature > 0 or not self.loss.uses_labels:
            mine, theirs = arch.feature_dim, teacher.feature_dim
            problem = f"needs features of one width, got {mine} and the teacher's {theirs}"
            require(mine == theirs, "loss.feature", problem)
        if self.loss.token > 0 or self.init == "teacher":
            for name in ("image_size", "patch_size", "dim", "depth", "num_classes", "in_channels"):
                mine, theirs = getattr(arch, name), getattr(teacher, name)
                require(mine == theirs, f"teacher.model.{name}", f"must be {mine}, as in model, got {theirs}")

    def teacher_run(self, teacher: TeacherConfig) -> "Config":
        """Returns the configuration of the run that trains one of the teachers."""
        return dataclasses.replace(
            self,
            model=teacher.model,
            epochs=teacher.epochs,
            batch_size=teacher.batch_size,
            optim=teacher.optim,
            loss=LossConfig(label_smoothing=teacher.label_smoothing),
            init=teacher.init,
            elastic_rule="random",
            teacher=None,
            cnn_teacher=None,
        )

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """The teachers of the run, by the name of their section."""
        return {name: x for name, x in (("teacher", self.teacher), ("cnn_teacher", self.cnn_teacher)) if x is not None}

    @property
    def recovered(self) -> Architecture | None:
        """The student's architecture if reverse modules recover its tokens in the training, else None."""
        arch = self.model.architecture
        return arch if self.loss.token > 0 and isinstance(arch, Architecture) and arch.is_slimmed else None

    @property
    def used_teacher(self) -> TeacherConfig | None:
        """The teacher if a loss term or the evaluation needs it, or custom terms may read its outputs."""
        used = self.loss.needs_teacher or self.loss.extra or not self.loss.uses_labels
        return self.teacher if used else None

    @property
    def inputs(self) -> InputSpec:
        """Parameters of the input pipeline."""
        arch = self.model.architecture
        return InputSpec(
            data=self.data,
            augment=self.augment,
            mix=self.mix,
            image_size=arch.image_shape,
            channels=arch.in_channels,
            num_classes=arch.num_classes,
            grid=arch.grid if isinstance(arch, Architecture) else (1, 1),
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            seed=self.seed,
            label_smoothing=self.loss.label_smoothing,
            labels=self.loss.uses_labels,
            patch_labels=self.loss.token_label > 0,
        )

    @property
    def scaled_optim(self) -> OptimConfig:
        """The optimizer section with the learning rate scaled to the run's batch size."""
        optim, size = self.optim, self.optim.lr_batch_size
        return dataclasses.replace(optim, lr=optim.lr * self.batch_size / size, lr_batch_size=0) if size else optim

    @property
    def needs_classes(self) -> bool:
        """Whether the data determines the number of classes of a model."""
        models = [self.model, *(teacher.model for teacher in self.teachers.values())]
        return self.loss.uses_labels and not all(model.architecture.num_classes for model in models)

    def with_classes(self, num_classes: int) -> "Config":
        """Returns the configuration with this number of classes in all models that need one; see `needs_classes`."""
        if not self.needs_classes:
            return self

        def resolve(model: ModelConfig) -> ModelConfig:
            arch = model.architecture
            arch = dataclasses.replace(arch, num_classes=arch.num_classes or num_classes)
            return dataclasses.replace(model, architecture=arch)

        teachers: dict[str, Any] = {n: dataclasses.replace(x, model=resolve(x.model)) for n, x in self.teachers.items()}
        return dataclasses.replace(self, model=resolve(self.model), **teachers)


def _check_training(section: Config | TeacherConfig) -> None:
    optim, dtype = section.optim, section.model.dtype
    problem = f"{section.batch_size} does not divide by optim.accumulate_steps {optim.accumulate_steps}"
    require(section.batch_size % optim.accumulate_steps == 0, "batch_size", problem)
    fits = optim.grad_dtype in ("float32", dtype)
    require(fits, "optim.grad_dtype", f"{optim.grad_dtype} needs model.dtype {optim.grad_dtype}, got {dtype}")
    problem = f"{optim.warmup_epochs} must be below epochs, {section.epochs}"
    require(optim.warmup_epochs < section.epochs, "optim.warmup_epochs", problem)
    problem = "names no weights; set it to random, or to a run, a model folder or a file of weights"
    require(section.init not in ("", "None"), "init", problem)
