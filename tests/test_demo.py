"""The demo: fewer tokens are the same tokens, the server gives away nothing, and the page works in a real browser."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import browser
import httpx
import jax
import numpy as np
import pytest
import random_weights
import tiny
from PIL import Image

import sit_jax
from sit_jax.cli import app as cli
from sit_jax.demo.middleware import Guard
from sit_jax.demo.models import keeps, open_demo_models
from sit_jax.models.architecture import Architecture
from sit_jax.visual.model_input import ModelInput

STUDENT = tiny.plain(image_size=64, stage_blocks=(1, 1, 2), keep_ratio=0.5)
SINGLE = tiny.plain(image_size=64, stage_blocks=(1, 3), kept_tokens=(16, 1))
NAMES = ["nothing", "one", "two", "three", "four", "five", "six", "seven", "eight", "<b>nine</b>"]


def test_the_numbers_of_tokens_follow_the_ratio() -> None:
    digits = Architecture(image_size=64, stem="conv4", dim=48, num_heads=3, stage_blocks=(1, 1, 1, 9), keep_ratio=0.5)
    assert list(keeps(digits)) == [
        "as trained: 8/4/2 tokens",
        "keep ratio 0.4: 6/2/1 tokens",
        "keep ratio 0.3: 4/1/1 tokens",
        "keep ratio 0.2: 3/1/1 tokens",
    ]
    assert keeps(SINGLE) == {"as trained: 1 token": (1,)}
    assert list(keeps(digits, fewer=False)) == ["as trained: 8/4/2 tokens"]
    by_counts = tiny.plain(image_size=64, stage_blocks=(2, 2), kept_tokens=(16, 10))
    assert keeps(by_counts)["80% per module: 8 tokens"] == (8,)
    elastic = dataclasses.replace(by_counts, kept_tokens=(), kept_tokens_choices=((16, 10), (16, 3)))
    assert keeps(elastic) == {"as trained: 10 tokens": (10,), "as trained: 3 tokens": (3,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    place = tmp_path_factory.mktemp("models")
    shapes = {"student": STUDENT, "single": SINGLE, "teacher": STUDENT.without_slimming()}
    for name, shape in shapes.items():
        weights = random_weights.draw(shape)
        dataclasses.replace(weights, metadata={**weights.metadata, "class_names": NAMES}).save(place / name)
    return {name: place / name for name in shapes}


@pytest.mark.parametrize(("reducer", "selectable"), [("topk", True), ("own_reducers:Weighted", False)])
def test_students_of_other_reducers(
    reducer: str, selectable: bool, folders: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    teacher = sit_jax.load(folders["teacher"])
    sit_jax.slim(teacher, keep_ratio=0.5, after=(1, 2), reducer=reducer).save(tmp_path / "student")
    student = open_demo_models([tmp_path / "student"], [folders["teacher"]]).students[str(tmp_path / "student")]
    assert (len(student.keeps) > 1) == selectable
    pixels = np.zeros((64, 64, 1), np.uint8)
    seen = ModelInput(pixels, pixels)
    for counts in student.keeps.values():
        assert [stage.kept for stage in student.maps(seen, counts).stages] == list(counts)


def test_classes_of_the_same_name_stay_apart(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    weights = random_weights.draw(STUDENT)
    names = ["crane", *NAMES[1:9], "crane"]
    dataclasses.replace(weights, metadata={**weights.metadata, "class_names": names}).save(tmp_path / "cranes")
    student = open_demo_models([tmp_path / "cranes"], [folders["teacher"]]).students[str(tmp_path / "cranes")]
    maps: Any = SimpleNamespace(probabilities=np.array([[0.6, *[0.0] * 8, 0.4]]))
    assert list(student.most_likely(maps).items())[:3] == [("crane (0)", 0.6), ("crane (9)", 0.4), ("one", 0.0)]


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ("--teacher TEACHER --host no.such.host.invalid", "--host: cannot listen on no.such.host.invalid"),
        ("--teacher TEACHER --host 192.0.2.1", "--host: cannot listen on 192.0.2.1"),
        ("--student TEACHER --teacher TEACHER", "--student: "),
        ("", "--teacher: "),
        ("--teacher TEACHER", 'pip install ".[demo]"'),
        ("--teacher TEACHER --port TAKEN", "--port: 127.0.0.1:TAKEN cannot be opened"),
    ],
)
def test_mistakes(
    words: str,
    fact: str,
    folders: dict[str, pathlib.Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # The server sets variables for Gradio.
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sit_jax.demo.page", raising=False)
    words = f"--student {folders['student']} --port {free_port()} {words}".replace("TEACHER", str(folders["teacher"]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", *words.replace("TAKEN", port).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fact.replace("TAKEN", port) in line


def test_a_runs_own_teacher_is_found(tmp_path: pathlib.Path) -> None:
    random_weights.draw(STUDENT).save(tmp_path / "run")
    random_weights.draw(STUDENT.without_slimming()).save(tmp_path / "run" / "teacher")
    assert list(open_demo_models([tmp_path / "run"], []).teachers) == [str(tmp_path / "run" / "teacher")]


def test_a_session_keeps_one_image(folders: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> None:
    page = pytest.importorskip("sit_jax.demo.page")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    models = open_demo_models([folders["student"]], [folders["teacher"]])
    (teacher,), (student,) = models.teachers.values(), models.students.values()
    _, _, _, kept, _, text, drawn, tokens = page.classify(str(tmp_path / "red.png"), teacher, student, None)
    assert "4 tokens after block 2" in text
    assert len(tokens) == 4
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(kept)) < 2 * drawn.nbytes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def serving(folders: dict[str, pathlib.Path], host: str, end: signal.Signals) -> Iterator[str]:
    """The address of a page with two students, which takes files of a megabyte; ended by a signal."""
    port = free_port()
    models = ["--student", folders["student"], "--student", folders["single"], "--teacher", folders["teacher"]]
    words = [sys.executable, "-m", "sit_jax", "demo", *map(str, models), "--port", str(port), "--max_mb", "1"]
    # Nobody answers at this proxy, and the folder is one that Gradio would give away.
    odd = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    odd |= {"NO_PROXY": "", "no_proxy": "", "GRADIO_ALLOWED_PATHS": os.getcwd()}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*words, "--host", host], stdout=pipe, stderr=subprocess.STDOUT, text=True, env={**os.environ, **odd}
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Open http"):
                break
        name = "localhost" if host == "0.0.0.0" else host
        assert said[-1:] == [f"Open http://{name}:{port} in a browser; Ctrl-C ends it\n"], said
        yield f"http://127.0.0.1:{port}"
        process.send_signal(end)
        rest = process.communicate(timeout=60)[0]
        assert "Traceback" not in rest, rest
        assert process.returncode == (143 if end == signal.SIGTERM else 0)


UPLOADS = pathlib.Path("/tmp/uploads")


def guarded(path: str, body: Any = None, method: str = "POST", folder: pathlib.Path = UPLOADS, **headers: str) -> int:
    """The status of a request: 200 where the middleware hands it on."""
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

    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": fields}
    asyncio.run(Guard(app, folder, max_bytes=1000)(scope, receive, send))
    return statuses[0]


def event(path: Any, url: Any = None) -> dict[str, Any]:
    return {"data": [{"path": path, "url": url, "meta": {"_type": "gradio.FileData"}}, "teacher"], "fn_index": 0}


def test_the_middleware_lets_uploads_pass_only() -> None:
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


@pytest.mark.parametrize(
    ("method", "paths", "status"),
    [
        ("GET", "/ /theme.css /assets/x.js /gradio_api/queue/data /gradio_api/heartbeat/x", 200),
        ("GET", "/gradio_api/file=/tmp/uploads/abc/x.png", 200),
        ("GET", "/docs /monitoring /gradio_api/info /gradio_api/proxy=http://example.com /gradio_api/queue/join", 403),
        ("POST", "/gradio_api/cancel", 200),
        ("POST", "/gradio_api/run/predict /gradio_api/queue/join/x /gradio_api/file=/tmp/uploads/x /login", 403),
        ("OPTIONS", "/", 403),
        # Gradio fetches addresses after `file=`, and streams what they say.
        ("GET", "/gradio_api/file=http://example.com/x /gradio_api/file/http://example.com/x /file=/etc/passwd", 403),
        ("HEAD", "/gradio_api/file=/tmp/uploads/../../etc/passwd /gradio_api/file= /gradio_api/file=x.png", 403),
    ],
)
def test_no_other_endpoints(method: str, paths: str, status: int) -> None:
    for path in paths.split():
        assert guarded(path, {} if method == "POST" else None, method) == status, path


def test_the_middleware_bounds_uploads(tmp_path: pathlib.Path) -> None:
    upload = "/gradio_api/upload"
    for path, status, headers in (
        (upload, 411, {}),
        (upload, 411, {"content_length": "x"}),
        (upload, 411, {"content_length": "9", "transfer_encoding": "chunked"}),
        (f"{upload}/", 413, {"content_length": "101001"}),
        (upload, 200, {"content_length": "101000"}),
    ):
        assert guarded(path, folder=tmp_path, **headers) == status, headers
    (tmp_path / "one").mkdir()
    for name, size, status in (("one/x.png", 40_000, 200), ("y.png", 20_000, 507)):
        (tmp_path / name).write_bytes(b"0" * size)
        assert guarded(upload, folder=tmp_path, content_length="101000") == status


@pytest.fixture(scope="module")
def served(folders: dict[str, pathlib.Path]) -> Iterator[str]:
    """The address of a page that lasts for several tests."""
    with serving(folders, "127.0.0.1", signal.SIGINT) as address:
        yield address


@pytest.mark.slow
def test_the_server_gives_away_nothing_and_leaves_no_uploads(folders: dict[str, pathlib.Path]) -> None:
    """The middleware is before Gradio's own endpoints and those of Starlette."""
    secret = pathlib.Path("pyproject.toml").resolve()
    with (
        serving(folders, "0.0.0.0", signal.SIGTERM) as address,
        httpx.Client(base_url=address, follow_redirects=False, trust_env=False) as client,
    ):
        assert client.get("/").status_code == 200
        for path in (f"gradio_api/file={secret}", f"file={secret}", "docs", "gradio_api/openapi.json", "monitoring"):
            assert client.get(f"/{path}").status_code == 403, path
        for folder in ("static", "assets", "svelte"):
            assert client.get(f"/{folder}/{secret}").status_code in (400, 403, 404, 405, 307, 308), folder
        event = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}], "session_hash": "x"}
        assert client.post("/gradio_api/queue/join", json={**event, "fn_index": 0}).status_code == 403
        many = [("files", (f"{index}.png", b"0" * 100_000)) for index in range(20)]
        assert client.post("/gradio_api/upload", files=many).status_code == 413
        (place,) = client.post("/gradio_api/upload", files={"files": ("../../x.png", b"0" * 1_000)}).json()
        assert re.fullmatch(r".*/sit_demo_[^/]+/[^/]+/[^/]*x\.png", place)
        assert client.get(f"/gradio_api/file={place}").status_code == 200
    assert not pathlib.Path(place).parents[1].exists()


