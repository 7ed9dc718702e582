"""TRL's PPOTrainer on the quickstart's task, as a worker of `benchmarks.time_to_reward`; see `trl_ppo`."""

import json
import tempfile
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import torch
import transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.peers.protocol import Channel
from benchmarks.peers.trl_ppo import QUIET, Gate, adapt_critic, run, watch

# Of a Llama; peft takes no "all-linear" where only some layers are adapted.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Judge(torch.nn.Module):
    """A reward model in the form that TRL calls: its hidden states are the tokens, and a server has the scores."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer, url: str):
        super().__init__()
        self.tokenizer, self.url, self.context_length = tokenizer, url, 0

    def backbone(self, input_ids, **_):
        """What `score` needs to see."""
        return SimpleNamespace(hidden_states=(input_ids[..., None].double(),))

    def score(self, hidden):
        """The score of each row's response, at every position."""
        ids = hidden[..., 0].long()
        texts = self.tokenizer.batch_decode(ids[:, self.context_length :], skip_special_tokens=True)
        request = urllib.request.Request(self.url, json.dumps(texts).encode())
        with urllib.request.urlopen(request) as answer:
            scores = torch.tensor(json.load(answer), device=ids.device)
        return scores[:, None, None].expand(*ids.shape, 1)


def main() -> None:
    """Steps until standard input ends."""
    channel = Channel()
    settings, folder = channel.settings, Path(channel.settings["folder"])
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(settings["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    weights = {"dtype": torch.float32}
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", **weights)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained
    value = classifier(folder / "policy", num_labels=1, **weights)
    layers = policy.config.num_hidden_layers
    adapted = list(range(layers - settings["layers"], layers))
    lora = settings["lora"] | {"target_modules": PROJECTIONS, "layers_to_transform": adapted}
    adapt_critic(value, peft.LoraConfig(**lora, exclude_modules=["score"]))
    judge = Judge(tokenizer, settings["url"])
    gate = Gate(channel)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(dir=folder),
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            per_device_train_batch_size=settings["rows"],
            response_length=settings["response_length"],
            stop_token="eos",
            total_episodes=settings["rows"] * settings["iterations"],
            use_cpu=not on_gpu,
            bf16=False,
            gradient_checkpointing=False,
            **QUIET,
            **settings["numbers"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=judge,
        value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": json.loads((folder / "prompts.json").read_text())}),
        callbacks=[gate],
        peft_config=peft.LoraConfig(**lora, task_type="CAUSAL_LM"),
    )
    watch(gate, trainer)
    watched = ppo_trainer.get_reward

    def with_context(model, query_responses, pad_token_id, context_length):
        judge.context_length = context_length
        return watched(model, query_responses, pad_token_id, context_length)

    ppo_trainer.get_reward = with_context
    run(channel, trainer)


if __name__ == "__main__":
    main()
