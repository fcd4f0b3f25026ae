"""Files of weights that are not what they say: one clear line each, nothing run, nothing left behind."""

import io
import json
import os
import pathlib
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import golden_files
import numpy as np
import original_models
import pytest
import safetensors.numpy
import torch
from test_convert import PLAIN
from test_other_stems import torch_model

from sit_jax.cli import app as cli
from sit_jax.errors import UserError
from sit_jax.io.convert.state_dict import select_torch
from sit_jax.io.load import read_weights

ARCH = golden_files.architecture(golden_files.load("dist_token").meta["model"])
OPTIONS = original_models.options(ARCH)
WORDS = [f"--model.{key}={value}" for key, value in OPTIONS.items()]


def weights() -> dict[str, np.ndarray]:
    return original_models.golden_weights("dist_token")


def refused(source: pathlib.Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Converts, and returns the one line that says why not."""
    before = sorted(path.name for path in source.parent.iterdir())
    assert cli.main(["convert", str(source), str(source.parent / "out"), *WORDS, *words]) == 2
    assert sorted(path.name for path in source.parent.iterdir()) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"sit convert: {source}: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def save(path: pathlib.Path, value: dict[str, np.ndarray]) -> pathlib.Path:
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(value, path)
        return path
    return original_models.save_torch(path, value, legacy="legacy" in path.name)


def _without_one(value: dict[str, np.ndarray]) -> None:
    del value["blocks.1.mlp.fc2.bias"]


def _one_more(value: dict[str, np.ndarray]) -> None:
    value["blocks.1.extra"] = np.zeros(3, np.float32)


def _other_shape(value: dict[str, np.ndarray]) -> None:
    value["blocks.1.mlp.fc2.bias"] = np.zeros(3, np.float32)


def _transposed(value: dict[str, np.ndarray]) -> None:
    value["blocks.1.mlp.fc1.weight"] = np.ascontiguousarray(value["blocks.1.mlp.fc1.weight"].T)


def _nan(value: dict[str, np.ndarray]) -> None:
    value["norm.weight"] = value["norm.weight"].copy()
    value["norm.weight"][3] = np.nan


def _infinite(value: dict[str, np.ndarray]) -> None:
    value["norm.weight"] = value["norm.weight"].astype(np.float64) * 1e300


def _integers(value: dict[str, np.ndarray]) -> None:
    value["norm.weight"] = value["norm.weight"].astype(np.int64)


def _no_positions(value: dict[str, np.ndarray]) -> None:
    del value["pos_embed"]


def _two_things(value: dict[str, np.ndarray]) -> None:
    _without_one(value)
    _one_more(value)
    value["blocks.0.another"] = np.zeros(2, np.float32)


@pytest.mark.parametrize("name", ["x.pth", "legacy.pt", "x.safetensors"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_one, "missing: blocks.1.mlp.fc2.bias"),
        (_one_more, "left over: blocks.1.extra"),
        (_other_shape, "wrong shape: blocks.1.mlp.fc2.bias (3,), here it is ("),
        (_transposed, "wrong shape: blocks.1.mlp.fc1.weight ("),
        (_nan, "not finite: norm.weight"),
        (_infinite, "not finite: norm.weight"),
        (_integers, "not floating-point: norm.weight"),
        (_no_positions, "missing pos_embed, without which the model's size is not known"),
        (_two_things, "missing: blocks.1.mlp.fc2.bias; left over: blocks.0.another, blocks.1.extra"),
    ],
)
def test_tensors_that_do_not_fill_the_model(
    spoil: Callable[[dict[str, np.ndarray]], None],
    message: str,
    name: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = weights()
    spoil(value)
    assert message in refused(save(tmp_path / name, value), capsys)


@pytest.mark.parametrize("name", ["x.pth", "legacy.pth", "x.safetensors", "x.npz"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(name: str, keep: float, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    if name == "x.npz":
        original_models.save_npz(path, original_models.google(PLAIN))
    else:
        save(path, weights())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    line = refused(path, capsys)
    assert any(word in line for word in ("damaged", "cut off", "no whole", "no file that torch.save wrote"))


def test_files_of_other_things(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32), "fc.weight": np.zeros((10, 64), np.float32)}
    assert "no vision transformer of a known layout; it holds conv1.weight, fc.weight" in refused(
        save(tmp_path / "resnet.pth", resnet), capsys
    )
    assert "holds no weights; its keys are epoch" in refused(
        original_models.save_torch(tmp_path / "empty.pth", {"epoch": 3}), capsys
    )
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "holds no dictionary of weights, but a list" in refused(tmp_path / "list.pth", capsys)
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "is no file that torch.save wrote" in refused(tmp_path / "page.pth", capsys)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "none that torch.save wrote: it has no data.pkl" in refused(tmp_path / "other.pt", capsys)
    (tmp_path / "x.h5").write_bytes(b"\x89HDF")
    assert ".h5 is no kind of weights; there are .pth" in refused(tmp_path / "x.h5", capsys)
    (tmp_path / "folder").mkdir()
    assert "is neither a run nor a model folder" in refused(tmp_path / "folder", capsys)
    assert "there is no such file or folder" in refused(tmp_path / "nowhere.pth", capsys)


class Malicious:
    """Makes a file when it is unpickled by anything that calls what a pickle names."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_does_not(
    legacy: bool, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pth"
    value: Any = {"state_dict": original_models.as_tensors(weights()), "args": Malicious(trace)}
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    assert "would run code: it names posix.system" in refused(path, capsys)
    assert not trace.exists()
    # It is what it seems: whoever loads it without care runs it.
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'touch TRACE'\ntR.",
        b"(S'touch TRACE'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch TRACE'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch TRACE\x85R.",
        b'c__builtin__\neval\n(S\'open("TRACE", "w")\'\ntR.',
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        b"\x80\x02ccollections\nOrderedDict\n)R}S'__class__'\ncos\nsystem\nsb.",
        b"\x82\x01.",
    ],
)
def test_pickles_by_hand(program: bytes, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "x.pth"
    path.write_bytes(program.replace(b"TRACE", str(trace).encode()))
    line = refused(path, capsys)
    assert "would run code" in line or "no file that torch.save wrote" in line or "would run code: it names" in line
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program.replace(b"TRACE", str(trace).encode()))
    line = refused(path, capsys)
    assert "would run code" in line or "which no weights need" in line or "damaged" in line
    assert not trace.exists()


