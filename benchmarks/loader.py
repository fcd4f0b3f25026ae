"""Images per second and CPU milliseconds per image of the input pipeline, beside timm's transforms and tf.data.

    python benchmarks/loader.py --images 2000 --workers 2

Every contender reads the same JPEGs (500 x 400 unless --folder names your own) from the same files and delivers
uint8 batches at 224 pixels, as a trainer takes them that normalises and erases on the device (timm's PrefetchLoader
does, and so do we). `plain` is random resized crop and flip; `full` adds RandAugment rand-m9-mstd0.5-inc1. tf.data
decodes whole images as the others do, or (`fused`) only the crop; its resize does not antialias. All run in turn,
round after round, each in a process of its own; the median round counts. CPU time is that of the process and its
children.

Peers run in the environments named with --timm_python and --tensorflow_python (where torch, timm and TensorFlow may
live beside this project's, which needs none of them); one that cannot run is left out and said so. timm 1.0's
RandAugment needs Pillow below 13.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

BATCH, SIZE = 64, 224
RECIPES = ("plain", "full")
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


def make_pictures(root: pathlib.Path, count: int) -> None:
    """Writes JPEGs of 500 x 400: crops of photographs that scikit-learn and scikit-image bring along."""
    import numpy as np
    import skimage.data
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [*load_sample_images().images, skimage.data.rocket(), skimage.data.coffee(), skimage.data.astronaut()]
    rng = np.random.default_rng(0)
    for index in range(count):
        image = Image.fromarray(photographs[index % len(photographs)])
        share = rng.uniform(0.6, 0.9)
        left, top = rng.uniform(0, 1 - share, 2)
        edges = (left * image.width, top * image.height, (left + share) * image.width, (top + share) * image.height)
        folder = root / "train" / f"class{index % len(photographs)}"
        folder.mkdir(parents=True, exist_ok=True)
        crop = image.resize((500, 400), Image.Resampling.BICUBIC, edges)
        crop.save(folder / f"{index:06d}.jpg", quality=90)


def ours(
    root: pathlib.Path, recipe: str, workers: int, threads: int, resampler: Literal["opencv", "pillow"]
) -> Iterator[Any]:
    """This project's loader."""
    import dataclasses

    from sit_jax.config import AugmentConfig, Config, DataConfig, ModelConfig
    from sit_jax.data.folder import FolderSource
    from sit_jax.data.pipeline import Hosts, TrainData
    from sit_jax.models.variants import get_architecture

    classes = len(FolderSource(root, "train").class_names)
    data = DataConfig(
        name="folder", data_dir=str(root), resize="crop", workers=workers, threads=threads, resampler=resampler
    )
    augment = AugmentConfig(flip=0.5)
    if recipe == "full":
        augment = dataclasses.replace(augment, rand_augment=RAND_AUGMENT)
    model = ModelConfig(architecture=get_architecture("deit_tiny", num_classes=classes, image_size=SIZE))
    config = Config(model=model, data=data, augment=augment, batch_size=BATCH)
    for batch in TrainData(config.inputs, Hosts()).batches():
        yield batch["image"]


def timm_loader(root: pathlib.Path, recipe: str, workers: int) -> Iterator[Any]:
    """timm's training transforms in PyTorch's DataLoader; uint8 out, as for timm's own PrefetchLoader."""
    import torch

    # torchvision has no build for a CPU torch: its compiled operators, which transforms do not use, must exist by name.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm.data
    from PIL import Image

    transform = timm.data.create_transform(
        SIZE,
        is_training=True,
        use_prefetcher=True,
        auto_augment=RAND_AUGMENT if recipe == "full" else None,
        color_jitter=None,
        interpolation="bicubic",
        re_prob=0.25,
    )
    files = sorted(root.rglob("*.jpg"))

    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.open(files[index]).convert("RGB")), 0

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Pictures(),
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        collate_fn=timm.data.loader.fast_collate,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield images


