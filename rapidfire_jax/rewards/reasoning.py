"""Verifiable rewards: answers to the problems of reasoning-gym, checked by the tasks themselves.

Stojanovski et al., Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards, 2025.
"""

import difflib
import functools
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rapidfire_jax.errors import InputError

INSTALL = "pip install 'rapidfire-jax[reasoning]'"

type Score = Callable[[str | None, dict[str, Any]], float]


def score(
    prompts: list[str],
    responses: list[str],
    entry: Sequence[str | Mapping[str, Any]],
    task: str | Sequence[str] | None = None,
    *,
    tag: str = "answer",
    require_tag: bool = False,
) -> list[float]:
    """How right the answer in each response is, in [0, 1], as `score_answer` of the problem's task says.

    1 is right. Most tasks give 0 otherwise; some give a little for an answer of the right form, or for the right
    answer with more around it. See `extract_answer` for what of a response counts; a response without an answer, and
    one whose answer the task fails to read, get 0.

    Args:
      prompts: not looked at.
      responses: texts with an answer each.
      entry: column of problems: mappings with `question`, `answer` and `metadata`, or their JSON text.
      task: name of the task, of all problems or one a problem; None: `metadata.source_dataset` of the problem.
      tag: the answer stands between `<tag>` and `</tag>`.
      require_tag: a response without the tags gets 0.

    Raises:
      InputError: reasoning-gym is not installed, an unknown task, or an entry that is no problem of its task.
    """
    tasks = [task] * len(entry) if task is None or isinstance(task, str) else task
    scores: list[float] = []
    tuples: dict[str, bool] = {}
    for row, (response, value, name) in enumerate(zip(responses, entry, tasks, strict=True)):
        problem = _problem(value, row)
        name = name or problem["metadata"].get("source_dataset")
        if not isinstance(name, str):
            raise InputError(f"reward reasoning: row {row}: metadata names no source_dataset; give args.task")
        score_answer = _score_answer(name)
        if name not in tuples:
            tuples[name] = _wants_tuples(score_answer, problem, name, row)
        if tuples[name]:
            problem = _with_tuples(problem)
        answer = extract_answer(response, problem["answer"], tag=tag, require_tag=require_tag)
        scores.append(0.0 if answer is None else _quietly(score_answer, answer, problem))
    return scores


def extract_answer(
    response: str, reference: str | None = None, *, tag: str = "answer", require_tag: bool = False
) -> str | None:
    """What a response answers: the text in its last `<tag>...</tag>`, without white space around it.

    Without the tags it is the last line that is not empty, or as many of these as the reference answer has lines; with
    `require_tag`, or where nothing is left, None.
    """
    tagged = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", response, flags=re.DOTALL)
    if tagged:
        return tagged[-1].strip() or None
    if require_tag:
        return None
    lines = [line for line in response.strip().splitlines() if line.strip()]
    wanted = max(len((reference or "").strip().splitlines()), 1)
    return "\n".join(lines[-wanted:]).strip() or None


@functools.cache
def _score_answer(task: str) -> Score:
    try:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn  # takes two seconds
    except ImportError as error:
        raise InputError(f"reward reasoning: reasoning-gym cannot be imported ({error}); {INSTALL}") from None
    if task not in DATASETS:
        nearest = difflib.get_close_matches(task, DATASETS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(sorted(DATASETS))}"
        raise InputError(f"reward reasoning: reasoning-gym has no task {task!r}; {hint}")
    try:
        return get_score_answer_fn(task)
    except Exception as error:  # `composite` has no defaults
        raise InputError(f"reward reasoning: task {task!r} cannot score: {type(error).__name__}: {error}") from None


def _problem(value: str | Mapping[str, Any], row: int) -> dict[str, Any]:
    try:
        problem = json.loads(value) if isinstance(value, str) else dict(value)
        if isinstance(problem, dict) and "answer" in problem and isinstance(problem.get("metadata"), Mapping):
            return problem
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"reward reasoning: row {row}: entry {value!r:.100} is not a problem; give a mapping, or its JSON text, with "
        "question, answer and metadata"
    )


def _wants_tuples(score_answer: Score, problem: dict[str, Any], task: str, row: int) -> bool:
    """Whether the task takes the problem's own answer only after lists, all that JSON knows, are tuples again."""
    own = problem["answer"]
    if not isinstance(own, str) or _quietly(score_answer, own, problem) == 1:  # None: a task with many solutions
        return False
    if _quietly(score_answer, own, _with_tuples(problem)) == 1:
        return True
    raise InputError(
        f"reward reasoning: row {row}: task {task!r} does not take the problem's own answer {own!r:.100}; the entry is "
        "of another task, or of another version of reasoning-gym"
    )


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _quietly(score_answer: Score, answer: str, problem: dict[str, Any]) -> float:
    """The score of an answer that may be anything; 0 where the task cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            value = float(score_answer(answer, problem))
        except Exception:
            return 0.0
    return min(max(value, 0.0), 1.0)
