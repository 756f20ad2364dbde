"""What Dagster, MLflow and DVC add to a run: the pipeline beside its stages called directly.

    python -m benchmarks.orchestration [--preset demo] [--turns 1]

Each turn makes everything twice, from nothing, each time in a folder and a process of its own: by
plain calls of the stages, and by `diffusemix run`. Prints the seconds of both, and where they went:
every 20 ms the main thread's stack is looked at. Beside it, what loading the definitions takes.
"""

# Imports lie within functions where they are part of what is timed.
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

LIMIT = 45.0
_LOOK_EVERY = 0.02  # seconds
_STARTING = "starting Python"
# The first that some frame's file name holds says what a moment was spent on.
_PLACES = {
    "diffusemix_pipeline/versioning.py": "DVC",
    "diffusemix_pipeline/tracking.py": "MLflow",
    "orchestration/checks.py": "asset checks",
    "orchestration/metadata.py": "pictures for the UI",
    "importlib._bootstrap": "importing",
    "diffusemix_pipeline/datasets/": "images, edits, mixing",
    "diffusemix_pipeline/editing/": "images, edits, mixing",
    "diffusemix_pipeline/mixing/": "images, edits, mixing",
    "diffusemix_pipeline/evaluation/evidence.py": "asking about test images",
    "diffusemix_pipeline/evaluation/": "statistics and the report",
    "diffusemix_pipeline/training/": "training",
}
_ELSE = "Dagster, and the rest"


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--within", choices=sorted(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.within:
        with _looking() as seconds:
            WAYS[options.within](options.preset)
        Path("seconds.json").write_text(json.dumps(seconds))
        return
    turns = [
        {way: _timed_apart(way, options.preset) for way in ("direct", "pipeline")}
        for _ in range(options.turns)
    ]
    _show(turns)
    loading = [_seconds_of(["-c", "import diffusemix_pipeline.definitions"]) for _ in range(5)]
    print(f"loading the definitions: {median(loading):.1f} s (median of 5; at most 3 asked)")


def directly(preset: str) -> None:
    """Make all that the pipeline makes, without Dagster, MLflow or DVC, in the present folder."""
    from benchmarks.fits import make_stages
    from diffusemix_pipeline.datasets.ingest import ingest
    from diffusemix_pipeline.datasets.manifest import class_names
    from diffusemix_pipeline.devices import choose_device
    from diffusemix_pipeline.evaluation.audit import audit
    from diffusemix_pipeline.evaluation.evidence import evaluate
    from diffusemix_pipeline.evaluation.report import ReportInputs, write_report
    from diffusemix_pipeline.layers import load_settings
    from diffusemix_pipeline.orchestration.learning import without_attacks
    from diffusemix_pipeline.orchestration.metadata import stages_picture
    from diffusemix_pipeline.training.arms import SUBJECTS, all_fits, fit_arm
    from diffusemix_pipeline.training.classifier import load_classifier
    from diffusemix_pipeline.training.data import load_images

    here = Path.cwd()
    aside, device = here / "aside", choose_device("auto")
    settings = load_settings(here, preset=preset, environment={})
    raw = ingest(settings.source.path, settings, here / "raw", aside=aside)
    stages = make_stages(raw, settings, here, kept=here)
    fits = [
        fit_arm(
            wanted,
            stages,
            settings,
            checkpoints=here / "checkpoints",
            fractal_cache=here / "fractals",
            aside=aside,
            device=device,
            on_point=lambda step, point: None,
        )
        for wanted in all_fits(settings)
    ]
    classes = class_names(raw.counts)
    images = {
        split: load_images([raw], split, classes, settings.size, aside=aside)
        for split in ("train", "val", "test")
    }
    found = {}
    asked = {"test": settings, "val": without_attacks(settings, corruptions=True)}
    for split, of_split in asked.items():
        models = {f"{fit.arm} {fit.seed}": load_classifier(fit.folder, device) for fit in fits}
        found[split] = dict(
            evaluate(
                {name: classifier.model for name, classifier in models.items()},
                images[split],
                of_split.evaluation,
                settings.seed,
                device,
                partial={name: here / "evidence" / f"{split} {name}" for name in models},
            )
        )
    subject = next(fit for fit in fits if fit.arm in SUBJECTS)
    classifier = load_classifier(subject.folder, device)
    answers = found["test"][f"{subject.arm} {subject.seed}"].probabilities
    inputs = ReportInputs(
        evidence={(fit.arm, fit.seed): found["test"][f"{fit.arm} {fit.seed}"] for fit in fits},
        classes=classes,
        settings=settings,
        counts=raw.counts["by_split"],
        curves={(fit.arm, fit.seed): fit.curve for fit in fits},
        steps={fit.arm: fit.steps for fit in fits},
        few_images={},
        test_reads=1,
        versions={},
        audit=audit(
            classifier,
            answers,
            images["test"],
            images["train"],
            raw,
            stages["augmented"],
            pictured=True,
            device=device,
        ),
        stages=stages_picture(stages),
    )
    write_report(inputs, here / "report", aside=aside)


