"""Recipes: which layer wins, where every value came from, and errors that say what was meant."""

from pathlib import Path

import pytest

from protocol.errors import SettingsError
from protocol.objectives import OBJECTIVES
from protocol.recipe import resolve
from protocol.recipe_keys import all_keys, describe, nearest
from protocol.settings import Settings

MINIMAL = '[run]\nname = "x"\n[model.toy]\n'


def recipe(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def problems(path: Path, *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        resolve(path, overrides, environ)
    return str(caught.value).splitlines()


def test_later_layers_win_and_origins_say_so(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + "[buffer]\nmax_lag = 1\nlease_seconds = 7\n")
    environ = {"VESPO_BUFFER__MAX_LAG": "2", "VESPO_BUFFER__MAX_ATTEMPTS": "9"}
    resolved = resolve(path, ["buffer.max_lag=3"], environ)
    assert resolved.settings.buffer.max_lag == 3
    assert resolved.settings.buffer.max_attempts == 9
    assert resolved.settings.buffer.lease_seconds == 7
    assert resolved.origins["buffer.max_lag"] == "command line"
    assert resolved.origins["buffer.max_attempts"] == "environment VESPO_BUFFER__MAX_ATTEMPTS"
    assert resolved.origins["buffer.lease_seconds"] == f"recipe {path}"
    assert resolved.origins["buffer.reconnect_seconds"] == "default"


def test_every_setting_has_a_row_with_origin_and_meaning(tmp_path: Path) -> None:
    shown: set[str] = set()
    for objective in [*OBJECTIVES, "mine:f"]:
        rows = resolve(recipe(tmp_path), [f"objective.name={objective}", "model.lora.rank=8"], {}).rows()
        shown |= {row.key for row in rows}
        assert all(row.doc for row in rows)
    assert set(all_keys()) <= shown


def test_nested_sections_from_the_environment(tmp_path: Path) -> None:
    settings = resolve(recipe(tmp_path), [], {"VESPO_MODEL__TOY__HIDDEN_SIZE": "64"}).settings
    assert settings.model.toy is not None
    assert settings.model.toy.hidden_size == 64


def test_variables_of_other_tools_are_left_alone(tmp_path: Path) -> None:
    environ = {"VESPO_SERVICE_HOST": "10.0.0.1", "VESPO_PORT_6379_TCP_ADDR": "x", "VESPOX__A": "1"}
    assert resolve(recipe(tmp_path), [], environ).settings.run.name == "x"


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("actors.top_p", "task.top_p"),
        ("learner.lr", "learner.learning_rate"),
        ("model.pathh", "model.path"),
        ("steps", "run.steps"),
        ("bufer.maxlag", "buffer.max_lag"),
        ("toy.hidden_size", "model.toy.hidden_size"),
    ],
)
def test_the_nearest_key_is_the_one_that_was_meant(wrong: str, meant: str) -> None:
    assert nearest(wrong) == meant


def test_unknown_keys_of_every_layer_are_reported_at_once(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + "[actors]\ntop_p = 1\n[lerner]\nlearning_rate = 1\n")
    lines = problems(path, "model.toy.hidden_sise=3", VESPO_RUN__NAM="y")
    assert f"recipe {path}: unknown key actors.top_p; did you mean task.top_p?" in lines
    assert any("unknown section [lerner]" in line and "learner.learning_rate" in line for line in lines)
    assert "command line: unknown key model.toy.hidden_sise; did you mean model.toy.hidden_size?" in lines
    assert "environment VESPO_RUN__NAM: unknown key run.nam; did you mean run.name?" in lines


def test_a_key_like_no_other_gets_the_list_of_its_section(tmp_path: Path) -> None:
    (line,) = problems(recipe(tmp_path), "metrics.zzz=1")
    assert "metrics.learner_port" in line


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("task.group_size=1", "greater than or equal to 2"),
        ("objective.k_pos=0.5", "second moment"),
        ("task.top_p=0.9", "biased"),
        ("buffer.hard_max_lag=1", "max_lag"),
        ("run.seed=abc", "valid integer"),
        ('learner.adam_betas=[0.9,"x"]', "valid number"),
    ],
)
def test_invalid_values_name_key_and_origin(tmp_path: Path, override: str, fragment: str) -> None:
    (line,) = problems(recipe(tmp_path), override)
    assert override.partition("=")[0].rpartition(".")[2] in line
    assert "command line" in line
    assert fragment in line


def test_a_rule_about_several_sections_names_what_was_given(tmp_path: Path) -> None:
    (line,) = problems(recipe(tmp_path), "model.reference=other")
    assert line.startswith("model.reference is used by nothing while objective.kl_coefficient is 0")
    assert line.endswith("(model.reference from command line)")


