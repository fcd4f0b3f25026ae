"""What the demo's guard hands on to Gradio, and what it refuses."""

import asyncio
import json
import pathlib
from typing import Any

import pytest

from sit_jax.demo.middleware import Guard


def guarded(
    path: str,
    body: Any = None,
    method: str = "POST",
    folder: Any = "/tmp/uploads",
    headers: dict[str, str] | None = None,
) -> int:
    """The status of a request: 200 where the guard hands it on."""
    statuses: list[int] = []
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parts = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if body is not None:
            assert (await receive())["body"] == raw
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    fields = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "path": path, "method": method, "headers": fields}
    asyncio.run(Guard(app, pathlib.Path(folder), max_bytes=1000)(scope, receive, send))
    return statuses[0]


def event(path: Any, url: Any = None) -> dict[str, Any]:
    return {"data": [{"path": path, "url": url, "meta": {"_type": "gradio.FileData"}}, "teacher"], "fn_index": 0}


def test_the_guard_lets_uploads_pass_only() -> None:
    join, here = "/gradio_api/queue/join", "http://127.0.0.1:7860/gradio_api/file=/tmp/uploads/x.png"
    assert guarded(join, event("/tmp/uploads/abc/x.png", here)) == 200
    assert guarded(join, {"data": [None, 3]}) == 200
    refused: list[Any] = ["/etc/passwd", "/tmp/uploads/../../etc/passwd", "x.png", "http://example.com/x.png", 3]
    for path in [*refused, "/tmp/uploads_of_others/x.png", "/tmp/up\0loads"]:
        assert guarded(join, event(path)) == 403, path
        assert guarded(join, {"data": {"deep": [[event(path)]]}}) == 403, path
    assert guarded(join, event("/tmp/uploads/x.png", "data:image/png;base64,AAAA")) == 403
    assert guarded(join, event("/tmp/uploads/x.png", "file:///etc/passwd")) == 403
    assert guarded(join, b"no json") == 403
    assert guarded(join, b'"' + b"a" * 2_000_000 + b'"') == 403
    assert guarded(join, b"[" * 100_000) == 403


@pytest.mark.parametrize("path", ["http://example.com/x", "/etc/passwd", "/tmp/uploads/../../etc/passwd", "", "x.png"])
@pytest.mark.parametrize("endpoint", ["file=", "file/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_other_files(path: str, endpoint: str, method: str) -> None:
    # Gradio fetches addresses after `file=`, and streams what they say.
    assert guarded(f"/gradio_api/{endpoint}{path}", method=method) == 403


@pytest.mark.parametrize(
    ("method", "paths", "status"),
    [
        ("GET", "/ /theme.css /assets/x.js /gradio_api/queue/data /gradio_api/heartbeat/x", 200),
        ("GET", "/gradio_api/file=/tmp/uploads/abc/x.png", 200),
        ("GET", "/docs /monitoring /gradio_api/info /gradio_api/proxy=http://example.com /gradio_api/queue/join", 403),
        ("POST", "/gradio_api/cancel", 200),
        ("POST", "/gradio_api/run/predict /gradio_api/queue/join/x /gradio_api/file=/tmp/uploads/x /login", 403),
        ("OPTIONS", "/", 403),
    ],
)
def test_no_other_endpoints(method: str, paths: str, status: int) -> None:
    for path in paths.split():
        assert guarded(path, {} if method == "POST" else None, method) == status, path


def test_the_guard_bounds_uploads(tmp_path: pathlib.Path) -> None:
    upload = "/gradio_api/upload"
    assert guarded(upload, folder=tmp_path) == 411
    assert guarded(upload, folder=tmp_path, headers={"content-length": "x"}) == 411
    assert guarded(upload, folder=tmp_path, headers={"content-length": "9", "transfer-encoding": "chunked"}) == 411
    assert guarded(upload, folder=tmp_path, headers={"content-length": "101001"}) == 413
    assert guarded(f"{upload}/", folder=tmp_path, headers={"content-length": "101001"}) == 413
    fits = {"content-length": "101000"}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.png").write_bytes(b"0" * 40_000)
    assert guarded(upload, folder=tmp_path, headers=fits) == 200
    (tmp_path / "y.png").write_bytes(b"0" * 20_000)
    assert guarded(upload, folder=tmp_path, headers=fits) == 507
