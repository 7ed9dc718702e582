"""Writes one folder per case: a tiny random decoder, and what PyTorch transformers computes with it.

Runs in an environment of its own (Python 3.11, torch 2.13.0, transformers 5.23.0, numpy 2.4.6), with the Python of a
second one (transformers 4.57.6, no torch needed) for the older spelling of the configuration, and with llama.cpp's
sources (the copy inside llama_cpp_python-0.3.36.tar.gz, `vendor/llama.cpp`) for the GGUF files:

    python tests/golden/families/make.py --transformers4 OTHER_ENVIRONMENT/bin/python --llama-cpp FOLDER [CASE ...]

Every folder holds

* `model.safetensors` and `config.json` as `save_pretrained` writes them; `config_4x.json`, the same configuration as
  transformers 4.57.6 writes it; and, for one case per architecture that llama.cpp converts, `model.gguf` (float32);
* `golden.npz`. All with eager attention in float32, V = vocabulary, D = width, L = layers; 0 at padding positions:
    - `tokens` [2, 20] without padding: `hidden` [L+1, 2, 20, D] (the last one after the final norm), `logits`;
    - `left_tokens`, `left_mask`, `left_hidden`, `left_logits` and `right_tokens`, `right_mask`, `right_logits`: row 1
      shortened to its first 14 tokens, with 6 ordinary tokens as padding on that side;
    - `packed_tokens`, `packed_segments` [1, 24]: three sequences in a row, each of them run alone for `packed_logits`;
    - `long_tokens` [1, 56], `long_hidden`, `long_logits`: beyond the window and the original context of the scaling;
    - `prompt`, `prompt_mask` [2, 8] with 3 tokens of padding on the left of row 1, `continuation` [2, 48]: greedy, with
      the cache. No padding in `llama_dynamic` and `phi3_longrope`, whose frequencies follow the longest row; only 16
      tokens in `phi3_longrope`, which stay within the original context. `llama_dynamic` also has
      `recomputed_continuation`, without the cache: cached keys keep the rotation of the length at which they were
      computed, so the two differ;
    - `score` [D] and `reward` [2]: a sequence classifier with one label on `left_tokens`, read at the last real token;
    - `gguf_logits`: `logits` under the settings that llama.cpp assumes where the GGUF cannot say what the model has;
    - `seed` of the weights: the first one whose greedy choices are clear and whose continuations do not get stuck;
    - `versions`.
"""

