"""How often intervals hold the truth, and how often a report says "better" or "worse" by chance.

    python -m benchmarks.intervals [--trials 300]

Arms are simulated that differ by their training seeds alone, so next to none is better or worse.
What a seed does is a draw in logits, the same for all its answers; one arm's seeds may lie further
apart than the others', which the intervals do not allow for. Three minutes.
"""

import argparse
from itertools import product

import numpy as np
import pandas as pd

from diffusemix_pipeline.evaluation.statistics import (
    SIGNIFICANT,
    Estimate,
    difference_spread,
    holm,
    mean_estimates,
)

_RESAMPLES = 1000


def simulated_answers(
    arms: int, seeds: int, images: int, deviation: float, trial: int, *, uneven: float = 1.0
) -> np.ndarray:
    """Return right (1.0) and wrong (0.0) answers of arms alike, float64 (arms, seeds, images).

    `deviation` is that of seeds, in logits, and `uneven` times as large for the second arm.
    """
    rng = np.random.default_rng(trial)
    hard = rng.normal(0, 1.2, images)
    of_seeds = rng.normal(0, deviation, (arms, seeds, 1))
    of_seeds[1] *= uneven
    return (hard + of_seeds + rng.normal(0, 0.8, (arms, seeds, images)) > -0.8).astype(float)


def differences_to_first(answers: np.ndarray, samples: int, seed: int) -> dict[int, Estimate]:
    """Estimate each arm's difference to the first, as the report does, by the arm's number."""
    spread = difference_spread(answers)
    changes = {arm: (answers[arm] - answers[0]).mean(axis=0) for arm in range(1, len(answers))}
    spreads = dict.fromkeys(changes, spread)
    return mean_estimates(changes, samples, seed, kind="difference", spreads=spreads)


def simulate(
    arms: int, seeds: int, images: int, deviation: float, uneven: float, trials: int
) -> dict[str, float]:
    """Return how often, of 1, the second arm's interval holds zero, and some arm differs."""
    held, alarms = 0, 0
    for trial in range(trials):
        answers = simulated_answers(arms, seeds, images, deviation, trial, uneven=uneven)
        found = differences_to_first(answers, _RESAMPLES, trial)
        held += found[1].holds_zero
        alarms += min(holm({arm: of.p for arm, of in found.items()}).values()) < SIGNIFICANT
    return {"held": held / trials, "alarms": alarms / trials}


def main() -> None:
    """Read the command line, simulate, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=300)
    trials = parser.parse_args().trials
    rows = [
        {
            "arms": arms,
            "seeds": seeds,
            "images": images,
            "deviation of seeds, logits": deviation,
            "of the second arm, times": uneven,
            **simulate(arms, seeds, images, deviation, uneven, trials),
        }
        for arms, (seeds, deviation, uneven), images in product(
            (2, 8, 12), ((1, 0.1, 1), (3, 0.0, 1), (3, 0.1, 1), (3, 0.1, 3)), (300, 2000)
        )
    ]
    print(pd.DataFrame(rows).to_markdown(index=False))


if __name__ == "__main__":
    main()
