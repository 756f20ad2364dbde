"""How Dagster runs the steps of a run that the UI, a schedule or `dagster` launches."""

import dagster as dg

EXECUTORS = {
    "in_process": dg.in_process_executor,  # no start-up of torch for every step
    "multiprocess": dg.multiprocess_executor,  # shards run at once, as far as the pool "gpu" lets
}
