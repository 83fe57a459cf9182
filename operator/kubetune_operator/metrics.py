"""The operator's own Prometheus metrics, served on /metrics.

Names of jobs never become labels here: what one job does is in its status and in the metrics that its trainer serves.
"""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

RECONCILE_SECONDS: Final = Histogram(
    "kubetune_reconcile_seconds", "Time of one pass over one job.", ["kind", "result"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
QUEUE_DEPTH: Final = Gauge("kubetune_queue_depth", "Jobs that wait to be looked at.")
API_SECONDS: Final = Histogram(
    "kubetune_api_request_seconds", "Time of requests to the API server, without watches.", ["method", "code"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)  # fmt: skip
API_THROTTLE_SECONDS: Final = Counter(
    "kubetune_api_throttle_seconds_total", "Time that requests waited for the operator's own rate limit."
)
JOBS: Final = Gauge("kubetune_jobs", "Jobs by kind and state.", ["kind", "state"])
RESTARTS: Final = Counter("kubetune_restarts_total", "Restarts, by what ended the attempt.", ["kind", "reason"])
WATCH_AGE_SECONDS: Final = Gauge(
    "kubetune_watch_age_seconds", "Time since the last event of a watch; grows while nothing happens.", ["resource"]
)
WATCH_STALE: Final = Gauge(
    "kubetune_watch_stale", "1 while a change that a list shows was not delivered.", ["resource"]
)
LOOP_LAG_SECONDS: Final = Gauge("kubetune_event_loop_lag_seconds", "How late the event loop wakes up a sleeper.")
LEADER: Final = Gauge("kubetune_leader", "1 while this process holds the Lease.")
