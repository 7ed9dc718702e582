"""What a plan says, as tables."""

from rich.console import Console
from rich.table import Table

from rapidfire_jax.memory.devices import GIB
from rapidfire_jax.planning.fit import Fit, Remedy


def show(fit: Fit) -> None:
    """Prints memory and work of every program, its largest buffers, and whether all fit."""
    console = Console()
    if fit.remat is not None:
        fit.remat.show()
    table = Table(title=f"on {fit.device.name}, GiB")
    for heading in ("program", "arguments", "temporaries", "outputs", "donated", "resident", "peak"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for program in fit.programs:
        need = program.need
        parts = (need.arguments, need.temporaries, need.outputs, need.aliased, need.resident, need.peak)
        table.add_row(program.name, *(f"{part / GIB:.2f}" for part in parts))
    console.print(table)
    work = Table(title="work")
    for heading in ("program", "TFLOP", "GB moved", "at least s", "about s", "times", "largest buffers"):
        work.add_column(heading, justify="left" if heading in ("program", "largest buffers") else "right")
    for program in fit.programs:
        buffers = "\n".join(f"{nbytes / GIB:.2f} GiB {what}" for nbytes, what in program.largest[:3])
        numbers = (program.flops / 1e12, program.bytes_accessed / 1e9)
        seconds = (f"{program.seconds:.2f}", f"{program.expected_seconds:.2f}", str(program.times))
        work.add_row(program.name, *(f"{n:,.1f}" for n in numbers), *seconds, buffers)
    console.print(work)
    if fit.estimated:
        print(f"estimated, not compiled: {'; '.join(fit.estimated)} (compiler: uv sync --group h100)")
    print(f"about {fit.iteration_seconds:.1f} s an iteration, rewards on the host not counted")
    verdict = "fits" if fit.fits else "does not fit"
    print(f"{verdict}: {fit.peak / GIB:.2f} GiB at most, of {fit.device.memory / GIB:.2f} on {fit.device.name}")


def show_remedy(remedy: Remedy) -> None:
    """Prints what some settings would change."""
    verdict = "fits" if remedy.fits else "does not fit"
    print(f"  {' '.join(remedy.overrides)}: {verdict}, {remedy.peak / GIB:.2f} GiB")
