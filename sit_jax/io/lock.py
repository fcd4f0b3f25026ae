"""The lock of a run directory, so that two trainers do not write to it at the same time."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from sit_jax.errors import RunError
from sit_jax.io.runs import writing

LOCK = ".lock"


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a run directory, which is created if missing.

    The lock is one of the kernel, which releases it when the process ends, also by SIGKILL. Its file, `.lock`, remains;
    it has the host and the process id of the last trainer. Where files cannot be locked, such as on some mounted
    buckets, there is no lock.

    Raises:
        RunError: Another trainer has the lock, or the folder is a file or cannot be created.
    """
    if workdir.exists() and not workdir.is_dir():
        raise RunError(f"{workdir} is not a folder; choose another --workdir")
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Other errors: the folder is not writable, which is reported later, or its file system has no locks.
        with contextlib.suppress(OSError):
            file = stack.enter_context((workdir / LOCK).open("ab+", buffering=0))
            file.seek(0)
            owner, mine = file.read(), f"process {os.getpid()} on {socket.gethostname()}\n".encode()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                other = owner.decode(errors="replace").strip() or "another process"
                problem = f"{workdir} is in use by {other}, which trains in it; wait for it or choose another --workdir"
                raise RunError(problem) from None
            if owner != mine:
                file.truncate(0)
                file.write(mine)
        yield


def lock_holder(workdir: pathlib.Path) -> str | None:
    """Returns the process that holds the lock of a run directory, as `process 12 on host`; None if it is free."""
    with contextlib.suppress(OSError), (workdir / LOCK).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().decode(errors="replace").strip() or "another process"
    return None
