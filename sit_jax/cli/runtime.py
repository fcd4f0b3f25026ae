"""Settings of the process that runs a command: output, devices, memory, compilation cache and `jax.distributed`."""

import argparse
import contextlib
import ctypes
import importlib.util
import io
import os
import pathlib
import sys
from typing import TYPE_CHECKING, TextIO

from sit_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """A standard stream. A closed pipe, as with `| head`, or a closed terminal is not an error."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._is_stdout = stream is sys.stdout
        self.reader_gone = False

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Discard all further output, including what is still buffered.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            self.reader_gone = isinstance(error, BrokenPipeError)
            if self._is_stdout and not self.reader_gone:
                raise UserError(f"standard output cannot be written: {error.strerror}") from None
        return memoryview(data).nbytes


def survive_closed_pipes() -> None:
    """Lets a command finish its work when its standard output or error is closed, at the start or by the reader.

    Progress that cannot be written does not stop training. If standard output cannot be written for another reason,
    such as a full disk, `write` raises UserError.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `print` would write to the other stream, and a new file would get its descriptor.
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
            continue
        # Keep streams that a test or an embedding program has set.
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        by_line = stream.line_buffering or stream.write_through
        raw = io.BufferedWriter(_Output(stream))
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=by_line))


def reader_gone(stream: TextIO) -> bool:
    """Whether the reader of a stream has closed the pipe; needs `survive_closed_pipes`."""
    return bool(getattr(getattr(getattr(stream, "buffer", None), "raw", None), "reader_gone", False))


def set_log_levels() -> None:
    """Hides log messages of libraries below the level of warnings, and one warning of a helper process."""
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    # Python's resource tracker removes the shared memory of loader processes that an interrupted command leaves, and
    # warns of it. It is a process of its own, which gets these options.
    option = "ignore:resource_tracker"
    if option not in sys.warnoptions:
        sys.warnoptions.append(option)


def is_about_devices(error: BaseException) -> bool:
    """Returns whether an error is that JAX cannot open the devices."""
    if str(error) or "jax" not in sys.modules:
        return "initialize backend" in str(error)
    # If JAX_PLATFORMS=cuda and there is no GPU, JAX fails each time with an assertion that has no text.
    try:
        return not sys.modules["jax"].devices()
    except AssertionError:
        return True


def force_cpu(devices: int = 1) -> None:
    """Restricts JAX to the CPU, with a number of virtual devices; must be called before JAX is initialized."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def join(arguments: argparse.Namespace) -> bool:
    """Joins the processes of `sit_jax.cli.verb.add_processes`; returns whether this one writes files and prints."""
    from sit_jax.parallel.distributed import Processes, initialize, is_process_0

    initialize(Processes(arguments.coordinator, arguments.num_processes, arguments.process_id))
    return is_process_0()


def enable_compilation_cache(folder: str = "") -> None:
    """Enables JAX's persistent compilation cache, in JAX_COMPILATION_CACHE_DIR or ~/.cache/sit_jax by default.

    `none` disables it. Raises a ConfigError if the given folder cannot be written to.
    """
    import jax

    option = "jax_compilation_cache_dir"
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
    elif "://" in folder:
        jax.config.update(option, folder)
    elif folder or not getattr(jax.config, option):
        caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        writable = False
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home.
            path = pathlib.Path(folder or caches / "sit_jax").expanduser().absolute()
            path.mkdir(parents=True, exist_ok=True)
            writable = os.access(path, os.W_OK | os.X_OK)
        if writable:
            jax.config.update(option, str(path))
        elif folder:
            raise ConfigError("--compilation_cache", f"{folder} is not a writable folder; `none` disables the cache")


# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Stops malloc from returning freed memory to the OS, on a machine without accelerator whose C library is glibc.

    On CPU, XLA allocates and frees hundreds of megabytes a step, also in its threads. glibc returns large blocks to the
    OS at once, and the OS zeroes every page when they are allocated again: a third of the time of a train step. Must be
    called before JAX is initialized, since threads keep the arena that they start with.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and (platforms or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  Other C libraries number these options differently.
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_ARENA_MAX, 1)
