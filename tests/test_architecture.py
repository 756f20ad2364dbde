"""The house stays as designed: imports one way, a cheap start, a lock that names no index."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import dagster as dg
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusemix_pipeline"


def test_imports_run_one_way():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("dagster", ("orchestration/",)),
        ("mlflow", ("tracking.py",)),
        ("dvc", ("dvc_process.py",)),
    ],
)
def test_each_tool_has_one_room(library, home):
    imports = re.compile(rf"^\s*(import|from) {library}(_\w+)?\b", re.MULTILINE)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if imports.search(path.read_text(encoding="utf-8"))
    }
    assert found
    assert all(name.startswith(home) for name in found), found


def test_every_library_that_is_imported_is_declared():
    """What another library happens to bring may go with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    asked = [*project["dependencies"], *(name for extra in extras for name in extra)]
    declared = {re.match(r"[\w-]+", name)[0].lower().replace("_", "-") for name in asked}
    brought_by = packages_distributions()
    places = [PACKAGE, ROOT / "tests", ROOT / "benchmarks"]
    ours = {"diffusemix_pipeline", "benchmarks"} | {path.stem for path in places[1].glob("*.py")}
    missing = {
        name
        for place in places
        for path in place.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in imported(node) - ours - set(sys.stdlib_module_names)
        if not declared & {one.lower().replace("_", "-") for one in brought_by[name]}
    }
    assert not missing


def imported(node: ast.AST) -> set[str]:
    """Return the top-level modules that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return {node.module.split(".")[0]}
    return set()


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh Python holds after `statement`."""
    script = f"{statement}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_definitions_loads_nothing_heavy():
    loaded = loaded_by("import diffusemix_pipeline.definitions")
    assert "dagster" in loaded
    heavy = {"torch", "torchvision", "scipy", "diffusers", "transformers", "timm", "mlflow", "dvc"}
    heavy |= {"numpy", "pandas", "pyarrow", "PIL"}
    assert not loaded & heavy


def test_help_and_settings_load_neither_torch_nor_dagster():
    loaded = loaded_by("import diffusemix_pipeline.cli")
    assert not loaded & {"torch", "dagster", "mlflow", "dvc", "pandas"}


def test_printing_a_report_loads_no_torch(tmp_path):
    folder = tmp_path / "outputs" / "report"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("**What it says**")
    estimate = {"value": 0, "low": 0, "high": 0}
    measured = dict.fromkeys(("clean", "corrupted", "fgsm", "ece"), estimate)
    arm = {"arm": "vanilla", "corrupted_unshared": None, "difference": None, **measured}
    said = {"headline": "What it says", "versions": {}, "fgsm_epsilon": 2, "arms": [arm]}
    said["shared_families"] = {"left_out": []}
    (folder / "report.json").write_text(json.dumps(said))
    loaded = loaded_by(
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "from click.testing import CliRunner; from diffusemix_pipeline.cli import main\n"
        "assert CliRunner().invoke(main, ['report']).output == '**What it says**\\n'"
    )
    assert "pandas" in loaded
    assert not loaded & {"torch", "timm", "matplotlib", "dagster", "mlflow"}


def test_selection_strings_parse_beside_dvc():
    # DVC's usual dependencies hold antlr at a version under which this raises TypeError.
    assert dg.AssetSelection.from_string("*") == dg.AssetSelection.all()
    one_down = dg.AssetSelection.from_string("key:raw_dataset+1")
    assert "raw_dataset" in one_down.to_selection_str()


def test_torch_and_torchvision_are_of_one_build():
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert torchvision.ops.nms(boxes, torch.ones(1), 0.5).tolist() == [0]


def test_the_lock_pins_hashes_and_names_no_index():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in lock
    requirements = re.findall(r"^[a-z0-9][^\n]*==(?:.*\\\n)+.*$", lock, re.MULTILINE)
    assert len(requirements) > 100
    assert all("--hash=sha256:" in requirement for requirement in requirements)


def test_dagster_packages_are_one_set():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    versions = set(
        re.findall(r"^dagster(?:-webserver|-graphql|-pipes|-shared)?==(\S+)", lock, re.M)
    )
    assert len(versions) == 1


@pytest.mark.parametrize("name", ["dagster.yaml", "workspace.yaml"])
def test_the_packaged_dagster_files_are_those_of_the_top_level(name):
    assert (PACKAGE / "orchestration" / name).read_bytes() == (ROOT / name).read_bytes()


def test_every_module_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert path.read_text(encoding="utf-8").startswith('"""'), path


def test_each_fault_that_is_documented_has_its_test():
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`tests/(\w+)\.py::(\w+)`", page)
    table = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(named) >= len(table) - 1 > 10  # the first line is of titles
    for file, test in named:
        tests = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in tests, test


def test_the_walk_through_the_code_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 20
    for file, name in named:
        home = ROOT / "tests" if file.startswith("test_") else PACKAGE
        code = (home / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), (file, name)
