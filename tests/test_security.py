"""Promises: what others wrote is shown and never run, secrets stay out, pictures where allowed."""

import ast
import base64
import io
import os
import re
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import yaml
from conftest import ASSETS, quick_settings, serving, write_classes
from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from benchmarks import soak
from diffusemix_pipeline.datasets.manifest import read_stage
from diffusemix_pipeline.orchestration.launch import Outcome, run_here
from diffusemix_pipeline.orchestration.metadata import stage_sheet
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusemix_pipeline"
SECRET = "known-to-the-environment-alone"
SECRETS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "DAGSTER_TOKEN", "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
)  # fmt: skip
HOSTILE = '"><img src=x onerror=alert(1)>'
CLASSES = [HOSTILE, "[x](javascript:alert(2)) | `$a$"]
PROMPTS = [f"{HOSTILE} [x](javascript:alert(3))", "a | `b` ![y](x)"]


# What the manual says


def test_every_threat_names_tests_that_are_there():
    table = (ROOT / "docs" / "security.md").read_text("utf-8")
    named = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", table)
    assert len(named) > 20
    for file, test in named:
        functions = {
            node.name
            for node in ast.parse((ROOT / file).read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, f"{file} has no {test}"
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        assert "::test_" in row or "not ours" in row, row


# Our own code


UNPICKLE = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
}  # fmt: skip


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Give where a function is called, its dotted name, and its constant keywords."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                given = {
                    k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
                }
                named = {k.arg for k in node.keywords} - given.keys()
                keywords = {**given, **dict.fromkeys(named, ...)}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), keywords


def test_nothing_in_the_package_unpickles():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not UNPICKLE & {name.split(".")[0] for name in names}, path
    found = list(calls())
    assert any(name == "np.load" for _, name, _ in found)
    for where, name, given in found:
        last = name.rsplit(".", 1)[-1]
        assert last != "read_pickle", where
        assert given.get("allow_pickle") is not True, where
        assert name != "torch.load" or given.get("weights_only") is True, where
        assert name not in ("yaml.load", "yaml.unsafe_load", "eval"), where
        assert name != "exec" or where.startswith("own_code.py:"), where  # what a setting names


def test_code_of_a_hub_is_never_asked_for():
    loaded = [(w, g) for w, name, g in calls() if name.rsplit(".", 1)[-1] == "from_pretrained"]
    assert loaded
    for where, given in loaded:
        assert given.get("use_safetensors") is True, where
    for where, _, given in calls():
        assert not {"trust_remote_code", "custom_pipeline"} & given.keys(), where


def test_what_reaches_another_machine_is_known():
    doors = {
        "url_to_fs": "shared_edits.py",  # storage.edits
        "MlflowClient": "tracking.py",  # tracking.uri
        "urlopen": "automation.py",  # FAILURE_WEBHOOK_URL
        "DagsterGraphQLClient": "trigger.py",  # --url
        "download": "editor.py",  # editing.editor and its commit
        "hf_hub_download": "editor.py",  # editing.lora and its commit
        "download_url": "archives.py",  # published datasets, with their checksums
    }
    others = {"urlretrieve", "HTTPConnection", "HTTPSConnection", "create_connection", "Session"}
    found = {}
    for where, name, _ in calls():
        last = name.rsplit(".", 1)[-1]
        assert last not in others, where
        assert not re.match(r"(requests|httpx|boto3|aiohttp)\.|socket\.socket", name), where
        if last in doors:
            found.setdefault(last, set()).add(where.split(":")[0])
    assert found == {name: {file} for name, file in doors.items()}


# One run on a dataset of somebody else's, without pictures, with secrets in the environment


class Hostile(NamedTuple):
    """What came of a run, and which addresses it asked for."""

    project: Project
    settings: Settings
    outcome: Outcome
    asked: list[Any]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Hostile:
    """A project in which the pipeline ran on images with names that would run or break out."""
    root = tmp_path_factory.mktemp("hostile")
    source = marked(write_classes(root / "source", CLASSES, 12))
    (source / HOSTILE / "<svg onload=alert(4)>.png").write_text("no image")
    asked = quick_settings("editing.gate.enabled=true", "editing.gate.folds=2").model_dump()
    asked |= {"thumbnails": False, "training": {**asked["training"], "steps": 20}}
    asked["source"] |= {"path": str(source), "val_fraction": 0.2, "test_fraction": 0.3}
    asked["source"]["train_per_class"] = None
    asked["editing"]["prompts"] = PROMPTS
    asked["checks"]["gate_yield"] = 0
    settings = Settings.model_validate(asked)
    project = Project(root / "project")
    project.root.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        for name in SECRETS:
            environment.setenv(name, SECRET)
        environment.setenv("FAILURE_WEBHOOK_URL", f"http://127.0.0.1:9/{SECRET}")
        with calls_outside() as asked:
            outcome = run_here(project, settings, silent)
    assert outcome.problems == []
    assert outcome.success
    assert sorted(path.name for path in root.iterdir()) == ["project", "source"]
    return Hostile(project, settings, outcome, asked)