# A stream of events that the page itself ends is a failed request to the browser.
ENDED = re.compile(r"http://127\.0\.0\.1:\d+/gradio_api/(queue/data|heartbeat|upload_progress).*ERR_ABORTED")


def drop(page: Any, path: pathlib.Path) -> None:
    page.wait_for_selector("#image input[type=file]", state="attached")
    page.set_input_files("#image input[type=file]", path)


@pytest.mark.slow
@pytest.mark.browser
def test_the_page(served: str, chromium: Any, tmp_path: pathlib.Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    with browser.visit(chromium, served) as seen:
        page = seen.page
        page.set_default_timeout(60_000)
        drop(page, tmp_path / "noise.png")
        page.wait_for_selector("#costs :text('times as fast')")
        assert re.search(r"teacher \d+\.\d\d ms, student \d+\.\d\d ms", page.inner_text("#costs"))
        for who in ("#teacher-says", "#student-says"):
            says = page.inner_text(who)
            assert sum(name in says for name in NAMES) == 5, says
            assert page.locator(f"{who} b").count() == 0  # Class names are text.
        maps: dict[int, str] = {}
        stages = ((2, "4 tokens after block 2", 4), (1, "8 tokens after block 1", 8), (0, "16 patches", 0))
        for stage, text, tokens in stages:
            page.locator("#stage input[type=range]").fill(str(stage))
            page.wait_for_selector(f"#text :text('{text}')")
            page.wait_for_function(f"document.querySelectorAll('#tokens .grid-container img').length == {tokens}")
            page.wait_for_function(
                f"!{json.dumps(list(maps.values()))}.includes(document.querySelector('#map img').src)"
            )
            maps[stage] = page.locator("#map img").get_attribute("src")
        assert len(set(maps.values())) == 3
        page.get_by_label("keep ratio 0.4: 6/2 tokens").check()
        page.wait_for_selector("#text :text('2 tokens after block 2')")
        # This one has no other number of tokens, and the page says why.
        page.locator("#student input").click()
        page.get_by_role("option").nth(1).click()
        page.wait_for_selector(":text('makes a single one')")
        page.wait_for_selector("#text :text('1 token after block 1')")
        assert page.locator("#keep").count() == 0 or not page.locator("#keep").is_visible()
        assert [error for error in seen.errors if not ENDED.match(error)] == []
        assert all(request.startswith(f"{served}/") for request in seen.requests)


@pytest.mark.slow
@pytest.mark.browser
def test_what_the_page_refuses(served: str, chromium: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "large.png").write_bytes(b"0" * 1_500_000)
    (tmp_path / "broken<b>.png").write_bytes(b"no image")
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")
    messages = {
        "large.png": "exceed the maximum allowed size of 1",
        "broken<b>.png": "cannot be read",
        "bomb.png": "has 8000 x 8000 pixels",
    }
    for name, message in messages.items():
        with browser.visit(chromium, served) as seen:
            seen.page.set_default_timeout(20_000)
            drop(seen.page, tmp_path / name)
            toast = seen.page.locator(".toast-wrap")
            toast.wait_for()
            assert message in toast.inner_text()
            assert toast.locator("b").count() == 0  # File names are text.
            assert all(request.startswith(f"{served}/") for request in seen.requests)
