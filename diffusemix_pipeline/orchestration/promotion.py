"""Joins the promotion rule to the registry: the best new model against the champion.

What belongs here: who is challenger, asking both about the same val images, and recording the
decision on the model. What does not: the rule itself (evaluation/promotion.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffusemix_pipeline.datasets.manifest import Stage, class_names, read_stage
from diffusemix_pipeline.devices import choose_device
from diffusemix_pipeline.evaluation.evidence import CODE_VERSION as EVIDENCE_VERSION
from diffusemix_pipeline.evaluation.evidence import Evidence, ask_and_keep, asked_of
from diffusemix_pipeline.evaluation.promotion import Decision, InClasses, ValScore, decide, score
from diffusemix_pipeline.evaluation.readings import count_reads, version_of_test
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.orchestration.learning import (
    FIT_TAG,
    evidence_of,
    logged_run,
    test_evidence,
    trained_fits,
    without_attacks,
)
from diffusemix_pipeline.progress import Progress
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.settings import Settings
from diffusemix_pipeline.tracking import Registered, Tracker, open_tracking
from diffusemix_pipeline.training.data import load_images

CHALLENGER, CHAMPION = "challenger", "champion"
_REASON = "promotion.reason"


@dataclass(frozen=True)
class Promotion:
    """What was decided of the best new model, which is `version` in the registry."""

    model: str
    """Arm and seed of the challenger."""
    version: str
    champion: str
    """The version that is champion now."""
    score: ValScore
    champion_score: ValScore | None
    """What the champion before it reached on the same images; None without one."""
    test: Mapping[str, float]
    """The challenger's `clean` and `corrupted` on test, 0 to 1, which decided nothing."""
    test_reads: int
    """How often this version of the test images was read on this machine."""
    decision: Decision
    reused: bool
    """Whether just this was decided before."""


def promote(project: Project, settings: Settings, progress: Progress) -> Promotion:
    """Make the best new model challenger, and champion where the rule says so.

    The best has the highest mean of clean and corrupted val accuracy of all arms and seeds. The
    decision, its reason and the figures are noted on the challenger, whichever way it went.
    """
    raw, fits = read_stage(project.raw), trained_fits(project, settings)
    asked = without_attacks(settings, corruptions=True)
    keys = {fit.fingerprint: _val_key(fit.fingerprint, raw, asked) for fit in fits}
    found = evidence_of(fits, keys, "val", project, raw, asked, progress)
    scores = {fit.fingerprint: score(found[fit.fingerprint]) for fit in fits}
    best = max(fits, key=lambda fit: scores[fit.fingerprint].mean)
    new = scores[best.fingerprint]
    tracker = open_tracking(project, settings.tracking)
    version = logged_run(tracker, best).model_version
    assert version  # fits on all images are registered
    champion, challenger = tracker.registered(CHAMPION), tracker.registered(CHALLENGER)
    old, is_champion = None, champion is not None and champion.version == version
    if is_champion:
        decision = Decision(True, f"It is the champion already. Val: {new}.")
    else:
        if champion:
            old = score(_champion_on_val(champion, tracker, project, raw, asked, progress))
        decision = decide(new, old, settings.checks.promotion_tolerance)
    test = test_evidence(project, best, raw, settings)
    reads = count_reads(project.test_reads, version_of_test(raw))
    promotion = Promotion(
        model=f"{best.arm}, seed {best.seed}",
        version=version,
        champion=version if decision.promoted or champion is None else champion.version,
        score=new,
        champion_score=old,
        test={"clean": float(test.correct.mean()), "corrupted": float(test.corrupted.mean())},
        test_reads=reads,
        decision=decision,
        reused=is_champion or (not decision.promoted and _is_noted(decision, version, challenger)),
    )
    if not promotion.reused:
        _record(promotion, tracker)
    elif is_champion and challenger and challenger.version == version:
        tracker.remove_alias(CHALLENGER)  # a run was killed before it did
    return promotion


def _is_noted(decision: Decision, version: str, challenger: Registered | None) -> bool:
    if challenger is None or challenger.version != version:
        return False
    return challenger.tags.get(_REASON) == decision.reason


def _val_key(fingerprint: str, raw: Stage, settings: Settings) -> str:
    """Identify the answers of a fit, known by its fingerprint, on the present val images."""
    rows = raw.manifest(["split", "label", "sha256"]).query("split == 'val'")
    val = digest(class_names(raw.counts), sorted(rows[["label", "sha256"]].values.tolist()))
    of_all = [settings.size, asked_of(settings.evaluation), settings.seed]
    return digest("answers on val", EVIDENCE_VERSION, fingerprint, val, *of_all)


def _champion_on_val(
    champion: Registered,
    tracker: Tracker,
    project: Project,
    raw: Stage,
    settings: Settings,
    progress: Progress,
) -> Evidence:
    """Return the champion's answers on the present val images, in the present classes."""
    fit = champion.tags.get(FIT_TAG, f"version {champion.version} of {tracker.model_name}")
    key = _val_key(fit, raw, settings)
    folder, classes = project.evidence / key, class_names(raw.counts)
    if folder.exists():
        return Evidence.load(folder)
    device = choose_device(settings.device)
    model = InClasses(tracker.classifier_of(champion.version, device), classes)
    val = load_images([raw], "val", classes, settings.size, aside=project.aside, progress=progress)
    ask_and_keep(
        {CHAMPION: model},
        {CHAMPION: folder},
        val,
        settings.evaluation,
        settings.seed,
        device,
        aside=project.aside,
        progress=lambda what, done, total: progress(f"{what}, champion", done, total),
    )
    return Evidence.load(folder)


def _record(promotion: Promotion, tracker: Tracker) -> None:
    """Write the decision into the registry: the figures first, then who is what."""
    figures = {
        "val_clean": promotion.score.clean,
        "val_corrupted": promotion.score.corrupted,
        **{f"test_{name}": value for name, value in promotion.test.items()},
    }
    notes = {f"promotion.{name}": f"{value:.4f}" for name, value in figures.items()}
    notes["promotion.test_reads"] = str(promotion.test_reads)
    notes[_REASON] = promotion.decision.reason
    notes["promotion.promoted"] = str(promotion.decision.promoted).lower()
    tracker.note(promotion.version, notes)
    tracker.set_alias(CHALLENGER, promotion.version)
    if promotion.decision.promoted:
        tracker.set_alias(CHAMPION, promotion.version)
        tracker.remove_alias(CHALLENGER)
