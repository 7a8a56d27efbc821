"""A fake clock that candidates advance: no test asserts a time of this machine."""


class Clock:
    """A clock that only candidates advance."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name, seconds):
        """Return a call that takes ``seconds``, or ``seconds(n)`` the n-th time, from 0."""
        calls = 0

        def call() -> None:
            nonlocal calls
            self.now += seconds(calls) if callable(seconds) else seconds
            self.log.append(name)
            calls += 1

        return call


class Interrupting:
    """Raises Ctrl-C after ``at`` calls."""

    def __init__(self, call, at: int) -> None:
        self.call, self.left = call, at

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.call()
