"""Damaged files of weights by the thousand: a reader answers with weights or with one clear error, soon and within
bounded memory.

`SIT_JAX_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz_readers.py` goes on for longer.
"""

import contextlib
import io
import json
import os
import pathlib
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import original_models
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sit_jax.errors import UserError
from sit_jax.io.convert.load_params import expected_shapes
from sit_jax.io.convert.sit_names import name_table
from sit_jax.io.load import read_weights
from sit_jax.models.architecture import Architecture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

EXAMPLES = int(os.environ.get("SIT_JAX_FUZZ_EXAMPLES", "40"))
SECONDS, MEMORY = 30, 2**30
ARCH = Architecture(
    image_size=32, num_classes=3, stem="conv4", dim=8, depth=2, num_heads=2, stage_blocks=(1, 1), keep_ratio=0.5
)
FIELDS = original_models.options(ARCH)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, and gives this process no more than a gigabyte besides what it has."""

    def hang(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def answers(path: pathlib.Path) -> bool:
    """Reads; whether the file was taken. Anything but a UserError of one line goes through."""
    problem = ""
    with bounded():
        try:
            weights = read_weights(path, FIELDS)
        except UserError as error:
            problem = str(error)
    if problem:
        assert problem.startswith((str(path), str(path.with_name("config.json"))))
        assert "\n" not in problem
        return False
    assert all(np.isfinite(value).all() for value in weights.params["norm"].values())
    return True


def _weights() -> dict[str, np.ndarray]:
    shapes, rng = flatten_dict(expected_shapes(ARCH, True)), np.random.default_rng(0)
    values = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()}
    return {entry.key: entry.to_torch(values[entry.path]) for entry in name_table(ARCH)}


def _rezipped(data: bytes, name: str, content: bytes) -> bytes:
    """A zip file with one entry's content replaced and its checksum right again."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, content if entry.filename == name else old.read(entry))
    return stream.getvalue()


def _entry(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


class Seed:
    """A sound file: the part of it that is damaged, and how the file is made of that."""

    def __init__(self, suffix: str, part: bytes, build: Callable[[bytes], bytes] = bytes) -> None:
        self.suffix, self.part, self.build = suffix, part, build


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    folder, value = tmp_path_factory.mktemp("seeds"), _weights()
    checkpoint = original_models.checkpoint(value)
    zipped = original_models.save_torch(folder / "x.pth", checkpoint).read_bytes()
    legacy = original_models.save_torch(folder / "y.pth", checkpoint, legacy=True).read_bytes()
    safe = safetensors.numpy.save(value)
    plain = Architecture(image_size=16, patch_size=8, num_classes=3, dim=8, depth=1, num_heads=2)
    original_models.save_npz(folder / "x.npz", original_models.google(plain))
    npz = (folder / "x.npz").read_bytes()
    length = 8 + struct.unpack("<Q", safe[:8])[0]
    return {
        "zip": Seed(".pth", zipped),
        "pickle in zip": Seed(".pth", _entry(zipped, "x/data.pkl"), lambda x: _rezipped(zipped, "x/data.pkl", x)),
        "legacy": Seed(".pth", legacy),
        "safetensors": Seed(".safetensors", safe),
        "header": Seed(".safetensors", safe[8:length], lambda x: struct.pack("<Q", len(x)) + x + safe[length:]),
        "npz": Seed(".npz", npz),
        "array in npz": Seed(".npz", _entry(npz, "cls.npy"), lambda x: _rezipped(npz, "cls.npy", x)),
    }


KINDS = ["zip", "pickle in zip", "legacy", "safetensors", "header", "npz", "array in npz"]
# Where damage falls: anywhere, near the start (headers, pickles), near the end (a zip file's directory).
PLACES = st.tuples(st.sampled_from(["any", "start", "end"]), st.floats(0, 1))
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "delete", "cut", "repeat", "number"]),
        PLACES,
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=5,
)
NUMBERS = (
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80\x00\x00\x00\x00",
    b"99999999999",
    b"-1",
    b"\x00" * 8,
)


