"""Runs a script in a process of its own, for what would change or needs another state of this one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

__all__ = ["REPOSITORY", "run_alone"]

REPOSITORY = Path(__file__).resolve().parents[2]


def run_alone(script: str, folder: Path, *, packages: Path | None = None) -> Any:
    """What `script` assigned to `result`, through JSON; larger things go through files in `folder`, where it runs.

    It has no network. What lies in `packages` is imported in place of what is installed.
    """
    program = (
        f"import json, pathlib\n{textwrap.dedent(script)}\npathlib.Path('result.json').write_text(json.dumps(result))\n"
    )
    (folder / "script.py").write_text(program, encoding="utf-8")
    (folder / "result.json").unlink(missing_ok=True)
    # The offline switches: whatever is not in `folder` is a mistake of the script.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(place) for place in (packages, REPOSITORY) if place),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, f"with {packages or 'what is installed'}:\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))
