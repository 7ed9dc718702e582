"""SIGINT and SIGTERM: finish the step, save, leave."""

import signal
from types import FrameType, TracebackType


class Interrupted(BaseException):
    """The run was asked to stop; `exit_code` is 128 + the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class InterruptGuard:
    """While `defer` is set, a first signal is only noted in `signum`; later and otherwise it raises `Interrupted`."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self.defer = False

    def __enter__(self) -> "InterruptGuard":
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.defer and self.signum is None:
            self.signum = signum
            print("\nstopping after this step; once more to stop at once", flush=True)
        else:
            raise Interrupted(signum, "stopped at once")
