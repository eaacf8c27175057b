"""The table of what may differ on resume is complete, documented and used."""

from pathlib import Path

import pytest

from looplm_jax import codec, resume
from looplm_jax.recipes import RECIPES, named_recipe

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_every_recipe_has_a_rule(name):
    assert [leaf.path for leaf in codec.leaves(named_recipe(name)) if resume.rule_of(leaf.path) is None] == []


def test_every_rule_is_about_some_field():
    paths = {leaf.path for name in RECIPES for leaf in codec.leaves(named_recipe(name))} | {"tokenizer"}
    used = {resume.rule_of(path) for path in paths}
    assert [rule for rule in resume.RULES if rule not in used] == []


def test_the_table_is_that_of_the_documentation():
    assert resume.markdown() in DESIGN.read_text()


def test_a_field_without_a_rule_must_be_the_same():
    assert not resume.may_differ("new")