def damaged(data: bytes, edits: list[tuple[str, tuple[str, float], bytes]]) -> bytes:
    for kind, (near, fraction), payload in edits:
        share = {"any": fraction, "start": fraction**4, "end": 1 - fraction**4}[near]
        place = int(share * len(data))
        if kind == "number":
            payload = NUMBERS[payload[0] % len(NUMBERS)]
        before, after = data[:place], data[place:]
        match kind:
            case "put" | "number":
                data = before + payload + after[len(payload) :]
            case "insert":
                data = before + payload + after
            case "delete":
                data = before + after[len(payload) :]
            case "cut":
                data = before
            case "repeat":
                data = before + after[:200] * 2 + after[200:]
    return data


fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SIT_JAX_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_taken(kind: str, seeds: dict[str, Seed], tmp_path: pathlib.Path) -> None:
    seed = seeds[kind]
    path = tmp_path / f"x{seed.suffix}"
    path.write_bytes(seed.build(seed.part))
    assert answers(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, seeds: dict[str, Seed], tmp_path: pathlib.Path) -> None:
    seed = seeds[kind]
    path = tmp_path / f"x{seed.suffix}"

    @fuzz
    @given(EDITS)
    def check(edits: list[tuple[str, tuple[str, float], bytes]]) -> None:
        path.write_bytes(seed.build(damaged(seed.part, edits)))
        answers(path)

    check()


GLOBALS = (
    "collections OrderedDict",
    "torch FloatStorage",
    "torch._utils _rebuild_tensor_v2",
    "argparse Namespace",
    "os system",
)
OPCODES: list[bytes] = [
    *(bytes([code]) for code in b"()[]}l0122tRbuasee.NQ\x81\x85\x86\x87\x88\x89\x8f\x90\x92\x93\x94ot"),
    *(f"c{name.replace(' ', chr(10))}\n".encode() for name in GLOBALS),
    *(b"q" + bytes([index]) for index in range(4)),
    *(b"h" + bytes([index]) for index in range(4)),
    *(b"X" + struct.pack("<I", len(text)) + text for text in (b"storage", b"0", b"cpu", b"pos_embed")),
    *(b"K" + bytes([number]) for number in (0, 1, 7, 255)),
    b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
    b"r\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 8,
    b"\x8b\xff\xff\xff\x7f",
    b"I123\n",
]


def test_random_programs(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"

    @fuzz
    @given(st.lists(st.sampled_from(OPCODES), max_size=60))
    def check(opcodes: list[bytes]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + b"".join(opcodes) + b".")
            archive.writestr("x/data/0", bytes(64))
        answers(path)

    check()


@pytest.mark.parametrize(
    "program",
    [
        # Tuples of tuples of tuples: hashing or printing the last would take for ever.
        b"(tq\x00" + b"h\x00h\x00\x86q\x00" * 200,
        b")q\x00" + b"h\x00h\x00\x86q\x000" * 200 + b"}h\x00K\x01s.",
        b"]q\x01" + b"h\x01h\x01a" * 10,
        b"(" * 100_000,
        b"]" * 50_000 + b"a" * 49_999,
        b"\x80\x02" + b"(tq\x00" + b"h\x00h\x00\x86q\x00" * 200 + b"h\x00h\x00\x93.",
        b"cargparse\nNamespace\n" + b"(tq\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"R.",
    ],
)
def test_programs_that_would_never_end(program: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program if program.endswith(b".") else program + b".")
    assert not answers(path)


@pytest.mark.parametrize("claim", [b"\x8e" + struct.pack("<Q", 2**40), b"B\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f"])
def test_values_longer_than_the_file(claim: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x04" + claim + b"abc.")
    assert not answers(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def test_any_config_beside_a_file(seeds: dict[str, Seed], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(seeds["safetensors"].part)
    names = [*Architecture.__dataclass_fields__, "format", "architecture", "model", "pretrained_cfg", "class_names"]

    @fuzz
    @given(st.dictionaries(st.sampled_from(names), JSON, max_size=4) | JSON, st.booleans())
    def check(value: Any, nested: bool) -> None:
        path.with_name("config.json").write_text(json.dumps({"architecture": value} if nested else value))
        answers(path)

    check()
