"""The guides are followed to the letter, command by command, on models that are small enough."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from images import photographs
from PIL import Image
from sklearn.datasets import load_digits

import sit_jax
from sit_jax.cli import app as cli

ROOT = pathlib.Path.cwd()
SIZES = {"dim": 16, "depth": 4, "num_heads": 2}
SHORT = ["--config.epochs=1", "--config.teacher.epochs=1", "--config.batch_size=32", "--config.teacher.batch_size=32"]
STEADY = ["--config.optim.warmup_epochs=0", "--config.teacher.optim.warmup_epochs=0", "--config.eval_batch_size=32"]
SMALL = [f"--config.{of}.{name}={size}" for of in ("model", "teacher.model") for name, size in SIZES.items()]
DIGITS = ["--config.data.train_split=train[:64]", "--config.data.eval_split=test[:32]"]


def small_digits(digits_dir: str) -> list[str]:
    blocks = ["--config.model.stage_blocks=(1,1,2)", f"--config.data.data_dir={digits_dir}"]
    return [*SHORT, *STEADY, *SMALL, *DIGITS, *blocks]


def follow(
    page: str, extra: list[str], verbs: tuple[str, ...] = (), first: int = 0, times: int = 99
) -> list[list[str]]:
    """Runs the commands of some of a page's shell blocks, in order; what takes long gets further words.

    With `verbs`, only commands of these that do not need ImageNet.
    """
    done = []
    quick = ["--seconds=0.1"]
    tune = [*quick, "--between=0"]
    further = {"train": extra, "show": ["--config.batch_size=8"], "benchmark": [*quick, "--rounds=1"], "tune": tune}
    text = (ROOT / "docs" / page).resolve().read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[first : first + times]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            imagenet = any("imagenet" in word or word == "runs/sit_tiny" for word in words)
            if not words or (verbs and (imagenet or words[0] != "sit" or words[1] not in verbs)):
                continue
            if words == ["make", "demo"]:
                recipe = re.search(r"^demo: .*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert recipe
                words = shlex.split(recipe[1].replace("$(WORKDIR)", "runs/digits"))
            assert words[0] == "sit", line
            verb = words[2] if words[1] == "data" else words[1]
            # The page's teacher is larger: half of this one's cost.
            more = ["--gmac=0.00016"] if "--before_training" in words else further.get(verb, [])
            assert cli.main([*words[1:], *more]) == 0, line
            done.append(words)
    return done


@pytest.fixture
def place(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, digits_dir: str) -> pathlib.Path:
    """An empty project's folder with the pages of configs/ in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    pathlib.Path("configs").symlink_to(ROOT / "configs")
    return tmp_path


@pytest.mark.slow
def test_quick_start(place: pathlib.Path, digits_dir: str) -> None:
    pathlib.Path("images").mkdir()
    for index, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 15).astype("uint8")).resize((64, 64)).save(f"images/{index}.jpg")
    done = follow("quickstart.md", small_digits(digits_dir))
    assert len(done) == 8
    summary = json.loads(pathlib.Path("runs/digits/summary.json").read_text())
    assert {"student", "teacher", "kept_accuracy"} <= set(summary)
    table = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "docs/quickstart.md").read_text(), re.MULTILINE)
    assert len(table) >= 7
    assert all((pathlib.Path("runs/digits") / name).exists() for name in table)
    # The page about reports goes on from there, and compares with another run.
    shutil.copytree("runs/digits", "runs/sharp")
    assert len(follow("report.md", [])) == 4
    assert pathlib.Path("both.html").exists()
    assert pathlib.Path("runs/digits/report.html").exists()
    # So do others: what is done with a trained run and its exported folder.
    pathlib.Path("models").mkdir()
    shutil.copytree("out/digits", "models/mine")
    shutil.copy("images/0.jpg", "image.jpg")
    Image.open("image.jpg").save("images/0.png")
    assert len(follow("visualize.md", [], ("visualize",), times=1)) == 4
    assert pathlib.Path("maps.npz").exists()
    # Random weights in the place of published ones.
    for name, model, layout in (
        ("deit_small_patch16_224", "deit_small", "timm"),
        ("lvvit_s", "lvvit_small", "original"),
    ):
        sit_jax.create_model(model).save(f"random/{model}")
        assert cli.main(["export", f"random/{model}", f"{name}.pth", "--format", layout]) == 0
    verbs = ("benchmark", "evaluate", "predict", "visualize", "report", "convert", "slim", "checkpoint", "models")
    assert len(follow("../README.md", [], verbs)) == 10
    assert len(follow("imagenet.md", [], ("convert",))) == 1