import argparse
import copy
import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
WINDOW = 7
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY = SPECIAL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GEMMA = TINY | {"head_dim": 12, "tie_word_embeddings": True}
GPT2 = SPECIAL | {"vocab_size": 64, "n_positions": 64, "n_ctx": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
NEOX = {k: v for k, v in TINY.items() if k != "num_key_value_heads"} | {"hidden_size": 48, "num_attention_heads": 3}
PHI3 = TINY | {"original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0, 1.05, 1.3, 1.7], "long_factor": [1.1, 1.6, 2.9, 5.3]}


def rope(theta: float = 10000.0, **scaling) -> tuple[dict, dict]:
    """Returns the two spellings, of transformers 4 and 5."""
    return (
        {"rope_theta": theta, "rope_scaling": scaling or None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling},
    )


def partial_rope(factor: float, theta_4x: str, factor_4x: str) -> tuple[dict, dict]:
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}
    return {theta_4x: 10000.0, factor_4x: factor}, {"rope_parameters": parameters}


GEMMA3_ROPE = (
    {
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
)
LONGROPE_BOTH = (
    {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope"} | LONGROPE},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0} | LONGROPE},
)

# Model type, settings of both spellings, (settings of transformers 4, settings of transformers 5).
CASES = {
    "llama": ("llama", TINY, rope()),
    "llama_theta": (
        "llama",
        TINY | {"head_dim": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
        rope(500000.0),
    ),
    "llama_bias": ("llama", TINY | {"attention_bias": True, "mlp_bias": True}, rope()),
    "llama_linear": ("llama", TINY, rope(rope_type="linear", factor=4.0)),
    "llama_dynamic": ("llama", TINY | {"max_position_embeddings": 24}, rope(rope_type="dynamic", factor=4.0)),
    "llama_llama3": (
        "llama",
        TINY | {"max_position_embeddings": 192},
        rope(
            500000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=24,
        ),
    ),
    # With heads of 8 the ramp between the kept and the stretched frequencies would be a step.
    "llama_yarn": (
        "llama",
        TINY | {"max_position_embeddings": 96, "head_dim": 16},
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=24),
    ),
    "mistral": ("mistral", TINY | {"sliding_window": WINDOW}, rope()),
    "mistral_null": ("mistral", TINY | {"sliding_window": None}, rope(1e6)),
    "qwen2": ("qwen2", TINY | {"use_sliding_window": False, "sliding_window": 4096}, rope()),
    "qwen2_sliding": (
        "qwen2",
        TINY
        | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
        | {"tie_word_embeddings": True},
        rope(),
    ),
    "qwen3": ("qwen3", TINY | {"head_dim": 12, "tie_word_embeddings": True}, rope()),
    "gemma": ("gemma", GEMMA | {"num_key_value_heads": 1}, rope()),
    "gemma2": (
        "gemma2",
        GEMMA
        | {"num_hidden_layers": 4, "sliding_window": WINDOW, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        rope(),
    ),
    "gemma3_text": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 6, "sliding_window": WINDOW, "sliding_window_pattern": 3}
        | {"query_pre_attn_scalar": 20},
        GEMMA3_ROPE,
    ),
    "gpt2": ("gpt2", GPT2, ({}, {})),
    "gpt_neox": ("gpt_neox", NEOX, partial_rope(0.25, "rotary_emb_base", "rotary_pct")),
    "gpt_neox_sequential": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False},
        partial_rope(0.25, "rotary_emb_base", "rotary_pct"),
    ),
    "phi3": ("phi3", PHI3, partial_rope(0.5, "rope_theta", "partial_rotary_factor")),
    "phi3_longrope": (
        "phi3",
        PHI3 | {"max_position_embeddings": 96, "original_max_position_embeddings": 24},
        LONGROPE_BOTH,
    ),
}
SHORT_CONTEXT = {"llama_dynamic", "phi3_longrope"}  # their frequencies follow the longest row of the batch
NO_SDPA = {"gemma2"}  # PyTorch's fused attention has no soft-cap
GGUF = ["llama", "llama_llama3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
GGUF += ["phi3"]
# What the file does not hold, as llama.cpp runs it: no window in its "llama" architecture, scores divided by
# sqrt(head_dim), every sixth layer with full attention.
GGUF_ASSUMES = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
}
CONFIG_4X = """
import json, sys
from transformers import AutoConfig
for path, model_type, settings in json.load(sys.stdin):
    AutoConfig.for_model(model_type, **settings).to_json_file(path)
"""


def config(case: str, **changes):
    model_type, both, (_, new) = CASES[case]
    return transformers.AutoConfig.for_model(model_type, **(both | new | changes))


def write_configs_4x(cases: list[str], python: str) -> None:
    jobs = []
    for case in cases:
        model_type, both, (old, _) = CASES[case]
        settings = both | old | {"dtype": "float32"}
        settings["architectures"] = json.loads((HERE / case / "config.json").read_text())["architectures"]
        jobs.append((str(HERE / case / "config_4x.json"), model_type, settings))
    subprocess.run([python, "-c", CONFIG_4X], input=json.dumps(jobs), text=True, check=True)


