"""How a command's process behaves: what libraries may print, and which devices it takes."""

import ctypes
import io
import os
import pathlib
import sys
from typing import TYPE_CHECKING, TextIO

from sit_jax.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """A standard stream that is no terminal. A reader that closes its end, as `head` does, is no error."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self._is_stdout = stream is sys.stdout
        self.reader_gone = False

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Everything after this goes nowhere, what is still buffered included.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            self.reader_gone = isinstance(error, BrokenPipeError)
            if self._is_stdout and not self.reader_gone:
                raise UserError(f"standard output cannot be written: {error.strerror}") from None
        return memoryview(data).nbytes


def survive_closed_pipes() -> None:
    """Lets a command finish its work when the reader of its standard output or error closes the pipe.

    Progress that cannot be written ends no training. A standard output that cannot be written for another reason, such
    as a full disk, is a UserError.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Streams that a test or an embedding program has put there are left alone.
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__") or stream.isatty():
            continue
        by_line = stream.line_buffering or stream.write_through
        raw = io.BufferedWriter(_Output(stream))
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=by_line))


def reader_gone(stream: TextIO) -> bool:
    """Whether the reader of a stream of `survive_closed_pipes` has closed its end."""
    return bool(getattr(getattr(getattr(stream, "buffer", None), "raw", None), "reader_gone", False))


def set_log_levels() -> None:
    """Leaves only warnings of what libraries log."""
    from absl import logging

    logging.set_verbosity(logging.WARNING)


def force_cpu(devices: int = 1) -> None:
    """Restricts JAX to the CPU; must be called before JAX is initialized.

    Args:
        devices: Number of virtual devices.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)
    set_log_levels()


def enable_compilation_cache(folder: str = "") -> None:
    """Keeps compiled programs from one start to the next.

    Args:
        folder: Where; `none` keeps nothing. If empty, what the environment variable JAX_COMPILATION_CACHE_DIR says,
            else `sit_jax` in the user's folder for caches.

    Raises:
        UserError: The given folder cannot be written to.
    """
    import jax

    if "://" in folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        return
    if folder == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    name = "jax_compilation_cache_dir"
    if not folder and getattr(jax.config, name):
        return
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        path = pathlib.Path(folder or caches / "sit_jax").expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # The latter: there is no home.
        writable = False
    if writable:
        jax.config.update(name, str(path))
    elif folder:
        raise UserError(f"--compilation_cache: {folder} is no folder that can be written to; `none` goes without")


# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Lets this process keep the memory that it frees, where JAX computes on the CPU and the C library is glibc.

    A forward pass on CPU takes and frees hundreds of megabytes. glibc gives large pieces back to the system at once,
    which hands them out again page by page, zeroed: a tenth of the time at large batches.
    """
    import jax

    if jax.default_backend() != "cpu":
        return
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  Another C library has other numbers for these options.
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (AttributeError, OSError, TypeError):
        return
