"""Runs a script in a process of its own, for what would change or needs another state of this one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["run_alone"]

REPOSITORY = Path(__file__).resolve().parents[2]


def run_alone(script: str, folder: Path) -> Any:
    """What `script` assigned to `result`, through JSON. It runs in `folder` and without a network."""
    program = (
        f"import json, pathlib\n{textwrap.dedent(script)}\npathlib.Path('result.json').write_text(json.dumps(result))\n"
    )
    (folder / "script.py").write_text(program, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
