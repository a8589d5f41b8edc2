"""How a command may end that neither finished nor failed."""


class Stopped(Exception):
    """A run was told to stop, and has kept what it did; the message says how to go on."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal
        """The exit status of a process that a signal ended, as shells have it."""
