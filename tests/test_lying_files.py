"""Malformed files of weights: one clear line each, nothing run, nothing left behind."""

import io
import os
import pathlib
import resource
import sys
import zipfile
from collections.abc import Callable

import malformed
import numpy as np
import original_models
import pytest
import torch
from test_convert import PLAIN
from test_other_stems import torch_model

from sit_jax.cli import app as cli

WORDS = ["--model.num_heads=2"]
WEIGHTS = original_models.state_dict(PLAIN)


def refused(source: pathlib.Path, capsys: pytest.CaptureFixture[str], *facts: str) -> None:
    """Converts, and checks that one line names the file and the facts."""
    before = sorted(path.name for path in source.parent.iterdir())
    assert cli.main(["convert", str(source), str(source.parent / "out"), *WORDS]) == 2
    assert sorted(path.name for path in source.parent.iterdir()) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sit convert: {source}: ")
    assert len(line) < 1000
    for fact in facts:
        assert fact in line


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "npz"])
def test_files_of_other_kinds(suffix: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (start, word) in malformed.FOREIGN.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(start)
        refused(path, capsys, word)


def save_pickle(path: pathlib.Path, program: bytes) -> pathlib.Path:
    """A zip file as `torch.save` writes it, with a pickle and a storage of 16 bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (("data.pkl", program), ("version", b"3\n"), ("data/0", bytes(16))):
            archive.writestr(f"x/{name}", data)
    return path


@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("resnet.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}, ["conv1.weight, fc.b"]),
        ("empty.pth", {"epoch": 3}, ["its keys are epoch"]),
        ("list.pth", [torch.zeros(3)], ["but a list"]),
        ("numbers.pth", {10**600: 3}, ["its keys are 1000"]),
        ("nothing.pth", {"pos_embed": torch.zeros(0, 5)}, ["pos_embed", "empty"]),
        ("sparse.pth", {"pos_embed": torch.eye(3).to_sparse()}, ["pos_embed", "sparse"]),
        ("expanded.pth", {"pos_embed": torch.ones(1).expand(10**9)}, ["4,000,000,000 bytes"]),
        # The whole model, not its state dict: the line names the class, and says what to do.
        ("model.pth", torch_model(PLAIN), ["torch_model.SiT", "torch.save(model.state_dict(), PATH)"]),
    ],
)
def test_checkpoints_of_other_things(
    name: str, value: object, facts: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(value, tmp_path / name)
    refused(tmp_path / name, capsys, *facts)


def test_other_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    original_models.save_torch(tmp_path / "x.pth", WEIGHTS)
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    (tmp_path / "x.h5").write_bytes(b"\x89HDF")
    (tmp_path / "folder").mkdir()
    for name, fact in (
        ("page.pth", "web page"),
        ("packed.pth", "compressed"),
        ("x.h5", ".safetensors"),
        ("folder", "model.safetensors"),
        ("nowhere.pth", "no such file"),
    ):
        refused(tmp_path / name, capsys, fact)


class Malicious:
    """Makes a file when it is unpickled by anything that calls what a pickle names."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_does_not(
    legacy: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pth"
    value = {"state_dict": original_models.as_tensors(WEIGHTS), "args": Malicious(trace)}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    refused(path, capsys, "posix.system", "torch.save(model.state_dict(), PATH)")
    assert not trace.exists()
    # The file does what it seems to do.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        # Objects that stand for allowed classes cannot be made to do anything.
        b"\x80\x02cargparse\nNamespace\n)\x81}X\x09\x00\x00\x00__class__cos\nsystem\nsb.",
        b"\x80\x02cpathlib\nPosixPath.touch\nX\x05\x00\x00\x00TRACE\x85R.",
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",  # Nested 50,000 deep.
        b"\x80\x02X\xff\xff\xff\xffabc.",  # A text of four gigabytes.
    ],
)
def test_pickles_by_hand(
    program: bytes, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(save_pickle(tmp_path / "x.pth", program), capsys)
    (tmp_path / "x.pth").write_bytes(program)
    refused(tmp_path / "x.pth", capsys)
    assert not (tmp_path / "TRACE").exists()


def test_arrays_that_claim_more_than_the_file_has(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    for shape, content, fact in (
        ((2**30,), b"", "(1073741824,)"),
        ((2**25,), bytes(2**27), "bytes of tensors"),
        ((0, 2**62), b"", "empty"),
    ):
        array = io.BytesIO()
        np.lib.format.write_array_header_1_0(array, {"shape": shape, "fortran_order": False, "descr": "<f4"})
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("cls.npy", array.getvalue() + content)
        refused(path, capsys, fact)


@pytest.mark.parametrize(
    "name", ["tsm.0.x", "rtsm.0.mlp1.fc1.weight", "dist_token", "bn.num_batches_tracked", "head/else"]
)
def test_unknown_tensors_in_googles_files(
    name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {**original_models.google(PLAIN), name: np.ones((4, 3), np.float32)}
    original_models.save_npz(tmp_path / "x.npz", arrays)
    assert cli.main(["convert", str(tmp_path / "x.npz"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith(f"left over: {name}\n")


def test_objects_in_npz_files(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", cls=np.array([Malicious(tmp_path / "trace")], dtype=object))
    refused(tmp_path / "x.npz", capsys, "objects")
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    return original_models.save_torch(tmp_path / "x.pth", WEIGHTS)


@pytest.fixture
def folder(source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> pathlib.Path:
    """A model folder."""
    assert cli.main(["convert", str(source), str(tmp_path / "folder"), *WORDS]) == 0
    capsys.readouterr()
    return tmp_path / "folder"


def test_destinations(source: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(dest: pathlib.Path, *words: str) -> str:
        code = cli.main(["convert", str(source), str(dest), *WORDS, *words])
        error = capsys.readouterr().err
        assert code == (2 if error else 0)
        return error

    mine, folder, file = tmp_path / "mine", tmp_path / "deep" / "folder", tmp_path / "y.safetensors"
    for dest in (folder, file):
        assert convert(dest) == ""
        assert "--force" in convert(dest)
        before = dest.stat().st_mtime_ns
        assert convert(dest, "--force") == ""
        assert dest.stat().st_mtime_ns > before
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "model folder" in convert(mine, "--force")
    assert ".onnx" in convert(tmp_path / "x.onnx")
    assert "source" in convert(source, "--force")
    assert "cannot be written" in convert(source / "below" / "it")
    assert (mine / "thesis.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "deep", "y.safetensors", "mine"}


def test_a_destination_within_the_source(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for dest in (folder / "model.safetensors", folder / "new", folder / "deep" / "x.pth", tmp_path / "link" / "new"):
        assert cli.main(["convert", str(folder), str(dest), "--force"]) == 2
        assert f"{dest}: " in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_pytorch_on_a_full_disk(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dest = tmp_path / "new" / "x.pth"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        assert cli.main(["convert", str(folder), str(dest)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f"sit convert: {dest}: cannot be written: File too large\n"
    assert list(dest.parent.iterdir()) == []


def test_without_pytorch(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for source, dest in (("x.pth", "out"), ("folder", "out.pth")):
        words = WORDS if dest == "out" else []
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / dest), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert ".pth: " in line
        assert 'pip install "sit_jax[convert]"' in line
        assert not (tmp_path / dest).exists()
    original_models.save_npz(tmp_path / "x.npz", original_models.google(PLAIN))
    for source, dest in (("folder", "out.safetensors"), ("x.npz", "google")):
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / dest)]) == 0


def test_a_write_that_fails_leaves_the_old_one(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("shutil.copyfile", fails)
    assert cli.main(["convert", str(folder.with_name("x.pth")), str(folder), *WORDS, "--force"]) == 2
    assert "folder: cannot be written: No space left on device" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in folder.parent.iterdir()} == {"x.pth", "folder"}
