"""Fractals: made ones are repeatable, varied and lively; folders are read whole or refused."""

import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.identity import seed_from
from diffusemix_pipeline.mixing import fractals
from diffusemix_pipeline.mixing.fractals import fractals_version, load_fractals, make_fractal
from diffusemix_pipeline.progress import silent
from diffusemix_pipeline.settings import Mixing

SEEDS = [seed_from(0, "fractal", index) for index in range(24)]


@pytest.fixture(scope="module")
def made():
    return [make_fractal(seed, 32) for seed in SEEDS]


def save(path, width, height, colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


# Made -------------------------------------------------------------------------------------------


def test_a_fractal_depends_on_seed_and_size_alone(made):
    np.random.seed(1)  # the global state must not matter
    again = {index: make_fractal(SEEDS[index], 32) for index in (5, 0, 3)}
    for index, fractal in again.items():
        assert fractal.dtype == np.uint8
        assert fractal.shape == (32, 32, 3)
        np.testing.assert_array_equal(fractal, made[index])


def test_fractals_differ_from_each_other(made):
    flat = np.array([fractal.ravel() for fractal in made], np.float64)
    likeness = np.corrcoef(flat) - np.eye(len(flat))
    assert likeness.max() < 0.8


def test_fractals_are_colourful_and_full_of_contrast(made):
    for fractal in made:
        grey = fractal.mean(axis=2)
        shares = np.histogram(grey, bins=16, range=(0, 255))[0] / grey.size
        assert grey.std() > 0.15 * 255
        assert -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() > 2.5
        assert np.ptp(fractal.astype(int), axis=2).mean() > 15  # no grey picture


@pytest.mark.parametrize("small", [32, 48])
def test_size_does_not_change_what_a_fractal_shows(small):
    for seed in SEEDS[:12]:
        large = make_fractal(seed, 2 * small).reshape(small, 2, small, 2, 3).mean(axis=(1, 3))
        likeness = np.corrcoef(make_fractal(seed, small).ravel(), large.ravel())[0, 1]
        assert likeness > 0.9


def test_flat_striped_and_noisy_pictures_are_dull():
    ramp = np.broadcast_to(np.linspace(0, 1, 32)[:, None], (32, 32))
    noise = np.random.Generator(np.random.PCG64(0)).random((32, 32))
    stripes = np.broadcast_to(0.5 + 0.5 * np.sin(np.arange(32)), (32, 32))
    for grey in (np.full((32, 32), 0.5), ramp, noise, stripes):
        assert not fractals._is_lively(np.repeat(grey[..., None], 3, axis=2).astype(np.float32))


def test_a_second_load_only_reads(tmp_path, monkeypatch):
    mixing = Mixing(fractal_count=3)
    first = load_fractals(mixing, 7, 32, tmp_path, silent)
    assert list(first) == ["made-00000", "made-00001", "made-00002"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert sum(path.is_file() for path in written) == 3

    monkeypatch.setattr(fractals, "make_fractal", lambda *_: pytest.fail("made again"))
    told = []
    second = load_fractals(mixing, 7, 32, tmp_path, lambda *report: told.append(report))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    assert told[-1] == ("Making fractals", 3, 3)
    for name, fractal in first.items():
        np.testing.assert_array_equal(second[name], fractal)


def test_only_what_is_missing_is_made(tmp_path):
    load_fractals(Mixing(fractal_count=2), 7, 32, tmp_path, silent)
    old = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    more = load_fractals(Mixing(fractal_count=3), 7, 32, tmp_path, silent)
    assert len(more) == 3
    assert {path: path.stat().st_mtime_ns for path in old} == old
    np.testing.assert_array_equal(more["made-00002"], make_fractal(seed_from(7, "fractal", 2), 32))


def test_cache_is_kept_apart_by_seed_and_size(tmp_path):
    mixing = Mixing(fractal_count=1)
    one = load_fractals(mixing, 7, 32, tmp_path, silent)["made-00000"]
    other = load_fractals(mixing, 8, 32, tmp_path, silent)["made-00000"]
    assert (one != other).any()
    assert load_fractals(mixing, 7, 16, tmp_path, silent)["made-00000"].shape == (16, 16, 3)


# Read from a folder -----------------------------------------------------------------------------


def test_a_folder_is_read_whole_in_any_case_and_depth(tmp_path):
    save(tmp_path / "b.PNG", 40, 40)
    save(tmp_path / "deep" / "er" / "a.JpEg", 40, 20)
    Image.new("L", (20, 50), 9).save(tmp_path / "grey.webp", lossless=True)
    (tmp_path / "notes.txt").write_text("no image, and no reason to warn")
    with warnings.catch_warnings(action="error"):
        read = load_fractals(Mixing(fractal_dir=str(tmp_path)), 0, 16, tmp_path / "cache", silent)
    assert list(read) == ["b.PNG", "deep/er/a.JpEg", "grey.webp"]
    assert all(pixels.shape == (16, 16, 3) for pixels in read.values())
    assert all(pixels.dtype == np.uint8 for pixels in read.values())
    assert (read["grey.webp"] == 9).all()
    assert (read["b.PNG"] == (200, 30, 60)).all()


def test_the_centre_square_is_kept_and_resized_without_aliasing(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255 * (np.indices((64, 64)).sum(axis=0) % 2)[..., None]  # fine chessboard
    Image.fromarray(pixels).save(tmp_path / "board.png")
    read = load_fractals(Mixing(fractal_dir=str(tmp_path)), 0, 16, tmp_path, silent)["board.png"]
    assert (
        np.abs(read.astype(int) - 127).max() < 20
    )  # the black margins are gone, the board is grey


def test_unreadable_and_huge_images_are_left_out_and_named(tmp_path, monkeypatch):
    save(tmp_path / "good.png", 20, 20)
    save(tmp_path / "huge.png", 50, 50)
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:50])
    monkeypatch.setattr(fractals, "MAX_PIXELS", 50 * 50 - 1)
    with pytest.warns(UserWarning) as caught:
        read = load_fractals(Mixing(fractal_dir=str(tmp_path)), 0, 16, tmp_path, silent)
    assert list(read) == ["good.png"]
    assert len(caught) == 1
    for name in ("huge.png (50 x 50 px", "torn.jpg", "cut.png"):
        assert name in str(caught[0].message)


def test_folders_without_images_are_a_users_error(tmp_path):
    missing, empty, broken = tmp_path / "missing", tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"not an image")
    for folder, why in ((missing, "is no folder"), (empty, "no image"), (broken, "no image")):
        with pytest.raises(UserError, match=why) as caught:
            load_fractals(Mixing(fractal_dir=str(folder)), 0, 16, tmp_path, silent)
        assert str(folder) in str(caught.value)
    with pytest.raises(UserError, match="is no folder"):
        fractals_version(Mixing(fractal_dir=str(missing)), 0)


