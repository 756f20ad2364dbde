"""Launching a run on a Dagster elsewhere, as CI does: through its GraphQL API, over HTTP alone.

What belongs here: launching, following, and what an ending means. What does not: a terminal.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import dagster as dg
from dagster_graphql import DagsterGraphQLClient, DagsterGraphQLClientError
from requests.exceptions import ConnectionError as NoConnection
from requests.exceptions import RequestException

from diffusemix_pipeline.errors import UserError
from diffusemix_pipeline.orchestration.assets.champion import PROMOTED
from diffusemix_pipeline.orchestration.assets.robustness_report import REPORT_MD

_POLL_SECONDS = 2.0
_UNREACHABLE_SECONDS = 120.0
"""How long a server may be away, as while it restarts, before following it ends."""
_EVENTS = """
query Events($run: ID!, $cursor: String) {
  logsForRun(runId: $run, afterCursor: $cursor) {
    __typename
    ... on EventConnection {
      cursor
      hasMore
      events {
        __typename
        ... on MessageEvent { message }
        ... on ExecutionStepFailureEvent {
          error { message errorChain { error { message } } }
        }
        ... on AssetCheckEvaluationEvent { evaluation { checkName success description } }
        ... on MaterializationEvent {
          metadataEntries { label ... on MarkdownMetadataEntry { mdStr } }
        }
      }
    }
  }
}
"""
_TOLD = {"ExecutionStepStartEvent", "ExecutionStepSuccessEvent", "ExecutionStepFailureEvent"}
_ENDED = {
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
}


@dataclass
class Ending:
    """How a run ended, and what it said on its way."""

    status: dg.DagsterRunStatus = dg.DagsterRunStatus.NOT_STARTED
    report: str | None = None
    """The Markdown of the report that it made."""
    refused: str | None = None
    """Why its model was not promoted; None where it was."""

    @property
    def succeeded(self) -> bool:
        """Whether every step did what it was to do."""
        return self.status == dg.DagsterRunStatus.SUCCESS


class RemoteRun(NamedTuple):
    """A run that was launched, and where a browser shows it."""

    client: DagsterGraphQLClient
    run_id: str
    address: str

    def follow(self, tell: Callable[[str], None]) -> Ending:
        """Wait until the run has ended, telling each step; or until the server is gone for long."""
        ending, cursor, last_answer = Ending(), None, time.monotonic()
        while ending.status not in _ENDED:
            time.sleep(_POLL_SECONDS)
            try:
                # First, so that all events of an ended run are read.
                status = self.client.get_run_status(self.run_id)
                more = True
                while more:
                    events, cursor, more = self._page(cursor)
                    _take(events, ending, tell)
            except (DagsterGraphQLClientError, RequestException) as error:
                if time.monotonic() - last_answer > _UNREACHABLE_SECONDS:
                    tell(f"The server no longer answers: {error}. See {self.address} later.")
                    break
                continue
            last_answer = time.monotonic()
            if status != ending.status:
                tell(status.value)
            ending.status = status
        return ending

    def _page(self, cursor: str | None) -> tuple[list[dict[str, Any]], str, bool]:
        """Return the events after a cursor, the next cursor, and whether there are more."""
        answer = self.client._execute(_EVENTS, {"run": self.run_id, "cursor": cursor})
        page = answer["logsForRun"]
        if page["__typename"] != "EventConnection":
            raise UserError(
                f"The server no longer knows the run {self.run_id}: see {self.address}, or launch "
                "it again."
            )
        return page["events"], page["cursor"], page["hasMore"]


def launch(
    url: str, job: str, tags: Mapping[str, str], settings: Mapping[str, Any], token: str | None
) -> RemoteRun:
    """Launch a job with its server's settings but for `settings`; `token` is sent as a bearer's.

    Raises UserError for a server that does not answer and for what it refuses.
    """
    try:
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(
            f"{url} is no address ({error}): write it like http://127.0.0.1:3000."
        ) from None
    if parts.username is not None:  # and do not repeat it: it may be a password
        raise UserError(
            "The address holds a user name: leave it out, and set the environment variable "
            "DAGSTER_TOKEN to a token for the proxy."
        )
    if not host:
        raise UserError(f"{url} is no address: write it like http://127.0.0.1:3000.")
    headers = {"Authorization": f"Bearer {token}"} if token else None
    config = {"resources": {"settings": {"config": settings}}} if settings else {}
    try:
        client = DagsterGraphQLClient(
            host,
            port_number=port,
            use_https=parts.scheme == "https",
            headers=headers,
            path_prefix=parts.path.rstrip("/"),
        )
        run_id = client.submit_job_execution(job, run_config=config, tags=dict(tags))
    except (DagsterGraphQLClientError, RequestException) as error:
        cause = error.__cause__ or error
        if isinstance(cause.__cause__, NoConnection):
            raise UserError(
                f"No Dagster answers at {url} ({_innermost(cause)}). Start it (`diffusemix ui`) or "
                "correct --url."
            ) from None
        raise UserError(f"{url} did not launch {job}: {cause}") from None
    home = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    return RemoteRun(client, run_id, f"{home}/runs/{run_id}")


def _innermost(error: BaseException) -> str:
    """Return in words what an error follows from, such as 'connection refused'."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(getattr(error, "strerror", None) or error).lower()


def _take(events: list[dict[str, Any]], ending: Ending, tell: Callable[[str], None]) -> None:
    for event in events:
        kind = event["__typename"]
        if kind in _TOLD:
            tell(event["message"])
            if error := event.get("error"):
                causes = [error, *(link["error"] for link in error["errorChain"])]
                tell(causes[-1]["message"].strip())
        elif kind == "AssetCheckEvaluationEvent":
            check = event["evaluation"]
            name, passed = check["checkName"], check["success"]
            if not passed:
                tell(f"{name}: {check['description']}")
            if name == PROMOTED:
                ending.refused = None if passed else check["description"]
        elif kind == "MaterializationEvent":
            for entry in event["metadataEntries"]:
                if entry["label"] == REPORT_MD:
                    ending.report = entry["mdStr"]