def centre_and_scale(name: str, shape: tuple, settings) -> tuple[float, float]:
    """Of the normal distribution: logits of about 2, attention that prefers some tokens.

    With tied embeddings the layers write more than the embedding does, or every token would predict itself.
    """
    tied, gemma = settings.tie_word_embeddings, "gemma" in settings.model_type
    if name.endswith("bias"):
        return 0.0, 0.3
    if len(shape) == 1:
        large = ("q_norm", "k_norm", *(("post_attention", "post_feedforward") if gemma else ()))
        return 1.0 - gemma + any(part in name for part in large), 0.2
    if name.endswith(("lm_head.weight", "embed_out.weight")):
        return 0.0, 2 / shape[1] ** 0.5
    if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight")):
        return 0.0, (1.5 if gemma else 2.0) / shape[1] ** 0.5 if tied else 1.0
    if name.endswith("wpe.weight"):
        return 0.0, 0.7
    gain = 1.5
    if tied and name.endswith(("o_proj.weight", "down_proj.weight", "attn.c_proj.weight")):
        gain = 4.0
    elif name.endswith(("query_key_value.weight", "attention.dense.weight", "c_attn.weight")):
        gain = 2.5
    elif name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 2.5 if gemma else 1.5
    elif name.endswith(("mlp.c_proj.weight", "dense_4h_to_h.weight")):
        gain = 1.0
    return 0.0, gain / shape[0 if ".c_" in name else 1] ** 0.5  # c_attn, c_proj, c_fc of gpt2: [in, out]


def build(case: str, seed: int):
    """Returns the model of `case` with random parameters, none of them left at its initial value."""
    model = transformers.AutoModelForCausalLM.from_config(config(case), attn_implementation="eager").float().eval()
    random = np.random.default_rng([zlib.crc32(case.encode()), seed])
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        values = random.normal(*centre_and_scale(name, shape, model.config), shape)
        parameter.data = torch.tensor(values, dtype=torch.float32)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