def through_the_pipeline(preset: str) -> None:
    """Run `diffusemix run` in the present folder."""
    from diffusemix_pipeline.cli import main as diffusemix

    diffusemix(["run", "--preset", preset], standalone_mode=False)


WAYS: dict[str, Callable[[str], None]] = {"direct": directly, "pipeline": through_the_pipeline}


def _timed_apart(way: str, preset: str) -> dict[str, float]:
    """Go one way in a process and a folder of its own; return seconds by what they went into."""
    with tempfile.TemporaryDirectory() as folder:
        took = _seconds_of(
            ["-m", "benchmarks.orchestration", "--preset", preset, "--within", way], folder
        )
        seconds: dict[str, float] = json.loads(Path(folder, "seconds.json").read_text())
    seconds[_STARTING] = took - sum(seconds.values())
    return seconds


def _seconds_of(arguments: Sequence[str], folder: str = ".") -> float:
    """Return what a Python with these arguments takes in `folder`; CalledProcessError if it fails.

    It imports what this process would.
    """
    there = os.environ | {"PYTHONPATH": str(Path.cwd())}
    began = time.monotonic()
    subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=there, check=True, stdout=subprocess.DEVNULL
    )
    return time.monotonic() - began


@contextmanager
def _looking() -> Iterator[defaultdict[str, float]]:
    """Count seconds by what the main thread is at."""
    seconds: defaultdict[str, float] = defaultdict(float)
    over, main_thread = threading.Event(), threading.main_thread().ident

    def look() -> None:
        last = time.monotonic()
        while not over.wait(_LOOK_EVERY):
            files, frame = [], sys._current_frames().get(main_thread or 0)
            while frame:
                files.append(frame.f_code.co_filename)
                frame = frame.f_back
            now = time.monotonic()
            place = next((p for p in _PLACES if any(p in file for file in files)), None)
            seconds[_PLACES[place] if place else _ELSE] += now - last
            last = now

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    try:
        yield seconds
    finally:
        over.set()
        looker.join()


def _show(turns: Sequence[dict[str, dict[str, float]]]) -> None:
    """Print the medians over turns, a line for each thing, and what the pipeline adds."""
    names = dict.fromkeys(name for turn in turns for way in turn.values() for name in way)

    def middle(way: str, name: str) -> float:
        return median(turn[way].get(name, 0.0) for turn in turns)

    print(f"{'seconds':<24}{'direct':>10}{'pipeline':>10}{'added':>10}")
    for name in sorted(names, key=lambda name: -middle("pipeline", name)):
        direct, pipeline = middle("direct", name), middle("pipeline", name)
        print(f"{name:<24}{direct:>10.1f}{pipeline:>10.1f}{pipeline - direct:>+10.1f}")
    wholes = {way: [sum(turn[way].values()) for turn in turns] for way in ("direct", "pipeline")}
    added = median(b - a for a, b in zip(wholes["direct"], wholes["pipeline"], strict=True))
    direct, pipeline = (median(each) for each in wholes.values())
    print(
        f"{'in all':<24}{direct:>10.1f}{pipeline:>10.1f}{added:>+10.1f}  ({LIMIT:g} at most asked)"
    )


if __name__ == "__main__":
    main()