# Version ----------------------------------------------------------------------------------------


def test_version_of_made_fractals_follows_seed_count_and_code(monkeypatch):
    versions = [
        fractals_version(Mixing(fractal_count=count), seed)
        for count, seed in ((4, 0), (5, 0), (4, 1))
    ]
    monkeypatch.setattr(fractals, "CODE_VERSION", fractals.CODE_VERSION + 1)
    versions.append(fractals_version(Mixing(fractal_count=4), 0))
    assert len(set(versions)) == 4
    monkeypatch.undo()
    assert fractals_version(Mixing(fractal_count=4, lam=0.5), 0) == versions[0]


def test_version_of_a_folder_follows_names_and_bytes_but_not_its_place(tmp_path):
    save(tmp_path / "one" / "a.png", 20, 20)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    mixing = Mixing(fractal_dir=str(tmp_path / "two"))
    first = fractals_version(mixing, 0)
    assert first == fractals_version(Mixing(fractal_dir=str(tmp_path / "one")), 1)

    save(tmp_path / "two" / "a.png", 20, 20, (0, 0, 0))
    changed = fractals_version(mixing, 0)
    (tmp_path / "two" / "a.png").rename(tmp_path / "two" / "b.png")
    assert len({first, changed, fractals_version(mixing, 0)}) == 3
