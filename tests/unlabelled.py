"""Images without labels, and the command that slims a small backbone on them."""

import pathlib

import numpy as np
from PIL import Image

BACKBONES = pathlib.Path("tests/golden/backbones")


def write_images(folder: pathlib.Path, count: int) -> None:
    """Noise, every third image in a subfolder."""
    rng = np.random.default_rng(count)
    (folder / "more").mkdir(parents=True)
    for index in range(count):
        image = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize((40, 36))
        image.save(folder / ("more" if index % 3 == 0 else "") / f"{index:02d}.png")


def command(folder: pathlib.Path, run: pathlib.Path, epochs: int = 2) -> list[str]:
    values = {"data.data_dir": folder, "data.val_fraction": 0.33, "epochs": epochs, "batch_size": 8}
    values |= {"eval_batch_size": 8, "optim.warmup_epochs": 0.0, "optim.ema_decay": 0.5, "log.every_steps": 1}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return ["train", "--config", f"features:{BACKBONES / 'hf_dinov2'}", "--workdir", str(run), *overrides]
