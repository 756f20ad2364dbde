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
    def settings(self) -> Path:
        """The settings that made `data`."""
        return self.data / "settings.yaml"

    @property
    def state(self) -> Path:
        return self.root / ".diffusemix"

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
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    @property
    def report(self) -> Path:
        return self.root / "outputs" / "report"
