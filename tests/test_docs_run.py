"""The guides are followed to the letter, command by command, on models that are small enough."""

import json
import pathlib
import re
import shlex

import pytest
import random_weights
import tiny
from pictures import photographs
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax import cli
from sit_jax.export.command import export_model
from sit_jax.export.folder import save_folder

ROOT = pathlib.Path.cwd()
SIZES = {"dim": 16, "depth": 4, "num_heads": 2}
SHORT = ["--config.epochs=1", "--config.teacher.epochs=1", "--config.batch_size=32", "--config.teacher.batch_size=32"]
STEADY = ["--config.optim.warmup_epochs=0", "--config.teacher.optim.warmup_epochs=0", "--config.eval_batch_size=32"]
SMALL = [f"--config.{of}.{name}={size}" for of in ("model", "teacher.model") for name, size in SIZES.items()]
DIGITS = ["--config.data.train_split=train[:64]", "--config.data.eval_split=test[:32]"]


def follow(page: str, extra: list[str], skip: tuple[str, ...] = (), times: int = 99) -> list[list[str]]:
    """Runs the commands of a page's first shell blocks; training gets further words."""
    done = []
    text = (ROOT / "docs" / page).read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)[:times]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] in skip:
                continue
            if words == ["make", "demo"]:
                recipe = re.search(r"^demo: .*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert recipe
                words = shlex.split(recipe[1].replace("$(WORKDIR)", "runs/digits"))
            assert words[0] == "sit", line
            assert cli.main([*words[1:], *(extra if words[1] == "train" else [])]) == 0, line
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
    pathlib.Path("pictures").mkdir()
    for index, image in enumerate(load_digits().images[:3]):
        Image.fromarray((image * 15).astype("uint8")).resize((64, 64)).save(f"pictures/{index}.jpg")
    blocks = ["--config.model.stage_blocks=(1,1,2)", f"--config.data.data_dir={digits_dir}"]
    done = follow("quickstart.md", [*SHORT, *STEADY, *SMALL, *DIGITS, *blocks])
    assert len(done) == 8
    summary = json.loads(pathlib.Path("runs/digits/summary.json").read_text())
    assert {"student", "teacher", "kept_accuracy"} <= set(summary)
    table = re.findall(r"^\| `([\w./]+)` \|", (ROOT / "docs/quickstart.md").read_text(), re.MULTILINE)
    assert len(table) >= 7
    assert all((pathlib.Path("runs/digits") / name).exists() for name in table)


@pytest.mark.slow
def test_own_pictures(place: pathlib.Path) -> None:
    for name, photograph in list(photographs().items())[:2]:
        for index in range(20):
            folder = pathlib.Path("pictures") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[index : index + 150, 3 * index : 3 * index + 150]).save(folder / f"{index}.jpg")
    text = (ROOT / "docs/own_pictures.md").read_text()
    (page,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def get_config" in code]
    pathlib.Path("my_vit.py").write_text(page)
    # The ViT that was trained elsewhere: timm's layout, for the folder's two classes.
    shape = {**SIZES, "image_size": 64, "stem": "patch", "mlp_ratio": 4.0, "in_channels": 3, "num_classes": 2}
    save_folder(place / "trained", random_weights.draw(tiny.plain(**shape)))
    export_model(place / "trained", place / "deit_small_patch16_224.safetensors", "timm")
    pathlib.Path("deit_small_patch16_224.safetensors").rename("deit_small_patch16_224.pth")
    small = [*SMALL, "--config.model.stage_blocks=(2,2)", "--config.batch_size=8", "--config.teacher.batch_size=8"]
    sizes = ["--config.model.image_size=64", "--config.teacher.model.image_size=64"]
    done = follow("own_pictures.md", [*SHORT[:2], *STEADY, *small, *sizes, "--config.eval_batch_size=8"])
    assert len(done) == 7
    assert pathlib.Path("examples.png").exists()
