import pytest

from dspark.errors import RecipeError
from dspark.training.recipe import RECIPES, DrafterRecipe, TargetRecipe, load_recipe

MINIMAL = """
kind: drafter
target: some/where
samples: {paths: [a.jsonl]}
run: {output_dir: out, steps: 10}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.yaml")))
def test_bundled_recipes_are_valid(name):
    assert isinstance(load_recipe(name), TargetRecipe | DrafterRecipe)


def test_defaults_are_the_papers(minimal):
    recipe = load_recipe(str(minimal))
    assert isinstance(recipe, DrafterRecipe)
    assert (recipe.loss.ce, recipe.loss.tv, recipe.loss.confidence) == (0.1, 0.9, 1.0)
    assert (recipe.drafter.num_layers, recipe.drafter.block_size) == (5, 7)
    assert recipe.drafter.markov_rank == 256


def test_overrides_reach_nested_keys(minimal):
    recipe = load_recipe(str(minimal), ["run.steps=3", "samples.paths=[x, y]", "loss.ce=1.0"])
    assert recipe.run.steps == 3
    assert recipe.samples.paths == ("x", "y")
    assert recipe.loss.ce == 1.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.stepz=3", "run.stepz"),
        ("speed=3", "speed"),
        ("run.row_tokens=64", "no key 'run.row_tokens'"),
        ("run.compile=true", "no key 'run.compile'"),
        ("run.steps=none", "run.steps"),
        ("run.steps=0", "run.steps"),
        ("optimiser.learning_rate=-1", "learning_rate"),
        ("run.steps", "not of the form key=value"),
        ("target.deeper=1", "goes below a value"),
        ("kind=painter", "painter"),
    ],
)
def test_what_does_not_fit_is_named(minimal, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(minimal), [override])


@pytest.mark.parametrize(
    ("algorithm", "override", "said"),
    [
        ("dflash", "drafter.markov_rank=64", "recipe for dflash has no key 'drafter.markov_rank'"),
        ("dflash", "drafter.confidence_head=true", "drafter.confidence_head"),
        ("dflash", "loss.tv=0.9", "loss.tv"),
        ("eagle3", "drafter.num_layers=2", "recipe for eagle3 has no key 'drafter.num_layers'"),
        ("eagle3", "drafter.block_size=7", "drafter.block_size"),
        ("eagle3", "samples.num_anchors=8", "samples.num_anchors"),
        ("eagle3", "loss.decay=4", "loss.decay"),
        ("mtp", "drafter.ttt_length=2", "recipe for mtp has no key 'drafter.ttt_length'"),
        ("mtp", "drafter.target_layer_ids=[1]", "drafter.target_layer_ids"),
        ("mtp", "loss.step_loss_decay=0.5", "no key 'loss'"),
        ("dspark", "drafter.ttt_length=2", "recipe for dspark has no key 'drafter.ttt_length'"),
        ("medusa", "run.steps=1", "algorithm is 'medusa', but .* dspark, dflash, eagle3, mtp"),
        ("[mtp]", "run.steps=1", "algorithm is"),
    ],
)
def test_what_contradicts_the_algorithm_is_named(minimal, algorithm, override, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(str(minimal), [f"algorithm={algorithm}", override])


@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_layers_are_named_in_one_way(minimal, algorithm):
    both = ["drafter.num_taps=3", "drafter.target_layer_ids=[0, 1, 2]", f"algorithm={algorithm}"]
    with pytest.raises(RecipeError, match=r"drafter: num_taps \(3\) says nothing beside target_la"):
        load_recipe(str(minimal), both)
    assert load_recipe(str(minimal), both[1:]).drafter.taps(12) == (0, 1, 2)
    assert load_recipe(str(minimal), both[::2]).drafter.taps(12) == (1, 5, 9)
    assert len(load_recipe(str(minimal), both[2:]).drafter.taps(12)) == 5


def test_missing_recipe_lists_the_bundled_ones():
    with pytest.raises(RecipeError, match="bundled_target"):
        load_recipe("nonsense")


def test_invalid_yaml_and_a_bare_list(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(str(path))
    path.write_text("- 1\n")
    with pytest.raises(RecipeError, match="no mapping"):
        load_recipe(str(path))
