"""The only code that imports dagster: assets, checks, jobs, schedules and resources.

What does not belong here: any work. An asset reads settings, calls one stage function and returns
what a person wants to see.
"""
