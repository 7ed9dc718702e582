"""`generate` of PyTorch transformers as a worker of `benchmarks.rollout`; runs in an environment of its own."""

import importlib.metadata
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.peers.protocol import Channel


def main() -> None:
    """Rollouts until standard input ends."""
    channel = Channel()
    settings, folder = channel.settings, Path(channel.settings["folder"])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=settings["dtype"])
    model.generation_config.eos_token_id = None
    prompts = torch.from_numpy(np.load(folder / "prompts.npy")).long()[: settings["rows"]]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    channel.tell(versions=versions)
    while True:
        channel.wait()
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=settings["response"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )
        channel.tell(seconds=time.perf_counter() - start, tokens=out[:, prompts.shape[1] :].numel())


if __name__ == "__main__":
    main()
