"""What runs in a container of SageMaker: its variables become options of train.py, and `final/` becomes its model.

    torchrun ... -m launch.sagemaker.entry

`launch.py` has the whole command. Its `exec` makes torchrun the first process of the container. Only that one gets the
SIGTERM of a stop, and torchrun passes it on: train.py finishes its step and saves.

The run is written into the directory of checkpoints, which SageMaker copies to S3 all the time, and back when the job
starts again. Left out: starting the job, and settings of EFA, whose defaults are libfabric's.
"""

import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path

FIXED = ("out_dir", "resume")
CHANNELS = {"model": "SM_CHANNEL_MODEL", "data_path": "SM_CHANNEL_TRAIN"}
MAX_REASON = 1024
"""Characters of `FailureReason`; SageMaker cuts longer ones."""


def arguments(environment: Mapping[str, str]) -> list[str]:
    """The command line of train.py: channels, then hyper-parameters, which beat them, then the place of the run.

    Args:
        environment: `SM_HPS` is a JSON object, in which a list is an option of several words. `SM_CHANNEL_MODEL` and
            `SM_CHANNEL_TRAIN` are directories, and may be missing. The directory of checkpoints is beside
            `SM_MODEL_DIR`.

    Raises:
        ValueError: a hyper-parameter is one that is fixed here.
    """
    chosen = {option: [environment[name]] for option, name in CHANNELS.items() if name in environment}
    for name, value in json.loads(environment.get("SM_HPS", "{}")).items():
        option = name.replace("-", "_")
        if option in FIXED:
            raise ValueError(f"hyper-parameter {name} is {value!r}: must not be given; the job sets it by itself")
        chosen[option] = [str(item) for item in (value if isinstance(value, list) else [value])]
    chosen |= {"out_dir": [str(Path(environment["SM_MODEL_DIR"]).with_name("checkpoints"))], "resume": ["auto"]}
    return [word for option, words in chosen.items() for word in (f"--{option}", *words)]


class Heard(io.TextIOBase):
    """Passes a stream on, and remembers the last line that it was given."""

    def __init__(self, stream: io.TextIOBase):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> int:
        """Pass the text on."""
        self.last = ([line for line in text.splitlines() if line.strip()] or [self.last])[-1]
        return self.stream.write(text)

    def flush(self) -> None:
        """Flush what is below."""
        self.stream.flush()

    def fileno(self) -> int:
        """The number of the file below, for the processes that print there too."""
        return self.stream.fileno()


def fail(sentence: str) -> None:
    """Make a sentence the job's `FailureReason`. The first process to fail knows the cause; others only lost it."""
    file = Path(os.environ["SM_OUTPUT_FAILURE"])
    if not file.exists():
        file.write_text(sentence[:MAX_REASON], encoding="utf-8")


def run() -> int:
    """Train, evaluate and report; then put `final/`, if it was written, into the model directory. The exit code."""
    import train  # late: the network's name has to be known before
    from grpo.config import parse_args
    from grpo.run.directory import place_of

    argv = arguments(os.environ)
    directory = place_of(parse_args(argv))
    code = train.main(argv)
    final = directory / "final"
    if code == 0 and os.environ.get("RANK", "0") == "0" and final.is_dir():
        shutil.copytree(final, os.environ["SM_MODEL_DIR"], dirs_exist_ok=True)
    return code


def main() -> int:
    """`run`, and if that fails the reason where SageMaker looks for it."""
    if network := os.environ.get("SM_NETWORK_INTERFACE_NAME"):
        for library in ("NCCL", "GLOO"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", network)
    heard = Heard(sys.stderr)
    try:
        with redirect_stderr(heard):
            code = run()
    except SystemExit as end:  # from reading the options, with the reason on stderr
        code = end.code
    except ValueError as error:
        print(f"train.py: error: {error}", file=heard)
        code = 2
    except Exception as error:
        fail(f"{type(error).__name__}: {error}")
        raise
    if code:
        fail(heard.last)
    return code


if __name__ == "__main__":
    sys.exit(main())
