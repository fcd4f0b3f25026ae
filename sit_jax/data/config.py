"""Data sections of the configuration; `sit_jax.config.schema` combines them into a `Config`.

They are in a module of their own because loader processes import them, and those must not import the models.
"""

import dataclasses
import os
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field
from pydantic import ConfigDict as PydanticConfig
from pydantic.dataclasses import dataclass

from sit_jax.data.rand_augment import parse_rand_augment
from sit_jax.errors import ConfigError

NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Range = tuple[Positive, Positive]
# The path of a file or folder; `~` and `~user` are expanded.
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]

STRICT = PydanticConfig(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The data set and how it is read.

    Attributes:
        name: `digits` (scikit-learn's handwritten digits), `folder` (a folder of images with one subfolder per class),
            `images` (a folder of images without classes, or a text file of paths), `synthetic` (generated noise, to
            test a machine; `synthetic/10` has 10 classes), or the name of any tfds image data set, such as
            `imagenet2012` or `cifar100`.
        data_dir: For `folder` and `images`, the folder of images, for `images` also a text file with one path per line,
            relative to the file's folder; otherwise the folder of prepared tfds data sets. Empty for the default of
            tfds (`TFDS_DATA_DIR` or `~/tensorflow_datasets`).
        train_split: Split to train on, in the syntax of tfds (`train`, `train[:99%]`).
        eval_split: Split to evaluate on.
        val_fraction: Fraction of each class, or of all images if there are no classes, used as `val` if the folder of
            images has no `val` subfolder.
        resize: How an image becomes a square: `stretch` (no cropping) or `crop` (random resized crop in training,
            resize and centre crop in evaluation).
        crop_fraction: Fraction of the shorter side that the centre crop keeps.
        interpolation: Filter of all resizes.
        resampler: Library that resizes training images, both with antialiasing: `opencv` applies a low-pass filter
            first and is six times faster; `pillow` widens the filter, as timm's transforms do. Evaluation always uses
            Pillow.
        mean: Per-channel mean that is subtracted, for values from 0 to 1; averaged over channels for grey images.
        std: Per-channel standard deviation that the result is divided by.
        on_decode_error: How to handle an image that cannot be decoded: `error` stops and names it, `skip` counts and
            skips it.
        max_pixels: Images with more pixels than this are rejected.
        workers: Number of loader processes; 0 uses threads of the main process.
        threads: Threads per loader process.
        label_maps: Folder of dense labels for token labelling, as written by `sit data label`; empty for none.
    """

    name: Annotated[str, Field(min_length=1)] = "digits"
    data_dir: UserPath = ""
    train_split: str = "train"
    eval_split: str = "test"
    val_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    resize: Literal["stretch", "crop"] = "stretch"
    crop_fraction: Annotated[float, Gt(0), Le(1)] = 0.875
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    resampler: Literal["opencv", "pillow"] = "opencv"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    on_decode_error: Literal["error", "skip"] = "error"
    max_pixels: Count = 80_000_000
    workers: Annotated[int, Ge(0)] = 0
    threads: Count = 2
    label_maps: UserPath = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    """Augmentations of training images, in the order in which they are applied.

    Attributes:
        crop_scale: Range of the area fraction of a random resized crop (with `data.resize` `crop`).
        crop_ratio: Range of the aspect ratio (width over height) of that crop.
        max_rotation: Largest rotation, in degrees.
        max_shift: Largest shift in each direction, as a fraction of the side.
        max_zoom: Largest relative change of scale, up or down.
        flip: Probability of a horizontal flip.
        rand_augment: RandAugment policy in timm's syntax, such as `rand-m9-mstd0.5-inc1`; empty for none.
        color_jitter: Largest relative change of brightness, contrast and saturation; 0 for none.
        erase: Probability of random erasing.
        erase_mode: Fill of the erased box: noise per `pixel`, one `rand` colour, or the mean colour (`const`).
        erase_count: Largest number of erased boxes.
        repeats: Differently augmented views of each image in a batch (repeated augmentation).
    """

    crop_scale: Range = (0.08, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    max_rotation: Annotated[float, Ge(0), Le(180)] = 0.0
    max_shift: Fraction = 0.0
    max_zoom: Fraction = 0.0
    flip: Probability = 0.0
    rand_augment: str = ""
    color_jitter: Fraction = 0.0
    erase: Probability = 0.0
    erase_mode: Literal["pixel", "rand", "const"] = "pixel"
    erase_count: Count = 1
    repeats: Count = 1

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ConfigError(name, f"{low} is above {high}")
        if self.crop_scale[1] > 1:
            raise ConfigError("crop_scale", f"must be at most 1, the whole image, got {self.crop_scale[1]}")
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixConfig:
    """How the images of a batch are mixed with each other, on the device.

    Attributes:
        mixup: Alpha of the Beta distribution of mixup's mixing weight; 0 disables mixup.
        cutmix: Alpha of the Beta distribution of CutMix's area; 0 disables CutMix.
        probability: Probability that a batch (or pair, or image: see `mode`) is mixed.
        switch: Probability of CutMix instead of mixup if both are enabled.
        mode: Whether the choices are drawn once per `batch`, per `pair` of images, or per image (`element`).
        mix_token: Alpha of the Beta distribution of MixToken, which is CutMix on the grid of patch tokens after the
            stem; 0 disables it. It replaces mixup and CutMix.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    probability: Probability = 1.0
    switch: Probability = 0.5
    mode: Literal["batch", "pair", "element"] = "batch"
    mix_token: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.mix_token > 0 and (self.mixup > 0 or self.cutmix > 0):
            raise ConfigError("mix_token", "replaces mixup and cutmix; set those to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Parameters of the input pipeline, derived from a run's configuration (`Config.inputs`).

    Image size (height, width), channels and classes are those of the model. `grid` is its rows and columns of patches,
    1 for models without patches; `labels` says whether labels are used, `patch_labels` whether the loss uses a label
    per patch. Batch sizes are global.
    """

    data: DataConfig
    image_size: tuple[int, int]
    channels: int
    num_classes: int
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    grid: tuple[int, int] = (1, 1)
    batch_size: int = 64
    eval_batch_size: int = 64
    seed: int = 0
    label_smoothing: float = 0.0
    labels: bool = True
    patch_labels: bool = False
