"""The life of data versions: which model was trained on which, and the way back to any of them.

A version is what DVC knows `data/` by. Each training run in MLflow holds its `data.dvc` and its
settings, so a version that git never saw is found too.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings, own_files
from diffusemix_pipeline.tracking import FinishedTraining, Run, open_tracking
from diffusemix_pipeline.versioning import committed_versions, digest_at, restore

DATA_TAG = "dvc.data"
_PIN, _SETTINGS, _DROPPED = "data.dvc", "settings.yaml", "dropped.txt"


class DataVersion(NamedTuple):
    """A version of `data/`: its digest, the commits that pin it, and what was trained on it."""

    digest: str
    commits: Sequence[str]
    trainings: Sequence[FinishedTraining]
    """Newest first."""


class KeptInputs(NamedTuple):
    """The files that a version's newest training kept: relative to the project's root."""

    settings: Path
    dropped: Path | None
    """What was dropped then, where other things are dropped now."""


def keep_inputs(run: Run, project: Project, settings: Settings) -> None:
    """Keep with a training run what is needed to come back to it."""
    run.log_bytes(_PIN, (project.root / "data.dvc").read_bytes())
    run.log_bytes(_DROPPED, _dropped(project))
    for name in own_files(settings):
        run.log_bytes(f"code/{Path(name).name}", Path(name).expanduser().read_bytes())
    kept = settings.model_dump(mode="json", exclude={"tracking"})
    kept["source"] |= {"path": "", "archives": ""}  # the images are those of the version
    run.log_bytes(_SETTINGS, yaml.safe_dump(kept, sort_keys=False).encode())


def history(project: Project, settings: Settings) -> list[DataVersion]:
    """List the versions that git or MLflow knows, those with the newest training first."""
    commits = committed_versions(project.root)
    trained: dict[str, list[FinishedTraining]] = defaultdict(list)
    for training in open_tracking(project, settings.tracking).trainings():
        trained[training.tags.get(DATA_TAG, "")].append(training)
    trained.pop("", None)
    digests = [*trained, *(digest for digest in commits if digest not in trained)]
    return [DataVersion(d, commits.get(d, []), trained.get(d, [])) for d in digests]


def checkout(project: Project, settings: Settings, wanted: str) -> tuple[str, KeptInputs | None]:
    """Bring a version back, by the start of its digest or by a commit that pins it.

    Returns its digest, and what its newest training kept, if it had one. Raises UserError for a
    version that is not known, and where neither cache nor remote has it.
    """
    digests = (wanted, digest_at(project.root, wanted) or wanted)
    known = history(project, settings)
    found = [version for version in known if version.digest.startswith(digests)]
    if len(found) != 1:
        what = "is not known" if not found else f"may be any of {len(found)}"
        raise UserError(f"The version {wanted} {what}: see `diffusemix data history`.")
    [version] = found
    if not version.trainings:
        restore(project.root, version.digest, commit=version.commits[0])
        return version.digest, None
    tracker = open_tracking(project, settings.tracking)
    run_id = version.trainings[0].run_id
    pin, made_by, dropped = (tracker.file_of(run_id, name) for name in (_PIN, _SETTINGS, _DROPPED))
    restore(project.root, version.digest, pin=pin)
    outputs, short = Path("outputs"), version.digest[:8]
    kept = outputs / f"settings-{short}.yaml"
    write_bytes(project.root / kept, made_by)
    dropped_then = outputs / f"dropped-{short}.txt"
    if dropped == _dropped(project):
        return version.digest, KeptInputs(kept, None)
    write_bytes(project.root / dropped_then, dropped)
    return version.digest, KeptInputs(kept, dropped_then)


def _dropped(project: Project) -> bytes:
    return project.dropped.read_bytes() if project.dropped.exists() else b""
