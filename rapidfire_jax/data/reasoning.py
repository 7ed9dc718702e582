"""Generated problems whose answers can be checked, from the package reasoning-gym."""

import json
from collections.abc import Iterator

from rapidfire_jax.errors import InputError

INSTRUCTION = "Give only the final answer, between <answer> and </answer>."


def problems(
    name: str, size: int = 1000, seed: int = 0, instruction: str = INSTRUCTION, **args: object
) -> Iterator[dict[str, str]]:
    """Problems of one task: {"prompt": the question and, below it, how to answer, "entry": the whole entry as JSON}.

    `rewards.reasoning` scores a response by the entry. The same arguments give the same problems in every epoch.

    Args:
      name: a task of reasoning-gym, for example "chain_sum" or "gsm_symbolic".
      size: number of problems.
      seed: of their generation.
      instruction: stands below the question; "" for none.
      args: settings of the task, for example `max_terms=3`.

    Raises:
      InputError: reasoning-gym is not installed, an unknown task, or a setting that it refuses.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise InputError(
            "data.function problems: reasoning-gym is not installed; pip install 'rapidfire-jax[reasoning]'"
        ) from None
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise InputError(f"problems: no task {name!r}; reasoning-gym has {', '.join(sorted(DATASETS))}")
    try:
        entries = reasoning_gym.create_dataset(name, size=size, seed=seed, **args)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"problems: {name} refuses {dict(size=size, seed=seed, **args)}: {error}") from None
    for entry in entries:
        question = f"{entry['question']}\n{instruction}" if instruction else entry["question"]
        yield {"prompt": question, "entry": json.dumps(entry, ensure_ascii=False, default=str)}
