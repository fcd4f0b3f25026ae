"""What the demo's guard hands on to Gradio, and what it refuses."""

import asyncio
import json
import pathlib
from typing import Any

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


def test_the_guard_opens_what_the_page_needs_only() -> None:
    # Gradio fetches addresses that stand behind `file=`, and streams what they say.
    for path in ("http://example.com/x", "/etc/passwd", "/tmp/uploads/../../etc/passwd", "", "x.png", "/tmp/up\0loads"):
        for endpoint in ("file=", "file/"):
            assert guarded(f"/gradio_api/{endpoint}{path}", method="GET") == 403, (endpoint, path)
            assert guarded(f"/gradio_api/{endpoint}{path}", method="HEAD") == 403, (endpoint, path)
    assert guarded("/gradio_api/file=/tmp/uploads/abc/x.png", method="GET") == 200
    closed = "run/predict api/predict call/predict call/v2/x component_server stream/x process_recording vibe-edit/"
    closed += (
        " vibe-code undo-vibe-edit run-history/connect profiling/clear login queue/join/x uploads file=/tmp/uploads/x"
    )
    for path in closed.split():
        assert guarded(f"/gradio_api/{path}", {}) == 403, path
    closed = "info openapi.json proxy=http://example.com custom_component/a/b/c/d vibe-code runs dev/reload call/a/b"
    for path in [*closed.split(), "deep_link", "upload", "queue/join"]:
        assert guarded(f"/gradio_api/{path}", method="GET") == 403, path
    for path in ("monitoring", "monitoring/summary", "docs", "gradio_api/monitoring"):
        assert guarded(f"/{path}", method="GET") == 403, path
    assert guarded("/", method="OPTIONS") == 403
    for path in ("/", "/theme.css", "/assets/x.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/x"):
        assert guarded(path, method="GET") == 200, path
    assert guarded("/gradio_api/cancel", {"session_hash": "x"}) == 200


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