def test_several_invalid_values_are_reported_at_once(tmp_path: Path) -> None:
    lines = problems(recipe(tmp_path), "task.group_size=1", "objective.k_neg=0", "run.steps=0", "nonsense")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "fragment"),
    [("[run\n", "line 1"), ("a = 1\na = 2\n", "line 2"), ("", "model is missing"), ("[model]\n", "exactly one of")],
)
def test_broken_recipes_say_what_and_where(tmp_path: Path, text: str, fragment: str) -> None:
    path = recipe(tmp_path, text)
    lines = problems(path)
    assert fragment in lines[0]


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.toml") == [f"recipe {tmp_path / 'no.toml'} does not exist"]
    assert "cannot be read" in problems(tmp_path)[0]


def test_sections_do_not_take_values(tmp_path: Path) -> None:
    assert "is a section" in problems(recipe(tmp_path), "buffer=3")[0]
    assert "is a section" in problems(recipe(tmp_path, "run = 3\n" + "[model.toy]\n"))[0]


def test_values_are_toml_or_plain_text(tmp_path: Path) -> None:
    settings = resolve(
        recipe(tmp_path),
        ["run.name=2024", "task.options.path=a b.json", "task.options.n=[1, 2]", "buffer.url=redis://h/0"],
        {"VESPO_TASK__OPTIONS": "{deep = {er = true}}"},
    ).settings
    assert settings.run.name == "2024"
    assert settings.task.options == {"path": "a b.json", "n": [1, 2], "deep": {"er": True}}
    assert settings.buffer.url == "redis://h/0"


def test_an_empty_value_returns_to_the_default(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + '[buffer]\nurl = "redis://h"\n')
    resolved = resolve(path, ["buffer.url="], {})
    assert resolved.settings.buffer.url is None
    assert resolved.origins["buffer.url"] == "default"


