"""Faults in runs: what a person sees of each, and whether a plain run afterwards mends it all.

    python -m benchmarks.soak [--faults 100] [--seed 0] [--only KIND] [--folder outputs/soak]

A small real project: the digits, the bundled editor, the label gate, two arms, a local DVC remote.
One run that nothing disturbs says what everything comes to: bytes, weights, the report's numbers,
metrics in MLflow. Then fault after fault: the project is put back to what it is after some stage,
or to nothing, a run is started, one thing is broken at a random moment and given back, and
`diffusemix run` is called once more. Its end has to be the undisturbed one. Each round is a line of
`rounds.jsonl`, so that a soak goes on where it was cut off. The table is printed at the end, and
by `--faults 0`. Needs Linux, with user namespaces, and libfaketime (Debian: `faketime`).
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, chdir, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import yaml

from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.locks import holders
from diffusemix_pipeline.project import Project
from diffusemix_pipeline.versioning import ensure_repository, pinned_digest

SETTINGS: dict[str, Any] = {
    "size": 32,
    "source": {"path": "digits", "train_per_class": 2, "val_fraction": 0.02, "test_fraction": 0.02},
    "editing": {
        "prompts": ["sunset", "mosaic"],
        "steps": 3,
        "copies": 2,
        "batch_size": 4,
        # Teachers of a few steps know nothing, but let some edits through.
        "gate": {"enabled": True, "folds": 2, "max_change": 1, "false_reject_rate": 0.25},
    },
    "mixing": {"fractal_count": 3},
    "training": {"model": "test_resnet", "steps": 12, "batch_size": 8, "validations": 4},
    "evaluation": {
        "fgsm_epsilons": [2],
        "attack_images": 8,
        "autoattack_images": 2,
        "corruptions": ["gaussian_noise", "contrast"],
        "severities": [3],
        "bootstrap_samples": 1000,
    },
    "checks": {"val_accuracy": 0, "gate_yield": 0},
    "device": "cpu",
}
STAGES = (
    "raw_dataset",
    "generated_images",
    "hybrid_images",
    "fractal_augmented_dataset",
    "trained_classifier",
    "robustness_report",
)
NOTHING = "nothing"
_AT_LEAST = 5.0  # seconds that a run takes where everything is there
_PATIENCE = 600.0  # seconds in which whatever is waited for has to come
# Of the numeric profile, whatever runs a step; and quick, where others compute beside it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A run is a process of its own, forked where everything that it imports is there already.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "diffusemix_pipeline.cli",
        "diffusemix_pipeline.editing.instruct_pix2pix",
        "diffusemix_pipeline.orchestration.launch",
        "diffusemix_pipeline.orchestration.learning",
        "diffusemix_pipeline.orchestration.promotion",
        "diffusemix_pipeline.training.loop",
        "diffusemix_pipeline.terminal",
        "mlflow",
    ]
)


class How(NamedTuple):
    """In what a run is started; by default, as it is."""

    environment: Mapping[str, str] = {}
    within: int | None = None
    """A process whose user and mount namespaces are entered."""
    by: Sequence[str] = ()
    """A program, with arguments, that starts it; without one, it is forked, which is quicker."""
    memory: int | None = None
    """Bytes that a batch of edits may map beside what is mapped; None: all that there is."""

    def enter(self) -> None:
        """Let this process be in it."""
        os.environ.update(self.environment)
        if self.within is None:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("user", "mnt"):
            namespace = os.open(f"/proc/{self.within}/ns/{kind}", os.O_RDONLY)
            if libc.setns(namespace, 0):
                raise OSError(ctypes.get_errno(), f"the namespace {kind} cannot be entered")


AS_IT_IS = How()


class Command:
    """`diffusemix run` in a project, in a session of its own, which prints into a file."""

    def __init__(self, root: Path, said: Path, how: How) -> None:
        self._said = said
        self._said.write_bytes(b"")
        self._process = _forked(_diffusemix, root, self._said, how)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """All that it printed by now."""
        return self._said.read_text("utf-8", errors="replace")

    def runs(self) -> bool:
        """Tell whether it has not ended yet."""
        return self._process.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for its end, but no longer than so."""
        self._process.join(seconds)

    def ended(self) -> int:
        """Return its exit code, which is negative for a signal; fail if it does not end."""
        self.wait(_PATIENCE)
        assert self._process.exitcode is not None, f"it does not end: {self.said}"
        return self._process.exitcode

    def signal_all(self, number: int) -> None:
        """Send a signal to it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _forked(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = FORKED.Process(target=work, args=arguments)
    process.start()
    return process


def _diffusemix(root: Path, said: Path, how: How) -> None:
    os.setsid()
    out = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(out, stream.fileno())
    how.enter()
    os.chdir(root)
    if how.by:
        command = [*how.by, sys.executable, "-m", "diffusemix_pipeline.cli", "run"]
        os.execvp(command[0], command)
    from diffusemix_pipeline.cli import main

    if how.memory is not None:
        _limit_edits(how.memory)
    main(["run"])


def _limit_edits(more: int) -> None:
    """Let the process map no more than so many bytes while it edits: allocations really fail."""
    from diffusemix_pipeline.editing.instruct_pix2pix import InstructPix2PixEditor

    edit, (_, most) = InstructPix2PixEditor.edit, resource.getrlimit(resource.RLIMIT_AS)

    def edit_with_little(self: Any, *batch: Any) -> Any:
        mapped = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more, most))
        try:
            return edit(self, *batch)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    setattr(InstructPix2PixEditor, "edit", edit_with_little)  # noqa: B010 (mypy refuses the other)


class Struck(NamedTuple):
    """A fault that hit a run: when, how the run ended, and what the next one is started in."""

    moment: str
    code: int | None
    said: str
    how: How = AS_IT_IS


class MissedError(Exception):
    """The run was over when the fault came: it is none."""


@dataclass
class Bench:
    """A place where one project is broken and mended over and over."""

    folder: Path
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    latest: bool = False
    """Whether runs are short: from the latest state that a fault allows, and none asks twice."""

    @property
    def place(self) -> Path:
        """Holds the project and its DVC remote: what is put back for each round."""
        return self.folder / "place"

    @property
    def project(self) -> Project:
        return Project(self.place / "project")

    @property
    def remote(self) -> Path:
        return self.place / "remote"

    @property
    def facts(self) -> Path:
        """The file of what is known of undisturbed runs."""
        return self.folder / "facts.json"

    @cached_property
    def known(self) -> dict[str, Any]:
        """What the undisturbed run made, how long one takes from each state, and the end's size."""
        return json.loads(self.facts.read_text("utf-8"))

    def state(self, *states: str) -> str:
        """Put the project back to one of the states, drawn, and return which."""
        drawn = self.draw_state(*states)
        self.put_back(drawn)
        return drawn

    def draw_state(self, *states: str) -> str:
        """Draw one of the states, in order; without any, of all, and nothing twice as often."""
        among = states or (NOTHING, NOTHING, *STAGES)
        return among[-1] if self.latest else self.rng.choice(among)

    def put_back(self, state: str) -> None:
        """Make project and remote what they are in a state; what is left of others there ends."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd().startswith(f"{self.place}/"):
                    process.kill()
        shutil.rmtree(self.place, ignore_errors=True)
        subprocess.run(["cp", "-a", self.folder / "states" / state, self.place], check=True)

    def start(self, how: How = AS_IT_IS) -> Command:
        """Start `diffusemix run`."""
        caches = {"DVC_SITE_CACHE_DIR": str(self.place / "dvc")}
        how = how._replace(environment={**caches, **how.environment})
        return Command(self.project.root, self.folder / f"{uuid.uuid4().hex}.said", how)

    def some_seconds_into(self, state: str, command: Command) -> str:
        """Wait for a random moment of a run from a state; return when it is."""
        moment = self.rng.uniform(0.2, self.known["seconds"][state])
        command.wait(moment)
        if not command.runs():
            raise MissedError
        return f"{moment:.1f} s after its start from {state}"

    def made(self, how: How = AS_IT_IS) -> dict[str, Any]:
        """Return all that runs made for keeps, as digests and numbers; see `_look`."""
        out = self.folder / "made.json"
        out.unlink(missing_ok=True)
        looks = _forked(_look, self.project.root, how, out)
        looks.join(_PATIENCE)
        assert looks.exitcode == 0
        return json.loads(out.read_text("utf-8"))


def prepare(bench: Bench) -> None:
    """Make the states from which runs are started, and learn what an undisturbed one makes."""
    if bench.facts.exists():
        return
    shutil.rmtree(bench.folder, ignore_errors=True)
    states = bench.folder / "states"
    states.mkdir(parents=True)
    bench.project.root.mkdir(parents=True)
    (bench.project.root / "diffusemix.yaml").write_text(yaml.safe_dump(SETTINGS))
    ensure_repository(bench.project.root)
    add = ["remote", "add", "--quiet", "--default", "store", str(bench.remote)]
    subprocess.run([sys.executable, "-m", "dvc", *add], cwd=bench.project.root, check=True)
    subprocess.run(["cp", "-a", bench.place, states / NOTHING], check=True)
    took = {}
    for stage in STAGES:
        began = time.monotonic()
        makes = _forked(_materialize, bench.project.root, stage)
        makes.join(_PATIENCE)
        assert makes.exitcode == 0, stage
        took[stage] = time.monotonic() - began
        subprocess.run(["cp", "-a", bench.place, states / stage], check=True)
    bench.put_back(NOTHING)
    command = bench.start()
    assert command.ended() == 0, command.said
    size = subprocess.check_output(["du", "-sk", bench.place], text=True).split()[0]
    names = (NOTHING, *STAGES)
    seconds = {
        name: _AT_LEAST + sum(took[s] for s in names[place + 1 :])
        for place, name in enumerate(names)
    }
    facts = {"made": bench.made(), "seconds": seconds, "kilobytes": int(size)}
    bench.facts.write_text(json.dumps(facts))


def _materialize(root: Path, name: str) -> None:
    import dagster as dg

    from benchmarks.scale import materialize
    from diffusemix_pipeline.layers import load_settings
    from diffusemix_pipeline.orchestration.launch import prepare_instance

    project = Project(root)
    prepare_instance(project)
    with chdir(root), dg.DagsterInstance.get() as instance:
        materialize(project, load_settings(root), instance, [name])


def _look(root: Path, how: How, out: Path) -> None:
    """Write down what lies in a project: files and edits by their digests, numbers, the tools'."""
    how.enter()
    from diffusemix_pipeline.layers import load_settings
    from diffusemix_pipeline.orchestration.learning import FIT_TAG
    from diffusemix_pipeline.orchestration.promotion import CHAMPION
    from diffusemix_pipeline.tracking import open_tracking

    project = Project(root)
    tops = [project.data, project.checkpoints, project.root / "data.dvc"]
    files = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file()]
    store = EditStore(project.edits)
    found: dict[str, Any] = {path.relative_to(root).as_posix(): _digest(path) for path in files} | {
        f"edit {key}": _digest(store.path(key)) for key in store
    }
    report = json.loads((project.report / "report.json").read_text("utf-8"))
    for of_how in (report, report["versions"]):  # by which executor, with which MLflow
        del of_how["settings"]
    found["report.json"] = report
    tracker = open_tracking(project, load_settings(root).tracking)
    for training in reversed(tracker.trainings()):  # the newest of a fit stays
        found[f"metrics of {training.name}"] = dict(training.metrics)
    champion = tracker.registered(CHAMPION)
    found["champion"] = champion and champion.tags[FIT_TAG]
    in_mlflow = tracker._search("attributes.status = 'RUNNING'")
    found["at work"] = [*_at_work(root), *(run.info.run_id for run in in_mlflow)]
    found["not in the remote"] = _not_in_remote(root)
    out.write_text(json.dumps(found))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _at_work(root: Path) -> list[str]:
    """List the runs that Dagster takes for unfinished."""
    import dagster as dg

    with chdir(root), dg.DagsterInstance.from_config(str(root)) as instance:
        return [run.run_id for run in instance.get_runs() if not run.is_finished]


