"""Versions of `data/`: the only code that asks DVC, by its command line.

What belongs here: making the project a DVC repository, pinning `data/` in `data.dvc`, and bringing
back what is pinned. What does not: git commits (a person's or CI's business), and which data a run
needs.

DVC runs as a process of its own, not through `dvc.repo.Repo`: the command line is the face that DVC
keeps stable, and importing DVC would put handlers on stdout, wrap `sys.stdout` and draw spinners.
It costs about a second a command. That process is `dvc_process.py`, which guards `Tree.load`.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ParsingError, RawConfigParser
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import psutil
import yaml
from filelock import FileLock

from diffusemix_pipeline.errors import UserError, of_the_machine
from diffusemix_pipeline.files import write_bytes
from diffusemix_pipeline.git import git
from diffusemix_pipeline.identity import digest
from diffusemix_pipeline.progress import Progress, silent
from diffusemix_pipeline.project import Project

_MD5 = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(rf"{_MD5.pattern}\.dir")
# No file is sent anywhere but to a remote that the user names. Hard links let edit store, data/ and
# cache share bytes; across file systems DVC copies.
_CONFIG = """\
[core]
    analytics = false
    check_update = false
    autostage = false
[cache]
    type = "hardlink,copy"
"""
_REPOSITORY_FILES = {
    ".dvc/config": _CONFIG,
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvcignore": "# What DVC need not walk through. Anchored: patterns hold within data/ too.\n"
    "/.diffusemix\n/.venv\n/outputs\n",
}
_DVC = "diffusemix_pipeline.dvc_process"


@dataclass(frozen=True)
class Snapshot:
    """What `data.dvc` pins now: `digest` is '<md5>.dir'; `note` says in words what became of it."""

    digest: str
    note: str


def ensure_repository(root: Path) -> None:
    """Make `root` a DVC repository, with or without git; what is there already is left alone.

    Without git, or where git ignores `root`, DVC is told so in `.dvc/config.local`, which is this
    machine's alone: `.dvc/config` is the same for a clone and for a folder without git. A folder
    below the top of a git work tree is a DVC repository of its own, with git.
    """
    for name, content in _REPOSITORY_FILES.items():
        if not (root / name).exists():
            write_bytes(root / name, content.encode())
    with _locked(root):
        no_git = str(not _git_would_keep(root / "data.dvc")).lower()
        if (_configured(root, "core", "no_scm") or "false").lower() == no_git:
            return
        if not (root / ".dvc" / "config.local").exists():
            write_bytes(root / ".dvc" / "config.local", b"[core]\n    no_scm = true\n")
        else:
            _run_dvc(root, "config", "--local", "core.no_scm", no_git)


def snapshot(root: Path, progress: Progress = silent) -> Snapshot:
    """Pin `data/` as it is now in `data.dvc`, and push it where a default remote is configured.

    With nothing changed, `data.dvc` keeps its bytes and its time. Nothing is committed to git.
    Raises UserError where DVC cannot add or push; what was added stays, and a second call goes on.
    """
    ensure_repository(root)
    progress("Pinning data/ with DVC", 0, 2)
    with _locked(root):
        digest = _add(root)
        write_bytes(_basis(root), digest.encode())
        progress("Pinning data/ with DVC", 1, 2)
        remote = _default_remote(root)
        if remote is None:
            note = (
                "no DVC remote is configured: data.dvc is up to date, nothing was pushed; "
                "add one with `dvc remote add -d NAME URL`"
            )
        else:
            _use_remote(root, remote, "push")
            note = f"pushed to the DVC remote '{remote}'"
    progress("Pinning data/ with DVC", 2, 2)
    return Snapshot(digest, note)


def pinned_digest(root: Path) -> str | None:
    """Return the '<md5>.dir' that `data.dvc` pins, or None where it pins nothing."""
    path = root / "data.dvc"
    if not path.exists() or not path.stat().st_size:  # emptied, where DVC was killed while writing
        return None
    try:
        return _md5_of(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise _damaged(str(path)) from None


def pinned_raw_version(root: Path) -> str | None:
    """Identify `data/raw` as `data.dvc` pins it; None where nothing is pinned.

    A run that pins new edits of the same images leaves it as it was. Where the list of files is not
    in the cache yet, as before the first pull, the version of all of `data/` stands for it.
    """
    pinned = pinned_digest(root)
    if pinned is None or not _is_cached(root, pinned):
        return pinned
    files = _listed(root, pinned).items()
    return digest(sorted(file for file in files if file[0].startswith("raw/")))


def committed_digest(root: Path, commit: str = "HEAD") -> str | None:
    """Return what the `data.dvc` of a commit pins; None without git or where it has none."""
    pin = _committed_pin(root, commit)
    return None if pin is None else _md5_of(pin.decode(), f"data.dvc of {commit}")


def digest_at(root: Path, name: str) -> str | None:
    """Return what the `data.dvc` of the commit pins that git knows by `name`; None for no commit.

    A person may write it as anything that git takes: HEAD~3, a tag, the start of a hash.
    """
    asked = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    commit = git(root, *asked)
    return committed_digest(root, commit.decode().strip()) if commit else None


def _committed_pin(root: Path, commit: str) -> bytes | None:
    return git(root, "show", f"{commit}:./data.dvc")


def committed_versions(root: Path) -> dict[str, list[str]]:
    """Return the commits of HEAD's history by the version that they pinned, both newest first.

    Empty without git.
    """
    found: dict[str, list[str]] = {}
    for commit in (git(root, "log", "--format=%h", "--", "data.dvc") or b"").decode().split():
        pinned = committed_digest(root, commit)
        if pinned is not None:
            found.setdefault(pinned, []).append(commit)
    return found


def basis_digest(root: Path) -> str | None:
    """Return the version from which `data/` was last made on this machine; None before any."""
    basis = _basis(root)
    return basis.read_text() if basis.exists() else None


def pull(root: Path, *, afresh: bool = False) -> bool:
    """Make `data/` what `data.dvc` pins; True where it is that, or was made from that since.

    `afresh` undoes what was made since. False where nothing is pinned, and where there is no remote
    and the cache alone cannot give it: `data/` is then left as it is. Raises UserError where the
    remote fails, or where `data/` holds files that no version holds.
    """
    pinned = pinned_digest(root)
    if pinned is None:
        return False
    ensure_repository(root)
    project = Project(root)
    with _locked(root):
        made_since = not afresh and basis_digest(root) == pinned
        if made_since and project.raw.exists():
            return True  # what a killed run left half made since then is for its stages to finish
        others_stay = made_since and any(stage.exists() for stage in project.stages)
        wanted = "data/raw" if others_stay else "data"
        if not _fill_cache(root, pinned, wanted):
            return False
        done = _dvc(root, "checkout", wanted)
        if done.returncode:
            raise UserError(
                f"`dvc checkout {wanted}` failed in {root}: {_complaint(done)}\nMove files that no "
                "version holds elsewhere; or, where a run that was cut off left them, run again, "
                "which finishes them."
            )
        write_bytes(_basis(root), pinned.encode())
        return True


def _fill_cache(root: Path, pinned: str, wanted: str) -> bool:
    """Have what is wanted of a version whole in the cache, by the remote.

    False where there is none, and the cache has it not. UserError where the remote does not give
    it.
    """
    remote = _default_remote(root)
    if remote is None:
        return _is_cached(root, pinned) and not _lost(root, pinned, wanted)
    _use_remote(root, remote, "fetch", wanted)
    # DVC fetches without complaint where the list of files itself is nowhere, and a checkout
    # then takes data/ away.
    if not _is_cached(root, pinned):
        raise UserError(
            f"The DVC remote '{remote}' does not hold the version {pinned} that "
            f"{root / 'data.dvc'} pins. Run `dvc push` where that version was made."
        )
    lost = _lost(root, pinned, wanted)
    if lost:  # the remote was not asked for what seemed to be there
        _use_remote(root, remote, "fetch", wanted)
        lost = _lost(root, pinned, wanted)
    if lost:
        name, md5 = next(iter(lost.items()))
        raise UserError(
            f"The DVC remote '{remote}' holds damaged files of the version {pinned}, {len(lost)} "
            f"of them, such as {_place(md5)}, which is {name}. Delete it there, with "
            f"{_place(pinned)}, and run `dvc push` where that version was made."
        )  # DVC looks for no file of a version whose list of files is there
    return True


def restore(
    root: Path, wanted: str, *, pin: bytes | None = None, commit: str | None = None
) -> None:
    """Make `data.dvc` and `data/` those of an earlier version, by its `pin` or a commit's.

    Raises UserError, with `data.dvc` as it was, where neither cache nor remote has the version, or
    where `data/` holds files that no version holds.
    """
    pin = pin or _committed_pin(root, str(commit))
    assert pin is not None  # whoever names the commit has read it
    if _md5_of(pin.decode(), "The data.dvc that was kept") != wanted:
        raise UserError(
            f"The data.dvc that was kept for the version {wanted} pins another: it was changed "
            "since. See `diffusemix data history` for other versions."
        )
    path = root / "data.dvc"
    before = path.read_bytes() if path.exists() else None
    write_bytes(path, pin)
    try:
        if not pull(root, afresh=True):
            raise UserError(
                f"The files of version {wanted} are neither in the DVC cache here nor on a remote: "
                "push them from where they were made (`diffusemix data push`)."
            )
    except UserError:
        if before is None:
            path.unlink()
        else:
            write_bytes(path, before)
        raise


def push(root: Path) -> str:
    """Send what `data.dvc` pins to the default remote; return its name. UserError without one."""
    ensure_repository(root)
    remote = _default_remote(root)
    if remote is None:
        raise UserError("No DVC remote is configured: add one with `dvc remote add -d NAME URL`.")
    with _locked(root):
        _use_remote(root, remote, "push")
    return remote


def changes(root: Path) -> dict[str, int]:
    """Count the files of `data/` that differ from what `data.dvc` pins, by added, modified, …."""
    ensure_repository(root)
    with _locked(root):
        told = json.loads(_run_dvc(root, "data", "status", "--granular", "--json"))
    uncommitted = told.get("uncommitted", {})
    return {kind: len(files) for kind, files in uncommitted.items() if isinstance(files, list)}


def _basis(root: Path) -> Path:
    """The file that holds the version from which `data/` was last made on this machine."""
    return Project(root).state / "data_version"


def _locked(root: Path) -> FileLock:
    return FileLock(root / ".dvc" / "tmp" / "diffusemix.lock")


def _git_would_keep(path: Path) -> bool:
    """Tell whether `path` lies in a git work tree that does not ignore it."""
    command = ["git", "-C", str(path.parent), "check-ignore", "--quiet", path.name]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 1
    except FileNotFoundError:
        return False


def _add(root: Path) -> str:
    pinned = pinned_digest(root)  # which tells of a damaged data.dvc in our words
    if pinned and _is_cached(root, pinned):
        _lost(root, pinned)  # what is made anew must not become a link to a damaged file
    pin = root / "data.dvc"
    before = (pin.read_bytes(), pin.stat()) if pin.exists() else None
    _run_dvc(root, "add", "data")
    if before is not None and pin.read_bytes() == before[0]:
        os.utime(pin, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
    digest = pinned_digest(root)
    assert digest is not None, "dvc add leaves a data.dvc"
    return digest


def _default_remote(root: Path) -> str | None:
    return _configured(root, "core", "remote")


def _md5_of(pin: str, name: str) -> str:
    """Return the digest in the text of a `data.dvc`; UserError, with `name`, where it is none.

    It may come from MLflow or from a commit: one that pins anything but `data/` would have DVC
    write elsewhere.
    """
    try:
        content = yaml.safe_load(pin)
        [out] = content["outs"]
        md5, path = out["md5"], out["path"]
    except (yaml.YAMLError, LookupError, TypeError, ValueError):
        raise _damaged(name) from None
    if content.keys() != {"outs"} or path != "data" or not _DIGEST.fullmatch(str(md5)):
        raise _damaged(name)
    return str(md5)


def _listed(root: Path, pinned: str) -> dict[str, str]:
    """Return the names of a version's files, and their digests.

    UserError for a list that is another's, which DVC does not look at.
    """
    listing = _cached(root, pinned)
    content = listing.read_bytes()
    if f"{_md5(content)}.dir" != pinned:
        raise UserError(
            f"{listing} is not the list of files of the version {pinned}, whose name it has: the "
            "DVC remote or the cache was changed. Delete it, and pull from a remote you trust."
        )
    return {file["relpath"]: file["md5"] for file in json.loads(content)}


def _lost(root: Path, pinned: str, wanted: str = "data") -> dict[str, str]:
    """Return the files of a version, with digests, that the cache lacks or has damaged.

    Damaged ones are moved out of it, into the project's state: nothing is deleted.

    DVC believes what is read-only there, though damage done in place to a file of `data/` is done
    to the cache's as well, by the hard link. What is linked still is not looked at: who finds it
    damaged removes it from `data/`. Where DVC has to copy, every file is.
    """
    cache, lost = _cache(root), {}
    for of_data, md5 in _listed(root, pinned).items():
        name = f"data/{of_data}"
        # A digest that leads out of the cache is refused by DVC's process.
        if not name.startswith(f"{wanted}/") or not _MD5.fullmatch(md5):
            continue
        kept, used = cache / _place(md5), root / name
        if kept.exists():
            if (used.exists() and used.samefile(kept)) or _md5_of_file(kept) == md5:
                continue
            aside = Project(root).state / "damaged"
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(kept, aside / md5)
        lost[name] = md5
    return lost


def _md5_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _damaged(name: str) -> UserError:
    return UserError(
        f"{name} is damaged. Restore it (`git checkout data.dvc`), or delete it to pin anew."
    )


def _is_cached(root: Path, md5: str) -> bool:
    return _cached(root, md5).exists()


def _cached(root: Path, md5: str) -> Path:
    """Return where the cache holds, or would hold, the content of a digest."""
    return _cache(root) / _place(md5)


def _cache(root: Path) -> Path:
    return root / ".dvc" / (_configured(root, "cache", "dir") or "cache")


def _place(md5: str) -> str:
    """Return where a cache or a remote holds the content of a digest."""
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def _configured(root: Path, section: str, option: str) -> str | None:
    """Return a value of the project's DVC configuration, the machine's own file over the shared."""
    parser = RawConfigParser(strict=False)
    for path in (root / ".dvc" / "config", root / ".dvc" / "config.local"):
        try:
            parser.read(path, "utf-8")
        except (ParsingError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Restore it, or remove it and name the DVC remote "
                "anew, if there was one (`dvc remote add`)."
            ) from None
    return parser.get(section, option, fallback="").strip("\"'") or None


def _use_remote(root: Path, remote: str, *command: str) -> None:
    done = _dvc(root, *command)
    if done.returncode:
        raise UserError(
            f"`dvc {' '.join(command)}` failed with the DVC remote '{remote}' in {root}: "
            f"{_complaint(done)}\nSee its address with `dvc remote list`, mend it with "
            f"`dvc remote modify {remote} url URL`, and run again."
        )


def _run_dvc(root: Path, *command: str) -> str:
    """Run a DVC command that needs no remote and return what it prints."""
    done = _dvc(root, *command)
    if done.returncode:
        why = _complaint(done)
        told = of_the_machine(why) or f"{why}\nMend what it names, and run again."
        raise UserError(f"`dvc {' '.join(command)}` failed in {root}: {told}")
    return done.stdout


def _dvc(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    _drop_stale_rwlock(root)
    read_end, write_end = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", _DVC, "--wait-for-lock", *command],
            cwd=root,
            env=os.environ | {"DVC_NO_ANALYTICS": "true"},
            stdin=read_end,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(read_end)
        os.close(write_end)


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stderr.partition("ERROR: ")[2].partition("Having any troubles?")[0].strip()
    return text[:1000] or done.stderr.strip() or f"it ended with code {done.returncode}"


def _drop_stale_rwlock(root: Path) -> None:
    """Remove DVC's list of readers and writers where a kill tore it or it names other processes.

    DVC strikes out dead processes itself; not a number that the system has since given to another
    process, as every restart of a container does.
    """
    path = root / ".dvc" / "tmp" / "rwlock"
    try:
        written = path.stat().st_mtime
        entries = json.loads(path.read_text(encoding="utf-8"))
        readers = chain.from_iterable(entries.get("read", {}).values())
        holders = [*entries.get("write", {}).values(), *readers]
        stale = any(_started_after(written, holder["pid"]) for holder in holders)
    except FileNotFoundError:
        return
    except (ValueError, LookupError, TypeError, AttributeError):
        stale = True
    if stale:
        path.unlink(missing_ok=True)


def _started_after(moment: float, pid: int) -> bool:
    try:
        return psutil.Process(pid).create_time() > moment
    except psutil.NoSuchProcess:
        return False
