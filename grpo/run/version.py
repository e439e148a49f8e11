"""The commit of the code. It does not import torch, so that a process that only needs the commit stays small."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the running code, followed by `-dirty` if files differ from it; None without git."""
    if not shutil.which("git"):
        return None
    describe = ["git", "-C", str(Path(__file__).parent.parent.parent), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
