"""A tokenizer for models of random weights, whose tokens mean nothing; both sides' environments import it."""

import tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A word for each id; EOS and padding come after them."""
    ids = {f"t{i}": i for i in range(words)} | {"<eos>": words, "<pad>": words + 1}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="t0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", padding_side="left")
