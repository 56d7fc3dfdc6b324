from pathlib import Path

import pytest

from hymba.errors import HymbaError
from hymba.training import Recipe

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_house_load(path: Path) -> None:
    assert Recipe.load(path).seq_length >= 256


def test_yaml_and_changes_become_typed_fields(tmp_path: Path) -> None:
    path = write(tmp_path, "peak_lr: 2e-3\nsteps: 10\nmodel: tiny\nbetas: [0, 0.95]\n")
    recipe = Recipe.load(path, ["tokens=1e6", "model.hidden_size=64", "bf16=false"])
    assert (recipe.peak_lr, recipe.steps, recipe.tokens) == (0.002, None, 1_000_000)
    assert recipe.size == "tiny"
    assert recipe.model_changes == {"hidden_size": 64}
    assert recipe.betas == [0.0, 0.95]
    assert recipe.bf16 is False
    assert Recipe.from_mapping(recipe.to_mapping()) == recipe


@pytest.mark.parametrize(
    ("text", "changes", "complaint"),
    [
        ("peek_lr: 1\nsteps: 1", [], "unknown key 'peek_lr': did you mean 'peak_lr'?"),
        ("steps: 1", [], "peak_lr is missing"),
        ("peak_lr: fast\nsteps: 1", [], "peak_lr must be a number, not 'fast'"),
        ("peak_lr: 1\nsteps: 1.5", [], "steps must be a whole number, not 1.5"),
        ("peak_lr: 1\nsteps: 1\nbf16: 3", [], "bf16 must be true or false, not 3"),
        ("peak_lr: 1\nsteps: 1\nheld_out: a.txt", [], "held_out must be a list, not 'a.txt'"),
        ("peak_lr: 1", [], "exactly one of steps, tokens and epochs"),
        ("peak_lr: 1\nsteps: 1\nepochs: 1", [], "exactly one of steps, tokens and epochs"),
        ("peak_lr: 1\nsteps: 0", [], "steps must be above 0"),
        ("peak_lr: .nan\nsteps: 1", [], "peak_lr must be above 0"),
        ("peak_lr: 1\nsteps: 1", ["optimizer=sgd"], "optimizer must be muon or adamw, not 'sgd'"),
        ("peak_lr: 1\nsteps: 1", ["micro_rows=5"], "batch_rows (16) must be a multiple of micro_rows (5)"),
        ("peak_lr: 1\nsteps: 1", ["warmup=0.9"], "together at most 1"),
        ("peak_lr: 1e-9\nsteps: 1", [], "min_lr must lie between 0 and peak_lr"),
        ("peak_lr: 1\nsteps: 1", ["betas=[0.9]"], "betas must be two numbers"),
        ("peak_lr: 1\nsteps: 1", ["steps"], "cannot apply 'steps': write key=value"),
        ("peak_lr: 1\nsteps: 1", ["betas.a=1"], "only model has keys inside"),
        ("just words", [], "is not a recipe"),
        ("a: [", [], "cannot read recipe"),
    ],
)
def test_a_bad_recipe_is_told_in_one_line(tmp_path: Path, text: str, changes: list[str], complaint: str) -> None:
    with pytest.raises(HymbaError) as error:
        Recipe.load(write(tmp_path, text), changes)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(HymbaError, match="cannot read recipe"):
        Recipe.load(tmp_path / "none.yaml")
