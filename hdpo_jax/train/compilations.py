"""Counts XLA compilations: after warm-up there should be none."""

import jax

_COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts the programs compiled in this process since it was made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILATION_EVENT:
            self.count += 1