def tf_data(root: pathlib.Path, recipe: str, fused: bool) -> Iterator[Any]:
    """tf.data with TensorFlow's random crop and its bicubic resize, which does not antialias; plain only."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    assert recipe == "plain"
    files = sorted(str(path) for path in root.rglob("*.jpg"))

    def load(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        box = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(encoded), box, area_range=(0.08, 1.0), aspect_ratio_range=(3 / 4, 4 / 3)
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        if fused:
            image = tf.image.decode_and_crop_jpeg(encoded, window, channels=3)
        else:
            image = tf.slice(tf.image.decode_jpeg(encoded, channels=3), begin, tf.concat([size[:2], [3]], 0))
        image = tf.image.random_flip_left_right(tf.image.resize(image, (SIZE, SIZE), "bicubic"))
        return tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH, drop_remainder=True)
    return iter(dataset.prefetch(2).as_numpy_iterator())


def measure(make: Callable[[], Iterator[Any]], images: int) -> dict[str, float]:
    """Start-up, images/s and CPU time per image of a loader, and its memory before and after."""
    begun = time.perf_counter()
    batches = make()
    next(batches)
    start_up = time.perf_counter() - begun
    for _ in range(3):
        next(batches)  # Whatever was prefetched while starting up.
    memory = _memory_mib()
    cpu, begun = _cpu_seconds(), time.perf_counter()
    steps = max(1, images // BATCH)
    for _ in range(steps):
        next(batches)
    wall, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu
    afterwards = _memory_mib()
    if hasattr(batches, "close"):
        batches.close()
    count = steps * BATCH
    return {
        "images_per_s": count / wall,
        "cpu_ms_per_image": 1e3 * cpu / count,
        "start_up_s": start_up,
        "memory_mib": memory,
        "memory_afterwards_mib": afterwards,
    }


def _processes() -> Iterator[pathlib.Path]:
    """This process and its living children, in /proc."""
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(") ", 1)[1].split()[1])
        except OSError:
            continue
        if os.getpid() in (int(entry.name), parent):
            yield entry


def _cpu_seconds() -> float:
    fields = [(entry / "stat").read_text().rsplit(") ", 1)[1].split() for entry in _processes()]
    return sum(int(x[11]) + int(x[12]) for x in fields) / os.sysconf("SC_CLK_TCK")


def _memory_mib() -> float:
    """Memory of all processes, shared pages counted once."""
    total = 0
    for entry in _processes():
        lines = (entry / "smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def run_one(arguments: argparse.Namespace) -> None:
    """Measures one contender in this process and prints JSON."""
    root, workers = arguments.folder, arguments.workers
    makers: dict[str, Callable[[], Iterator[Any]]] = {
        "sit_jax": lambda: ours(root, arguments.recipe, workers, 1, "opencv"),
        "sit_jax, threads": lambda: ours(root, arguments.recipe, 0, workers, "opencv"),
        "sit_jax, Pillow's resize": lambda: ours(root, arguments.recipe, workers, 1, "pillow"),
        "timm": lambda: timm_loader(root, arguments.recipe, workers),
        "tf.data": lambda: tf_data(root, arguments.recipe, False),
        "tf.data, fused": lambda: tf_data(root, arguments.recipe, True),
    }
    print(json.dumps(measure(makers[arguments.only], arguments.images)))
    sys.stdout.flush()
    os._exit(0)  # Loaders may take long to wind up; nothing of theirs is wanted any more.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images per round")
    parser.add_argument("--pictures", type=int, default=1000, help="JPEGs to make")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=pathlib.Path, help="your own: FOLDER/train/CLASS/*.jpg")
    parser.add_argument("--timm_python", default=sys.executable, help="Python with torch and timm")
    parser.add_argument("--tensorflow_python", default=sys.executable, help="Python with TensorFlow")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", default="plain", choices=RECIPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run_one(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.folder is None:
            arguments.folder = pathlib.Path(scratch)
            make_pictures(arguments.folder, arguments.pictures)
        report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Runs all contenders in turn and prints the table."""
    tensorflow = arguments.tensorflow_python
    pythons = {"timm": arguments.timm_python, "tf.data": tensorflow, "tf.data, fused": tensorflow}
    contenders = ("sit_jax", "sit_jax, threads", "sit_jax, Pillow's resize", "timm", "tf.data", "tf.data, fused")
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    missing: set[str] = set()
    for _ in range(arguments.rounds):
        for recipe in RECIPES:
            for name in contenders:
                if name in missing or (name.startswith("tf.data") and recipe == "full"):
                    continue
                words = [pythons.get(name, sys.executable), __file__, "--only", name, "--recipe", recipe]
                words += ["--images", str(arguments.images), "--workers", str(arguments.workers)]
                done = subprocess.run([*words, "--folder", str(arguments.folder)], capture_output=True, text=True)
                if done.returncode:
                    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    print(f"{name} is left out: {last}", file=sys.stderr)
                    missing.add(name)
                    continue
                results.setdefault((recipe, name), []).append(json.loads(done.stdout.strip().splitlines()[-1]))
    medians = {
        key: {field: statistics.median(r[field] for r in rounds) for field in rounds[0]}
        for key, rounds in results.items()
    }
    machine = f"{os.cpu_count()} x {_cpu_name()}, {time.strftime('%Y-%m-%d')}"
    print(f"{machine}; {arguments.workers} workers, {SIZE} px, batches of {BATCH}, median of {arguments.rounds}\n")
    print("| recipe | loader | images/s | CPU ms per image | start-up s | MiB, before and after | over timm |")
    print("|---|---|---|---|---|---|---|")
    for (recipe, name), row in medians.items():
        base = medians.get((recipe, "timm"))
        ratio = f"{row['images_per_s'] / base['images_per_s']:.2f}" if base else ""
        cells: tuple[str, ...] = (
            f"{row['images_per_s']:.0f}",
            f"{row['cpu_ms_per_image']:.2f}",
            f"{row['start_up_s']:.1f}",
        )
        cells += (f"{row['memory_mib']:.0f}, {row['memory_afterwards_mib']:.0f}", ratio)
        print(f"| {recipe} | {name} | {' | '.join(cells)} |")
    if arguments.json:
        rows = [{"recipe": recipe, "loader": name, **row} for (recipe, name), row in medians.items()]
        arguments.json.write_text(json.dumps({"machine": machine, "results": rows}, indent=2) + "\n")


def _cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
