"""The README's commands do what it says, in a copy of the repository with nothing installed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("readme")  # one worker: the bundle is made once


def command(marker: str) -> str:
    """The shell command below an HTML comment of the README."""
    found = re.search(rf"<!-- {marker} -->\n```bash\n(.+?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks or would track, copied."""
    target = tmp_path_factory.mktemp("fresh") / "qvdit"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def bundle(checkout: Path) -> Path:
    """What the README's main command leaves."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "VIRTUAL_ENV", "PYTHONPATH"))}
    done = subprocess.run(
        ["bash", "-c", command("main")], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return checkout / "out" / "w4a8"


def test_main_command_meets_what_the_project_promises(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    parity, size, speed, quality = (report[name] for name in ("parity", "size", "speed", "quality"))
    assert parity["layers_compared"] == parity["layers_total"] == 60
    assert parity["xq_mismatches"] == parity["acc_mismatches"] == 0
    assert parity["xq_compared"] > 10_000_000
    assert 0.9 <= parity["error_ratio"] <= 1.1
    assert size["nominal_weight_bits"] == 4
    assert size["weights_quantized_bytes"] <= 0.29 * size["weights_fp16_bytes"]
    assert quality["videos"] >= 3
    assert quality["psnr_db"] >= 26
    assert quality["fp"]["scene_consistency"] >= 0.9
    # Times are of this machine, which may be busy: that they were taken is all that is checked.
    assert min(speed[name] for name in ("fp32_ms", "quantized_ms", "linear_fp32_ms", "linear_quantized_ms")) > 0
    assert all(stage["peak_memory_bytes"] > 0 for stage in report["stages"].values())
    assert (bundle / "report.html").stat().st_size > 100_000


def test_the_bundle_runs_where_the_readme_says(checkout: Path, bundle: Path) -> None:
    done = subprocess.run(
        [".venv/bin/qvdit", "parity", "out/w4a8"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 compared, 0 with integers that differ" in done.stdout


def test_python_example_runs(checkout: Path, bundle: Path) -> None:
    code = re.search(r"```python\n(.+?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    quick = code[1].replace('background").', 'background", num_inference_steps=1).')
    check = "\nassert video.shape == (1, 3, 16, 32, 32) and video.isfinite().all()"
    done = subprocess.run(
        [".venv/bin/python", "-c", quick + check], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_ci_runs_the_readmes_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    extracted = subprocess.run(
        ["bash", "-c", script.split("command=")[1].split("\n")[0].removeprefix("$(").removesuffix(")")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert extracted.stdout.strip() == command("tests")
