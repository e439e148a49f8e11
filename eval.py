"""Evaluate a model, or a base and a tuned model side by side, for every number of shots, stop policy and grader.

    python eval.py --model Qwen/Qwen2.5-0.5B --tuned runs/NAME/final --data gsm8k --shots 0,8 --out DIR
    python eval.py --regrade DIR --graders last_number published

This file reads the options and prints the table. `grpo/evaluation/compare.py` does the work.
"""

import sys

import grpo  # noqa: F401  before torch, which reads settings when it is loaded

# isort: split
import torch

from grpo import distributed, options
from grpo.evaluation import headline
from grpo.evaluation.compare import compare_models, regrade
from grpo.evaluation.protocol import EvalOptions
from grpo.evaluation.transcribe import Interrupted
from grpo.run.log import say
from grpo.run.machine import settings, settle
from grpo.run.signals import Signals


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a wrong option or input."""
    chosen = options.parse(EvalOptions, argv, "eval.py")
    try:
        device = distributed.init(chosen.device)
        if chosen.regrade is not None:
            result = distributed.on_main(lambda: regrade(chosen))
        else:
            chosen = settle(chosen, device)
            with settings(device), Signals() as signals:
                result = compare_models(chosen, device, chosen.precision, signals.asked)
    except Interrupted:
        say(f"stopped; the answers so far are in {chosen.out or 'eval'}, and the same command continues")
        return 0
    except torch.OutOfMemoryError as error:
        say(f"eval.py: error: out of memory; lower batch, budget or the number of shots ({error})")
        return 2
    except (ValueError, OSError) as error:
        say(f"eval.py: error: {error}")
        return 2
    if distributed.is_main():
        print(headline.table(result))
        print(f"transcripts: {chosen.regrade or chosen.out or 'eval'}")
    distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
