"""The README's table of families and formats, made from the tests that prove its cells.

    python -m tests.support_matrix            # print it
    python -m tests.support_matrix --write    # put it into README.md

A cell is ticked where a test marked `supports(column)` runs on a case of the family; the case is the golden folder that
the test's parameter `name` or `case` names.
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- support matrix -->\n", "<!-- end -->\n"
COLUMNS = ("safetensors", "Flax msgpack", "GGUF", "export", "PEFT adapter", "reward head")
FAMILIES = {
    "llama": "Llama 1 to 3.2, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "phi3": "Phi-3, Phi-3.5 mini",
}


class _Collector:
    """Notes which family every marked test runs on."""

    def __init__(self) -> None:
        self.proved: set[tuple[str, str]] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            name = parameters.get("name", parameters.get("case"))
            for mark in item.iter_markers("supports"):
                assert mark.args[0] in COLUMNS, f"{item.nodeid}: unknown column {mark.args[0]!r}"
                self.proved.add((_family(item.path.parents[1] / "golden", str(name)), mark.args[0]))


def _family(golden: Path, name: str) -> str:
    for kind in ("families", "flax"):
        if (config := golden / kind / name / "config.json").exists():
            return json.loads(config.read_text())["model_type"]
    adapter = json.loads((golden / "adapters" / name / "adapter_config.json").read_text())
    return _family(golden, Path(adapter["base_model_name_or_path"]).name)


def table() -> str:
    """The table in Markdown."""
    collector = _Collector()
    pytest.main(
        ["--collect-only", "-o", "addopts=", "-p", "no:terminal", str(ROOT / "tests/models")], plugins=[collector]
    )
    lines = [f"| family | `model_type` | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for family, title in FAMILIES.items():
        ticks = " | ".join("✓" if (family, column) in collector.proved else " " for column in COLUMNS)
        lines.append(f"| {title} | `{family}` | {ticks} |")
    return "\n".join(lines) + "\n"


def in_readme() -> str:
    """The table as the README has it."""
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)]


if __name__ == "__main__":
    new = table()
    if "--write" in sys.argv:
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        README.write_text(before + BEGIN + new + END + rest.split(END, 1)[1], encoding="utf-8")
    print(new)
