"""Promise: the UI shows the pipeline, "Materialize all" runs it, and the report reads well."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ASSETS, quick_settings, runs, serving, wait_for
from playwright.sync_api import Page, expect

from diffusemix_pipeline.project import Project
from diffusemix_pipeline.tracking import open_tracking

pytestmark = [pytest.mark.slow, pytest.mark.browser]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A fresh clone of what is committed: its settings are the demo's."""
    clone = tmp_path_factory.mktemp("clone") / "diffusemix"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    return Project(clone)


@pytest.fixture
def page(browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


@pytest.mark.timeout(3000)  # the demo, beside other tests
def test_materialize_all_in_the_ui_does_what_the_command_does(project, page):
    with serving(project, "ui") as address:
        page.goto(f"{address}/asset-groups")
        for asset in ASSETS:
            expect(page.get_by_text(asset, exact=True).first).to_be_visible()
        page.get_by_role("button", name="Materialize all").click()
        wait_for(lambda: bool(runs(project)), seconds=120)  # or the page leaves before it has asked
        page.goto("about:blank")  # the running UI would take a good part of a core
        wait_for(lambda: any(run.is_finished for run in runs(project)), seconds=2400)
        assert (project.report / "report.json").exists()
        page.goto(f"{address}/assets/raw_dataset")
        expect(page.get_by_text("set_aside").first).to_be_visible()
        page.get_by_text("[Show Markdown]").first.click()
        expect(page.locator("img[src^='data:image/png']").first).to_be_visible()
        page.goto(f"{address}/assets/robustness_report")
        page.locator("tr", has_text="reliability").get_by_text("[Show Markdown]").click()
        expect(page.locator("img[src^='data:image/png']").first).to_be_visible()
        page.goto(f"{address}/assets/trained_classifier?view=checks")
        expect(page.get_by_text("weights_finite").first).to_be_visible()
        expect(page.get_by_text("Passed").first).to_be_visible()
        page.goto(f"{address}/assets/champion")
        expect(page.get_by_text("There was no champion").first).to_be_visible()
    again = subprocess.run(
        [sys.executable, "-m", "diffusemix_pipeline.cli", "run", "--preset", "demo"],
        cwd=project.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Nothing changed, nothing done" in again.stdout  # the UI has done what `make demo` does


def test_mlflow_shows_the_runs(project, page):
    with serving(project, "mlflow") as address:
        experiment = open_tracking(project, quick_settings().tracking).experiment_id
        page.goto(f"{address}/#/experiments/{experiment}/runs")
        for run in ("vanilla, seed 0", "diffusemix, seed 0"):
            expect(page.get_by_text(run).first).to_be_visible(timeout=60_000)


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "light"), (390, "dark")])
def test_the_report_fits_the_screen_and_asks_no_one(project, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((project.report / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.locator("img")
    assert images.count() > 3
    for index in range(images.count()):
        assert images.nth(index).get_attribute("alt")
        if images.nth(index).is_visible():
            assert images.nth(index).evaluate("image => image.naturalWidth") > 0
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert problems == []
    context.close()


def test_the_report_prints_all_of_itself(project, browser):
    width = 718  # of A4 less a usual margin, in px
    context = browser.new_context(viewport={"width": width, "height": 1000})
    page = context.new_page()
    page.goto((project.report / "index.html").as_uri())
    folded = page.locator("details > :not(summary)")
    assert folded.count() > 0
    assert not folded.first.is_visible()
    page.emulate_media(media="print")
    for part in folded.all():
        assert part.evaluate("part => part.getBoundingClientRect().height") > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for table in page.locator(".scroll").all():
        assert table.evaluate("table => table.scrollWidth - table.clientWidth") <= 1
    assert page.pdf(format="A4").startswith(b"%PDF")
    context.close()
