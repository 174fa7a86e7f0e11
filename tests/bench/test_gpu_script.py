"""The script for GPU machines: its syntax, and what it does where there is no GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*command, **environment):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=240,
        check=False,
    )


def test_syntax():
    assert os.access(SCRIPT, os.X_OK)
    done = run("bash", "-n", str(SCRIPT))
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = run("shellcheck", str(SCRIPT))
        assert done.returncode == 0, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_gpu_is_said_in_one_line_and_in_the_status(tmp_path):
    done = run(str(SCRIPT), str(tmp_path / "results"))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("skipped device (0 s) no GPU: torch ") and "sees no CUDA device" in line
    written = json.loads((tmp_path / "results" / "steps.json").read_text())
    (step,) = written["steps"]
    assert written["status"] == 2 and written["not_run"] == ["device"]
    assert step["result"] == "skipped" and step["name"] == "device" and step["seconds"] == 0


def test_no_torch_is_said(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    done = run(str(SCRIPT), str(tmp_path / "results"), PYTHON=str(bare))
    assert done.returncode == 2 and "cannot import torch" in done.stdout, done.stdout + done.stderr


FALSE_PYTHON = """#!/bin/sh
# A python on a machine with a GPU, for the script: probes say yes, every step is what its last word says.
case "$*" in
  "-c import torch") exit 0 ;;
  *is_available*) exit 0 ;;
  *get_device_capability*) echo 9.0 ;;
  *find_spec*) exit 0 ;;
  *_native_build.py*) echo fresh ;;
  *cuda_status*) echo CUDA library loaded ;;
  *"--suite pair"*) echo broken; exit 3 ;;
  *"--suite network"*) exec sleep 100 ;;
  "- "*) exec {python} "$@" ;;
  *) echo "done: $*" ;;
esac
"""


def test_steps_are_reported_and_failures_hide_nothing(tmp_path):
    false = tmp_path / "python"
    false.write_text(FALSE_PYTHON.replace("{python}", sys.executable))
    false.chmod(0o755)
    steps = {"GPU_STEPS": "tests tucker2 pair network large", "GPU_SECONDS": "14"}
    done = run(str(SCRIPT), str(tmp_path / "results"), PYTHON=str(false), **steps)
    assert done.returncode == 1, done.stdout + done.stderr
    written = json.loads((tmp_path / "results" / "steps.json").read_text())
    assert written["status"] == 1 and written["not_run"] == ["large"]
    found = {s["name"]: s for s in written["steps"]}
    assert {name: step["result"] for name, step in found.items()} == {
        **dict.fromkeys(("device", "load", "tests", "tucker2"), "ok"),
        **dict.fromkeys(("pair", "network"), "FAILED"),
        "large": "skipped",
    }
    assert found["pair"]["reason"] == "status 3: broken"
    assert "took longer than" in found["network"]["reason"]
    assert found["large"]["reason"] == "no time left of 14 s"
    assert "--device cuda" in (tmp_path / "results" / "tucker2.log").read_text()
    assert len(done.stdout.splitlines()) == len(found) + 2
    assert done.stdout.splitlines()[-1] == "1 steps not run: large"


def test_small_cases_agree_with_the_oracle_on_the_cpu():
    done = run(sys.executable, str(ROOT / "benchmarks" / "gpu_small_cases.py"), "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "76 cases, 0 faults, 0 cases left out for time" in done.stdout


@pytest.mark.parametrize(
    ("pair", "status", "last"), [("pair", 3, "1 steps not run: large"), ("", 0, "all steps")]
)
def test_steps_not_run_are_no_success(tmp_path, pair, status, last):
    false = tmp_path / "python"
    script = FALSE_PYTHON.replace("{python}", sys.executable).replace("echo broken; exit 3", "sleep 6")
    false.write_text(script)
    false.chmod(0o755)
    steps = {"GPU_STEPS": f"tucker2 {pair} {'large' if pair else ''}", "GPU_SECONDS": "14"}
    done = run(str(SCRIPT), str(tmp_path / "results"), PYTHON=str(false), **steps)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith(last)
    assert json.loads((tmp_path / "results" / "steps.json").read_text())["status"] == status


def test_limits_of_all_steps_fit():
    text = SCRIPT.read_text()
    limits = {n: int(s) for n, s in re.findall(r"^ *(?:step|suite) (\S+) (\d+) ", text, re.M)}
    assert limits.pop("build") and {
        "load",
        "tests",
        "tucker2",
        "pair",
        "chain",
        "embedding",
        "lowrank_sparse",
        "network",
        "compiled",
    } <= set(limits)
    tools = limits.pop('"$tool"')
    probe = 30  # whether torch.compile works
    assert sum(limits.values()) + 2 * tools + probe <= 530
