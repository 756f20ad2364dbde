"""The label gate: which edits may stand for their source's label, and how many may.

What belongs here: verdicts from pixels and class probabilities, the thresholds behind them, and
the share of accepted edits. What does not: the classifiers that give the probabilities (training),
and what becomes of a rejected edit (generate).

An edit is rejected for what would teach a classifier something wrong, or nothing:

- It is black, white or flat, as editors return where half precision overflows or a safety checker
  paints over: its pixels have one tone, but for the darkest and the lightest hundredth. Where the
  original itself is so, that is no fault.
- It lies outside of a band of similarity. Below, it is the original again, but for what a lossy
  autoencoder changes: their mean absolute difference is small. Above, it is another picture: too
  little of the original's structure is left, by SSIM (Wang et al. 2004), which another subject
  lowers far more than an overlaid style does. Differences alone do not tell those two apart: a
  night sky changes every pixel and keeps the subject. Both are taken in colour at 32 px, so that
  composition counts and texture does not, and a bound means the same for every size.
- A classifier that never saw the source gives the label too low a probability: see
  `class_thresholds`.

The default bounds come from edits by the bundled editor at 32 px (450 of digits, 432 of flowers,
450 of CIFAR-10). They changed by at least 0.05 and lost at most 0.73 of the structure. Of edits
that were put beside an original of another class, 86 % (digits), 100 % and 99 % lost more than
0.75: digits on one black ground resemble each other, and the rest is the classifier's to tell.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from PIL import Image

from diffusemix_pipeline.editing.planning import SourceImage
from diffusemix_pipeline.settings import Gate

Judge = Callable[[Sequence[SourceImage], np.ndarray, np.ndarray], list[str]]
"""Gives the verdicts on edits, uint8 (B, S, S, 3) as their sources' originals."""

ACCEPTED = "accepted"
REASONS = ("black", "white", "flat", "unchanged", "changed too much", "label")
"""Why an edit is rejected, in the order in which the reasons are looked for."""
_ONE_TONE = 16  # of 255: smaller differences are noise to an eye
_COMPARED_AT = 32  # px
_LIKELIER_THAN_NOT = 0.5


def class_thresholds(
    own: np.ndarray, labels: np.ndarray, classes: int, false_reject_rate: float
) -> np.ndarray:
    """Return float64 (classes,): the least probability of its own label that an edit may have.

    `own` float (N,) are real images' probabilities of their own `labels`, int (N,), each judged by
    a classifier that did not see it. Of n images of a class, the threshold is the k-th lowest
    probability of the true class, k = floor(rate * (n + 1)). So a further real image of that class,
    exchangeable with them, falls below it with a probability of at most `false_reject_rate`: a
    class-conditional ("Mondrian") conformal predictor (Vovk, Gammerman and Shafer 2005,
    "Algorithmic Learning in a Random World"). With several classifiers, one a fold, this holds
    approximately, as in cross-conformal prediction (Vovk 2015). Nothing is promised of edits, which
    are no real images: those fall below that look less like their label than nearly all of these.

    No threshold is above 0.5: an edit whose label is likelier than all others together keeps it,
    however sure classifiers are of real images. This only lowers thresholds, so the rate holds.

    A class with n < 1 / rate - 1 has no such k. Such classes share one threshold, from the images
    of all of them, so that hard rare classes are not measured by easy frequent ones. Where these
    together are too few, they take the threshold of all N images; where those are, 0: every edit
    passes. The rate then holds for the images of those classes together, not for each class.
    """
    own = own.astype(np.float64)
    thresholds = [
        _low_quantile(own[labels == label], false_reject_rate) for label in range(classes)
    ]
    few = np.array([threshold is None for threshold in thresholds])
    shared = _low_quantile(own[few[labels]], false_reject_rate)
    if shared is None:
        shared = _low_quantile(own, false_reject_rate) or 0.0
    found = [shared if threshold is None else threshold for threshold in thresholds]
    return np.minimum(found, _LIKELIER_THAN_NOT)


def verdicts(
    originals: np.ndarray,
    edits: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    thresholds: np.ndarray,
    gate: Gate,
) -> list[str]:
    """Return each edit's verdict: ACCEPTED, or the first of REASONS that applies.

    `originals` and `edits` are uint8 (B, S, S, 3), `labels` int (B,), `probabilities` float (B, C)
    the edits' class probabilities, `thresholds` float (C,) from `class_thresholds`. A verdict
    depends on its own edit alone.
    """
    was, now = _one_tone(originals), _one_tone(edits)
    own = probabilities[np.arange(len(labels)), labels]
    applies = [
        *(now[kind] & ~was[kind] for kind in ("black", "white", "flat")),
        change(originals, edits) < gate.min_change,
        lost_structure(originals, edits) > gate.max_change,
        ~(own >= thresholds[labels]),  # so that NaN is rejected
    ]
    return np.select(applies, REASONS, ACCEPTED).tolist()


def change(originals: np.ndarray, edits: np.ndarray) -> np.ndarray:
    """Return float64 (B,) in [0, 1]: mean absolute difference at 32 px, 1 from black to white."""
    return np.abs(_reduced(edits) - _reduced(originals)).mean(axis=(1, 2, 3))


def lost_structure(originals: np.ndarray, edits: np.ndarray) -> np.ndarray:
    """Return float64 (B,) in [0, 1]: 1 - SSIM at 32 px, negative similarities taken as none."""
    pairs = zip(_reduced(originals), _reduced(edits), strict=True)
    similar = [_ssim(original, edit) for original, edit in pairs]  # one by one: no neighbours
    return 1 - np.clip(np.array(similar), 0, 1)


def yield_table(judged: pd.DataFrame) -> pd.DataFrame:
    """Return the share of accepted edits, 0 to 1: a row a class, a column a prompt, both sorted.

    `judged` has a row an edit with columns label, prompt and verdict, rejected ones included. A
    class that was never edited by a prompt has NaN there.
    """
    accepted = judged.assign(accepted=judged["verdict"] == ACCEPTED)
    return accepted.pivot_table(index="label", columns="prompt", values="accepted", aggfunc="mean")


def _ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Return the structural similarity, -1 to 1, of two float64 (H, W, 3) pictures in [0, 1]."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (one, other))
    similarity = structural_similarity_index_measure(first, second, data_range=1.0)
    assert isinstance(similarity, torch.Tensor)
    return float(similarity)


def _low_quantile(values: np.ndarray, rate: float) -> float | None:
    """Return the value below which a further one lies with a probability of at most `rate`.

    None where there are too few values for any.
    """
    rank = int(rate * (len(values) + 1))
    return float(np.sort(values)[rank - 1]) if rank else None


def _one_tone(images: np.ndarray) -> dict[str, np.ndarray]:
    """Tell, as bool (B,) each, which uint8 (B, H, W, 3) images are black, white and flat.

    The darkest and brightest 1 % of each channel may be anything: a stray pixel is no picture.
    """
    low, high = np.percentile(images, [1, 99], axis=(1, 2)).astype(np.float64)
    return {
        "black": (high <= _ONE_TONE).all(axis=1),
        "white": (low >= 255 - _ONE_TONE).all(axis=1),
        "flat": (high - low <= _ONE_TONE).all(axis=1),
    }


def _reduced(images: np.ndarray) -> np.ndarray:
    """Return float64 (B, S, S, 3) in [0, 1], averaged down to at most 32 px."""
    side = min(_COMPARED_AT, images.shape[1])
    small = [Image.fromarray(i).resize((side, side), Image.Resampling.BOX) for i in images]
    return np.stack([np.asarray(image) for image in small]) / 255
