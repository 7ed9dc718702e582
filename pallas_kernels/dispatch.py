"""Which implementation of an operation runs, and why another one does not.

An operation lists its implementations, best first; the last one can serve every valid call. `implementation=None` takes
the first that has no reason against the call; a name takes that one, or raises with all its reasons.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from pallas_kernels import hopper, launch


class Choice(NamedTuple):
    """One call that was traced."""

    operation: str
    implementation: str  # that runs
    against: dict[str, list[str]]  # reasons against each of the others that was tried before, by name


_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("record", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Choice]]:
    """Collects what is chosen for every call traced in the block; jitted functions that were traced before are silent.

    with record() as choices:
        jax.eval_shape(step, state, batch)
    """
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


_preferred = jax.make_user_context(())  # what was traced with other preferences is traced again


def prefer(*implementations: str) -> contextlib.AbstractContextManager[None]:
    """Calls traced in the block that name no implementation take the first of these that the operation has."""
    return _preferred(implementations)


class Implementation(NamedTuple):
    """One way to compute an operation. Both functions take the arguments of the operation's own `run` call."""

    run: Callable[..., Any]  # differentiable where the operation is
    reasons: Callable[..., list[str]] = lambda *args, **kwargs: []  # against serving this call; empty: it can


def hopper_kernel(run: Callable[..., Any], reasons: Callable[..., list[str]]) -> Implementation:
    """An implementation by Mosaic kernels; `reasons` are those against shapes and dtypes."""
    return Implementation(run, lambda *args, **kwargs: hopper.why_not_hopper() + reasons(*args, **kwargs))


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
        if implementation is not None and implementation not in self.implementations:
            accepted = ", ".join(map(repr, self.implementations))
            raise ValueError(f"{self.name}: implementation={implementation!r}; accepted: {accepted}, None")
        if implementation is None:
            implementation = next((name for name in _preferred.value if name in self.implementations), None)
        args, kwargs = launch.vary((args, kwargs), launch.varying_axes(args, kwargs))
        against: dict[str, list[str]] = {}
        for name in self.implementations if implementation is None else [implementation]:
            candidate = self.implementations[name]
            if reasons := candidate.reasons(*args, **kwargs):
                against[name] = reasons
                continue
            if (choices := _record.get()) is not None:
                choices.append(Choice(self.name, name, against))
            return candidate.run(*args, **kwargs)
        listed = "".join(f"\n  - {reason}" for reasons in against.values() for reason in reasons)
        raise NotImplementedError(f"{self.name}: implementation={implementation!r} cannot serve this call:{listed}")