@pytest.mark.slow
def test_training(place: pathlib.Path, digits_dir: str) -> None:
    crops(2)
    verbs = ("models", "train", "evaluate", "checkpoint", "data", "plan")
    assert len(follow("training.md", small_digits(digits_dir), verbs)) == 13
    assert pathlib.Path("data/mine").is_dir()


@pytest.mark.slow
def test_choosing_a_speed(place: pathlib.Path, digits_dir: str) -> None:
    words = [word for word in small_digits(digits_dir) if "stage_blocks" not in word]
    assert len(follow("speed.md", [*words, "--config.model.stage_blocks=(1,1,1,1)"], times=3)) == 7
    (snippet,) = code("speed.md")
    exec(snippet)
    # The proposal has the sizes of its teacher.
    assert len(follow("speed.md", SHORT, times=1, first=3)) == 2
    assert sit_jax.load("runs/proposed").vit.is_slimmed


def crops(classes: int) -> None:
    """Images in folders, one for each class."""
    for name, photograph in list(photographs().items())[:classes]:
        for index in range(20):
            folder = pathlib.Path("images") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[index : index + 150, 3 * index : 3 * index + 150]).save(folder / f"{index}.jpg")


@pytest.mark.slow
def test_own_images(place: pathlib.Path) -> None:
    crops(2)
    small = [*SMALL, "--config.model.stage_blocks=(2,2)", "--config.batch_size=8", "--config.teacher.batch_size=8"]
    sizes = ["--config.model.image_size=64", "--config.teacher.model.image_size=64"]
    words = [*SHORT[:2], *STEADY, *small, *sizes, "--config.eval_batch_size=8"]
    assert len(follow("own_images.md", words, times=2)) == 4
    assert pathlib.Path("examples.png").exists()
    # The page's own ViT, which `sit convert` would have brought, with random weights and as narrow as the rest.
    text = (ROOT / "docs/own_images.md").read_text()
    (page,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    pathlib.Path("my_vit.py").write_text(page)
    sit_jax.create_model("deit_small", num_classes=2, image_size=64, **SIZES).save("models/deit_small")
    vit = [word for word in words if "stage_blocks" not in word] + ["--config.model.stage_blocks=(1,1,1,1)"]
    assert len(follow("own_images.md", vit, ("train",), first=2)) == 2


def code(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.slow
def test_an_own_reducer(place: pathlib.Path, digits_dir: str) -> None:
    pathlib.Path("attended.py").write_text(code("extend.md")[0])
    pathlib.Path("images").mkdir()
    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save("images/0.png")
    assert len(follow("extend.md", small_digits(digits_dir))) == 4
    assert pathlib.Path("out/attended.stablehlo").exists()


@pytest.mark.slow
def test_own_losses_and_sources_and_the_step_alone(place: pathlib.Path) -> None:
    small = f"""
import sit_jax
def small():
    config = sit_jax.get_config("digits")
    for model in (config.model, config.teacher.model):
        model.update({SIZES})
    config.model.stage_blocks = (1, 1, 2)
    config.optim.warmup_epochs = config.teacher.optim.warmup_epochs = 0.0
    config.log.every_steps, config.eval_batch_size = 1, 32
    return config
"""
    printed = []
    for program in (
        code("extend.md")[1],
        code("extend.md")[2] + "\nassert metrics['loss'] > 0 and int(state.step) == 3",
    ):
        short = program.replace('sit_jax.get_config("digits")', "small()").replace("epochs = 5", "epochs = 1")
        done = subprocess.run([sys.executable, "-c", small + short], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    lines = [line.split() for line in printed[0].splitlines() if len(line.split()) == 3]
    assert [words[:2] for words in lines[-3:]] == [["1", "train"], ["2", "train"], ["2", "eval"]]
    assert "confidence" in pathlib.Path("runs/stripes/metrics.jsonl").read_text().splitlines()[-2]