def _not_in_remote(root: Path) -> list[str]:
    """List the digests of what `data.dvc` pins that the remote lacks."""
    pinned = pinned_digest(root)
    assert pinned is not None
    files = "files/md5"
    listed = json.loads((root / ".dvc/cache" / files / pinned[:2] / pinned[2:]).read_text("utf-8"))
    remote = root.parent / "remote" / files
    digests = [pinned, *(entry["md5"] for entry in listed)]
    return [md5 for md5 in digests if not (remote / md5[:2] / md5[2:]).exists()]


def differences(made: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Name what is not as expected."""
    names = sorted(made.keys() | expected.keys())
    return [name for name in names if made.get(name) != expected.get(name)]


Kind = Callable[[Bench], AbstractContextManager[Struck]]
"""Breaks one thing in a run, and gives it back before or after the next one."""


@contextmanager
def worker_killed(bench: Bench) -> Iterator[Struck]:
    """kill -9 of the process of a step: what the kernel does where memory runs out."""
    state = bench.state()
    command = bench.start(_STEPS_APART)
    moment = bench.some_seconds_into(state, command)
    with suppress(ProcessLookupError):
        os.kill(_worker(bench, command, apart=True), signal.SIGKILL)
    if (code := command.ended()) == 0:  # its step had ended
        raise MissedError
    yield Struck(moment, code, command.said)


_STEPS_APART = How({"DIFFUSEMIX_EXECUTOR": "multiprocess"})


def _worker(bench: Bench, command: Command, *, apart: bool) -> int:
    """Return the process of a step that is at work; waits for one."""
    while command.runs():
        at_work = holders(bench.project.run_lock)
        if apart and command.pid in at_work:  # it looks whether another run is at work
            at_work.remove(command.pid)
        if at_work:
            return at_work[0]
        time.sleep(0.05)
    raise MissedError


@contextmanager
def everything_killed(bench: Bench) -> Iterator[Struck]:
    """kill -9 of a run and all that it started, as when the power fails."""
    state = bench.state()
    how = bench.rng.choice([AS_IT_IS, _STEPS_APART])
    command = bench.start(how)
    moment = bench.some_seconds_into(state, command)
    command.signal_all(signal.SIGKILL)
    yield Struck(moment, command.ended(), command.said)


@contextmanager
def daemon_killed(bench: Bench) -> Iterator[Struck]:
    """kill -9 of Dagster's daemon, at a moment of the run that it queued; then it is restarted."""
    from diffusemix_pipeline.orchestration.launch import prepare_instance

    state, root = bench.state(), bench.project.root
    prepare_instance(bench.project)
    assert not _at_work(root)  # by whose look the databases are made, which two cannot do at once
    home = os.environ | {"DAGSTER_HOME": str(root)}

    def dagster(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, *arguments, "--workspace", "workspace.yaml"]
        with (bench.folder / "daemon.said").open("ab") as said:
            return subprocess.Popen(
                command, cwd=root, env=home, stdout=said, stderr=said, start_new_session=True
            )

    daemons = [dagster("dagster._daemon", "run")]
    try:
        assert dagster("dagster", "job", "launch", "--job", "diffusemix").wait(_PATIENCE) == 0
        moment = bench.rng.uniform(0, 10 + bench.known["seconds"][state])
        time.sleep(moment)
        if not _at_work(root):
            raise MissedError
        daemons[0].kill()
        daemons[0].wait()
        daemons.append(dagster("dagster._daemon", "run"))
        _until(lambda: not _at_work(root))
    finally:
        for daemon in daemons:
            with suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
    yield Struck(f"{moment:.1f} s after it was queued, from {state}", None, _told_by_dagster(root))


def _told_by_dagster(root: Path) -> str:
    """Return how the runs of a project ended, oldest first, and what made them fail."""
    import dagster as dg

    lines: list[str] = []
    with chdir(root), dg.DagsterInstance.from_config(str(root)) as instance:
        for run in reversed(instance.get_runs()):
            failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
            lines += [run.status.value, *(entry.user_message for entry in failures)]
    return "\n".join(f"diffusemix: {line}" for line in lines)


def _until(what: Callable[[], bool], seconds: float = _PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def disk_full(bench: Bench) -> Iterator[Struck]:
    """Project, remote and state lie on a disk that fills up; then it has room again."""
    with _namespaces() as within:
        state = bench.draw_state(NOTHING, *STAGES[:5])
        shutil.rmtree(bench.place, ignore_errors=True)
        bench.place.mkdir()
        _do(within, "mount", "-t", "tmpfs", "none", bench.place)
        _do(within, "cp", "-a", f"{bench.folder / 'states' / state}/.", bench.place)
        used, at_the_end = _kilobytes(within, bench.place), bench.known["kilobytes"]
        size = used + round(bench.rng.uniform(0, 0.9) * (at_the_end - used))
        _do(within, "mount", "-o", f"remount,size={size}k", bench.place)
        command = bench.start(How(within=within))
        code = command.ended()
        _do(within, "mount", "-o", "remount,size=1g", bench.place)
        yield Struck(
            f"{size - used} of {at_the_end - used} kB left, from {state}",
            code,
            command.said,
            How(within=within),
        )


@contextmanager
def folder_read_only(bench: Bench) -> Iterator[Struck]:
    """A folder of the project may not be written, from the start or from some moment on."""
    state = bench.state()
    top = bench.project.root / bench.rng.choice(_WRITTEN)
    top.mkdir(parents=True, exist_ok=True)
    modes: dict[Path, int] = {}

    def take_away() -> None:
        modes.update({path: path.stat().st_mode for path in (top, *top.rglob("*/"))})
        for path in modes:
            path.chmod(0o555)

    moment = f"from the start, {state}"
    if bench.rng.random() < 0.5:
        take_away()
        command = bench.start(_WITHOUT_PRIVILEGE)
    else:
        command = bench.start(_WITHOUT_PRIVILEGE)
        moment = bench.some_seconds_into(state, command)
        take_away()
    code = command.ended()
    for path, mode in modes.items():
        if path.exists():
            path.chmod(mode)
    if code == 0:  # it had nothing more to write there
        raise MissedError
    yield Struck(f"{top.name}, {moment}", code, command.said)


# Root may write wherever it wants to, but not without these capabilities.
_UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
_WITHOUT_PRIVILEGE = How(by=() if os.getuid() else _UNPRIVILEGED)
_WRITTEN = (
    "data",
    "outputs",
    ".dvc",
    ".diffusemix",
    ".diffusemix/aside",
    ".diffusemix/edits",
    ".diffusemix/checkpoints",
    ".diffusemix/mlflow",
    ".diffusemix/dagster",
)


_NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount() -> bool:
    """Tell whether anybody may mount a disk here, in a user namespace."""
    command = [*_NAMESPACES, "true"]
    known = shutil.which(command[0]) is not None
    return known and subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def _namespaces() -> Iterator[int]:
    """Give a process with user and mount namespaces of its own, in which anybody may mount."""
    ready = ["sh", "-c", "echo; exec sleep infinity"]
    with subprocess.Popen([*_NAMESPACES, *ready], stdout=subprocess.PIPE) as sleeper:
        try:
            assert sleeper.stdout is not None
            assert sleeper.stdout.readline() == b"\n", "user namespaces are not allowed here"
            yield sleeper.pid
        finally:
            sleeper.kill()


def _do(within: int, *command: str | Path) -> str:
    enter = ["nsenter", f"--target={within}", "--user", "--mount", "--preserve-credentials"]
    return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout


def _kilobytes(within: int, folder: Path) -> int:
    return int(_do(within, "df", "--output=used", "-k", folder).split()[-1])


def faketime() -> Path | None:
    """Return the library that sets a clock for one program, where it is installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@contextmanager
def clock_back(bench: Bench) -> Iterator[Struck]:
    """The clock goes back, by hours or days, during a run, and stays there for the next one."""
    clock = bench.folder / "clock"
    clock.write_text("+0")
    library = faketime()
    assert library, "libfaketime is not installed (Debian: faketime)"
    faked = {
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which setting a clock leaves alone
        "NO_FAKE_STAT": "1",
    }
    how = How(faked, by=("env", f"LD_PRELOAD={library}"))
    state = bench.state()
    command = bench.start(how)
    moment = bench.some_seconds_into(state, command)
    hours = bench.rng.choice([1, 30, 30 * 24])
    clock.write_text(f"-{hours}h")
    code = command.ended()
    yield Struck(f"{hours} h back, {moment}", code, command.said, how)


class MlflowServer:
    """A server on loopback with a database of its own, which is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, _free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'runs.db'}"]
        command += ["--artifacts-destination", str(self._folder / "files")]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        with (self._folder / "said").open("ab") as said:
            self._server = subprocess.Popen(
                command, cwd=self._folder, stdout=said, stderr=said, start_new_session=True
            )
        _until(self._answers)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False

    def kill(self) -> None:
        """End it at once."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _mlflow(bench: Bench) -> Iterator[tuple[MlflowServer, How]]:
    """Give a server, not started yet, and the environment in which a run uses it."""
    server, name = MlflowServer(bench.folder / "mlflow"), uuid.uuid4().hex
    names = {"URI": server.uri, "EXPERIMENT": name, "MODEL_NAME": name}
    environment = {f"DIFFUSEMIX_TRACKING__{key}": name for key, name in names.items()}
    if bench.latest:
        environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    try:
        yield server, How(environment)
    finally:
        server.kill()


@contextmanager
def mlflow_down_at_start(bench: Bench) -> Iterator[Struck]:
    """The server that `tracking.uri` names is not there when a run starts."""
    with _mlflow(bench) as (server, how):
        state = bench.state(NOTHING, *STAGES[:4])
        command = bench.start(how)
        code = command.ended()
        server.start()
        yield Struck(f"from {state}", code, command.said, how)


def _mlflow_down(told: tuple[str, ...]) -> Kind:
    """Return the fault of a server that is killed soon after a run told one of these."""

    @contextmanager
    def mlflow_down(bench: Bench) -> Iterator[Struck]:
        with _mlflow(bench) as (server, how):
            state, after = bench.state(*STAGES[:4]), bench.rng.choice(told)
            server.start()
            command = bench.start(how)
            _until(lambda: after in command.said or not command.runs())
            time.sleep(bench.rng.uniform(0, 1))
            if not command.runs():
                raise MissedError
            server.kill()
            code = command.ended()
            server.start()
            yield Struck(f"after '{after}', from {state}", code, command.said, how)

    return mlflow_down


@contextmanager
def remote_gone(bench: Bench) -> Iterator[Struck]:
    """The DVC remote's disk is not there, and comes back; or it comes back empty."""
    state = bench.state(NOTHING, *STAGES[:4])
    away, comes_back = bench.place / "away", bench.rng.random() < 0.5
    if bench.remote.exists():
        bench.remote.rename(away)
    bench.remote.symlink_to("/nonexistent/disk")
    command = bench.start()
    code = command.ended()
    bench.remote.unlink()
    if comes_back and away.exists():
        away.rename(bench.remote)
    how = "as it was" if comes_back else "empty"
    yield Struck(f"it comes back {how}, from {state}", code, command.said)


@contextmanager
def dagster_locked(bench: Bench) -> Iterator[Struck]:
    """Another process holds Dagster's database, for seconds or for as long as the run lives."""
    state = bench.state(*STAGES)
    command = bench.start()
    moment = bench.some_seconds_into(state, command)
    history = bench.project.state / "dagster/storage/history"
    name = bench.rng.choice(["runs.db", "runs/index.db"])
    seconds = bench.rng.choice([2.0, 20.0, _PATIENCE])
    with closing(sqlite3.connect(history / name, timeout=60)) as other:
        other.execute("BEGIN EXCLUSIVE")
        command.wait(seconds)
        other.rollback()
    how_long = "2 s" if seconds == 2 else "20 s" if seconds == 20 else "till its end"
    yield Struck(f"{name}, {how_long}, {moment}", command.ended(), command.said)


@contextmanager
def out_of_memory(bench: Bench) -> Iterator[Struck]:
    """The editor gets little memory beside what the process has, or none."""
    state, more = bench.state(NOTHING, "raw_dataset"), bench.rng.choice([28, 24, 4, 0])
    command = bench.start(How(memory=more << 20))
    code = command.ended()
    if code == 0 and "Memory does not suffice" not in command.said:  # it did
        raise MissedError
    yield Struck(f"{more} MB, from {state}", code, command.said)


@contextmanager
def step_hangs(bench: Bench) -> Iterator[Struck]:
    """A run stands still for ever; a second one says what to do, and that is done."""
    state = bench.state()
    how = bench.rng.choice([AS_IT_IS, _STEPS_APART])
    command = bench.start(how)
    moment = bench.some_seconds_into(state, command)
    worker = _worker(bench, command, apart=how == _STEPS_APART)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGSTOP)
    if worker not in holders(bench.project.run_lock):  # its step ended in this moment
        command.signal_all(signal.SIGCONT)
        raise MissedError
    second = bench.start()
    code = second.ended()
    if named := re.search(r"`(kill -9 [\d ]+)`", second.said):
        subprocess.run(named[1].split(), check=True)
    command.ended()
    yield Struck(moment, code, second.said)


