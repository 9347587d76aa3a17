"""What a command imports before it must, and how the time to the first step is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_folders import make_policy
from worlds import make_world, ppo_config

from rlhf_ray import app
from rlhf_ray.run import read_metrics
from rlhf_ray.startup import StartUp

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(file.name for file in (REPOSITORY / "launch").glob("*.py"))
WORDS = ("data.py", "doctor.py", "report.py", "tokenizer.py")
"""Scripts that are given words and have no configuration."""
HEAVY = ("torch", "ray", "numpy", "pyarrow", "tensorboard", "matplotlib", "transformers", "pandas", "safetensors")
WATCH = """
import runpy, sys
script, *lines = sys.argv[1:]
for line in lines:
    sys.argv = [script, *line.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print("exit", end.code, file=sys.stderr)
print("loaded", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def loaded(script: Path, *lines: str) -> tuple[str, set[str]]:
    """What a script says on standard error when it is given these words one after the other, and the packages that it
    has imported in the end.
    """
    line = [sys.executable, "-c", WATCH, str(script), *lines]
    said = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True).stderr.splitlines()
    return "\n".join(said[:-1]), set(said[-1].split()[1:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_a_wrong_flag_and_a_wrong_value_import_nothing_heavy(script: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("no_such_key: 1\n", encoding="utf-8")
    wrong = [] if script in WORDS else [f"--config {tmp_path / 'wrong.yaml'}"]
    said, packages = loaded(REPOSITORY / "launch" / script, "--help", "--no-such-flag", *wrong)
    assert "argparse" in packages and not packages & set(HEAVY)
    *told, end = said.splitlines()
    assert told[0] == "exit 0" and end == "exit 2" and len(told) > 1
    if wrong:
        assert told[-2] == "exit 2" and "unknown key no_such_key" in told[-1]


def test_opening_a_model_leaves_the_compiler_out(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    code = (
        "import sys, torch\n"
        "from rlhf_ray.models.hf_weights import load_policy\n"
        f"model = load_policy({str(tmp_path / 'policy')!r}, device='cpu', dtype=torch.float32)\n"
        "assert model(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()\n"
        "print(*sorted({'sympy', 'torch._dynamo'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == ""


def test_asking_for_the_pipeline_leaves_ray_train_out() -> None:
    code = "import sys, rlhf_ray.pipeline\nprint(*sorted({'ray.train', 'pandas'} & set(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == ""


def test_the_first_step_alone_says_where_the_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_world(tmp_path)
    config = ppo_config(tmp_path, total_steps=2)
    app.train_ppo(config)
    first, second = (
        {name for name in row if name.startswith("time/startup_")} for row in read_metrics(app.run_folder(config))
    )
    assert first == {"time/startup_inputs", "time/startup_workers", "time/startup_first_step"} and second == set()
    assert capsys.readouterr().out.count("start-up ") == 1


def test_phases_add_up_and_are_named_in_order() -> None:
    startup = StartUp(age=2.0)
    startup.done("imports")
    startup.done("inputs")
    startup.seconds["inputs"] += 0.5
    startup.done("first_step")
    assert list(startup.metrics()) == ["time/startup_imports", "time/startup_inputs", "time/startup_first_step"]
    assert startup.metrics()["time/startup_imports"] >= 2.0
    startup.seconds = {"imports": 2.04, "inputs": 0.01, "first_step": 0.53}
    assert str(startup) == "start-up 2.6 s: imports 2.0, first step 0.5"
