"""Joins training and evaluation to MLflow and DVC: what neither may know of the other.

A fit is known to MLflow by the tag that holds its fingerprint: a finished fit that has its run is
neither trained nor logged again, and a report is logged to the run of the model that it judges.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusemix_pipeline.datasets.manifest import Stage, class_names, read_stage
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.evaluation.audit import Audit, audit
from diffusemix_pipeline.evaluation.evidence import CODE_VERSION as EVIDENCE_VERSION
from diffusemix_pipeline.evaluation.evidence import Evidence, ask_and_keep, asked_of
from diffusemix_pipeline.evaluation.metrics import model_metrics
from diffusemix_pipeline.evaluation.published_corruptions import (
    corrupted_sets_version,
    read_corrupted_sets,
)
from diffusemix_pipeline.evaluation.readings import record_reads, version_of_test
from diffusemix_pipeline.evaluation.report import CODE_VERSION, ReportInputs, write_report
from diffusemix_pipeline.evaluation.written_report import (
    DOCUMENT,
    MARKDOWN,
    PAGE,
    Report,
    read_report,
)
from diffusemix_pipeline.files import write_json
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.orchestration.data_versions import DATA_TAG, keep_inputs
from diffusemix_pipeline.orchestration.metadata import stages_picture
from diffusemix_pipeline.pictures import learning_curves
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings, flatten
from diffusemix_pipeline.tracking import Dataset, LoggedRun, Run, Tracker, open_tracking
from diffusemix_pipeline.training.arms import (
    BASELINE,
    SUBJECTS,
    Fit,
    Wanted,
    all_fits,
    few_image_fits,
    finished_fit,
    fit_arm,
    fit_fingerprint,
    slug,
)
from diffusemix_pipeline.training.classifier import load_classifier
from diffusemix_pipeline.training.data import (
    LabelledImages,
    LoadImages,
    load_images,
    loading_once,
)
from diffusemix_pipeline.versioning import pinned_digest

FIT_TAG = "diffusemix.fit"
"""What MLflow knows a fit by."""


@dataclass(frozen=True)
class Trained:
    """The fits of all arms and seeds, where MLflow shows each, and whether all were there."""

    fits: list[Fit]
    run_urls: dict[str, str]
    reused: bool


@dataclass(frozen=True)
class Judged:
    """The report, its version (what was judged, on what, by which settings), and what it cost."""

    report: Report
    version: str
    reused: bool


def train_arms(
    project: Project, settings: Settings, dagster_run_id: str, progress: Progress
) -> Trained:
    """Train and log what is not there yet: one MLflow run an arm and seed."""
    tracker = open_tracking(project, settings.tracking)
    tracker.reconcile()
    stages = _stages_of(project)
    dataset = Dataset("fractal_augmented_dataset", "data", _data_digest(project))
    fits, urls, reused, load = [], {}, True, loading_once()
    for wanted in (*all_fits(settings), *few_image_fits(settings, stages["raw"])):
        fingerprint = fit_fingerprint(wanted, stages, settings)
        fit = finished_fit(project.checkpoints, fingerprint)
        logged = tracker.find_run(FIT_TAG, fingerprint)
        if fit is None or logged is None:
            reused = False
            tags = {
                FIT_TAG: fingerprint,
                "diffusemix.arm": wanted.arm,
                "diffusemix.seed": str(wanted.seed),
                "diffusemix.images_a_class": str(wanted.per_class or "all"),
                "dagster.run_id": dagster_run_id,
                DATA_TAG: dataset.digest,
            }
            with tracker.training_run(str(wanted), flatten(settings), dataset, tags) as run:
                fit, logged = _train_and_log(
                    wanted, run, project, settings, stages, load=load, progress=progress
                )
        fits.append(fit)
        urls[str(wanted)] = tracker.run_url(logged.run_id)
    if reused and tracker.find_run(DATA_TAG, dataset.digest) is None:
        # Nothing is learnt from what changed in the data; the version is to be found all the same.
        tags = {DATA_TAG: dataset.digest, "dagster.run_id": dagster_run_id}
        with tracker.training_run("nothing new to train", {}, dataset, tags) as run:
            keep_inputs(run, project, settings)
    return Trained(fits, urls, reused)


def _train_and_log(
    wanted: Wanted,
    run: Run,
    project: Project,
    settings: Settings,
    stages: Mapping[str, Stage],
    *,
    load: LoadImages,
    progress: Progress,
) -> tuple[Fit, LoggedRun]:
    """Train one arm and seed, and give MLflow its curve and its model; `load` as in `fit_arm`."""
    fit = fit_arm(
        wanted,
        stages,
        settings,
        checkpoints=project.checkpoints,
        fractal_cache=project.fractals,
        aside=project.aside,
        device=choose_device(settings.device),
        on_point=run.log_curve,
        progress=progress,
        load=load,
    )
    keep_inputs(run, project, settings)
    run.log_bytes("figures/learning_curve.png", learning_curves({str(wanted): fit.curve}))
    if wanted.per_class is not None:  # no model to be used
        return fit, LoggedRun(run.run_id, None, None)
    return fit, run.log_classifier(fit.folder, alias=slug(wanted.arm))


def judge(project: Project, settings: Settings, progress: Progress) -> Judged:
    """Judge every fit on the test images, each once in its life, and write the report.

    A report on the same fits, test images and settings is left as it is.
    """
    stages = _stages_of(project)
    raw = stages["raw"]
    fits = [_expected_fit(project, wanted, stages, settings) for wanted in all_fits(settings)]
    few = [
        _expected_fit(project, wanted, stages, settings) for wanted in few_image_fits(settings, raw)
    ]
    test = version_of_test(raw)
    clean = without_attacks(settings, corruptions=False)
    sets = corrupted_sets_version(settings.evaluation.corrupted_sets)
    keys = {fit.fingerprint: _evidence_key(fit, test, settings, sets) for fit in fits}
    keys |= {fit.fingerprint: _evidence_key(fit, test, clean, "") for fit in few}
    reads = record_reads(project.test_reads, test, keys.values())
    tracker = open_tracking(project, settings.tracking)
    runs = {fit.fingerprint: logged_run(tracker, fit) for fit in (*fits, *few)}
    versions = _versions(project, settings, stages, test, keys)
    logged = {"versions": versions, "runs": [tracker.uri, *(run.run_id for run in runs.values())]}
    there = _report_that_is_there(project)
    if there and there.versions == versions and _is_logged(project, logged):
        return Judged(there, digest(versions), reused=True)
    found = evidence_of(fits, keys, "test", project, raw, settings, progress)
    found |= evidence_of(few, keys, "test", project, raw, clean, progress)
    traced = _audited(project, fits, found, stages, settings, progress)
    inputs = _report_inputs(
        fits, few, found, stages, settings, audit=traced, test_reads=reads, versions=versions
    )
    report = write_report(inputs, project.report, aside=project.aside)
    for fit in (*fits, *few):
        base = inputs.evidence.get((BASELINE, fit.seed)) if fit.per_class is None else None
        metrics = model_metrics(found[fit.fingerprint], base, report.left_out)
        dataset = Dataset("test", "data/raw/test", test)
        tracker.log_evaluation(runs[fit.fingerprint], metrics, dataset, report.folder)
    write_json(_logged(project), logged)  # last: a run cut off before this logs again
    return Judged(report, digest(versions), reused=False)


def _versions(
    project: Project,
    settings: Settings,
    stages: Mapping[str, Stage],
    test: str,
    keys: Mapping[str, str],
) -> dict[str, str]:
    """Say what a report judges, on what, by which settings; `keys` of answers, by fit."""
    return {
        "data.dvc": _data_digest(project),
        "test": test,
        **{name: stage.version for name, stage in stages.items()},
        "fits": digest(list(keys)),
        "evidence": digest(sorted(keys.values())),
        "settings": digest(flatten(settings)),
        "report": CODE_VERSION,
    }


def _report_inputs(
    fits: Sequence[Fit],
    few: Sequence[Fit],
    found: Mapping[str, Evidence],
    stages: Mapping[str, Stage],
    settings: Settings,
    *,
    audit: Audit | None,
    test_reads: int,
    versions: Mapping[str, str],
) -> ReportInputs:
    """Gather what a report says of fits on all images and on `few`; `found` by fingerprint."""
    raw = stages["raw"]
    return ReportInputs(
        evidence={(fit.arm, fit.seed): found[fit.fingerprint] for fit in fits},
        classes=class_names(raw.counts),
        settings=settings,
        counts=raw.counts["by_split"],
        curves={(fit.arm, fit.seed): fit.curve for fit in fits},
        steps={fit.arm: fit.steps for fit in fits},
        few_images={
            (fit.arm, fit.per_class, fit.seed): found[fit.fingerprint]
            for fit in few
            if fit.per_class is not None
        },
        test_reads=test_reads,
        versions=versions,
        copies=raw.notes["copies_across_splits"],
        set_aside=raw.notes["set_aside"],
        audit=audit,
        stages=stages_picture(stages) if settings.thumbnails else None,
    )


def _report_that_is_there(project: Project) -> Report | None:
    """Return the report; None where it is not all there, or damaged: it is made anew."""
    if not all((project.report / name).exists() for name in (DOCUMENT, PAGE, MARKDOWN)):
        return None
    try:
        return read_report(project.report)
    except UserError:
        return None


def _logged(project: Project) -> Path:
    """The file that says which report MLflow has, and in which runs."""
    return project.state / "logged_report.json"


def _is_logged(project: Project, logged: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(_logged(project).read_text(encoding="utf-8")) == logged)
    except (FileNotFoundError, ValueError):  # damaged: it is logged again
        return False


def logged_run(tracker: Tracker, fit: Fit) -> LoggedRun:
    """Return the MLflow run of a fit; UserError where there is none."""
    run = tracker.find_run(FIT_TAG, fit.fingerprint)
    if run is None:
        raise UserError(
            f"MLflow has no run of the arm {fit.arm}, seed {fit.seed}: `diffusemix run` makes one."
        )
    return run


def _stages_of(project: Project) -> dict[str, Stage]:
    """Read all stages of the data, by name; UserError where one is not there."""
    folders = {
        "raw": project.raw,
        "generated": project.generated,
        "hybrid": project.hybrid,
        "augmented": project.augmented,
    }
    return {name: read_stage(folder) for name, folder in folders.items()}


def _data_digest(project: Project) -> str:
    pinned = pinned_digest(project.root)
    if pinned is None:
        raise UserError("data.dvc is not there: `diffusemix run` makes the dataset and pins it.")
    return pinned


def trained_fits(project: Project, settings: Settings) -> list[Fit]:
    """Return the fits of all arms and seeds on all images; UserError where one is not there."""
    stages = _stages_of(project)
    return [_expected_fit(project, wanted, stages, settings) for wanted in all_fits(settings)]


def _expected_fit(
    project: Project, wanted: Wanted, stages: dict[str, Stage], settings: Settings
) -> Fit:
    """Return what was trained; UserError where it was not."""
    fit = finished_fit(project.checkpoints, fit_fingerprint(wanted, stages, settings))
    if fit is None:
        raise UserError(
            f"The arm {wanted} is not trained with these data and settings: `diffusemix run` "
            "trains it."
        )
    return fit


def _evidence_key(fit: Fit, test: str, settings: Settings, sets: str) -> str:
    """Identify a fit's answers: by the versions of the test images, all that is done to them, and
    of the published sets."""
    asked = asked_of(settings.evaluation)
    return digest("test", EVIDENCE_VERSION, fit.fingerprint, test, asked, sets, settings.seed)


def test_evidence(project: Project, fit: Fit, raw: Stage, settings: Settings) -> Evidence:
    """Return what a fit answered on the test images; UserError where it was not asked."""
    sets = corrupted_sets_version(settings.evaluation.corrupted_sets)
    key = _evidence_key(fit, version_of_test(raw), settings, sets)
    if not (project.evidence / key).exists():
        raise UserError(
            f"The arm {fit.arm}, seed {fit.seed}, was not judged on the test images: "
            "`diffusemix run` judges it."
        )
    return Evidence.load(project.evidence / key)


def without_attacks(settings: Settings, *, corruptions: bool) -> Settings:
    """Return settings under which classifiers are asked about clean images, or corrupted too.

    No user may ask for so little: no strength of FGSM, and perhaps no corruption.
    """
    none: dict[str, Any] = {"fgsm_epsilons": [], "corrupted_sets": ""}
    none |= {"attack_epsilon": 1, "attack_images": 0, "autoattack_images": 0}
    none |= {} if corruptions else {"corruptions": [], "severities": [1]}
    evaluation = settings.evaluation.model_copy(update=none)
    return settings.model_copy(update={"evaluation": evaluation})


def evidence_of(
    fits: Sequence[Fit],
    keys: Mapping[str, str],
    split: str,
    project: Project,
    raw: Stage,
    settings: Settings,
    progress: Progress,
) -> dict[str, Evidence]:
    """Return the answers on a split's images by fit, asking those that have not answered yet.

    A fit is known by its fingerprint, its answers by `keys`.
    """
    folders = {fit.fingerprint: project.evidence / keys[fit.fingerprint] for fit in fits}
    silent = [fit for fit in fits if not folders[fit.fingerprint].exists()]
    if silent:
        images = load_images(
            [raw],
            split,
            class_names(raw.counts),
            settings.size,
            aside=project.aside,
            progress=progress,
        )
        for seed in sorted({fit.seed for fit in silent}):  # arms at once, as they share the images
            of_seed = [fit for fit in silent if fit.seed == seed]
            _ask(of_seed, folders, project, images, settings, progress)
    return {key: Evidence.load(folder) for key, folder in folders.items()}


def _ask(
    fits: Sequence[Fit],
    folders: Mapping[str, Path],
    project: Project,
    images: LabelledImages,
    settings: Settings,
    progress: Progress,
) -> None:
    """Ask some fits of one seed about a split's images, and keep what each answers in its folder.

    Both are by the fit's fingerprint.
    """
    device = choose_device(settings.device)
    classifiers = {fit.fingerprint: load_classifier(fit.folder, device) for fit in fits}
    classes = classifiers[fits[0].fingerprint].classes
    ask_and_keep(
        {name: classifier.model for name, classifier in classifiers.items()},
        {name: folders[name] for name in classifiers},
        images,
        settings.evaluation,
        settings.seed,
        device,
        aside=project.aside,
        sets=read_corrupted_sets(settings.evaluation.corrupted_sets, classes),
        progress=lambda what, done, total: progress(f"{what}, seed {fits[0].seed}", done, total),
    )


def _audited(
    project: Project,
    fits: Sequence[Fit],
    found: Mapping[str, Evidence],
    stages: Mapping[str, Stage],
    settings: Settings,
    progress: Progress,
) -> Audit | None:
    """Trace the wrong answers of the first fit of the report's subject; `found` by fingerprint."""
    subjects = [fit for subject in SUBJECTS for fit in fits if fit.arm == subject]
    if not subjects:
        return None
    fit = subjects[0]
    device, raw = choose_device(settings.device), stages["raw"]
    classifier = load_classifier(fit.folder, device)
    size, classes, aside = settings.size, classifier.classes, project.aside
    train, test = (
        load_images([raw], split, classes, size, aside=aside, progress=progress)
        for split in ("train", "test")
    )
    answers = found[fit.fingerprint].probabilities
    return audit(
        classifier,
        answers,
        test,
        train,
        raw,
        stages["augmented"],
        pictured=settings.thumbnails,
        device=device,
        progress=progress,
    )