def test_a_model_path_replaces_the_toy_of_an_earlier_layer(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    settings = resolve(path, ["model.path=/models/a"], {"VESPO_MODEL__TOY__NUM_LAYERS": "3"}).settings
    assert (settings.model.path, settings.model.toy) == ("/models/a", None)
    back = resolve(path, ["model.toy.num_layers=1"], {"VESPO_MODEL__PATH": "/models/a"}).settings
    assert back.model.path is None
    assert back.model.toy is not None
    both = recipe(tmp_path, MINIMAL + '[model]\npath = "/a"\n')
    assert "exactly one" in problems(both)[0]


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    overrides = ["buffer.url=redis://u:hunter2@h/0", "task.options.api_key=hunter2"]
    rows = {row.key: row.value for row in resolve(recipe(tmp_path), overrides, {}).rows()}
    assert rows["buffer.url"] == "redis://u:***@h/0"
    assert rows["task.options.api_key"] == "***"
    query = resolve(recipe(tmp_path), ["buffer.url=redis://h/0?password=hunter2&db=1"], {}).rows()
    assert not any("hunter2" in str(row.value) for row in query)


def test_secrets_are_not_in_error_messages(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + '[buffer]\nurl = ["redis://u:hunter2@h/0"]\n')
    assert "hunter2" not in "\n".join(problems(path))


def test_meanings_come_from_the_settings() -> None:
    assert describe(("task", "group_size")).startswith("Completions per prompt")
    assert describe(("task", "options", "anything")) == ""


def test_the_shipped_recipe_resolves() -> None:
    settings = resolve(Path(__file__).parents[2] / "deploy/recipes/arithmetic.toml", [], {}).settings
    assert settings.run.name == "arithmetic"


def objective(path: Path, *overrides: str, **environ: str) -> dict[str, object]:
    settings = resolve(path, overrides, environ).settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings  # as the processes of a run get it
    return {"name": settings.objective.name} | settings.objective.hyperparameters()


def test_the_objective_is_chosen_by_its_name(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + '[objective]\nname = "grpo"\nclip_low = 0.1\n')
    chosen = {"name": "grpo", "clip_low": 0.1, "clip_high": 0.28, "dual_clip": 3.0}
    assert objective(path) == chosen
    assert objective(path, "objective.dual_clip=off") == chosen | {"dual_clip": None}
    assert objective(path, VESPO_OBJECTIVE__CLIP_HIGH="0.5") == chosen | {"clip_high": 0.5}
    assert objective(path, "objective.clip_low=") == chosen | {"clip_low": 0.2}
    assert objective(recipe(tmp_path), VESPO_OBJECTIVE__K_POS="2.5")["k_pos"] == 2.5
    assert objective(recipe(tmp_path), "objective={name='tis', ratio_max=3}") == {"name": "tis", "ratio_max": 3.0}


def test_only_the_chosen_objective_is_shown(tmp_path: Path) -> None:
    resolved = resolve(recipe(tmp_path), ["objective.name=sapo", "objective.tau_pos=2"], {})
    origins = {key: origin for key, origin in resolved.origins.items() if key.startswith("objective.")}
    assert origins["objective.tau_pos"] == "command line"
    assert origins["objective.tau_neg"] == "default"
    assert "objective.k_pos" not in origins
    assert {row.key for row in resolved.rows() if row.key.startswith("objective.")} == origins.keys()


def test_hyperparameters_go_with_the_objective_that_a_later_layer_replaces(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + "[objective]\nk_pos = 4\nnormalise_std = true\n")
    assert objective(path, "objective.name=reinforce") == {"name": "reinforce"}
    assert resolve(path, ["objective.name=reinforce"], {}).settings.objective.normalise_std
    assert objective(path, "objective.name=vespo")["k_pos"] == 4
    gspo = objective(path, "objective.name=gspo", VESPO_OBJECTIVE__NAME="grpo", VESPO_OBJECTIVE__CLIP_LOW="0.3")
    assert gspo == {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}
    later = objective(path, "objective.clip_low=0.1", VESPO_OBJECTIVE__NAME="gspo", VESPO_OBJECTIVE__CLIP_LOW="0.3")
    assert later["clip_low"] == 0.1


def test_an_objective_of_ones_own_takes_options(tmp_path: Path) -> None:
    path = recipe(tmp_path, MINIMAL + '[objective]\nname = "mine.losses:soft"\n[objective.options]\nbeta = 0.1\n')
    assert objective(path, "objective.options.kind=a b") == {"name": "mine.losses:soft", "beta": 0.1, "kind": "a b"}
    assert objective(path, "objective.name=vespo")["name"] == "vespo"
    assert "objective.options.beta" not in resolve(path, ["objective.name=vespo"], {}).origins


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            ["objective.clip_low=0.1"],
            ["objective.clip_low", "command line", "not a setting of vespo but of grpo, gspo"],
        ),
        (["objective.name=grpo", "objective.k_pos=2"], ["objective.k_pos", "it has clip_low, clip_high, dual_clip"]),
        (["objective.name=grpo", "objective.clip_hig=1"], ["unknown key", "did you mean objective.clip_high?"]),
        (["objective.name=tis", "objective.ratio_min=1"], ["did you mean ratio_max?"]),
        (["objective.name=reinforce", "objective.k_pos=2"], ["not a setting of reinforce", "it has none"]),
        (["objective.options.beta=1"], ["objective.options (command line)", "not a setting of vespo"]),
        (["objective.name=a:b", "objective.beta=1"], ["unknown key objective.beta"]),
        (["objective.name=a:b", "objective.k_pos=1"], ["not a setting of a:b but of vespo", "it has options"]),
        (["objective.name=vespa"], ["no such objective, the nearest is vespo", "package.module:function"]),
        (["objective.name=a:"], ["no such objective"]),
        (["objective.k_neg=0.99"], ["greater than or equal to 1", "second moment"]),
        (["objective.lambda_pos=0"], ["greater than 0"]),
        (["objective.name=grpo", "objective.dual_clip=1"], ["greater than 1", '"off"']),
        (["objective.name=grpo", "objective.clip_low=none"], ["valid number"]),
        (["objective.name=cispo", "objective.ratio_min=9"], ["ratio_min = 9.0 is above ratio_max = 5.0"]),
        (["objective.name=bapo", "objective.low_start=0.95"], ["low_start = 0.95 is above low_max = 0.9"]),
        (["objective.name=bapo", "objective.high_step=1e-5"], ["more than 1000 steps"]),
        (["objective.aggregation=mean"], ["'token-mean' or 'sequence-mean-token-mean'"]),
    ],
)
def test_a_wrong_objective_says_what_it_has(tmp_path: Path, overrides: list[str], fragments: list[str]) -> None:
    (line,) = problems(recipe(tmp_path), *overrides)
    assert all(fragment in line for fragment in fragments), line


def test_mistakes_of_the_objective_are_reported_with_all_others(tmp_path: Path) -> None:
    lines = problems(
        recipe(tmp_path), "objective.k_pos=0", "objective.clip_low=1", "objective.lambda_neg=0", "run.steps=0"
    )
    assert len(lines) == 4