def test_whole_models_are_refused_with_what_to_do(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch_model(PLAIN), tmp_path / "x.pth")
    line = refused(tmp_path / "x.pth", capsys)
    assert "would run code: it names test_other_stems.TorchViT" in line
    assert "torch.save(model.state_dict(), PATH)" in line


def test_headers_that_claim_terabytes(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**43) + b"{}")
    assert "is no whole safetensors file" in refused(path, capsys)
    header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert "is no whole safetensors file" in refused(path, capsys)
    path = tmp_path / "x.npz"
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(array, {"shape": (2**30,), "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", array.getvalue())
    assert "claims shape (1073741824,), but its size is another one" in refused(path, capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", array.getvalue() + bytes(2**27))
    assert "which cannot be weights of this file's size" in refused(path, capsys)


def _tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], elements: int) -> bytes:
    """A pickled dictionary of one tensor, with whatever numbers."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, shape, strides, False, None)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"pos_embed": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "elements"),
    [((10**9,), (0,), 4), ((10**6, 10**6), (1, 0), 10**13), ((4,), (10**15,), 4), ((5,), (1,), 5), ((8,), (1,), 4)],
)
def test_tensors_beyond_their_storage(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    elements: int,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", _tensor_pickle(shape, strides, elements))
        archive.writestr("archive/data/0", bytes(16))
    assert "does not lie within its storage" in refused(tmp_path / "x.pth", capsys)


@pytest.mark.parametrize("shape", [(0, 2**62), (0, 10**30), (1, 0, 3), (10**5000,)])
def test_tensors_of_nothing(shape: tuple[int, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "pos_embed claims an axis that is empty or longer than 2,147,483,648"
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", _tensor_pickle(shape, (1,) * len(shape), 4))
        archive.writestr("archive/data/0", bytes(16))
    assert message in refused(tmp_path / "x.pth", capsys)
    (tmp_path / "x.pth").unlink()
    if len(shape) > 1:
        array = io.BytesIO()
        np.lib.format.write_array_header_1_0(array, {"shape": shape, "fortran_order": False, "descr": "<f4"})
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("pos_embed.npy", array.getvalue())
        assert message in refused(tmp_path / "x.npz", capsys)


def test_huge_strides_along_axes_of_one(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("archive/data.pkl", _tensor_pickle((1, 2, 1), (10**30, 2, 10**40), 4))
        archive.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
    (tensor,) = select_torch(tmp_path / "x.pth", ema=False, log=print).values()
    np.testing.assert_array_equal(tensor.read(), np.array([[[0], [2]]], np.float32))


@pytest.mark.parametrize("value", [3, torch.zeros(2)])
def test_keys_of_thousands_of_digits(value: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({10**5000: value}, tmp_path / "x.pth")
    assert "it holds 0x" in (line := refused(tmp_path / "x.pth", capsys)) or "its keys are 0x" in line
    assert len(line) < 500


@pytest.mark.parametrize(
    "stray",
    [
        *("tsm.0.x", "tsm.0.weight.3.weight", "rtsm.0.mlp1.fc1.weight", "patch_embed.conv1.weight", "aux_head.weight"),
        *("dist_token", "bn.num_batches_tracked", "Transformer/encoderblock_0/gamma", "head/else"),
    ],
)
@pytest.mark.parametrize("shape", [(3,), (4, 3), (8, 3, 7, 7)])
def test_strays_in_googles_files(
    stray: str, shape: tuple[int, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {**original_models.google(PLAIN), stray: np.ones(shape, np.float32)}
    original_models.save_npz(tmp_path / "x.npz", arrays)
    assert cli.main(["convert", str(tmp_path / "x.npz"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"the weights do not fill the model: left over: {stray}")


def test_tensors_on_top_of_one_another(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = torch.zeros(100_000)
    torch.save({f"blocks.{i}.norm1.weight": storage[i:] for i in range(50)}, tmp_path / "x.pth")
    assert "bytes of tensors, but cannot hold more than" in refused(tmp_path / "x.pth", capsys)


def test_big_endian_and_objects(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "x.pth", weights())
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert "was written by a big-endian machine" in refused(path, capsys)
    np.savez(tmp_path / "x.npz", cls=np.array([Malicious(tmp_path / "trace")], dtype=object))
    assert "holds Python objects, which would run code" in refused(tmp_path / "x.npz", capsys)
    assert not (tmp_path / "trace").exists()


def test_wrong_architecture_beside_the_file(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(save(tmp_path / "x.pth", weights())), str(tmp_path / "folder"), *WORDS]) == 0
    capsys.readouterr()
    path = tmp_path / "folder" / "config.json"
    values = json.loads(path.read_text())
    for key, value, message in (
        ("depth", 10**12, "depth: "),
        ("stem", "conv6", "model.stem: is given as 'conv6'"),
        ("num_head", 2, "num_head"),
        ("image_size", 480, "kept_tokens"),
        ("norm_eps", -1, "norm_eps: "),
    ):
        changed = {**values, "architecture": {**values["architecture"], key: value}}
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "folder")
    path.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        read_weights(tmp_path / "folder")


def test_destinations(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "x.pth", weights())
    command = ["convert", str(source), "DEST", *WORDS]

    def convert(dest: pathlib.Path, *words: str) -> str:
        code = cli.main([word.replace("DEST", str(dest)) for word in command] + list(words))
        error = capsys.readouterr().err
        assert code == (2 if error else 0)
        return error

    folder, file = tmp_path / "deep" / "folder", tmp_path / "y.safetensors"
    assert convert(folder) == convert(file) == ""
    for dest in (folder, file):
        assert "is there already; pass --force to replace it" in convert(dest)
        before = dest.stat().st_mtime_ns
        assert convert(dest, "--force") == ""
        assert dest.stat().st_mtime_ns > before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "is a folder, but no model folder" in convert(tmp_path / "mine", "--force")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert "cannot be a .onnx file" in convert(tmp_path / "x.onnx")
    assert "holds or belongs to the source" in convert(source, "--force")
    assert "cannot be written" in convert(source / "below" / "it")
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "deep", "y.safetensors", "mine"}
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json"}


def test_a_destination_within_the_source(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    assert cli.main(["convert", str(save(tmp_path / "x.pth", weights())), str(folder), *WORDS]) == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for dest in (folder / "model.safetensors", folder / "new", folder / "deep" / "x.pth", tmp_path / "link" / "new"):
        capsys.readouterr()
        assert cli.main(["convert", str(folder), str(dest), "--force"]) == 2
        assert f"{dest}: is, holds or belongs to the source" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("verb", [["convert"], ["export", "--format", "original"]])
def test_pytorch_on_a_full_disk(verb: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, dest = tmp_path / "folder", tmp_path / "new" / "x.pth"
    assert cli.main(["convert", str(save(tmp_path / "x.pth", weights())), str(folder), *WORDS]) == 0
    command = [verb[0], str(folder), str(dest), *verb[1:]]
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
        code = cli.main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"sit {verb[0]}: {dest}: cannot be written: File too large"
    assert list(dest.parent.iterdir()) == []
    assert cli.main([word.replace(str(dest), "/proc/x.pth") for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sit {verb[0]}: /proc/x.pth: cannot be written: ")


def test_without_pytorch(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [save(tmp_path / "x.pth", weights()), save(tmp_path / "legacy.pth", weights())]
    monkeypatch.setitem(sys.modules, "torch", None)
    for number, source in enumerate(sources):
        assert cli.main(["convert", str(source), str(tmp_path / f"out{number}"), *WORDS]) == 0
    assert cli.main(["convert", str(sources[0]), str(tmp_path / "out.pth"), *WORDS]) == 2
    assert "writing .pth files needs PyTorch: pip install torch, or write .safetensors" in capsys.readouterr().err


def test_interrupted_while_replacing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = save(tmp_path / "x.pth", weights()), tmp_path / "folder"
    assert cli.main(["convert", str(source), str(folder), *WORDS]) == 0
    old = (folder / "model.safetensors").read_bytes()
    replace = pathlib.Path.replace

    def interrupted(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if path.name.startswith(".folder.part"):
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", interrupted)
    assert cli.main(["convert", str(source), str(folder), *WORDS, "--force"]) == cli.INTERRUPTED
    assert (folder / "model.safetensors").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "folder"}


def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = save(tmp_path / "x.pth", weights()), tmp_path / "folder"
    assert cli.main(["convert", str(source), str(folder), *WORDS]) == 0
    old = (folder / "model.safetensors").read_bytes()

    def full(path: pathlib.Path, *_: object) -> None:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sit_jax.io.model.write_folder", full)
    assert cli.main(["convert", str(source), str(folder), *WORDS, "--force"]) == 2
    assert "folder: cannot be written: No space left on device" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"x.pth", "folder"}
