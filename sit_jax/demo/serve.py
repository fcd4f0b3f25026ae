"""Opens the models, serves the page and waits."""

import os
import pathlib
import socket
import tempfile
from collections.abc import Sequence
from typing import Any

from sit_jax.demo.contestants import Contest, open_contest
from sit_jax.demo.guard import Guard
from sit_jax.errors import UserError

_PACKAGE = "gradio"


def serve(
    students: Sequence[pathlib.Path], teachers: Sequence[pathlib.Path], host: str, port: int, max_mb: int
) -> None:
    """Serves the page until it is interrupted.

    Args:
        students: Folders of slimmed models.
        teachers: Folders of what they are compared with; empty for the teachers that lie in the students' runs.
        host: Address to listen at.
        port: Port to listen at.
        max_mb: Largest file that the page takes, in megabytes.

    Raises:
        UserError: A model cannot be opened, Gradio is not installed, or the port is taken.
    """
    _check_port(host, port)
    contest = open_contest(students, teachers)
    with tempfile.TemporaryDirectory(prefix="sit_demo_") as folder:
        page = start(contest, pathlib.Path(folder), host, port, max_mb)
        print(f"Open http://{host}:{port} in a browser; Ctrl-C ends it", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)


def start(contest: Contest, folder: pathlib.Path, host: str, port: int, max_mb: int) -> Any:
    """Starts serving the page; returns Gradio's `Blocks`, whose `close` ends it.

    Args:
        contest: The models.
        folder: Where uploaded files and drawn pictures lie; the page reads nothing else.
        host: Address to listen at.
        port: Port to listen at.
        max_mb: Largest file that the page takes, in megabytes.

    Raises:
        UserError: Gradio is not installed.
    """
    # Read when Gradio is imported, and while it runs: it calls nobody, and keeps its files where they are cleaned up.
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_SHARE": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    try:
        from sit_jax.demo.page import SESSIONS, build_page, theme
    except ImportError as error:
        if not (error.name or "").startswith(_PACKAGE):
            raise
        raise UserError('sit demo needs Gradio, which is not installed: pip install "sit-jax[demo]"') from None
    from starlette.middleware import Middleware

    page = build_page(contest, max_mb)
    page.queue(api_open=False, max_size=32)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=max_mb * 2**20,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
        state_session_capacity=SESSIONS,
        theme=theme(),
        app_kwargs={
            "middleware": [Middleware(Guard, uploads=folder, max_bytes=max_mb * 2**20)],
            "openapi_url": None,
            "docs_url": None,
        },
    )
    return page


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UserError(f"--port: {host}:{port} cannot be opened: {error.strerror}; choose another one") from None
