"""TRL's PPOTrainer as a worker of `benchmarks.end_to_end`; runs in an environment of its own.

`train()` is called once and is as TRL wrote it; a callback holds it at the end of each step until the next is asked
for, so that the collection of garbage that ends a step counts with the one after it. Two functions of its module and a
method of its accelerator are wrapped to read clock and scores. There is no EOS to draw and no padding: the tokens that
the trainer must be given for both lie beyond the vocabulary.
"""

import importlib.metadata
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import peft
import torch
import transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.protocol import Channel
from benchmarks.peers.words import word_tokenizer

PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate")
QUIET = {"num_sample_generations": 0, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
# What a side need not be told; where checkpointing is wanted, the models have it before the trainer sees them.
DEFAULTS = {"device": "cpu", "dtype": "float32", "checkpointing": False, "rollout_rows": 64}


class Gate(transformers.TrainerCallback):
    """Answers for the step that ends, and waits for the word to begin the next."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.times: dict[str, float] = {}
        self.logs: dict[str, float] = {}
        self.scores = torch.zeros(0)

    def mark(self, name: str) -> None:
        """Reads the clock when the device has done what it was asked for, the first time in a step."""
        if name not in self.times:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times[name] = time.perf_counter()

    def begin(self) -> None:
        """Waits."""
        self.channel.wait()
        self.times = {}
        self.mark("begin")

    def on_train_begin(self, *_, **__) -> None:
        """Before the first step."""
        self.begin()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        """What TRL says of the step."""
        self.logs = logs

    def on_step_end(self, *_, **__) -> None:
        """After each step."""
        self.mark("end")
        times = self.times
        self.channel.tell(
            **{
                "seconds": times["end"] - times["begin"],
                "rollout s": times["sampled"] - times["begin"],
                "scoring s": times["scored"] - times["sampled"],
                "update s": times["end"] - times["scored"],
                "score": self.logs["objective/scores"],
                "score_std": self.scores.std(correction=0).item(),
                "kl": self.logs["objective/kl"],
                "approx_kl": self.logs["policy/approxkl_avg"],
                "entropy": self.logs["policy/entropy_avg"],
                "device peak MB": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
            }
        )
        self.begin()


def watch(gate: Gate, trainer: PPOTrainer) -> None:
    """Wraps what `train()` calls between its phases."""
    generation, get_reward, accumulate = (
        ppo_trainer.batch_generation, ppo_trainer.get_reward, trainer.accelerator.accumulate,
    )  # fmt: skip

    def watched_generation(*args):
        out = generation(*args)
        gate.mark("sampled")
        return out

    def watched_reward(model, *args):
        out = get_reward(model, *args)
        if model is trainer.reward_model:
            gate.scores = out[1]
        return out

    def watched_accumulate(*models):
        gate.mark("scored")
        return accumulate(*models)

    ppo_trainer.batch_generation, ppo_trainer.get_reward = watched_generation, watched_reward
    trainer.accelerator.accumulate = watched_accumulate


def adapt_critic(value: transformers.PreTrainedModel, lora: peft.LoraConfig) -> None:
    """Adapters for a critic, whose head is trained whole; TRL itself gives them to the policy alone."""
    peft.inject_adapter_in_model(lora, value)
    value.score.requires_grad_(True)


def run(channel: Channel, trainer: PPOTrainer) -> None:
    """Says what the trainer is, and trains."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    device = "CPU" if trainer.args.use_cpu else torch.cuda.get_device_name()
    channel.tell(versions=versions, trained=trained, device=device)
    trainer.train()


def main() -> None:
    """Steps until standard input ends."""
    channel = Channel()
    settings, folder = DEFAULTS | channel.settings, Path(channel.settings["folder"])
    torch.set_num_threads(settings["threads"])
    on_gpu = settings["device"] == "cuda"
    weights = {"dtype": settings["dtype"], "device_map": "cuda" if on_gpu else None}
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", **weights)
    value, reward = (classifier(folder / "reward", num_labels=1, **weights) for _ in range(2))
    if settings["checkpointing"]:
        policy.gradient_checkpointing_enable()
        value.gradient_checkpointing_enable()
        value.enable_input_require_grads()
    lora = settings["lora"]
    if lora is not None:
        of_peft = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
        if settings["critic_lora"]:
            adapt_critic(value, peft.LoraConfig(**of_peft, exclude_modules=["score"]))
        lora = peft.LoraConfig(**of_peft, task_type="CAUSAL_LM")
    prompts = np.load(folder / "prompts.npy").tolist()
    rows = settings["rows"]
    micro_rows = settings.get("micro_rows", rows)
    gate = Gate(channel)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(dir=folder),
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            temperature=settings["temperature"],
            kl_coef=settings["kl_coef"],
            num_ppo_epochs=settings["epochs"],
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=rows // micro_rows,
            local_rollout_forward_batch_size=settings["rollout_rows"],
            response_length=settings["response"],
            total_episodes=rows * 1_000_000,
            seed=settings["seed"],
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,
            **QUIET,
        ),
        processing_class=word_tokenizer(settings["vocabulary"]),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        callbacks=[gate],
        peft_config=lora,
    )
    watch(gate, trainer)
    run(channel, trainer)


if __name__ == "__main__":
    main()
