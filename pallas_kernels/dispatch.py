"""Which implementation of an operation runs, and why another one does not.

An operation lists its implementations, best first; the last one can serve every valid call. `implementation=None` takes
the first that has no reason against the call; a name takes that one, or raises with all its reasons.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Implementation(NamedTuple):
    """One way to compute an operation. Both functions take the arguments of the operation's own `run` call."""

    run: Callable[..., Any]  # differentiable where the operation is
    reasons: Callable[..., list[str]] = lambda *args, **kwargs: []  # against serving this call; empty: it can


class Operation(NamedTuple):
    """A name and its implementations, best first."""

    name: str
    implementations: dict[str, Implementation]

    def __call__(self, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        """Runs the named implementation, or with None the first that can serve the call.

        Raises:
          ValueError: there is no implementation of that name.
          NotImplementedError: the named implementation cannot serve the call; says every reason.
        """
        if implementation is None:
            return self.implementations[self.choose(*args, **kwargs)].run(*args, **kwargs)
        if implementation not in self.implementations:
            accepted = ", ".join(map(repr, self.implementations))
            raise ValueError(f"{self.name}: implementation={implementation!r}; accepted: {accepted}, None")
        chosen = self.implementations[implementation]
        if reasons := chosen.reasons(*args, **kwargs):
            listed = "".join(f"\n  - {reason}" for reason in reasons)
            raise NotImplementedError(f"{self.name}: implementation={implementation!r} cannot serve this call:{listed}")
        return chosen.run(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> str:
        """Name of the implementation that would run."""
        return next(name for name, reasons in self.explain(*args, **kwargs).items() if not reasons)

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """The reasons against each implementation for this call; empty for those that can serve it."""
        return {name: each.reasons(*args, **kwargs) for name, each in self.implementations.items()}
