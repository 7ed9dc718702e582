"""Processes that do the same work in turns on the same cores, and the environment of those that are not ours.

An iteration while other processes took more than 5% of the cores is repeated, 3 times at most. The peers' environment
is made once, in `${XDG_CACHE_HOME:-~/.cache}/rapidfire-jax/peers/`.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rapidfire_jax.user_cache import cache_folder

PEER = {"trl": "1.12.0", "torch": "2.13.0", "transformers": "5.23.0"}
OTHERS = ("peft", "accelerate", "datasets")
THREADS, REPEATS, DISTURBED = 2, 3, 0.05


def peer_python() -> Path:
    """The interpreter of TRL's environment, which is made if it is not there; on a machine with TRL and a GPU, this."""
    if importlib.util.find_spec("trl") and Path("/dev/nvidia0").exists():
        return Path(sys.executable)
    folder = cache_folder() / "peers" / f"trl-{PEER['trl']}"
    python, uv = folder / "bin/python", os.environ.get("UV", "uv")
    if not _is_complete(python):
        wanted = [*(f"{name}=={version}" for name, version in PEER.items()), *OTHERS]
        subprocess.run([uv, "venv", "--clear", "--seed", "--no-project", "--python", "3.11", folder], check=True)
        by_uv = [uv, "pip", "install", "--python", str(python), "--torch-backend", "cpu"]
        by_pip = [str(python), "-m", "pip", "install"]  # where PyTorch's own index is out of reach
        if not any(subprocess.run([*how, *wanted], stdout=sys.stderr).returncode == 0 for how in (by_uv, by_pip)):
            sys.exit(f"error: cannot install {', '.join(wanted)} into {folder}")
    return python


def _is_complete(python: Path) -> bool:
    if not python.exists():
        return False
    say = f"from importlib.metadata import version; print(*map(version, {[*PEER, *OTHERS]}))"
    said = subprocess.run([python, "-c", say], capture_output=True, text=True, check=False).stdout.split()
    return [version.partition("+")[0] for version in said[: len(PEER)]] == list(PEER.values())


class Worker:
    """A side in a process of its own, stopped but for the iterations that it is asked for.

    Args of the class:
      side: its name, and that of its log in `folder`.
      python: interpreter.
      module: in `benchmarks.peers`.
      settings: what the module is told.

    `started` is what it said of itself after `loading` seconds, `answers` what of its iterations; of each, "others" is
    the share of the cores that other processes took meanwhile, and "counts" says whether its time does.
    """

    def __init__(self, side: str, python: Path, module: str, settings: dict[str, Any], folder: Path):
        command = [str(python), "-m", f"benchmarks.peers.{module}", json.dumps(settings)]
        self.side, self.answers = side, list[dict[str, Any]]()
        self._log = (folder / f"{side}.log").open("w+")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        begin = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, **pipes)
        try:
            self.started = self._answer()
        except RuntimeError:
            self.close()
            raise
        self.loading = time.perf_counter() - begin
        self._stop()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def iterate(self) -> dict[str, Any]:
        """One iteration, and its answer."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        before = _ticks(self._process.pid)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        total, busy, own = (b - a for a, b in zip(before, _ticks(self._process.pid), strict=True))
        self._stop()
        self.answers.append(answer | {"others": max(busy - own, 0) / max(total, 1), "counts": False})
        told = "{side} {n}: {seconds:.2f} s, {others:.0%} of the cores to others"
        print(told.format(side=self.side, n=len(self.answers), **self.answers[-1]), file=sys.stderr, flush=True)
        return self.answers[-1]

    def measure(self) -> None:
        """Iterations until one is undisturbed; the least disturbed counts."""
        tried: list[dict[str, Any]] = []
        while len(tried) <= REPEATS and not (tried and tried[-1]["others"] <= DISTURBED):
            tried.append(self.iterate())
        min(tried, key=lambda answer: answer["others"])["counts"] = True

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _stop(self) -> None:
        """Returns when every thread stands."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.side} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)


def take_turns(workers: list[Worker], turns: int) -> None:
    """An iteration of each that compiles and does not count, then `turns` measured ones, one worker after another."""
    for worker in workers:
        worker.iterate()
    for _ in range(turns):
        for worker in workers:
            worker.measure()


def _ticks(pid: int) -> tuple[int, int, int]:
    """Clock ticks so far: of the cores that this process may use, those not idle, and those of process `pid`."""
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    cores = [list(map(int, ticks[:8])) for name, *ticks in lines if name in names]  # the last two are counted twice
    total, idle = sum(map(sum, cores)), sum(ticks[3] + ticks[4] for ticks in cores)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return total, total - idle, int(fields[11]) + int(fields[12])
