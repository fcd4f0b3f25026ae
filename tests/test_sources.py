"""The digits, folders and tfds data sets as sources, and `sit data prepare`."""

import collections
import dataclasses
import io
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
from typing import Any

import images
import malformed
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from PIL import Image
from sklearn.datasets import load_digits

from sit_jax.cli import app as cli
from sit_jax.config import LossConfig, ModelConfig
from sit_jax.data.config import DataConfig
from sit_jax.data.folder import FolderSource, find_images
from sit_jax.data.pipeline import Hosts, TrainData, eval_batches
from sit_jax.data.registry import open_source
from sit_jax.data.sources import Source, read_lines
from sit_jax.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight classes of twenty images, without splits."""
    root = tmp_path_factory.mktemp("images") / "flat"
    images.make_folder(root, 20, size=(24, 20))
    return root


def names(source: Any) -> set[str]:
    return {source[index].name for index in range(len(source))}


def pixels(source: Source) -> list[tuple[bytes, int]]:
    examples = (source[index] for index in range(len(source)))
    return [(np.asarray(Image.open(io.BytesIO(x.image))).tobytes(), x.label) for x in examples]


def test_digits_are_scikit_learns(digits_dir: str) -> None:
    train, test = (pixels(open_source(DataConfig(data_dir=digits_dir), split)) for split in ("train", "test"))
    digits = load_digits()
    expected = [
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    assert (len(train), len(test)) == (1438, 359)
    assert sorted(train + test) == sorted(expected)
    assert sorted(test) == sorted(expected[4::5])


def test_no_tensorflow_at_run_time(digits_dir: str) -> None:
    code = (
        "import sys; import sit_jax.data.map_fns; assert 'flax' not in sys.modules;"  # A loader process starts fast.
        "from sit_jax.data.registry import open_source; from sit_jax.data.config import DataConfig;"
        f"open_source(DataConfig(data_dir={digits_dir!r}), 'train')[0]; import sit_jax.training.loop;"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_and_sizes_that_do_not_exist(digits_dir: str) -> None:
    data = DataConfig(data_dir=digits_dir)
    assert len(open_source(data, "train[:10%]")) == 144
    with pytest.raises(UserError, match=r"'valid'.*train, test"):
        open_source(data, "valid")
    plain = ModelConfig(architecture=dataclasses.replace(tiny.TEACHER, num_classes=7))
    for key, changes in (
        ("batch_size", {"batch_size": 2000}),
        ("model.num_classes", {"model": plain, "loss": LossConfig(), "teacher": None}),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainData(tiny.config(data=data, **changes).inputs)
        assert caught.value.key == key
    with pytest.raises(ConfigError, match=r"sit data prepare --name cifar100 --data_dir"):
        open_source(DataConfig(name="cifar100", data_dir=digits_dir), "train")


def test_flat_folder_holds_out_a_fraction_of_every_class(flat: pathlib.Path) -> None:
    train, val = FolderSource(flat, "train", 0.1), FolderSource(flat, "val", 0.1)
    assert (len(train), len(val)) == (8 * 18, 8 * 2)
    assert len(names(train) | names(val)) == 160
    assert train.class_names == val.class_names == tuple(sorted(train.class_names))
    assert sorted(val[index].label for index in range(len(val))) == sorted(list(range(8)) * 2)
    example = train[0]
    assert pathlib.Path(example.name).read_bytes() == example.image
    assert pathlib.Path(example.name).parent.name == train.class_names[example.label]
    assert pickle.loads(pickle.dumps(train))[5] == train[5]
    assert len(FolderSource(flat, "test", 0.25)) == 8 * 5


def test_folder_with_splits_and_slices(tmp_path: pathlib.Path) -> None:
    images.make_folder(tmp_path, 10, "train", size=(24, 20))
    images.make_folder(tmp_path, 3, "valid", seed=1, size=(24, 20))
    deeper = tmp_path / "train" / "china" / "more"
    deeper.mkdir()
    (deeper / "x.PNG").write_bytes(malformed.PNG)
    (tmp_path / "train" / "china" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "china" / "._hidden.jpg").write_bytes(b"")
    train = FolderSource(tmp_path, "train")
    assert (len(train), len(FolderSource(tmp_path, "val"))) == (81, 24)
    assert [pathlib.Path(x).name for x in train.ignored] == ["._hidden.jpg", "notes.txt"]
    first, second = FolderSource(tmp_path, "train[:50%]"), FolderSource(tmp_path, "train[50%:]")
    assert len(first) + len(second) == 81
    assert not names(first) & names(second)
    counts = np.bincount([first[index].label for index in range(len(first))])
    assert counts.min() >= 4  # A part has something of every class.
    assert len(FolderSource(tmp_path, "train[:7]")) == 7


def test_unicode_forms_of_a_class_are_one(tmp_path: pathlib.Path) -> None:
    for folder in ("train/caf\u00e9", "val/cafe\u0301"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(malformed.PNG)
        (tmp_path / folder / "notes.txt").touch()
    val = FolderSource(tmp_path, "val")
    assert (len(val), val[0].label, len(val.ignored)) == (1, 0, 1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_files_may_have_a_byte_order_mark(encoding: str) -> None:
    encoded = io.BytesIO("caf\u00e9.png\r\nb.png\r\n".encode(encoding))
    assert find_images(["-"], read_lines(io.TextIOWrapper(encoded))) == ["caf\u00e9.png", "b.png"]


def test_folders_and_splits_that_cannot_be_a_data_set(flat: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "no_classes").mkdir()
    (tmp_path / "few" / "cat").mkdir(parents=True)
    (tmp_path / "few" / "cat" / "1.png").write_bytes(malformed.PNG)
    images.make_folder(tmp_path / "other", 1, "train", size=(8, 8))
    images.make_folder(tmp_path / "other", 1, "val", size=(8, 8))
    (tmp_path / "other" / "val" / "zebra").mkdir()
    for name, split, fact in (
        ("nowhere", "train", "data.data_dir: .*nowhere"),
        ("no_classes", "train", "data.data_dir: .*no_classes"),
        ("few", "val", r"data.val_fraction 0\.1"),
        ("other", "val", "data.data_dir: .*zebra"),
        (str(flat), "tst", "there are train, val"),
        (str(flat), "train[5", "not understood"),
        (str(flat), "train[:0]", "contains no images"),
    ):
        with pytest.raises(UserError, match=fact):
            FolderSource(tmp_path / name, split)
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig(name="folder"), "train")
    assert caught.value.key == "data.data_dir"


def plant(root: pathlib.Path, tree: str) -> None:
    """Makes `PATH*N` (a folder of N images), `PATH/` (an empty folder), `PATH` (a file) and `PATH->TARGET` (a link)."""
    for word in tree.split():
        path, _, target = word.partition("->")
        path, _, count = path.partition("*")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / path).symlink_to(target)
        elif count or path.endswith("/"):
            (root / path).mkdir(exist_ok=True)
            for index in range(int(count or 0)):
                (root / path / f"{index:02}.PNG").write_bytes(malformed.PNG)
        else:
            (root / path).write_bytes(malformed.PNG)


DIR = "data.data_dir"
ONE, AB = {"a": 1, "b": 1}, {"a": 2, "b": 2}
# What is in the folder, the images per class in train and in val (or the key of the error), and what the notes name.
LAYOUTS: dict[str, tuple[str, dict[str, int] | str, dict[str, int] | str, str]] = {
    "splits": ("train/a*2 train/b*2 val/a*1 val/b*1", AB, ONE, ""),
    "letter case": ("Train/a*2 Train/b*2 VAL/a*1 VAL/b*1", AB, ONE, "Train VAL"),
    "other names": ("training/a*2 training/b*2 Testing/b*1", AB, {"b": 1}, "training Testing"),
    "synonyms": ("train/a*2 train/b*2 valid/a*1 valid/b*1 test/a*3 test/b*3", AB, ONE, "test"),
    "val alone": ("val/a*1 val/b*1", DIR, ONE, "train"),
    "train alone": ("train/a*20 train/b*20", {"a": 18, "b": 18}, AB, "val_fraction"),
    "beside": ("train/a*2 train/b*2 val/a*2 val/b*2 bird*3", AB, AB, "bird"),
    "images outside of classes": ("train/a*2 train/b*2 train/x.jpg val/a*2 val/b*2 y.jpg", AB, AB, "x.jpg y.jpg"),
    "vehicles": (
        "car*20 train*20 test*20",
        dict.fromkeys(("car", "test", "train"), 18),
        dict.fromkeys(("car", "test", "train"), 2),
        "train test",
    ),
    "deeper": ("car*2 train*2 train/freight*1", {"car": 1, "train": 2}, {"car": 1, "train": 1}, "train"),
    "no classes": ("train*2 val*2", DIR, DIR, ""),
    "annotations": ("Train*2 Val*2 labels/x.xml", DIR, DIR, ""),
    "splits in classes": ("a/train*2 a/val*2 b/train*2 b/val*2", {"a": 3, "b": 3}, ONE, "a/train b/val"),
    "wrapped": ("SET/train/a*2 SET/train/b*2 SET/val/a*2 SET/val/b*2 .git/x", DIR, DIR, ""),
    "wrapped classes": ("SET/a*10 SET/b*10", {"SET": 18}, {"SET": 2}, "SET"),
    "images": ("1.jpg 2.jpg", DIR, DIR, ""),
    "archive": ("train.zip", DIR, DIR, ""),
    "system": ("a*3 b*3 @eaDir*2 __MACOSX/a*2 lost+found*1 $RECYCLE.BIN*1 .thumbnails*2", AB, ONE, "@eaDir lost+found"),
    "inside": ("a*3 b*3 a/@eaDir/0.PNG*3 a/.cache*3 b/._x.jpg b/Thumbs.db b/desktop.ini", AB, ONE, "a/@eaDir"),
    "system in val": ("train/a*2 train/b*2 train/@eaDir*1 val/a*2 val/b*2 val/@EADIR*1", AB, AB, "@eaDir @EADIR"),
    "links back": ("a*3 b*3 a/up->.. a/self->. b/sub/root->../.. c->.", AB, ONE, "a/up a/self b/sub/root c"),
    "links round": ("s/a*3 s/b*3 t*4 t/x->../s/a s/a/y->../../t", {"s": 9, "t": 6}, {"s": 1, "t": 1}, "t/x/y"),
    "links on": ("train/a*1 train/b*2 val/a*2 val/b*2 ../far*1 train/a/more->../../../far", AB, AB, ""),
    "linked": ("train/a->../more/a train/b->../more/b val/a*2 val/b*2 more/a*2 more/b*2", AB, AB, "more"),
    "dead link": ("a*3 b*3 c->nowhere", AB, ONE, "c"),
    "letter case differs": ("train/A*2 train/b*2 val/a*2 val/b*2", {"A": 2, "b": 2}, DIR, ""),
    "classes twice": ("Cat*3 cat*3", {"Cat": 2, "cat": 2}, {"Cat": 1, "cat": 1}, "Cat cat"),
    "few": ("a*3 b*20 c*1", {"a": 2, "b": 18, "c": 1}, {"a": 1, "b": 2}, "a c"),
    "one class": ("train/a*2 val/a*2", {"a": 2}, {"a": 2}, "a"),
    "empty": ("train/a*2 train/b*2 train/c/ val/a*2 val/b*2", AB, AB, "c"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(tmp_path: pathlib.Path, case: str) -> None:
    tree, *expected, named = LAYOUTS[case]
    plant(tmp_path / "images", tree)
    notes: list[str] = []
    for split, counts in zip(("train", "val"), expected, strict=True):
        if isinstance(counts, str):
            with pytest.raises(ConfigError) as caught:
                FolderSource(tmp_path / "images", split)
            assert caught.value.key == counts
            continue
        source = FolderSource(tmp_path / "images", split)
        found = collections.Counter(source.class_names[label] for _, label in source.files)
        assert found == counts
        notes += source.notes
    assert all("\n" not in note for note in notes)
    assert bool(notes) == bool(named)
    text = " ".join(notes).replace(str(tmp_path), "")
    assert [x for x in named.split() if not re.search(rf"(?<![\w/]){re.escape(x)}(?!\w)", text)] == []


def test_lone_train_folder_is_whole_if_the_run_evaluates_it(tmp_path: pathlib.Path) -> None:
    plant(tmp_path, "train/a*20 train/b*20")
    mine, other = (DataConfig(name="folder", data_dir=str(tmp_path), eval_split=x) for x in ("train[90%:]", "test"))
    assert [len(open_source(mine, x)) for x in ("train", "train[:90%]", "train[90%:]")] == [40, 36, 4]
    assert [len(open_source(other, x)) for x in ("train", "val")] == [36, 4]


def test_prepared_folder_is_the_same_data(flat: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    words = ["data", "prepare", "--from_folder", str(flat), "--name", "photos", "--data_dir", str(tmp_path)]
    assert cli.main(words) == 0
    assert "Prepared: " in capsys.readouterr().out
    for split in ("train", "val"):
        prepared = open_source(DataConfig(name="photos", data_dir=str(tmp_path)), split)
        plain = open_source(DataConfig(name="folder", data_dir=str(flat)), split)
        assert prepared.class_names == plain.class_names
        mine, theirs = (sorted((x[i].image, x[i].label) for i in range(len(x))) for x in (prepared, plain))
        assert mine == theirs
    assert cli.main(words) == 2
    assert "prepared already" in capsys.readouterr().err


def test_prepared_names_that_are_not_utf8(flat: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in (b"caf\xe8", b"caf\xe9"):
        shutil.copytree(flat / "coffee", tmp_path / "odd" / os.fsdecode(name) / os.fsdecode(name))
    words = ["--from_folder", str(tmp_path / "odd"), "--name", "odd", "--data_dir", str(tmp_path)]
    assert cli.main(["data", "prepare", *words]) == 0
    prepared = open_source(DataConfig(name="odd", data_dir=str(tmp_path)), "val")
    assert (list(prepared.class_names), len(prepared)) == ([r"caf\udce8", r"caf\udce9"], 4)


@pytest.mark.parametrize("what", ["digits", "photos"])
def test_full_disk_leaves_nothing_behind(flat: pathlib.Path, tmp_path: pathlib.Path, what: str) -> None:
    # Files of this process may not grow beyond 50 kB: the write itself fails, as it does on a full disk.
    source = ["--from_folder", str(flat)] if what == "photos" else []
    words = ["data", "prepare", *source, "--name", what, "--data_dir", str(tmp_path)]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    code = f"{limit}; from sit_jax.cli.app import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"sit data prepare: .*cannot be written: File too large$", done.stderr.strip())
    assert not list(tmp_path.rglob("dataset_info.json"))
    if what == "digits":
        assert len(open_source(DataConfig(data_dir=str(tmp_path)), "train")) == 1438  # Made anew, and whole.


# What ImageNet needs that a test's machine has not.
NOT_THERE = r"TensorFlow|ILSVRC2012_img_train\.tar"


def test_prepare_refusals(tmp_path: pathlib.Path, flat: pathlib.Path, capsys: Any) -> None:
    for args, facts in (
        (["--from_folder", str(flat)], ["--name"]),
        (["--name", "Big Name", "--from_folder", str(flat)], ["--name", "Big Name"]),
        (["--name", "no_such_set", "--data_dir", str(tmp_path)], ["data.name", "no_such_set"]),
        (["--name", "imagenet2012", "--data_dir", str(tmp_path), "--manual_dir", str(tmp_path)], [NOT_THERE]),
        (["--from_tfrecord", str(tmp_path / "x")], ["--from_tfrecord", "dataset_info.json"]),
        (["--name", "x", "--from_folder", str(tmp_path / "none")], ["none"]),
    ):
        assert cli.main(["data", "prepare", *args]) == 2
        *_, error = capsys.readouterr().err.splitlines()
        assert error.startswith("sit data prepare: ")
        assert all(re.search(fact, error) for fact in facts)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "prepare", "--name", "x", "--val_fraction", "2", "--from_folder", str(flat)])
    assert "--val_fraction" in capsys.readouterr().err


class ManyLabels(tfds.core.GeneratorBasedBuilder):
    """As ImageNet ReaL: several correct classes, one, or none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        label = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=8))
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "real_label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"validation": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for index, labels in enumerate(([3], [], [1, 5], [0, 2, 7])):
            yield index, {"image": io.BytesIO(malformed.JPEG), "real_label": labels}


