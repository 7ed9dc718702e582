"""The `rapidfire` command."""

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rapidfire_jax.config import load_config, with_dtypes
from rapidfire_jax.errors import InputError

app = typer.Typer(
    help="RLHF in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of input errors too.")]


def _report_errors[**P](command: Callable[P, None]) -> Callable[P, None]:
    """Turns bad input into one message and exit code 2, an interruption into its own exit code."""
    from rapidfire_jax.training.interrupt import Interrupted

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            else:
                print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            raise typer.Exit(stop.exit_code) from None

    return wrapped


@app.command()
@_report_errors
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run.", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example rl.kl_coef=0.02.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue the run in this folder.")] = None,
    debug: Debug = False,
) -> None:
    """Run a configured job, or continue one."""
    from rapidfire_jax.models.precision import hardware_dtype
    from rapidfire_jax.training.run_directory import RunDirectory

    if (config is None) == (resume is None):
        raise InputError("give either a configuration file or --resume RUN")
    if resume is not None:
        run = RunDirectory.open(resume)
        run_config = run.load_config()
    else:
        assert config is not None
        run_config = with_dtypes(load_config(config, overrides or []), hardware_dtype())
        run = RunDirectory.create(run_config)
    from rapidfire_jax.programs import give_back_memory_of_compiling
    from rapidfire_jax.training.job import train as train_job
    from rapidfire_jax.user_cache import keep_compiled_programs

    keep_compiled_programs()
    give_back_memory_of_compiling()
    print(f"run directory: {run.path}", flush=True)
    train_job(run_config, run)
    print(f"final model: {run.final}")


@app.command()
@_report_errors
def generate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, model folder, .gguf file or repository.")
    ],
    prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap prompts in the model's chat template.")] = False,
    adapter: Annotated[str | None, typer.Option(help="peft folder or repository to merge into the model.")] = None,
    debug: Debug = False,
) -> None:
    """Print the responses of a policy or model to some prompts."""
    from rapidfire_jax.rollout.text import generate_text
    from rapidfire_jax.user_cache import keep_compiled_programs

    keep_compiled_programs()
    responses = generate_text(
        _policy_of(model),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        adapter=adapter,
    )
    for text, response in zip(prompt, responses, strict=True):
        print(f"{text}\n-> {response}\n" if len(prompt) > 1 else response)


@app.command()
@_report_errors
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, model folder, .gguf file or repository.")
    ],
    folder: Annotated[Path, typer.Argument(help="New, empty, or an earlier export, which is replaced.")],
    adapter: Annotated[str | None, typer.Option(help="peft folder or repository to merge into the weights.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto: as stored.")] = "auto",
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest weight file, in GB.")] = 5.0,
    debug: Debug = False,
) -> None:
    """Write a run's newest policy, or any model, as a Hugging Face folder."""
    if (Path(source) / "config.yaml").is_file():
        if adapter is not None or dtype != "auto":
            raise InputError("--adapter and --dtype are for models; the policy of a run is written as it was trained")
        from rapidfire_jax.training.job import export_checkpoint
        from rapidfire_jax.training.run_directory import RunDirectory

        iteration = export_checkpoint(RunDirectory.open(source), folder)
        print(f"policy of iteration {iteration}: {folder}")
        return
    from rapidfire_jax.models.export import convert

    convert(source, folder, adapter=adapter, dtype=dtype, max_shard_bytes=int(shard_gb * 1e9))
    print(f"model: {folder}")


@app.command()
@_report_errors
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example rl.micro_batches=16.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="a100-40gb, a100-80gb, h100-80gb, h200, b200, l40s, rtx4090 or cpu.")
    ] = "h100-80gb",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Say whether a run fits on a device that need not be here, and what each of its programs takes there.

    Exit code 3: it does not fit; settings that would make it fit are tried and printed.
    """
    from rapidfire_jax.memory.devices import find_device
    from rapidfire_jax.planning.fit import fit, remedies
    from rapidfire_jax.planning.report import show, show_remedy

    def tell(what: str) -> None:
        print(f"compiling {what}", file=sys.stderr, flush=True)

    run, target = load_config(config, overrides or []), find_device(device)
    found = fit(run, target, tell)
    if not as_json:
        show(found)
    tried = []
    if not found.fits:
        for remedy in remedies(config, overrides or [], run, target, tell):
            tried.append(remedy)
            if not as_json:
                show_remedy(remedy)
    if as_json:
        settings = [{"overrides": r.overrides, "peak_bytes": r.peak, "fits": r.fits} for r in tried]
        print(json.dumps(found.record() | {"tried": settings}))
    if not found.fits:
        raise typer.Exit(3)


@app.command()
@_report_errors
def doctor(
    model: Annotated[str, typer.Option(help="Size whose calls are tried: 135m, 1b, 8b or 70b.")] = "8b",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, and which kernels would run here and why others would not."""
    from pallas_kernels.shape_specs import MODELS
    from rapidfire_jax.doctor import examine, show

    if model not in MODELS:
        raise InputError(f"--model {model}; accepted: {', '.join(MODELS)}")
    found = examine(model)
    print(json.dumps(found)) if as_json else show(found)


def _policy_of(name: str) -> str:
    """The exported policy of a run directory; any other name as it is."""
    if (Path(name) / "config.yaml").is_file():
        final = Path(name) / "final"
        if not final.is_dir():
            raise InputError(
                f"{name}: the run has not finished, it holds no final policy; see rapidfire train --resume"
            )
        return str(final)
    return name


def main() -> Any:
    """Entry point."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return app()
