"""Promise: an edit that was paid for once stays as it was, and is known for what made it."""

import itertools
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from diffusemix_pipeline.editing.records import Record, Records
from diffusemix_pipeline.editing.store import EditStore
from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import file_sha256
from diffusemix_pipeline.locks import alone_with_edits, using_edits
from diffusemix_pipeline.project import Project

PROFILE = {"device": "a", "batch_size": 8}
PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def key_of(number: int) -> str:
    return f"{number:032x}"


@pytest.fixture
def store(tmp_path: Path) -> EditStore:
    return EditStore(tmp_path / "edits")


def filled(store: EditStore, edits: int) -> str:
    profile = store.add_profile(PROFILE)
    for number in range(edits):
        store.put(key_of(number), PIXELS + number, profile)
    return profile


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_the_pixels_come_back(tmp_path_factory, pixels):
    store = EditStore(tmp_path_factory.mktemp("edits"))
    record = store.put(key_of(1), pixels, "p")
    assert key_of(1) in store
    assert np.array_equal(np.asarray(Image.open(store.path(key_of(1)))), pixels)
    assert file_sha256(store.path(key_of(1))) == record.sha256


def test_edits_are_counted_by_the_profile_that_made_them(store):
    keys = [key_of(number) for number in range(6)]
    assert store.records().count_by_profile(keys) == {}
    for key in keys[1:5]:
        store.put(key, PIXELS, "p" if key < keys[3] else "q")
    made = [key for key in keys if key in store]
    assert store.records().count_by_profile(keys) == Counter(
        store.records()[key].profile for key in made
    )
    assert store.records().count_by_profile([]) == {}


def test_the_first_bytes_stay(store):
    first = store.put(key_of(1), PIXELS, "p")
    store.put(key_of(1), PIXELS + 1, "q")
    assert file_sha256(store.path(key_of(1))) == first.sha256
    assert store.checked([key_of(1)]) == {key_of(1)}
    assert store.records() == {key_of(1): first}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["00" * 16, "ab" + "00" * 15, "00" * 15 + "01", "ff" * 16]),
            st.sampled_from(["00" * 32, "cd" + "00" * 31, "ff" * 32]),
            st.sampled_from(["one", "two"]),
        )
    )
)
def test_records_are_what_was_said_first(said):
    records = Records({"key": k, "sha256": s, "profile": p} for k, s, p in said)
    first: dict[str, Record] = {}
    every: dict[str, list[Record]] = {}
    for key, sha256, profile in said:
        first.setdefault(key, Record(sha256, profile))
        every.setdefault(key, []).append(Record(sha256, profile))
    assert dict(records) == first
    assert list(records) == sorted(first)
    assert "12" * 16 not in records
    disputed = {k: r for k, r in every.items() if len({one.sha256 for one in r}) > 1}
    assert records.disputed() == disputed
    for key, all_of_it in disputed.items():
        records.settle(key, all_of_it[-1])
        assert records[key] == all_of_it[-1]


def test_a_file_of_another_name_is_set_aside_like_any_foreign_one(store):
    filled(store, 1)
    stray = store.path(key_of(0)).with_name("00-copy.png")
    stray.write_bytes(b"x")
    assert store.status().edits == 1
    assert store.checked(list(store)) == {key_of(0)}
    assert not stray.exists()


def test_a_changed_and_a_foreign_file_are_set_aside(store):
    filled(store, 4)
    changed = bytearray(store.path(key_of(1)).read_bytes())
    changed[-20] ^= 1
    store.path(key_of(1)).write_bytes(changed)
    store.path(key_of(2)).write_bytes(b"")
    foreign = store.path(key_of(9))
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"not the store's")
    every = [key_of(n) for n in (0, 1, 2, 3, 9, 10)]
    assert store.checked(every) == {key_of(0), key_of(3)}
    assert {key for key in every if key in store} == {key_of(0), key_of(3)}
    assert store.status().quarantined == 3
    assert store.put(key_of(1), PIXELS + 1, "p")  # made anew, it is sound again
    assert key_of(1) in store.checked([key_of(1)])


def test_a_torn_record_is_passed_over(store, tmp_path):
    filled(store, 3)
    (records,) = (tmp_path / "edits" / "records").iterdir()
    records.write_bytes(records.read_bytes() + b'{"key": "0000')
    assert len(EditStore(tmp_path / "edits").checked([key_of(n) for n in range(3)])) == 3


def test_what_it_holds_by_what_made_it(store, tmp_path):
    profile = filled(store, 5)
    status = store.status()
    assert (status.edits, status.by_profile, status.quarantined) == (5, {profile: 5}, 0)
    files = (tmp_path / "edits").glob("[0-9a-f][0-9a-f]/*")
    assert status.bytes == sum(file.stat().st_size for file in files)
    assert status.profiles == {profile: PROFILE}


def test_what_is_removed_is_gone_and_the_rest_stays(store):
    filled(store, 5)
    store.remove([key_of(0), key_of(2), key_of(4)])
    assert list(store) == [key_of(1), key_of(3)]


def test_whoever_uses_edits_waits_for_whoever_removes_some(tmp_path):
    project, entered = Project(tmp_path), threading.Event()

    def use() -> None:
        with using_edits(project):
            entered.set()

    user = threading.Thread(target=use)
    with alone_with_edits(project):
        with pytest.raises(UserError, match="Edits are being made or used"):
            alone_with_edits(project).__enter__()
        user.start()
        assert not entered.wait(0.2)
    assert entered.wait(30)
    user.join()


def write(folder: Path, of: int, numbers: Iterable[int]) -> None:
    store = EditStore(folder)
    profile = store.add_profile({"writer": of})
    for number in numbers:
        store.put(key_of(number), np.full((8, 8, 3), of, np.uint8), profile)


def test_many_processes_may_write_and_one_may_die(tmp_path):
    context = multiprocessing.get_context("spawn")
    folder, shared = tmp_path / "edits", range(60)
    endless = context.Process(target=write, args=(folder, 0, itertools.count()))
    others = [context.Process(target=write, args=(folder, of, shared)) for of in (1, 2, 3)]
    for writer in (endless, *others):
        writer.start()
    while not list(folder.glob("[0-9a-f][0-9a-f]/*.png")):
        assert endless.is_alive()
    endless.kill()
    for writer in (endless, *others):
        writer.join(60)
    assert [writer.exitcode for writer in (endless, *others)] == [-signal.SIGKILL, 0, 0, 0]
    store = EditStore(folder)
    every = set(store)
    assert every >= {key_of(number) for number in shared}
    assert store.checked(every) == every
    assert store.status().edits == len(every)
