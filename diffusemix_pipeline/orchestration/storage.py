"""Where Dagster keeps runs and events: SQLite in the project, or the PostgreSQL of a team.

`dagster.yaml` names the class; the environment says which, as it holds the password.
"""

import os
from typing import Any

import dagster as dg
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData

POSTGRES_URL = "DAGSTER_POSTGRES_URL"


class StorageByEnvironment(DagsterStorage, ConfigurableClass):
    """Never made itself: `from_config_value` returns one of Dagster's own storages."""

    @classmethod
    def config_type(cls) -> Any:
        """Return what `dagster.yaml` must say: the folder of the SQLite files."""
        return {"base_dir": dg.StringSource}

    @classmethod
    def from_config_value(  # type: ignore[override]  # Dagster asks for any DagsterStorage
        cls, inst_data: ConfigurableClassData, config_value: Any
    ) -> DagsterStorage:
        """Return PostgreSQL's storage where DAGSTER_POSTGRES_URL is set, else SQLite's."""
        url = os.environ.get(POSTGRES_URL)
        if not url:
            return DagsterSqliteStorage.from_config_value(inst_data, config_value)
        try:
            from dagster_postgres import DagsterPostgresStorage
        except ModuleNotFoundError:
            raise dg.DagsterInvariantViolationError(
                f"{POSTGRES_URL} is set, and dagster-postgres is not installed. `make install` "
                "brings it; elsewhere, `pip install '.[postgres]'` in a clone."
            ) from None
        # What dagster-postgres installs, which is no longer SQLAlchemy's first choice.
        url = url.replace("postgresql://", "postgresql+psycopg2://", 1)
        config: Any = {"postgres_url": url, "should_autocreate_tables": True}
        return DagsterPostgresStorage.from_config_value(inst_data, config)
