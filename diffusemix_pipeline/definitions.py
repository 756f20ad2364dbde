"""Dagster's door: `workspace.yaml` loads `defs` from here.

Every server, daemon and step imports this, so it loads neither torch nor diffusers nor mlflow.
"""

import os
from pathlib import Path

from diffusemix_pipeline.layers import load_settings
from diffusemix_pipeline.orchestration.build import build_definitions
from diffusemix_pipeline.project import Project

_root = Path(os.environ.get("DAGSTER_HOME") or Path.cwd())

defs = build_definitions(Project(_root), load_settings(_root))
