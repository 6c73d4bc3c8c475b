"""docs/reference.md is what the code says."""

import importlib.util

from tests.conftest import ROOT


def load():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_up_to_date():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == load().reference(), "run `make docs`"


def test_reference_covers_every_verb_and_field():
    page = load().reference()
    for name in ("`retort pull`", "`--draft-budget`", "| `method` | `mgsr` |", "`scrg_rounds`"):
        assert name in page
    assert "`gradient_accumulation_steps`" not in page
