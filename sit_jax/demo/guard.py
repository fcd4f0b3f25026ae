"""What of Gradio's server the page needs, and nothing more.

Gradio lets whoever calls its endpoints name files and addresses, which it then checks or fetches. The page names none
but what it uploaded itself.
"""

import json
import pathlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Endpoints of Gradio's clients, of its loader of other pages, and of what is not used here.
_CLOSED = ("run/", "api/", "call/", "proxy=", "stream/", "component_server", "deep_link", "runs", "run-history", "dev/")
_MAX_EVENT = 1_000_000


class Guard:
    """ASGI middleware: closes endpoints that the page does not use, and refuses events that name other files than
    uploaded ones.

    Args:
        app: The application behind it.
        uploads: Folder of uploaded files.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], uploads: pathlib.Path) -> None:
        self._app = app
        self._uploads = uploads.resolve()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hands a request on, or answers it with 403."""
        if scope["type"] == "http":
            path = scope["path"].lstrip("/").removeprefix("gradio_api/").lstrip("/")
            if path.startswith(_CLOSED):
                return await _refuse(send, "this page has no such endpoint")
            if scope["method"] == "POST" and path.startswith("queue/join"):
                body = await _read(receive)
                if body is None or not self._names_uploads_only(body):
                    return await _refuse(send, "events of this page name no files but uploaded ones")
                receive = _replay(body, receive)
        return await self._app(scope, receive, send)

    def _names_uploads_only(self, body: bytes) -> bool:
        try:
            entries = list(_entries(json.loads(body)))
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


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


async def _read(receive: Receive) -> bytes | None:
    """A request's body; None where it is too large for an event, or cut off."""
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


async def _refuse(send: Send, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
