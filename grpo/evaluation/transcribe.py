"""Ask a model: each problem is answered once, and every answer becomes one row of text.

Greedily unless asked otherwise, to `budget` tokens with only EOS ending it; the stop policy and the grader are applied
to the same texts afterwards. `stop_early` ends rows at the stop string, for speed, when no run-on grading is wanted.
Left out: grading, and what is written (`compare.py`).
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

from data.problem import Problem
from grpo import distributed
from grpo.dataloader import encode_prompts, refuse_unequal, render, stop_strings
from grpo.evaluation.protocol import EvalOptions
from grpo.sampler import Sampler
from grpo.tree import trunk_length


class Interrupted(Exception):
    """The caller's `should_stop` said so between two batches. `rows`: what had been answered, on every rank."""

    def __init__(self, rows: list[dict]):
        super().__init__()
        self.rows = rows


def say_progress(text: str) -> None:
    """How far it is, on stderr: an evaluation may take hours."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def transcribe(
    sampler: Sampler,
    problems: Sequence[Problem],
    options: EvalOptions,
    should_stop: Callable[[], bool] = lambda: False,
    answered: Sequence[dict] = (),
) -> list[dict]:
    """Answer every problem. A collective call: ranks share the problems.

    Args:
        sampler: of the model.
        problems: all that count.
        options: how to prompt and sample.
        should_stop: asked between batches.
        answered: rows of an earlier call that are taken as they are, if their problem is still the same.

    Returns:
        On every rank, one row per problem and sample, in that order: index, sample, question, prompt, answer, stop,
        completion (all of it, or up to the stop string under `stop_early`), ended (`eos`, `stop` or `limit`), tokens,
        stop_tokens (tokens up to the one that completes the first stop string; None if there is none).

    Raises:
        ValueError: there is no problem, ranks have different ones, or a prompt is too long.
        Interrupted: `should_stop()` was True on some rank.
    """
    refuse_unequal(problems)
    if not problems:
        raise ValueError("data: there is no problem to evaluate")
    prompt_ids = encode_prompts(
        problems, sampler.tokenizer, chat=options.chat, max_prompt_tokens=options.max_prompt_tokens
    )
    trunk = trunk_length(prompt_ids)
    known = [row for row in answered if _is_of(row, problems, sampler.tokenizer, options.chat)]
    asked = set(range(len(problems))) - {row["index"] for row in known}
    # Prompts of like length share a batch, and of one length order: no result depends on it.
    order = sorted(asked, key=lambda i: (len(prompt_ids[i]), i))
    mine = order[distributed.rank() :: distributed.world_size()]
    at_once = max(1, options.batch // options.samples)
    rounds = -(-len(order[:: distributed.world_size()]) // at_once)
    rows = known if distributed.is_main() else []

    def of_all_ranks() -> list[dict]:
        gathered = [row for part in distributed.gather_objects(rows) for row in part]
        return sorted(gathered, key=lambda row: (row["index"], row["sample"]))

    start = said = time.perf_counter()
    for k in range(rounds):
        if distributed.any_true(should_stop()):
            raise Interrupted(of_all_ranks())
        if time.perf_counter() - said > 60:
            said = time.perf_counter()
            say_progress(f"  {k / rounds:.0%} of {len(problems):,} problems after {(said - start) / 60:.0f} min")
        if index := mine[k * at_once : (k + 1) * at_once]:
            rows += _answer(sampler, problems, prompt_ids, trunk, index, options)
    return of_all_ranks()


def _is_of(row: dict, problems: Sequence[Problem], tokenizer, chat: bool) -> bool:
    """Whether a row that comes from a file answers the problem that now stands in its place."""
    if row["index"] >= len(problems):
        return False
    asks = json.loads(json.dumps(_asks(problems[row["index"]], tokenizer, chat)))
    return all(row[name] == value for name, value in asks.items())


def _asks(problem: Problem, tokenizer, chat: bool) -> dict:
    """What the rows of a problem say of it."""
    return {
        "question": problem.info.get("question", problem.prompt),
        "prompt": render(problem, tokenizer, chat),
        "answer": problem.answer,
        "info": problem.info,
    }


def _answer(sampler: Sampler, problems, prompt_ids, trunk: int, index: list[int], options: EvalOptions) -> list[dict]:
    """Transcripts of the problems at these places."""
    stop = stop_strings(problems)
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
    rows = []
    for row, (text, ids, length, finished) in enumerate(
        zip(
            completions.texts,
            completions.completion_ids.tolist(),
            completions.completion_mask.sum(1).tolist(),
            completions.finished.tolist(),
            strict=True,
        )
    ):
        ids = ids[:length]
        problem = problems[index[row // options.samples]]
        eos = finished and bool(sampler.is_eos[ids[-1]])
        rows.append(
            {
                "index": index[row // options.samples],
                "sample": row % options.samples,
                **_asks(problem, sampler.tokenizer, options.chat),
                "stop": stop,
                "stop_early": options.stop_early,
                "completion": text,
                "ended": "eos" if eos else "stop" if finished else "limit",
                "tokens": len(ids),
                "stop_tokens": finder.tokens_to_stop(ids),
            }
        )
    return rows
