"""The example adapters are small, and say how they were made."""

from __future__ import annotations

from pathlib import Path

MEGABYTE = 1_000_000
NAMES = {
    *("bundle-gsm8k", "heads-code", "heads-general", "heads-maths"),
    *("lora-gsm8k", "lora-style", "private-gsm8k"),
}


def test_their_folders_take_less_than_20_megabytes(example_adapters: Path) -> None:
    assert {path.name for path in example_adapters.iterdir()} == NAMES
    sizes = {path: path.stat().st_size for path in example_adapters.rglob("*")}
    assert sum(sizes.values()) < 20 * MEGABYTE
    private = sum(size for path, size in sizes.items() if path.parent.name == "private-gsm8k")
    assert private < MEGABYTE


def test_their_cards_name_base_licence_and_command(example_adapters: Path) -> None:
    for name in NAMES:
        card = (example_adapters / name / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: ")
        assert f"# {name}: " in card and "## Data and licence" in card and "## Measured" in card
        assert "\n    lorastack train heads" in card or "\n    python make_" in card, name
