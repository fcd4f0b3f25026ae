"""The parts of a configuration that describe data; `sit_jax.config.schema` puts them into a whole.

They stand apart since loader processes read them, and those must not wait for the models to be imported.
"""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict as PydanticConfig
from pydantic import Field
from pydantic.dataclasses import dataclass

from sit_jax.data.rand_augment import parse_rand_augment
from sit_jax.errors import ConfigError

NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Probability = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Range = tuple[Positive, Positive]

STRICT = PydanticConfig(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """The data set and how it is read.

    Attributes:
        name: `digits` (scikit-learn's handwritten digits), `folder` (your own images), `synthetic` (noise, to try a
            machine; `synthetic/10` has 10 classes), or the name of any tfds image classification data set, such as
            `imagenet2012` or `cifar100`.
        data_dir: For `folder` the folder of images; else where tfds keeps prepared data sets, empty for tfds's own
            default (`TFDS_DATA_DIR` or `~/tensorflow_datasets`).
        train_split: Split to train on, in tfds's syntax (`train`, `train[:99%]`).
        eval_split: Split to evaluate on.
        val_fraction: Fraction of each class that a folder without `train` and `val` in it gives to `val`.
        resize: How a training or evaluation image becomes a square: `stretch` it (crop nothing), or `crop`:
            random resized crop in training, resize and centre crop in evaluation.
        crop_fraction: Fraction of the shorter side that the centre crop leaves.
        interpolation: Filter of every resize.
        resampler: What resizes training images, neither with aliasing: `opencv` blurs before it shrinks and takes a
            sixth of the time; `pillow` widens the filter, as timm's transforms do. Evaluation is always Pillow's.
        mean: Mean of the channels, of values from 0 to 1, that is taken off; averaged over channels for grey images.
        std: Standard deviation that they are divided by.
        on_decode_error: What an unreadable image does: `error` stops and names it, `skip` counts it and goes on.
        max_pixels: Images of more pixels are not decoded.
        workers: Processes that read and vary images; 0 for threads of this one.
        threads: Threads in each of them.
        label_maps: Folder of dense labels for token labelling, as `sit data label` writes it; empty for none.
    """

    name: Annotated[str, Field(min_length=1)] = "digits"
    data_dir: str = ""
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
    label_maps: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AugmentConfig:
    """How training images are varied, in this order.

    Attributes:
        crop_scale: Fraction of the image's area that a random resized crop takes (with `data.resize` `crop`).
        crop_ratio: Width over height of that crop.
        max_rotation: Images are turned by up to this many degrees.
        max_shift: ... and moved by up to this share of their side in each direction.
        max_zoom: ... and scaled by up to this share up or down.
        flip: Probability of a horizontal flip.
        rand_augment: timm's string, such as `rand-m9-mstd0.5-inc1`; empty for none.
        color_jitter: Brightness, contrast and saturation change by up to this share; 0 for none.
        erase: Probability of random erasing.
        erase_mode: What fills the erased box: noise per `pixel`, one `rand` colour, or the mean colour (`const`).
        erase_count: Boxes at most.
        repeats: Differently varied views of each image in a batch (repeated augmentation).
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
            raise ConfigError("crop_scale", f"a crop is at most the whole picture, 1, is {self.crop_scale[1]}")
        if self.rand_augment:
            parse_rand_augment(self.rand_augment)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixConfig:
    """How the images of a batch are mixed with one another, on the device.

    Attributes:
        mixup: Parameter of the Beta distribution that mixup's share is drawn from; 0 for no mixup.
        cutmix: The same for cutmix's area; 0 for no cutmix.
        probability: Fraction of the batches (or pairs, or images: `mode`) that are mixed at all.
        switch: Where both are on, the probability of cutmix instead of mixup.
        mode: Whether the choices are drawn once per `batch`, per `pair` of images, or per image (`element`).
        mix_token: Parameter of the Beta distribution for MixToken, cutmix on the grid of patch tokens behind the stem;
            0 for none. It takes the place of the other two.
    """

    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    probability: Probability = 1.0
    switch: Probability = 0.5
    mode: Literal["batch", "pair", "element"] = "batch"
    mix_token: NonNegative = 0.0

    def __post_init__(self) -> None:
        if self.mix_token > 0 and (self.mixup > 0 or self.cutmix > 0):
            raise ConfigError("mix_token", "takes the place of mixup and cutmix; set those to 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What the input pipeline takes of a run's configuration (`Config.inputs`).

    Attributes:
        data: The data set and how images are read.
        image_size: Height and width of the model's input in pixels.
        channels: Of the model's input.
        num_classes: Classes of the model.
        augment: How training images are varied.
        mix: Mixup, CutMix and MixToken.
        grid_size: Patches along one side, for labels per patch; 1 for models without patches.
        batch_size: Examples in a global training batch.
        eval_batch_size: Examples in a global evaluation batch.
        seed: Decides order and augmentation.
        label_smoothing: Fraction of a label spread over all classes.
        patch_labels: Whether the loss takes a label for each patch.
    """

    data: DataConfig
    image_size: int
    channels: int
    num_classes: int
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    mix: MixConfig = dataclasses.field(default_factory=MixConfig)
    grid_size: int = 1
    batch_size: int = 64
    eval_batch_size: int = 64
    seed: int = 0
    label_smoothing: float = 0.0
    patch_labels: bool = False
