"""Let a model answer every problem, and keep every answer as one transcript row.

Sampling is greedy by default. A completion ends at EOS or after `budget` tokens; stop policies and graders are applied
to the text afterwards. With `stop_early` it ends at the stop string, which is faster but loses the run-on text. Left
out: grading (`grading.py`), and which evaluation a file belongs to (`transcripts.py`).
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from data.problem import Problem
from grpo import distributed
from grpo.dataloader import encode_all, refuse_lengths, refuse_unequal, render, stop_strings
from grpo.evaluation import transcripts
from grpo.evaluation.protocol import EvalOptions
from grpo.files import write_lines
from grpo.sampler import Sampler
from grpo.tree import trunk_length


class Interrupted(Exception):
    """`should_stop` was True between two batches."""


def say_progress(text: str) -> None:
    """Print progress on stderr, from rank 0: an evaluation may take hours."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def transcribe(
    sampler: Sampler,
    problems: Sequence[Problem],
    options: EvalOptions,
    *,
    model: str = "tuned",
    shots: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    file: Path | None = None,
    prompt_ids: Sequence | None = None,
) -> list[dict]:
    """Answer every problem. This is a collective call: ranks share the problems, and rank 0 writes.

    Args:
        sampler: of the model.
        problems: all problems, the same on every rank.
        options: how to prompt and sample.
        model: what the rows call it, base or tuned.
        shots: number of worked examples in the prompts.
        should_stop: called between batches; True interrupts.
        file: rows are appended to it as they come. Problems that it answers already are not asked again.
        prompt_ids: the problems' prompts in tokens; None: they are tokenized here.

    Returns:
        On every rank, one row per problem and sample, in that order. A row holds:

        - model, shots, index, sample, question, prompt, answer, info, stop, stop_early; in a file `info` has None in
          place of `tests`, which may be megabytes, and which are read again from the data;
        - completion: the whole text, or the text up to the stop string under `stop_early`;
        - ended: `eos`, `stop` or `limit`;
        - tokens: number of sampled tokens;
        - stop_tokens: number of tokens up to the end of the first stop string, or None if there is none.

    Raises:
        ValueError: ranks have different problems, or a prompt is too long.
        Interrupted: `should_stop()` was True on some rank.
    """
    refuse_unequal(problems)
    if not problems:
        raise ValueError("data: there is no problem to evaluate")
    if prompt_ids is None:
        prompt_ids = encode_all(problems, sampler.tokenizer, options.chat)
    refuse_lengths(prompt_ids, options.max_prompt_tokens)
    trunk, stop = trunk_length(prompt_ids), stop_strings(problems, options.chat)
    ends = {"stop": stop, "stop_early": options.stop_early}
    asks = [_asks(problem, sampler.tokenizer, options.chat) | ends for problem in problems]
    rows = distributed.on_main(lambda: transcripts.answered(file, asks, options.samples)) if file else []
    asked = set(range(len(problems))) - {row["index"] for row in rows}
    # Prompts of similar length share a batch, which saves padding. No result depends on this order.
    order = sorted(asked, key=lambda i: (len(prompt_ids[i]), i))
    at_once = max(1, options.batch // options.samples) * distributed.world_size()
    start = said = time.perf_counter()
    for at in range(0, len(order), at_once):
        if distributed.any_true(should_stop()):
            raise Interrupted
        if time.perf_counter() - said > 60:
            said = time.perf_counter()
            say_progress(f"  {at / len(order):.0%} of {len(problems):,} problems after {(said - start) / 60:.0f} min")
        index = order[at : at + at_once][distributed.rank() :: distributed.world_size()]
        new = []
        for i, sample, answer in _answers(sampler, index, prompt_ids, trunk, stop, options):
            new.append({"model": model, "shots": shots, "index": i, "sample": sample, **asks[i], **answer})
        new = [row for part in distributed.gather_objects(new) for row in part]
        if file:
            distributed.on_main(partial(transcripts.append, file, new))
        rows += new
    rows.sort(key=lambda row: (row["index"], row["sample"]))
    if file:
        distributed.on_main(lambda: write_lines(file, rows))
    return [row | {"info": problems[row["index"]].info} for row in rows]


def _asks(problem: Problem, tokenizer, chat: bool) -> dict:
    """The fields of a row that say what was asked."""
    return {
        "question": problem.info.get("question", problem.prompt),
        "prompt": render(problem, tokenizer, chat),
        "answer": problem.answer,
        "info": problem.info | ({"tests": None} if "tests" in problem.info else {}),
    }


def _answers(
    sampler: Sampler, index: list[int], prompt_ids: list, trunk: int, stop: list[str], options: EvalOptions
) -> Iterator[tuple[int, int, dict]]:
    """Let the model answer the problems with these indices: (index, sample, fields of the row)."""
    if not index:
        return
    completions = sampler.generate(
        [prompt_ids[i].tolist() for i in index],
        group_size=options.samples,
        max_new_tokens=options.budget,
        temperature=options.temperature,
        seed=options.seed,
        step=0,
        prompt_index=index,
        stop=stop if options.stop_early else (),
        purpose="evaluation",
        trunk_tokens=trunk,
    )
    finder = sampler.stop_strings(tuple(stop))
    for row, text in enumerate(completions.texts):
        ids = completions.completion_ids[row][completions.completion_mask[row]].tolist()
        if not completions.finished[row]:
            ended = "limit"
        elif sampler.is_eos[ids[-1]]:
            ended = "eos"
        else:
            ended = "stop"
        fields = {"completion": text, "ended": ended, "tokens": len(ids), "stop_tokens": finder.tokens_to_stop(ids)}
        yield index[row // options.samples], row % options.samples, fields
