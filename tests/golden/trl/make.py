"""Writes what TRL's own `PPOTrainer.train()` computes, step by step.

Runs in an environment of its own (Python 3.11, torch 2.13.0 for CPU, transformers 5.23.0, trl 1.12.0, numpy 2.4.6; the
versions of the last run are in versions.json):

    python tests/golden/trl/make.py

Every figure comes out of an unchanged `PPOTrainer` that trains tiny models for one iteration. Two things are arranged
around it. The function `batch_generation`, which samples, gives way to one that returns chosen responses together with
the logits of a forward pass of the policy, divided by temperature + 1e-7 as the scores of `generate` are. And a trace
function looks at the local variables of `train()` whenever it is about to run certain lines (`LOOK_BEFORE` and those in
`Recorder`); it copies them and changes none. Before TRL's backward pass it also asks autograd for the gradient of
`loss` with respect to the log-probabilities and values of the micro-batch as they were before TRL masked them.

cases.npz
    Many small iterations with two PPO epochs in float64, keys `case/field`: the models are float64 (GPT-2, which has no
    float32 inside, unlike the norms of Llama) and so is torch's default dtype, because the Bessel factor of the
    whitening and the statistics take theirs from it. TRL itself counts `pg_clipfrac` and `vf_clipfrac` in float32
    (`.float()`), so these two and their averages are only good to 1e-7; AdamW's step counters are the only other
    float32. The reference policy is the policy plus some noise, and the scores are those of a real reward model.

    Settings: `kl_coef`, `kl_estimator` (0 for k1, 1 for k3), `whiten_rewards`, `gamma`, `lam`, `cliprange`,
    `cliprange_value`, `vf_coef`, `temperature`, `missing_eos_penalty` (nan for None), `stop_token_id` (-1 for None),
    `eos_id`, `pad_id`, `context_length`, `num_ppo_epochs`, `gradient_accumulation_steps`, `num_mini_batches`,
    `per_device_train_batch_size`, `learning_rate`.

    Rollout, [rows, T] or [rows]: `query_responses` (with the left-padded prompts), `responses`,
    `postprocessed_responses`, `sequence_lengths` (index of the last token that is kept), `logprobs_raw`,
    `ref_logprobs_raw`, `values_raw`, `scores_raw` before TRL masks and penalises them; `contain_eos`, `scores`,
    `padding_mask`, `padding_mask_p1` (True at padding), `logprobs`, `ref_logprobs`, `values`, `kl`, `non_score_reward`,
    `rewards_unwhitened`, `rewards`, `advantages_unwhitened`, `advantages`, `returns`.

    Micro-batches, `case/0/field`, `case/1/field` and so on: `index` (epoch, minibatch, accumulation: its place in TRL's
    statistics), `inds` (rows), `stepped` (whether the optimiser stepped after it), `new_logprobs_raw`, `vpred_raw`,
    `grad_new_logprobs`, `grad_vpred` (of `loss`, before accelerate divides it by the accumulation steps), `entropy_t`,
    and the scalars `pg_loss`, `vf_loss`, `loss`, `approxkl`, `pg_clipfrac`, `vf_clipfrac`, `entropy`, `ratio`.

    `metrics/name`: what TRL logs, but for `eps`, the speed.

iteration/
    One iteration in float32 with a tiny Llama for the policy, the value and the reward, four epochs, the reference
    policy being TRL's copy of the policy, and TRL's default optimiser but for the learning rate of 1e-3 (linear decay
    per iteration: constant here). `policy/`, `value/`, `reward/` hold the models before and `policy_after.safetensors`,
    `value_after.safetensors` the parameters after it; iteration.npz has the fields above, `queries` and `permutations`
    (the rows of every epoch).
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import itertools
import json
import pathlib
import platform
import shutil
import sys
import tempfile
import zlib
from typing import Any

import accelerate
import datasets
import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
import trl
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

HERE = pathlib.Path(__file__).parent
VOCABULARY = 24
STOP = 7  # the stop token of the cases whose stop token is not EOS

# Local variables of train() to copy (name here: name there), by the line before which they have these values.
LOOK_BEFORE = {
    "contain_eos_token = torch.any(": {
        "context_length": "context_length",
        "queries": "queries",
        "query_responses": "query_responses",
        "responses": "responses",
        "postprocessed_responses": "postprocessed_responses",
        "sequence_lengths": "sequence_lengths",
        "logprobs_raw": "logprobs",
        "ref_logprobs_raw": "ref_logprobs",
        "values_raw": "values",
        "scores_raw": "scores",
    },
    "if args.whiten_rewards:": {
        "contain_eos": "contain_eos_token",
        "scores": "scores",
        "padding_mask": "padding_mask",
        "padding_mask_p1": "padding_mask_p1",
        "logprobs": "logprobs",
        "ref_logprobs": "ref_logprobs",
        "values": "values",
        "kl": "kl",
        "non_score_reward": "non_score_reward",
        "rewards_unwhitened": "rewards",
    },
    "lastgaelam = 0": {"rewards": "rewards"},
    "returns = advantages + values": {"advantages_unwhitened": "advantages"},
    "for ppo_epoch_idx in range(": {"advantages": "advantages", "returns": "returns"},
}
STATISTICS = ("pg_loss", "vf_loss", "approxkl", "pg_clipfrac", "vf_clipfrac", "entropy", "ratio")
FLOAT32_IN_TRL = {"pg_clipfrac", "vf_clipfrac"}


def array(value: Any) -> np.ndarray:
    """Returns a copy, with whole numbers as int32."""
    out = value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.array(value)
    return out.astype(np.int32) if out.dtype == np.int64 else out


class Recorder:
    """Runs `train()` and keeps what it saw: `rollout`, the list `micro_batches` and `metrics`."""

    def __init__(self, trainer: PPOTrainer):
        self.rollout: dict[str, np.ndarray] = {}
        self.micro_batches: list[dict[str, np.ndarray]] = []
        self.metrics: dict[str, float] = {}
        self.unmasked: dict[str, torch.Tensor] = {}
        self.looks = {self.line(text): names for text, names in LOOK_BEFORE.items()}
        self.in_micro_step = {
            self.line("new_logprobs = torch.masked_fill("): lambda f: self.keep_unmasked("new_logprobs", f),
            self.line("vpred = torch.masked_fill("): lambda f: self.keep_unmasked("vpred", f),
            self.line("accelerator.backward(loss)"): self.start_micro_batch,
            self.line("gradient_accumulation_idx += 1"): self.end_micro_batch,
            self.line("self.log(metrics)"): lambda f: self.metrics.update(f["metrics"]),
        }
        sys.settrace(self.enter)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.train()
        finally:
            sys.settrace(None)

    @staticmethod
    def line(text: str) -> int:
        lines, first = inspect.getsourcelines(PPOTrainer.train)
        (found,) = [first + i for i, line in enumerate(lines) if line.strip().startswith(text)]
        return found

    def enter(self, frame, event, argument):
        return self.look if frame.f_code is PPOTrainer.train.__code__ else None

    def look(self, frame, event, argument):
        if event == "line" and (names := self.looks.get(frame.f_lineno)):
            variables = frame.f_locals
            self.rollout |= {name: array(variables[theirs]) for name, theirs in names.items()}
        elif event == "line" and (act := self.in_micro_step.get(frame.f_lineno)):
            act(frame.f_locals)
        return self.look

    def keep_unmasked(self, name: str, variables: dict) -> None:
        self.unmasked[name] = variables[name]

    def start_micro_batch(self, variables: dict) -> None:
        new_logprobs, vpred = self.unmasked["new_logprobs"], self.unmasked["vpred"]
        gradients = torch.autograd.grad(variables["loss"], [new_logprobs, vpred], retain_graph=True)
        fields = {
            "new_logprobs_raw": new_logprobs,
            "vpred_raw": vpred,
            "grad_new_logprobs": gradients[0],
            "grad_vpred": gradients[1],
        }
        self.micro_batches.append({name: array(value) for name, value in fields.items()})

    def end_micro_batch(self, variables: dict) -> None:
        index = tuple(variables[f"{n}_idx"] for n in ("ppo_epoch", "minibatch", "gradient_accumulation"))
        fields = {name: variables[f"{name}_stats"][index] for name in STATISTICS}
        fields |= {
            "index": index,
            "inds": variables["micro_batch_inds"],
            "stepped": variables["accelerator"].sync_gradients,
            "entropy_t": variables["entropy"],
            "loss": variables["loss"],
        }
        others = {name for name in STATISTICS if variables[name].dtype != variables["loss"].dtype}
        assert others <= FLOAT32_IN_TRL, others
        self.micro_batches[-1] |= {name: array(value) for name, value in fields.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        out = dict(self.rollout)
        for u, fields in enumerate(self.micro_batches):
            out |= {f"{u}/{name}": value for name, value in fields.items()}
        return out | {f"metrics/{name}": array(value) for name, value in self.metrics.items() if name != "eps"}


def tokenizer(vocabulary: int, eos: int, pad: int) -> transformers.PreTrainedTokenizerFast:
    names = {eos: "<eos>", pad: "<pad>"}
    words = {names.get(i, f"t{i}"): i for i in range(vocabulary)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t1")),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )


def train(responses_of, models: dict, prompts: list[list[int]], words, seed: int, **settings) -> Recorder:
    """One call of TRL with `responses_of(policy, queries)` in the place of sampling."""

    def batch_generation(policy, queries, local_rollout_forward_batch_size, pad_token_id, generation_config):
        query_responses = torch.cat([queries, responses_of(policy, queries)], 1)
        logits = ppo_trainer.forward(policy, query_responses, pad_token_id).logits
        return query_responses, logits[:, queries.shape[1] - 1 : -1] / (settings["temperature"] + 1e-7)

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    theirs, ppo_trainer.batch_generation = ppo_trainer.batch_generation, batch_generation
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = PPOConfig(
                output_dir=folder,
                seed=seed,
                total_episodes=settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"],
                num_sample_generations=0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **settings,
            )
            trainer = PPOTrainer(
                args=arguments,
                processing_class=words,
                train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
                **models,
            )
            np.random.seed(seed)  # of the permutations; `seed` in the arguments does not reach them
            return Recorder(trainer)
    finally:
        ppo_trainer.batch_generation = theirs


@dataclasses.dataclass(frozen=True)
class Case:
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    whiten_rewards: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    temperature: float = 0.7
    missing_eos_penalty: float | None = None
    num_mini_batches: int = 1
    gradient_accumulation_steps: int = 1
    learning_rate: float = 0.003
    stop: int | None = 1  # the EOS of `Case`, STOP or None
    eos: int = 1
    pad: int = 23
    rows: int = 8
    length: int = 6
    layout: str = "mixed"
    filler: str = "stop"  # what follows the stop token: "stop", "pad" or "junk"
    score_scale: float = 1.0
    batches_in_dataset: int = 1  # on the last one accelerate steps after every micro-batch

    def ppo_settings(self) -> dict:
        fields = dataclasses.asdict(self)
        ours = ("stop", "eos", "pad", "rows", "length", "layout", "filler", "score_scale", "batches_in_dataset")
        return {name: value for name, value in fields.items() if name not in ours} | {
            "stop_token_id": self.stop if self.stop != self.eos else None,
            "stop_token": "eos" if self.stop == self.eos else None,
            "num_ppo_epochs": 2,
            "per_device_train_batch_size": self.rows // self.gradient_accumulation_steps,
        }


# The column of the stop token, row by row and then again from the first; None for a row that has none.
LAYOUTS = {
    "mixed": (None, 0, -1, 2, -2, None, 1, 3),
    "no_eos": (None,),
    "eos_first": (0,),
    "eos_last": (-1,),
    "eos_before_last": (-2,),
    "short": (1, 0, 0, 2),
    "some_first": (0, None, 0, 3, None),
    "one_token": (None, 0, 0),
}

CASES = {
    "defaults": Case(),
    "k3": Case(kl_estimator="k3"),
    "k3_strong": Case(kl_estimator="k3", kl_coef=0.5),
    "k1_strong": Case(kl_coef=0.5),
    "no_kl": Case(kl_coef=0.0),
    "no_kl_k3": Case(kl_coef=0.0, kl_estimator="k3"),
    "whiten": Case(whiten_rewards=True),
    "whiten_k3": Case(whiten_rewards=True, kl_estimator="k3", kl_coef=0.5),
    "whiten_short": Case(whiten_rewards=True, layout="short", missing_eos_penalty=1.0),
    "whiten_large": Case(whiten_rewards=True, score_scale=1e3),
    "whiten_no_stop": Case(whiten_rewards=True, stop=None, filler="junk"),
    "whiten_eos_last": Case(whiten_rewards=True, layout="eos_last"),
    "whiten_minibatches": Case(whiten_rewards=True, rows=16, num_mini_batches=2),
    "no_stop": Case(stop=None, filler="junk"),
    "no_stop_penalty": Case(stop=None, filler="junk", missing_eos_penalty=1.0),
    "no_stop_pads": Case(stop=None, filler="pad", missing_eos_penalty=1.0),
    "other_stop": Case(stop=STOP),
    "other_stop_penalty": Case(stop=STOP, missing_eos_penalty=1.0, filler="junk"),
    "other_stop_pads": Case(stop=STOP, missing_eos_penalty=1.0, filler="pad", whiten_rewards=True),
    "penalty": Case(missing_eos_penalty=1.0),
    "penalty_no_eos": Case(missing_eos_penalty=1.0, layout="no_eos"),
    "penalty_some_first": Case(missing_eos_penalty=1.0, layout="some_first", filler="pad"),
    "junk_after_eos": Case(filler="junk"),
    "pads_after_eos": Case(filler="pad"),
    "pad_is_0": Case(pad=0, eos=2, stop=2, filler="pad"),
    "eos_is_0": Case(pad=1, eos=0, stop=0, missing_eos_penalty=1.0),
    "no_eos": Case(layout="no_eos"),
    "eos_first": Case(layout="eos_first"),
    "eos_last": Case(layout="eos_last"),
    "eos_before_last": Case(layout="eos_before_last"),
    "one_token": Case(layout="one_token", length=1, missing_eos_penalty=1.0),
    "one_token_whiten": Case(layout="one_token", length=1, whiten_rewards=True),
    "two_tokens": Case(layout="some_first", length=4, gamma=0.9),
    "three_rows": Case(rows=3, layout="mixed", length=9),
    "cold": Case(temperature=0.3),
    "warm": Case(temperature=1.0),
    "hot": Case(temperature=1.7, kl_estimator="k3"),
    "discount": Case(gamma=0.9),
    "monte_carlo": Case(lam=1.0),
    "one_step": Case(lam=0.0),
    "discount_one_step": Case(gamma=0.9, lam=0.0, layout="no_eos"),
    "narrow": Case(cliprange=0.1, cliprange_value=0.1),
    "value_clip_wide": Case(cliprange_value=1.0),
    "strong_value_loss": Case(vf_coef=1.0, score_scale=3.0),
    "no_value_loss": Case(vf_coef=0.0),
    "large_scores": Case(score_scale=1e3, missing_eos_penalty=1.0),
    "small_scores": Case(score_scale=1e-3, kl_coef=0.5),
    "fast": Case(learning_rate=0.05),
    "accumulate": Case(gradient_accumulation_steps=2, batches_in_dataset=2),
    "accumulate_last_batch": Case(gradient_accumulation_steps=2),
    "accumulate_whiten": Case(gradient_accumulation_steps=2, batches_in_dataset=2, whiten_rewards=True),
    "minibatches": Case(num_mini_batches=2),
    "minibatches_accumulate": Case(num_mini_batches=2, gradient_accumulation_steps=2, batches_in_dataset=2),
    "minibatches_accumulate_4": Case(num_mini_batches=2, gradient_accumulation_steps=4, batches_in_dataset=2),
}

CHOICES = {
    "kl_coef": (0.0, 0.05, 0.5),
    "kl_estimator": ("k1", "k3"),
    "whiten_rewards": (False, True),
    "gamma": (1.0, 0.9),
    "lam": (0.95, 1.0, 0.0),
    "cliprange": (0.1, 0.2),
    "cliprange_value": (0.1, 0.2, 0.5),
    "vf_coef": (0.1, 0.5),
    "temperature": (0.3, 0.7, 1.0, 1.7),
    "missing_eos_penalty": (None, 1.0),
    "stop": (1, 1, None, STOP),
    "filler": ("stop", "junk"),
    "layout": ("mixed", "some_first"),
    "score_scale": (1.0, 1e3),
    "length": (5, 7),
}


def cases() -> dict[str, Case]:
    """Returns the named ones, and some that mix the settings at random."""
    random = np.random.default_rng(0)
    picks = [{k: values[random.integers(len(values))] for k, values in CHOICES.items()} for _ in range(14)]
    return CASES | {f"mix_{i}": Case(**pick) for i, pick in enumerate(picks)}


def responses(case: Case, random: np.random.Generator) -> np.ndarray:
    ordinary = [i for i in range(VOCABULARY) if i not in (case.eos, case.pad, STOP)]
    out = random.choice(ordinary, (case.rows, case.length))
    stop = case.eos if case.stop is None else case.stop
    for row, column in zip(out, itertools.cycle(LAYOUTS[case.layout]), strict=False):
        if case.stop == STOP:
            row[random.integers(case.length)] = case.eos
        if column is not None:
            row[column] = stop
            rest = row[column:][1:]
            rest[:] = {"stop": stop, "pad": case.pad, "junk": rest}[case.filler]
    return out


def prompts(random: np.random.Generator, tokens: list[int], lengths: tuple[int, ...], count: int) -> list[list[int]]:
    return [random.choice(tokens, n).tolist() for n in itertools.islice(itertools.cycle(lengths), count)]


def gpt2(kind: type, case: Case, random: np.random.Generator) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        num_labels=1,
        bos_token_id=case.eos,
        eos_token_id=case.eos,
        pad_token_id=case.pad,
    )
    model = kind.from_config(config).double()
    for name, parameter in sorted(model.named_parameters()):
        parameter.data = torch.tensor(random.normal(float("ln_" in name and "weight" in name), 0.4, parameter.shape))
    return model


def near(model: transformers.PreTrainedModel, random: np.random.Generator) -> transformers.PreTrainedModel:
    """Returns a reference policy that differs a little."""
    other = copy.deepcopy(model).eval()
    for _, parameter in sorted(other.named_parameters()):
        parameter.data += torch.tensor(random.normal(0, 0.03, parameter.shape))
    return other


def run_case(name: str, case: Case) -> dict[str, np.ndarray]:
    seed = zlib.crc32(name.encode()) % 2**31
    random = np.random.default_rng(seed)
    policy = gpt2(transformers.AutoModelForCausalLM, case, random)
    value = gpt2(transformers.AutoModelForSequenceClassification, case, random)
    reward = gpt2(transformers.AutoModelForSequenceClassification, case, random)
    reward.score.weight.data *= case.score_scale
    ordinary = [i for i in range(VOCABULARY) if i not in (case.eos, case.pad, STOP)]
    chosen = torch.tensor(responses(case, random))
    settings = case.ppo_settings()
    recorder = train(
        lambda policy, queries: chosen,
        {"model": policy, "ref_model": near(policy, random), "value_model": value, "reward_model": reward},
        prompts(random, ordinary, (4, 2, 4, 3), case.rows * case.batches_in_dataset),
        tokenizer(VOCABULARY, case.eos, case.pad),
        seed,
        **settings,
    )
    arrays = recorder.arrays()
    del arrays["queries"]
    check(name, recorder)
    return {f"{name}/{k}": v for k, v in (described(settings, case.eos, case.pad, case.stop) | arrays).items()}


def described(settings: dict, eos: int, pad: int, stop: int | None) -> dict[str, np.ndarray]:
    """Returns the settings as numbers."""
    penalty = settings["missing_eos_penalty"]
    numbers = {name: value for name, value in settings.items() if name not in ("stop_token", "stop_token_id")} | {
        "kl_estimator": ("k1", "k3").index(settings["kl_estimator"]),
        "missing_eos_penalty": np.nan if penalty is None else penalty,
        "stop_token_id": -1 if stop is None else stop,
        "eos_id": eos,
        "pad_id": pad,
    }
    return {name: array(value) for name, value in numbers.items()}


def check(name: str, recorder: Recorder) -> None:
    """Everything is float64 and finite; prints how much the last micro-batch clips."""
    everything = recorder.arrays()
    other = {k: v.dtype for k, v in everything.items() if v.dtype not in (np.float64, np.int32, bool)}
    assert not other, other
    assert all(np.isfinite(v).all() for v in everything.values())
    policy, value = (recorder.micro_batches[-1][f"{kind}_clipfrac"] for kind in ("pg", "vf"))
    print(f"{name}: clips {policy:.2f} of the policy loss and {value:.2f} of the value loss", flush=True)


def llama(kind: type, seed: int, pad: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        num_labels=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad,
    )
    model = kind.from_config(config)
    random = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        centre, width = (1.0, 0.2) if parameter.ndim == 1 else (0.0, 1.5 / parameter.shape[1] ** 0.5)
        width = 1.0 if "embed_tokens" in name else width
        parameter.data = torch.tensor(random.normal(centre, width, parameter.shape), dtype=torch.float32)
    return model


def run_iteration(folder: pathlib.Path) -> None:
    eos, pad, length = 2, 39, 12
    policy = llama(transformers.AutoModelForCausalLM, 1, pad)
    value = llama(transformers.AutoModelForSequenceClassification, 2, pad)
    reward = llama(transformers.AutoModelForSequenceClassification, 3, pad)
    shutil.rmtree(folder, ignore_errors=True)
    for name, model in {"policy": policy, "value": value, "reward": reward}.items():
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)

    def responses_of(policy, queries):
        """Samples ordinary tokens, then ends most rows early."""
        torch.manual_seed(0)
        out = policy.generate(
            input_ids=torch.where(queries == pad, 0, queries),
            attention_mask=queries != pad,
            generation_config=transformers.GenerationConfig(
                do_sample=True, temperature=0.7, top_k=0, max_new_tokens=length, suppress_tokens=[eos, pad]
            ),
        )[:, queries.shape[1] :]
        for row, column in zip(out, (None, 5, 2, length - 1, 8, length - 2, 0, 6), strict=True):
            if column is not None:
                row[column] = eos
                row[column + 1 :] = pad
        return out

    settings = {
        "kl_coef": 0.05,
        "kl_estimator": "k1",
        "whiten_rewards": False,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "temperature": 0.7,
        "missing_eos_penalty": 1.0,
        "stop_token": "eos",
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
    }
    recorder = train(
        responses_of,
        {"model": policy, "ref_model": None, "value_model": value, "reward_model": reward},
        prompts(np.random.default_rng(0), list(range(3, pad)), (9, 4, 7, 6, 3, 8), 8),
        tokenizer(40, eos, pad),
        0,
        **settings,
    )
    arrays = described(settings, eos, pad, eos) | recorder.arrays()
    arrays["permutations"] = np.stack([fields["inds"] for fields in recorder.micro_batches])
    np.savez_compressed(folder / "iteration.npz", **arrays)
    for name, model in {"policy": policy, "value": value}.items():
        safetensors.torch.save_file(model.state_dict(), folder / f"{name}_after.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.set_default_dtype(torch.float64)
    arrays = {}
    for name, case in cases().items():
        arrays |= run_case(name, case)
    np.savez_compressed(HERE / "cases.npz", **arrays)
    torch.set_default_dtype(torch.float32)
    run_iteration(HERE / "iteration")
    packages = {module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate, np)}
    versions = {"python": platform.python_version()} | packages
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