_LEARNING = ("Pinning data/ with DVC: 2", "Training vanilla, seed 0", "Training diffusemix, seed 0")
_JUDGING = ("Reading test images", "Evaluating images, seed 0", "Tracing wrong answers")
KINDS: dict[str, Kind] = {
    "worker killed": worker_killed,
    "everything killed": everything_killed,
    "daemon killed": daemon_killed,
    "disk full": disk_full,
    "folder read-only": folder_read_only,
    "clock back": clock_back,
    "MLflow down at start": mlflow_down_at_start,
    "MLflow down in training": _mlflow_down(_LEARNING),
    "MLflow down at the end": _mlflow_down(_JUDGING),
    "DVC remote gone": remote_gone,
    "Dagster's database locked": dagster_locked,
    "out of memory": out_of_memory,
    "step hangs": step_hangs,
}


def one_round(bench: Bench, kind: str) -> dict[str, Any]:
    """Break a run in one way, run once more, and tell all of it; again where the fault missed."""
    while True:
        for said in bench.folder.glob("*.said"):
            said.unlink()
        try:
            with KINDS[kind](bench) as struck:
                began = time.monotonic()
                again = bench.start(struck.how)
                code = again.ended()
                seconds = time.monotonic() - began
                made = bench.made(struck.how) if code == 0 else {}
        except MissedError:
            continue
        return {
            "kind": kind,
            "moment": struck.moment,
            "code": struck.code,
            "seen": seen(struck.said, struck.code),
            "again": code,
            "seconds": round(seconds, 1),
            "differs": differences(made, bench.known["made"])[:20] if code == 0 else ["all"],
            "said": struck.said[-20000:],
            "said_again": again.said[-6000:],
        }


