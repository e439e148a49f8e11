"""Which code this is. Without torch, so that a process that only asks stays small."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Of the code that runs, `-dirty` behind it if files differ; None without git."""
    if not shutil.which("git"):
        return None
    describe = ["git", "-C", str(Path(__file__).parent.parent.parent), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
