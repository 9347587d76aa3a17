"""How a configuration is put together, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config import ChatConfig, ConfigError, EvaluateConfig, PPOConfig, load
from rlhf_ray.config.loader import REPOSITORY, merge, read_yaml, repository_path


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "seed: 3\ntotal_steps: 7\nppo: {lr: 2.0e-5, epochs: 2}\n")
    second = write(tmp_path / "b.yaml", "total-steps: 9\nppo: {epochs: 3}\n")
    config = load(PPOConfig, ["--config", first, "--config", second, "--seed", "4", "--ppo.gamma", "0.9"])
    assert (config.seed, config.total_steps) == (4, 9)
    assert (config.ppo.lr, config.ppo.epochs, config.ppo.gamma) == (2e-5, 3, 0.9)
    assert config.ppo.gae_lambda == PPOConfig().ppo.gae_lambda


def test_preset_counts_only_without_config(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    other = write(tmp_path / "other.yaml", "seed: 5\n")
    write(preset, "total_steps: 11\n")
    assert load(PPOConfig, [], preset=preset).total_steps == 11
    assert load(PPOConfig, ["--config", other], preset=preset).total_steps == PPOConfig().total_steps


@pytest.mark.parametrize(
    "argv",
    [
        ["--compare", "A", "B", "--seed", "1"],
        ["--compare", "A", "--seed", "1", "--compare", "B"],
        ["--seed", "1", "--compare", "A", "B"],
    ],
)
def test_list_flags_take_several_values(argv: list[str]) -> None:
    config = load(ChatConfig, argv)
    assert (config.compare, config.seed) == ([Path("A"), Path("B")], 1)


def test_several_config_files_behind_one_flag(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.yaml", "seed: 3\n"), write(tmp_path / "b.yaml", "top_k: 5\n")
    config = load(ChatConfig, ["--config", first, second])
    assert (config.seed, config.top_k) == (3, 5)


def test_single_valued_flags_take_one_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(ChatConfig, ["--policy", "A", "B"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unexpected argument B; see --help\n"


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [("--temprature", "--temperature"), ("--top_p", "--top-p"), ("--polcy=x", "--policy")],
)
def test_unknown_flag_names_the_nearest(flag: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(ChatConfig, [flag, "1"])
    assert stop.value.code == 2
    name = flag.split("=")[0]
    assert capsys.readouterr().err == f"error: unknown flag {name}; the nearest one is {nearest}\n"


def test_flags_are_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(ChatConfig, ["--temp", "1"])
    assert stop.value.code == 2
    assert "unknown flag --temp" in capsys.readouterr().err


def test_flag_without_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(ChatConfig, ["--temperature"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: argument --temperature: expected one argument\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature: 1", "unknown key temprature; the nearest one is temperature"),
        ("zzz: 1", "unknown key zzz; see --help"),
        ("temperature: hot", "temperature = 'hot': Input should be a valid number"),
        ("temperature: -1", "temperature = -1: Input should be greater than or equal to 0"),
        ("- 1", "must hold a mapping"),
        ("a: [1", "is not YAML"),
    ],
)
def test_wrong_yaml_is_one_line_that_names_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as error:
        load(ChatConfig, ["--config", file])
    assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def test_unknown_nested_key(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "ppo: {epoch: 3}")
    with pytest.raises(ConfigError, match=r"unknown key ppo\.epoch; the nearest one is epochs"):
        load(PPOConfig, ["--config", file])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "hot"], "temperature = 'hot'"),
        (["--top-p", "0"], "top_p = '0'"),
        (["--template", "poem"], "template = 'poem'"),
    ],
)
def test_wrong_flag_value_names_field_and_value(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(ChatConfig, argv)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_sizes_must_fit_each_other() -> None:
    with pytest.raises(ConfigError, match=r"mini_batch_size = 64 is larger than batch_size = 32"):
        load(PPOConfig, ["--batch-size", "32"])


def test_missing_config_file() -> None:
    with pytest.raises(ConfigError, match=r"config file .*nowhere\.yaml does not exist"):
        load(ChatConfig, ["--config", "nowhere.yaml"])


def test_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    assert read_yaml(Path(write(tmp_path / "c.yaml", "# nothing\n"))) == {}


def test_optional_path_can_be_unset() -> None:
    assert load(EvaluateConfig, ["--reward-model", "null"]).reward_model is None
    assert load(EvaluateConfig, []).reward_model == Path("checkpoints/reward_model/default")


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    import yaml

    config = load(PPOConfig, ["--kl.adaptive", "--no-resume", "--reward", "a.py:f", "b.py:g"])
    file = write(tmp_path / "config.yaml", yaml.safe_dump(config.resolved()))
    again = load(PPOConfig, ["--config", file])
    assert again == config
    assert again.kl.adaptive and not again.resume
    assert [source.kind for source in again.reward_sources] == ["function", "function"]


def test_environment_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "99")
    assert load(ChatConfig, []).seed == 0


def test_merge_goes_into_mappings_and_replaces_lists() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [4]}) == {
        "a": {"b": 1, "c": 3},
        "d": [4],
    }


def test_paths_are_found_here_or_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert repository_path("pyproject.toml") == REPOSITORY / "pyproject.toml"
    write(tmp_path / "pyproject.toml", "")
    assert repository_path("pyproject.toml") == tmp_path / "pyproject.toml"
    assert repository_path("/x/y") == Path("/x/y")
