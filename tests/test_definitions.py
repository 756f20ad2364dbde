"""Promise: Dagster holds documented assets in a row, jobs, schedules, and settings with types."""

from itertools import pairwise
from pathlib import Path

import dagster as dg
import pytest
import yaml
from conftest import ASSETS, quick_settings

from diffusemix_pipeline import tracking
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration.build import build_definitions
from diffusemix_pipeline.project import Project


@pytest.fixture
def definitions(project: Project) -> dg.Definitions:
    return build_definitions(project, quick_settings())


def test_the_assets_stand_in_a_row(definitions):
    graph = definitions.resolve_asset_graph()
    chain = ["source_images", *ASSETS]
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == set(chain)
    for before, after in pairwise(chain):
        parents = graph.get(dg.AssetKey(after)).parent_keys
        assert dg.AssetKey(before) in parents


@pytest.mark.parametrize("asset", ASSETS)
def test_every_asset_says_what_it_is_and_guarantees(asset, definitions):
    node = definitions.resolve_asset_graph().get(dg.AssetKey(asset))
    assert "Guarantees:" in node.description
    assert node.group_name == "diffusemix"  # one group: the graph opens unfolded
    assert node.kinds
    assert node.code_version
    assert node.tags["kept_by"] in ("dvc", "mlflow")


def test_the_assets_are_signed_with_who_answers_for_them(project):
    settings = quick_settings("owners=['team:vision', ann@example.org]")
    graph = build_definitions(project, settings).resolve_asset_graph()
    for asset in ASSETS:
        assert graph.get(dg.AssetKey(asset)).owners == ["team:vision", "ann@example.org"]


def test_the_schedule_asks_for_the_whole_job_once_a_week(definitions):
    schedule = definitions.resolve_schedule_def("retrain")
    assert schedule.cron_schedule == "0 4 * * 1"
    with dg.DagsterInstance.ephemeral() as instance:
        context = dg.build_schedule_context(instance=instance)
        requests = schedule.evaluate_tick(context).run_requests
    assert len(requests) == 1
    job = definitions.resolve_job_def(schedule.job_name)
    assert {node.name for node in job.nodes} >= set(ASSETS)


def test_a_run_may_last_as_long_as_dagster_yaml_says(definitions):
    file = Path(__file__).parent.parent / "dagster.yaml"
    asked = yaml.safe_load(file.read_text(encoding="utf-8"))["run_monitoring"]
    assert asked["enabled"]
    # MLflow's runs of so long ago are taken for dead: whoever changes one changes the other.
    assert asked["max_runtime_seconds"] == tracking._LONGEST_RUN_DAYS * 24 * 3600
    # The job's own would outrank it.
    assert dg.MAX_RUNTIME_SECONDS_TAG not in definitions.resolve_job_def("diffusemix").tags


def test_a_cron_that_is_none_is_named(project):
    with pytest.raises(UserError, match="retrain_cron: .*every monday"):
        build_definitions(project, quick_settings("retrain_cron=every monday"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"editing": {"stepz": 3}}, 'unexpected config entry "stepz"'),
        ({"editing": {"steps": "many"}}, 'Expected type "Int"|not valid for expected type "Int"'),
        ({"editing": {"sampler": "dpm"}}, "not in enum"),
        ({"mixing": {"masks": ["lef"]}}, "not in enum"),
    ],
)
def test_the_launchpad_refuses_unknown_keys_and_wrong_types(config, message, definitions):
    job = definitions.resolve_job_def("diffusemix")
    with pytest.raises(dg.DagsterInvalidConfigError, match=message):
        dg.validate_run_config(job, {"resources": {"settings": {"config": config}}})


def test_the_launchpad_starts_from_the_projects_settings(project):
    definitions = build_definitions(project, quick_settings("editing.steps=7"))
    resource = definitions.resolve_job_def("diffusemix").resource_defs["settings"]
    context = dg.build_init_resource_context(config={"mixing": {"lam": 0.5}})
    settings = resource(context)
    assert settings.editing.steps == 7
    assert settings.mixing.lam == 0.5


def test_ranges_are_refused_before_any_work(definitions, project):
    job = definitions.resolve_job_def("diffusemix")
    config = {"resources": {"settings": {"config": {"editing": {"steps": -1}}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.execute_in_process(run_config=config, instance=instance, raise_on_error=False)
    assert not result.success
    assert not project.data.exists()
