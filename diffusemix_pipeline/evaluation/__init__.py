"""A classifier becomes evidence, and evidence becomes a report.

What belongs here: attacks, corruptions, calibration, the statistics of comparing arms, and the page
that a person reads. What does not: training (`training/`), and anything that knows of Dagster,
MLflow or DVC. Nothing here chooses a model: by then that was done, on val.
"""
