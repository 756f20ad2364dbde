#!/usr/bin/env bash
# Retrains and leaves the report: what CI runs on a push, by schedule and by hand.
#
# With DAGSTER_URL, on the Dagster there (DAGSTER_TOKEN is a proxy's token); without, here.
# SETTINGS holds settings over the project's own, split as a shell would: seed=1 "editing.prompts=[sunset, snowy]".
# The report is report.md, and goes into GitHub's job summary where there is one.
# The exit code is not 0 where the run failed or, on a Dagster, its model was not promoted.
set -euo pipefail

bin=${BIN:-.venv/bin}
overrides=()
# A shell's splitting without its expansions: nothing in SETTINGS is run.
given=$("$bin/python" -c 'import os, shlex; [print(s) for s in shlex.split(os.environ.get("SETTINGS", ""))]')
while IFS= read -r setting; do
  [ -z "$setting" ] || overrides+=(--set "$setting")
done <<< "$given"

rm -f report.md
status=0
if [ -n "${DAGSTER_URL:-}" ]; then
  "$bin/diffusemix" trigger --tag "git_sha=${GITHUB_SHA:-$(git rev-parse HEAD)}" \
    --wait --report report.md "${overrides[@]}" || status=$?
else
  "$bin/diffusemix" run --set executor=in_process "${overrides[@]}" && cp outputs/report/report.md report.md || status=$?
fi
if [ -n "${GITHUB_STEP_SUMMARY:-}" ] && [ -f report.md ]; then
  cat report.md >> "$GITHUB_STEP_SUMMARY"
fi
exit "$status"