@contextmanager
def calls_outside() -> Iterator[list[Any]]:
    """Collect the addresses other than this machine's that the process asks for meanwhile."""
    found: list[Any] = []
    listening = [True]

    def hear(event: str, given: tuple[Any, ...]) -> None:
        if not listening or event not in ("socket.connect", "socket.getaddrinfo"):
            return
        host = given[1][0] if event == "socket.connect" and given[1:] else given[0]
        if not isinstance(host, str) or not re.match(r"127\.|::1$|localhost$|/", host):
            found.append((event, given[1:]))

    sys.addaudithook(hear)  # for good: Python takes none back
    yield found
    listening.clear()


MARK = (255, 0, 255)  # of no plot


def marked(source: Path) -> Path:
    for path in source.rglob("*.png"):
        image = Image.open(path).convert("RGB")
        image.paste(MARK, (8, 8, 24, 24))
        image.save(path)
    return source


def shows_an_image(png: bytes) -> bool:
    """Tell whether a picture holds what all images of the source hold, edited and mixed or not."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return bool((np.abs(pixels - MARK).max(axis=2) < 60).sum() > 20)


def whole(path: Path) -> bytes:
    """Return what a file holds; a database's values row by row, as its pages cut them."""
    if path.suffix != ".db":
        return path.read_bytes()
    with closing(sqlite3.connect(path)) as database:
        return "\n".join(database.iterdump()).encode()


def pictures_of(project: Project) -> dict[str, bytes]:
    """Return every picture in the report, in MLflow's files and in Dagster's database."""
    found = {}
    for top in (project.report, project.state / "mlflow", project.state / "dagster"):
        for path in top.rglob("*"):
            if not path.is_file():
                continue
            content, name = whole(path), str(path.relative_to(project.root))
            if content.startswith(b"\x89PNG"):
                found[name] = content
            for number, code in enumerate(re.findall(rb"image/png;base64,([\w+/=]+)", content)):
                found[f"{name} {number}"] = base64.b64decode(code)
    return found


@pytest.mark.slow
def test_without_thumbnails_no_picture_of_an_image_leaves_data(hostile):
    project, settings, outcome, _ = hostile
    allowed = settings.model_copy(update={"thumbnails": True})
    sheet = stage_sheet(read_stage(project.raw), "label", allowed)["contact_sheet"].value
    assert shows_an_image(base64.b64decode(sheet.split("base64,")[1].rstrip(")")))
    pictures = pictures_of(project)
    for place in ("outputs/report/fgsm.png", "outputs/report/index.html", "mlflow/", "dagster/"):
        assert any(place in name for name in pictures), place
    assert [name for name, png in pictures.items() if shows_an_image(png)] == []
    for shown in outcome.metadata.values():
        assert not {"contact_sheet", "stages", "audit"} & shown.keys()
    said = "No picture of an image is shown"
    for name in ("index.html", "report.md", "report.json"):
        assert said in (project.report / name).read_text("utf-8")


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_anywhere(hostile):
    project = hostile.project
    files = [path for path in project.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in whole(path)] == []


class Guard(BaseHTTPRequestHandler):
    """Passes on to a server what comes with the token, and refuses everything else."""

    server_address: str
    passed = refused = 0

    def pass_on(self) -> None:
        guard = type(self)
        if self.headers["Authorization"] != f"Bearer {SECRET}":
            guard.refused += 1
            self.send_error(401)
            return
        guard.passed += 1
        content = self.rfile.read(int(self.headers["Content-Length"] or 0)) or None
        kept = {name: self.headers[name] for name in ("Content-Type",) if self.headers[name]}
        url = self.server_address + self.path
        request = urllib.request.Request(url, content, kept, method=self.command)
        try:
            answer = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            body = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = pass_on  # noqa: N815


