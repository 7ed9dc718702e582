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
import tokenizers
import torch
import transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.protocol import Channel

PACKAGES = ("trl", "torch", "transformers", "peft", "accelerate")


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


def tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A word for each id; EOS and padding come after them."""
    words = {f"t{i}": i for i in range(vocabulary)} | {"<eos>": vocabulary, "<pad>": vocabulary + 1}
    model = tokenizers.models.WordLevel(words, unk_token="t0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def main() -> None:
    """Steps until standard input ends."""
    channel = Channel()
    settings, folder = channel.settings, Path(channel.settings["folder"])
    torch.set_num_threads(settings["threads"])
    on_gpu = settings.get("device") == "cuda"
    weights = {"dtype": settings.get("dtype", "float32"), "device_map": "cuda" if on_gpu else None}
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", **weights)
    value, reward = (classifier(folder / "reward", num_labels=1, **weights) for _ in range(2))
    if settings.get("checkpointing"):
        policy.gradient_checkpointing_enable()
        value.gradient_checkpointing_enable()
        value.enable_input_require_grads()
    lora = settings["lora"]
    if lora is not None:
        of_peft = {"r": lora["rank"], "lora_alpha": lora["alpha"], "target_modules": lora["targets"]}
        if settings["critic_lora"]:
            peft.inject_adapter_in_model(peft.LoraConfig(**of_peft, exclude_modules=["score"]), value)
            value.score.requires_grad_(True)
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
            local_rollout_forward_batch_size=settings.get("rollout_rows", 64),
            response_length=settings["response"],
            total_episodes=rows * 1_000_000,
            num_sample_generations=0,
            seed=settings["seed"],
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,  # where it is wanted, the models have it already
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        processing_class=tokenizer(settings["vocabulary"]),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        callbacks=[gate],
        peft_config=lora,
    )
    watch(gate, trainer)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    channel.tell(versions=versions, trained=trained, device=device)
    trainer.train()


if __name__ == "__main__":
    main()