def forward(model, tokens: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns hidden states and logits, 0 at padding."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    attention_mask = torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        # A copy, because dynamic and long scaling remember the longest input so far.
        out = copy.deepcopy(model)(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
        )
        head = model.get_output_embeddings()(out.hidden_states[-1])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        head = cap * torch.tanh(head / cap)
    close(head.numpy()[mask], out.logits.numpy()[mask], 1e-5)  # the last hidden state is the one after the norm
    hidden = np.stack([h.numpy() for h in out.hidden_states])
    return np.where(mask[..., None], hidden, 0), np.where(mask[..., None], out.logits.numpy(), 0)


def greedy(model, prompt: np.ndarray, mask: np.ndarray, steps: int, use_cache: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens and the logits they were chosen from."""
    out = copy.deepcopy(model).generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, prompt.shape[1] :].numpy().astype(np.int32), torch.stack(out.logits, 1).numpy()


def is_clear(tokens: np.ndarray, logits: np.ndarray) -> bool:
    """Every choice by a margin that rounding does not turn over, and rows that keep moving."""
    best = np.sort(logits, axis=-1)
    moves = [len(set(row)) >= len(row) // 4 and len(set(row[-16:])) >= 4 for row in tokens.tolist()]
    return (best[..., -1] - best[..., -2]).min() >= 2e-3 and all(moves)


def find_model(case: str, prompt: np.ndarray, mask: np.ndarray, steps: int):
    """Returns the first seed with clear continuations, its model and the continuations by name."""
    for seed in itertools.count():
        model = build(case, seed)
        runs = {"continuation": greedy(model, prompt, mask, steps, True)}
        if case == "llama_dynamic":
            runs["recomputed_continuation"] = greedy(model, prompt, mask, steps, False)
        if all(is_clear(*run) for run in runs.values()):
            break
    for tokens, logits in runs.values():
        np.testing.assert_array_equal(logits.argmax(-1), tokens)
    if case != "llama_dynamic":
        # The cache changes nothing, and neither does the padding.
        tokens, logits = runs["continuation"]
        for row in range(2):
            sequence = np.concatenate([prompt[row][mask[row]], tokens[row]])[None, :-1]
            close(forward(model, sequence)[1][0, -steps:], logits[row], 1e-4)
    return seed, model, {name: tokens for name, (tokens, _) in runs.items()}


def reward(model, score: np.ndarray, tokens: np.ndarray, mask: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Returns the score of the last real token, which is also what transformers' classifier says."""
    rewards = hidden[-1][[0, 1], [np.flatnonzero(row)[-1] for row in mask]] @ score
    settings = copy.deepcopy(model.config)
    settings.num_labels = 1
    classifier = transformers.AutoModelForSequenceClassification.from_config(settings, attn_implementation="eager")
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    classifier.score.weight.data = torch.tensor(score)[None]
    attention_mask = torch.tensor(mask, dtype=torch.long)
    with torch.no_grad():
        theirs = classifier.eval()(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        ).logits
    close(rewards, theirs[:, 0].numpy(), 1e-5)  # it looks for the last token that is not 0: the last column
    return rewards


def close(actual: np.ndarray, desired: np.ndarray, atol: float) -> None:
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def check(case: str, model, arrays: dict[str, np.ndarray]) -> None:
    """Other ways to the same logits."""
    tokens, mask = arrays["left_tokens"], arrays["left_mask"]
    alone = forward(model, tokens[1:, 6:])[1][0]
    close(arrays["left_logits"][1, 6:], alone, 1e-4)
    close(arrays["right_logits"][1, :14], alone, 1e-4)
    close(arrays["logits"][1, :14], alone, 1e-4)
    if case not in NO_SDPA:
        sdpa = transformers.AutoModelForCausalLM.from_config(config(case), attn_implementation="sdpa").float().eval()
        sdpa.load_state_dict(model.state_dict())
        close(forward(sdpa, tokens, mask)[1], arrays["left_logits"], 1e-4)
        close(forward(sdpa, arrays["long_tokens"])[1], arrays["long_logits"], 1e-4)
    assert 0.5 < arrays["logits"].std() < 4, arrays["logits"].std()


def check_files(case: str) -> None:
    """Both configurations give the model of the figures."""
    folder = HERE / case
    with np.load(folder / "golden.npz") as golden:
        for name in ["config.json", "config_4x.json"]:
            settings = transformers.AutoConfig.for_model(**json.loads((folder / name).read_text()))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=settings, attn_implementation="eager", dtype=torch.float32
            ).eval()
            close(forward(model, golden["tokens"])[1], golden["logits"], 1e-6)
            close(forward(model, golden["long_tokens"])[1], golden["long_logits"], 1e-6)


def shift(tokens: np.ndarray, padding: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens with row 1 cut to make place for `padding`, and the mask."""
    out, mask, n = tokens.copy(), np.ones(tokens.shape, bool), len(padding)
    out[1] = np.concatenate([padding, tokens[1, :-n]] if left else [tokens[1, :-n], padding])
    mask[1, slice(None, n) if left else slice(-n, None)] = False
    return out, mask


def make(case: str) -> None:
    random = np.random.default_rng(zlib.crc32(case.encode()))

    def draw(*shape: int) -> np.ndarray:
        return random.integers(3, TINY["vocab_size"], shape, dtype=np.int32)

    arrays = {"tokens": draw(2, 20), "long_tokens": draw(1, 56), "prompt": draw(2, 8), "packed_tokens": draw(1, 24)}
    padding = draw(6)
    arrays["left_tokens"], arrays["left_mask"] = shift(arrays["tokens"], padding, left=True)
    arrays["right_tokens"], arrays["right_mask"] = shift(arrays["tokens"], padding, left=False)
    arrays["prompt_mask"] = np.ones((2, 8), bool)
    arrays["prompt_mask"][1, :3] = case in SHORT_CONTEXT
    arrays["packed_segments"] = np.repeat(np.array([1, 2, 3, 0], np.int32), [9, 7, 5, 3])[None]

    steps = 16 if case == "phi3_longrope" else 48
    seed, model, continuations = find_model(case, arrays["prompt"], arrays["prompt_mask"], steps)
    arrays |= continuations
    arrays["hidden"], arrays["logits"] = forward(model, arrays["tokens"])
    arrays["long_hidden"], arrays["long_logits"] = forward(model, arrays["long_tokens"])
    arrays["left_hidden"], arrays["left_logits"] = forward(model, arrays["left_tokens"], arrays["left_mask"])
    arrays["right_logits"] = forward(model, arrays["right_tokens"], arrays["right_mask"])[1]
    arrays["packed_logits"] = np.zeros((1, 24, TINY["vocab_size"]), np.float32)
    for segment in (1, 2, 3):
        member = arrays["packed_segments"][0] == segment
        arrays["packed_logits"][:, member] = forward(model, arrays["packed_tokens"][:, member])[1]
    arrays["score"] = random.standard_normal(model.config.hidden_size).astype(np.float32)
    arrays["reward"] = reward(model, arrays["score"], arrays["left_tokens"], arrays["left_mask"], arrays["left_hidden"])
    if case in GGUF_ASSUMES:
        other = transformers.AutoModelForCausalLM.from_config(
            config(case, **GGUF_ASSUMES[case]), attn_implementation="eager"
        )
        other.float().eval().load_state_dict(model.state_dict())
        arrays["gguf_logits"] = forward(other, arrays["tokens"])[1]
    check(case, model, arrays)

    folder = HERE / case
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    versions = np.array([f"torch {torch.__version__}", f"transformers {transformers.__version__}"])
    np.savez_compressed(folder / "golden.npz", **arrays, seed=np.int32(seed), versions=versions)
    print(f"{case}: seed {seed}, std of the logits {arrays['logits'].std():.2f}", flush=True)


def write_gguf(case: str, llama_cpp: pathlib.Path) -> None:
    """llama.cpp's converter, with a vocabulary of its own making instead of the tokenizer that there is not."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    import gguf
    from conversion import get_model_class

    folder = HERE / case
    special = ["<|endoftext|>", "<s>", "</s>", "<unk>"]  # the names that llama.cpp looks for in a "phi3"
    ordinary = [chr(ord("A") + i) for i in range(TINY["vocab_size"] - len(special) - 1)] + ["ab"]

    def set_vocab() -> None:
        converter.gguf_writer.add_tokenizer_model("gpt2")
        converter.gguf_writer.add_tokenizer_pre("default")
        converter.gguf_writer.add_token_list(special + ordinary)
        types = [gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * len(ordinary)
        converter.gguf_writer.add_token_types(types)
        converter.gguf_writer.add_token_merges(["a b"])  # an empty list would not be written
        gguf.SpecialVocab(converter.dir_model).add_to_gguf(converter.gguf_writer)  # ids from config.json

    with tempfile.TemporaryDirectory() as scratch:
        for name in ["config.json", "model.safetensors"]:
            shutil.copy(folder / name, scratch)
        # The Gemma 3 converter cuts the embedding to the number of tokens in this file.
        tokenizer = {"model": {"vocab": {token: i for i, token in enumerate(special + ordinary)}}, "added_tokens": []}
        pathlib.Path(scratch, "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = json.loads((folder / "config.json").read_text())
        # Its GPT-NeoX part wants `rotary_pct`, which transformers 5 no longer has.
        hparams = json.loads((folder / "config_4x.json").read_text()) if case == "gpt_neox" else None
        with torch.inference_mode():
            converter = get_model_class(settings["architectures"][0])(
                pathlib.Path(scratch),
                gguf.LlamaFileType.ALL_F32,
                folder / "model.gguf",
                eager=True,
                model_name=case,
                hparams=hparams,
            )
            converter.set_vocab = set_vocab
            converter.write()
        assert scratch.encode() not in (folder / "model.gguf").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--transformers4", required=True)
    parser.add_argument("--llama-cpp", type=pathlib.Path, required=True)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for case in arguments.cases:
        make(case)
    write_configs_4x(arguments.cases, arguments.transformers4)
    for case in arguments.cases:
        check_files(case)
        if case in GGUF:
            write_gguf(case, arguments.llama_cpp)


if __name__ == "__main__":
    main()