@pytest.mark.slow
def test_a_token_that_is_used_is_written_nowhere(tmp_path):
    server, project = soak.MlflowServer(tmp_path / "mlflow"), Project(tmp_path / "project")
    project.root.mkdir()
    guard = ThreadingHTTPServer(("127.0.0.1", 0), Guard)
    Guard.server_address = server.uri
    asked = quick_settings(f"tracking.uri=http://127.0.0.1:{guard.server_port}")
    (project.root / "diffusemix.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    Thread(target=guard.serve_forever, daemon=True).start()

    def run(**environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "diffusemix_pipeline.cli", "run"],
            cwd=project.root,
            env=os.environ | environment,
            capture_output=True,
            check=False,
        )

    try:
        server.start()
        wrong = run(MLFLOW_TRACKING_TOKEN=f"not {SECRET}")
        right = run(MLFLOW_TRACKING_TOKEN=SECRET)
    finally:
        server.kill()
        guard.shutdown()
    assert (wrong.returncode, right.returncode) == (2, 0), right.stderr
    assert Guard.refused and Guard.passed
    for printed in (wrong.stdout, wrong.stderr, right.stdout, right.stderr):
        assert SECRET.encode() not in printed
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("mlflow" in path.parts for path in files)
    assert [path for path in files if SECRET.encode() in whole(path)] == []


@pytest.mark.slow
def test_a_run_asks_no_other_machine(hostile):
    assert hostile.asked == []


@pytest.mark.slow
def test_the_markdown_of_a_hostile_dataset_holds_none_of_its_markup(hostile):
    project, _, outcome, _ = hostile
    texts = [(project.report / "report.md").read_text("utf-8")]
    for shown in outcome.metadata.values():
        texts += [v.value for v in shown.values() if type(v).__name__ == "MarkdownMetadataValue"]
    assert any("alert" in text for text in texts)
    for text in texts:
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        assert not re.search(r"<(script|svg|a|iframe)\b", page)
        assert not re.search(r'<img(?! src="data:image/png;base64,)', page)


def assert_harmless(page: Page) -> None:
    """Say that nothing of what names and prompts hold became a part of the page."""
    markup = "img[src='x'], img[src='y'], [onload], [onerror], a[href^='javascript']"
    assert page.locator(markup).count() == 0


@pytest.mark.slow
@pytest.mark.browser
def test_a_hostile_dataset_renders_harmlessly(hostile, browser: Browser):
    project = hostile.project
    page, ran, seen = browser.new_page(), [], 0
    page.set_default_timeout(60_000)
    page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
    page.goto((project.report / "index.html").as_uri())
    for name in CLASSES:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    assert_harmless(page)
    with serving(project, "ui") as address:
        for asset in ASSETS:
            page.goto(f"{address}/assets/{asset}")
            expect(page.get_by_text("Latest materialization")).to_be_visible(timeout=60_000)
            for shown in page.get_by_text("[Show Markdown]").all():
                shown.click()
                page.wait_for_timeout(500)
                if asset == "generated_images":
                    seen += page.locator("td", has_text=HOSTILE).count()
                assert_harmless(page)
                page.keyboard.press("Escape")
                page.wait_for_timeout(500)
            assert_harmless(page)
        assert seen  # in the table of what the gate let through
        page.goto("about:blank")
    with serving(project, "mlflow") as address:
        run = next((project.state / "mlflow").glob("*/artifacts/report")).parts[-3]
        for tab in ("", "/artifacts/report/index.html"):
            page.goto(f"{address}/#/experiments/1/runs/{run}{tab}")
            expect(page.get_by_text("seed 0").first).to_be_visible()
            page.wait_for_timeout(2000)
            assert_harmless(page)
    assert ran == []


# Who reaches the servers


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ui", "mlflow"])
def test_servers_listen_on_loopback_unless_told_otherwise_with_a_warning(command, tmp_path):
    for options, expected in (([], {"127.0.0.1"}), (["--host", "0.0.0.0"], {"0.0.0.0"})):
        project = Project(tmp_path / "-".join(["project", *options]))
        project.root.mkdir()
        with serving(project, command, *options) as address:
            heard = [
                c.laddr
                for c in psutil.net_connections("tcp")
                if c.status == psutil.CONN_LISTEN and c.pid and works_in(c.pid, project.root)
            ]
        port = int(address.rsplit(":", 1)[1])
        assert {place.ip for place in heard if place.port == port} == expected
        assert {place.ip for place in heard if place.port != port} <= {"127.0.0.1", "::1"}
        warned = "WARNING: 0.0.0.0 may be reached from other machines"
        said = (project.root / f"{command}.log").read_text()
        assert (warned in said) == bool(options)


def works_in(pid: int, folder: Path) -> bool:
    try:
        return psutil.Process(pid).cwd() == str(folder)
    except psutil.Error:
        return False
