"""Damaged files of weights by the thousand: a reader returns weights or raises one clear error, within bounded time
and memory.

`SIT_JAX_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz_readers.py` goes on for longer.
"""

import contextlib
import dataclasses
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
from typing import Any, NamedTuple

import numpy as np
import original_models
import pytest
import safetensors.numpy
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import PLAIN

from sit_jax.errors import UserError
from sit_jax.io.load import read_weights
from sit_jax.models.architecture import Architecture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

EXAMPLES = int(os.environ.get("SIT_JAX_FUZZ_EXAMPLES", "40"))
SECONDS, MEMORY = 30, 2**30
ARCH = dataclasses.replace(tiny.STUDENT, in_channels=3, dim=8, depth=2, stage_blocks=(1, 1))
FIELDS = original_models.options(ARCH)


class TooSlowError(BaseException):
    """Reading took too long. Not an Exception, which a reader may take for an error in the file."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Limits the time, and the memory to a gigabyte more than this process has."""

    def hang(*_: object) -> None:
        raise TooSlowError(f"took more than {SECONDS} s")

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
    """Returns whether a file is read; all errors but a UserError of one line are raised."""
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


class Seed(NamedTuple):
    """A sound file: the part of it that is damaged, and how the file is made of that."""

    suffix: str
    part: bytes
    build: Callable[[bytes], bytes] = bytes


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seed]:
    folder, value = tmp_path_factory.mktemp("seeds"), original_models.state_dict(ARCH, rtsm=True)
    checkpoint = original_models.checkpoint(value)
    zipped = original_models.save_torch(folder / "x.pth", checkpoint).read_bytes()
    legacy = original_models.save_torch(folder / "y.pth", checkpoint, legacy=True).read_bytes()
    safe = safetensors.numpy.save(value)
    google = original_models.google(dataclasses.replace(PLAIN, dim=8, depth=1))
    npz = original_models.save_npz(folder / "x.npz", google).read_bytes()
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
NUMBERS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80\0\0\0\0", b"99999999999", b"-1", b"\0" * 8)
# Bytes that are put anywhere, near the start (headers, pickles) or near the end (a zip file's directory), and how many
# they replace: all that follow, to truncate the file.
EDITS = st.lists(
    st.tuples(
        st.tuples(st.sampled_from(["any", "start", "end"]), st.floats(0, 1)),
        st.sampled_from(NUMBERS) | st.binary(max_size=9),
        st.integers(0, 9) | st.sampled_from([200, 2**31]),
    ),
    min_size=1,
    max_size=5,
)


def damaged(data: bytes, edits: list[tuple[tuple[str, float], bytes, int]]) -> bytes:
    for (near, where), payload, replaced in edits:
        place = int({"any": where, "start": where**4, "end": 1 - where**4}[near] * len(data))
        data = data[:place] + payload + data[place + replaced :]
    return data


fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SIT_JAX_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, seeds: dict[str, Seed], tmp_path: pathlib.Path) -> None:
    seed = seeds[kind]
    path = tmp_path / f"x{seed.suffix}"
    path.write_bytes(seed.build(seed.part))
    assert answers(path)  # The file is read before it is damaged.

    @fuzz
    @given(EDITS)
    def check(edits: list[tuple[tuple[str, float], bytes, int]]) -> None:
        path.write_bytes(seed.build(damaged(seed.part, edits)))
        answers(path)

    check()


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