def seen(said: str, code: int | None) -> str:
    """Return the message in what a run printed, without what differs from run to run."""
    other = r"(?!diffusemix: |.*: \d+ done$)"  # the next message, or progress
    told = re.findall(rf"^diffusemix: .*(?:\n{other}.*)*", said, re.MULTILINE)
    lines = []
    for message in told:
        first, *more = message.strip().splitlines()
        raised = [line for line in more if re.match(r"[\w.]+(Error|Exception)\b", line)]
        trace = any(line.startswith("Stack Trace") for line in more)
        lines.append(" ".join([first, *(raised[-1:] if trace else more[:1])]))
    if not told and code and "Traceback" in said:
        lines = [f"Traceback … {said.strip().splitlines()[-1]}"]
    text = " | ".join(dict.fromkeys(lines)) or "nothing"
    text = re.sub(r"[^\s']*/place/project", "PROJECT", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9a-f]{32}\b", "ID", text)
    return re.sub(r"(?<!-)\b\d+\b", "N", text)[:600]


def soak(bench: Bench, faults: int, seed: int, only: str | None) -> pd.DataFrame:
    """Go on until so many faults were struck; return a row for each."""
    path = bench.folder / "rounds.jsonl"
    rounds = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if len(rounds) < faults:
        prepare(bench)
    for number in range(len(rounds), faults):
        bench.rng = random.Random(f"{seed} {number}")
        kind = only or bench.rng.choice(list(KINDS))
        done = {"round": number, **one_round(bench, kind)}
        with path.open("a") as file:
            file.write(json.dumps(done) + "\n")
        print({name: done[name] for name in done if not name.startswith("said")}, flush=True)
        rounds.append(done)
    return pd.DataFrame(rounds)


def table(rounds: pd.DataFrame) -> str:
    """Return the figures by kind and message, as Markdown."""
    same = (rounds["again"] == 0) & (rounds["differs"].str.len() == 0)
    rows = [
        {
            "fault": kind,
            "times": len(of),
            "seen": seen.replace("|", "/"),
            "exit code": "" if pd.isna(code) else int(code),
            "rerun ended the same": f"{same[of.index].sum()} of {len(of)}",
            "seconds of the rerun": f"{of['seconds'].median():.0f}",
        }
        for (kind, seen, code), of in rounds.groupby(["kind", "seen", "code"], dropna=False)
    ]
    whole = f"{len(rounds)} faults; after {same.sum()} of them the rerun ended the same."
    return f"{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n\n{whole}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"))
    options = parser.parse_args()
    bench = Bench(options.folder.resolve())
    print(table(soak(bench, options.faults, options.seed, options.only)))
