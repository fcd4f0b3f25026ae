"""Opens the models and serves the page."""

import os
import pathlib
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence

from sit_jax.demo.middleware import Guard
from sit_jax.demo.models import DemoModels, open_demo_models
from sit_jax.errors import UserError


def serve(
    students: Sequence[pathlib.Path],
    teachers: Sequence[pathlib.Path],
    images: Sequence[str],
    host: str,
    port: int,
    max_mb: int,
) -> None:
    """Serves the page until it is interrupted; see `open_demo_models`.

    Raises a UserError if a model cannot be opened, Gradio is not installed, the port is in use, or the page does not
    start.
    """
    _check_address(host, port)
    models = open_demo_models(students, teachers, images)
    # By default, SIGTERM ends the process at once, which would leave the uploaded files.
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="sit_demo_") as folder:
            _serve(models, pathlib.Path(folder), host, port, max_mb)
    finally:
        signal.signal(signal.SIGTERM, former)


def _serve(models: DemoModels, folder: pathlib.Path, host: str, port: int, max_mb: int) -> None:
    """Serves the page; `folder` has the uploaded files and drawn images, and the page reads no other files."""
    # Read when Gradio is imported and while it runs: it connects only to its own page, for which it would use the proxy
    # of the environment, and stores its files where they are cleaned up.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False", "GRADIO_TEMP_DIR": str(folder)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    try:
        from sit_jax.demo.page import SESSIONS, build_page, theme
    except ImportError as error:
        if not (error.name or "").startswith("gradio"):
            raise
        raise UserError('the page needs Gradio, which is not installed: pip install ".[demo]"') from None
    import httpx
    from starlette.middleware import Middleware

    page = build_page(models, max_mb)
    page.queue(api_open=False, max_size=32)
    guard = Middleware(Guard, uploads=folder, max_bytes=max_mb * 2**20)
    try:
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
            app_kwargs={"middleware": [guard], "openapi_url": None, "docs_url": None},
        )
    except (OSError, ValueError, httpx.HTTPError) as error:
        # In a message of several lines, the first states the error. Gradio's ValueError means that its own page does
        # not respond.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"Gradio cannot serve the page at {host}:{port}: {reason}") from error
    shown = "localhost" if host == "0.0.0.0" else host
    print(f"Open http://{shown}:{port} in a browser; Ctrl-C ends it", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    try:
        address = socket.getaddrinfo(host, 0, socket.AF_INET)[0][4]
        socket.create_server((str(address[0]), 0)).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "is not a name"
        meant = "give a name or an IPv4 address of this machine"
        raise UserError(f"--host: cannot listen on {host}: {reason}; {meant}") from None
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UserError(f"--port: {host}:{port} cannot be opened: {error.strerror}; choose another one") from None
