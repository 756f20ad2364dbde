"""A classifier becomes evidence, evidence becomes a report, and val says which model is served.

What belongs here: attacks, corruptions, calibration, the statistics of comparing arms, the page
that a person reads, and whether a new model takes the champion's place, which val alone decides.
What does not: training (`training/`), and anything that knows of Dagster, MLflow or DVC.
"""