def test_several_correct_classes(tmp_path: pathlib.Path) -> None:
    ManyLabels(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    data = DataConfig(name="many_labels", data_dir=str(tmp_path), train_split="validation")
    source = open_source(data, "validation")
    inputs = tiny.folder_config(data, batch_size=2, eval_batch_size=16).inputs
    with pytest.raises(ConfigError) as caught:
        TrainData(inputs, Hosts())
    assert caught.value.key == "data.name"
    (batch,) = eval_batches(inputs, source, Hosts())
    assert batch["mask"].sum() == 3
    labels = batch["label"][batch["mask"] > 0]
    assert sorted(row[row >= 0].tolist() for row in labels) == [[0, 2, 7], [1, 5], [3]]


def test_synthetic_images() -> None:
    source = open_source(DataConfig(name="synthetic/10"), "train[:100]")
    assert (len(source), len(source.class_names), source.multi_label) == (100, 10, False)
    assert (source[99].label, source[13].image) == (9, source[77].image)
    image = Image.open(io.BytesIO(source[0].image))
    assert (image.format, image.size, image.mode) == ("JPEG", (256, 256), "RGB")
    assert len(pickle.loads(pickle.dumps(source))) == 100
    for name, split in (("synthetic/0", "train"), ("synthetic", "train[5:]")):
        with pytest.raises(UserError, match=re.escape(name if "/" in name else split)):
            open_source(DataConfig(name=name), split)
