"""Writes smollm2.npz: what PyTorch transformers computes on the quickstart GGUF.

Runs in an environment of its own (Python 3.11, torch 2.13.0, transformers 5.23.0, gguf 0.19.0):

    python tests/golden/make_smollm2.py FOLDER_WITH_THE_GGUF

Holds, for five prompts of different lengths in one left-padded batch: token ids, attention mask, the greedy
continuation of 32 tokens, and the logits of every prompt position for 256 vocabulary entries plus their logsumexp.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "The",
    "This film was",
    "Write one sentence about why dogs are friendly.",
    "In 1969, 3 astronauts flew 384400 km to the Moon; the first words spoken there were",
    "I went into this movie expecting very little, because the trailer was dull and the reviews were mixed, but after "
    "the first twenty minutes I was completely absorbed, and by the end",
]


def main(folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in PROMPTS]
    longest = max(map(len, ids))
    tokens = torch.tensor([[0] * (longest - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=32, pad_token_id=0, eos_token_id=None
        )
    vocabulary = np.sort(np.random.default_rng(0).choice(logits.shape[-1], 256, replace=False))
    np.savez_compressed(
        pathlib.Path(__file__).with_name("smollm2.npz"),
        prompts=np.array(PROMPTS),
        tokens=tokens.numpy().astype(np.int32),
        mask=mask.numpy().astype(bool),
        continuation=out[:, longest:].numpy().astype(np.int32),
        vocabulary=vocabulary.astype(np.int32),
        logits=logits[..., torch.from_numpy(vocabulary)].numpy(),
        logsumexp=logits.logsumexp(-1).numpy(),
        versions=np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"]),
    )


if __name__ == "__main__":
    main(sys.argv[1])
