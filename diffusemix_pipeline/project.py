"""Where things lie: every path of a project follows from its root."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """A project folder: what is versioned lies under `data`, what is only state under `state`."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def raw(self) -> Path:
        return self.data / "raw"

    @property
    def generated(self) -> Path:
        return self.data / "generated"

    @property
    def hybrid(self) -> Path:
        return self.data / "hybrid"

    @property
    def augmented(self) -> Path:
        return self.data / "augmented"

    @property
    def stages(self) -> list[Path]:
        return [self.raw, self.generated, self.hybrid, self.augmented]

    @property
    def settings(self) -> Path:
        """The settings that made `data`."""
        return self.data / "settings.yaml"

    @property
    def dropped(self) -> Path:
        """The images and edits that a person took out: committed, like the settings."""
        return self.root / "dropped.txt"

    @property
    def state(self) -> Path:
        return self.root / ".diffusemix"

    @property
    def augment(self) -> Path:
        """What `augment_folder` made of others' folders: a folder each."""
        return self.state / "augment"

    @property
    def dagster(self) -> Path:
        """Dagster's home here: its databases, logs, and the values that steps tell each other."""
        return self.state / "dagster"

    @property
    def mlflow_database(self) -> Path:
        return self.state / "mlflow.db"

    @property
    def run_lock(self) -> Path:
        """Locked by the run that is at work, whose name it holds: see `note_holder`."""
        return self.state / "run.lock"

    @property
    def edits_lock(self) -> Path:
        """Shared by whoever makes or uses edits, held alone by whoever removes some."""
        return self.state / "edits.lock"

    @property
    def aside(self) -> Path:
        """Half-written folders: on the file system of `data`, and never versioned."""
        return self.state / "aside"

    @property
    def edits(self) -> Path:
        return self.state / "edits"

    @property
    def gate(self) -> Path:
        """The label gate's teachers and verdicts."""
        return self.state / "gate"

    @property
    def fractals(self) -> Path:
        return self.state / "fractals"

    @property
    def evidence(self) -> Path:
        return self.state / "evidence"

    @property
    def test_reads(self) -> Path:
        """How often each version of the test images was read on this machine."""
        return self.state / "test_reads.json"

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    def archives(self, chosen: str) -> Path:
        """Where published datasets lie: what `source.archives` says, else a folder of our own."""
        return Path(chosen).expanduser() if chosen else self.state / "published"

    @property
    def report(self) -> Path:
        return self.root / "outputs" / "report"
