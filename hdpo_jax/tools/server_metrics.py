"""What a tool server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from hdpo_jax.tools.sessions import Answer

REASONS = {401: "token", 408: "slow", 413: "size", 422: "invalid", 429: "busy", 503: "draining"}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)


class ServerMetrics:
    """Counters of one server, in a registry of their own. Labels are ours: nothing that a policy or client wrote."""

    def __init__(self, sessions: Callable[[], float], queue: Callable[[], float]):
        """`sessions`, `queue`: how many there are now."""
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("hdpo_tools_requests", "Requests for observations.", ["status"], registry=registry)
        self._rejected = Counter("hdpo_tools_rejected", "Requests refused.", ["reason"], registry=registry)
        self._calls = Counter("hdpo_tools_calls", "Tool calls answered.", ["tool", "outcome"], registry=registry)
        self._seconds = Histogram(
            "hdpo_tools_call_seconds",
            "From a call's turn to its answer.",
            ["tool"],
            buckets=SECONDS,
            registry=registry,
        )
        Gauge("hdpo_tools_sessions_open", "Trajectories open.", registry=registry).set_function(sessions)
        Gauge("hdpo_tools_queue_length", "Calls that wait.", registry=registry).set_function(queue)

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def count_request(self, status: int) -> None:
        self._requests.labels(str(status)).inc()
        if status in REASONS:
            self._rejected.labels(REASONS[status]).inc()

    def count_call(self, tool: str, answer: Answer, *, valid: bool) -> None:
        """`tool`: one that there is, or "unknown". `valid`: there was something to run."""
        self._calls.labels(tool, _outcome(answer, valid)).inc()
        self._seconds.labels(tool).observe(answer.seconds)


def _outcome(answer: Answer, valid: bool) -> str:
    if answer.lost:
        return "lost"
    if answer.timed_out:
        return "timeout"
    if not valid:
        return "invalid"
    return "ok" if answer.ok else "failed"
