"""Each setting says in `help()` what it means."""

import dataclasses
import inspect
from dataclasses import dataclass

import pytest

import factsmith as fs
from factsmith.core.documented import documented

CONFIGS = [
    fs.RomeConfig,
    fs.MemitConfig,
    fs.EmmetConfig,
    fs.AlphaEditConfig,
    fs.FineTuneConfig,
    fs.LoraConfig,
]


@dataclass
class Parent:
    """The parent."""

    rate: float = 0.5
    """How fast it learns."""
    silent: int = 3


@documented
@dataclass
class Child(Parent):
    """The child."""

    steps: int = 20
    """How many steps
    it takes."""
    rate: float = 0.1


def test_a_setting_has_its_type_its_default_and_its_meaning() -> None:
    text = inspect.getdoc(Child)
    assert text is not None and text.startswith("The child.\n\nSettings:\n")
    assert "steps: int = 20\n        How many steps it takes." in text
    assert "rate: float = 0.1\n        How fast it learns." in text, "the child's default"
    assert "silent" not in text and "20" not in (Parent.__doc__ or "")


@pytest.mark.parametrize("config", CONFIGS)
def test_help_explains_every_setting(config: type) -> None:
    text = inspect.getdoc(config) or ""
    names = [field.name for field in dataclasses.fields(config)]
    assert names and [name for name in names if f"\n    {name}: " not in text] == []
