"""Restricts Gradio's server, which reads files and URLs that its clients name, to what the page needs."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Endpoints that the page uses. All others are closed: Gradio has some forty more, and new versions add more.
_READ = {
    *("", "config", "theme.css", "robots.txt", "favicon.ico", "manifest.json", "startup-events"),
    *("queue/data", "upload_progress"),
}
_READ_BELOW = ("assets/", "static/", "svelte/", "heartbeat/")
_WRITTEN = {"upload", "queue/join", "cancel", "reset"}
_FILES = ("file=", "file/")
_MAX_EVENT = 1_000_000
# Extra bytes of a form in addition to its file, and the number of largest files that the folder may hold at a time.
_FORM, _MOST_UPLOADS = 100_000, 50


class Guard:
    """ASGI middleware that closes unused endpoints, limits uploads, and rejects requests that name other files.

    Only files in `uploads`, the folder of uploaded files and drawn images, may be named in a request.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], uploads: pathlib.Path, max_bytes: int) -> None:
        self._app = app
        self._uploads = uploads.resolve()
        self._max_bytes = max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forwards a request, or responds with 403, and for uploads 411 (no length), 413 (too large) or 507 (full)."""
        if scope["type"] == "http":
            path = scope["path"].lstrip("/").removeprefix("gradio_api/").lstrip("/")
            if path.startswith(_FILES) and not self._is_upload(path[len(_FILES[0]) :]):
                return await _refuse(send, 403, "this page has no files but uploaded ones")
            if not _is_open(scope["method"], path):
                return await _refuse(send, 403, "this page has no such endpoint")
            if scope["method"] == "POST" and path.rstrip("/") == "upload":
                refusal = await self._refuses_upload(dict(scope["headers"]))
                if refusal is not None:
                    # The rest is read and discarded: a client whose upload is cut off does not receive the response.
                    while (await receive()).get("more_body"):
                        pass
                    return await _refuse(send, *refusal)
            elif scope["method"] == "POST":
                body = await _read(receive)
                if body is None or not self._names_uploads_only(body):
                    return await _refuse(send, 403, "events of this page name no files but uploaded ones")
                receive = _replay(body, receive)
        return await self._app(scope, receive, send)

    async def _refuses_upload(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Returns status and reason, or None if the upload is allowed."""
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            return 411, "uploads must have a Content-Length"
        if int(length) > self._max_bytes + _FORM:
            return 413, f"uploads of this page have at most {self._max_bytes} bytes"
        if await asyncio.to_thread(_size, self._uploads) > _MOST_UPLOADS * self._max_bytes:
            return 507, "too many uploads are stored here; they are deleted within about an hour"
        return None

    def _names_uploads_only(self, body: bytes) -> bool:
        entries: list[tuple[str, Any]] = []  # All keys and values of JSON objects, on all levels.

        def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            entries.extend(pairs)
            return dict(pairs)

        try:
            json.loads(body, object_pairs_hook=collect)
        except (ValueError, RecursionError):
            return False
        paths = [value for key, value in entries if key == "path" and value is not None]
        urls = [value for key, value in entries if key == "url" and value is not None]
        local = all(isinstance(url, str) and url.startswith(("http://", "https://", "/")) for url in urls)
        return local and all(isinstance(path, str) and self._is_upload(path) for path in paths)

    def _is_upload(self, path: str) -> bool:
        try:
            return pathlib.Path(path).is_absolute() and pathlib.Path(path).resolve().is_relative_to(self._uploads)
        except (OSError, ValueError):
            return False


def _is_open(method: str, path: str) -> bool:
    bare = path.rstrip("/")
    if method == "POST":
        return bare in _WRITTEN
    return method in ("GET", "HEAD") and (bare in _READ or path.startswith((*_READ_BELOW, *_FILES)))


def _size(folder: pathlib.Path) -> int:
    """Returns the total size in bytes of the files in a folder, some of which may be deleted meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


async def _read(receive: Receive) -> bytes | None:
    """Reads a request's body; returns None if it is too large for an event, or incomplete."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > _MAX_EVENT:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": waiting.pop()} if waiting else await receive()

    return replay


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
