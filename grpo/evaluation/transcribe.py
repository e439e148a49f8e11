"""Let a model answer every problem, and keep every answer as one transcript row.

Sampling is greedy by default. A completion ends at EOS or after `budget` tokens; stop policies and graders are applied
to the text afterwards. With `stop_early` it ends at the stop string, which is faster but loses the run-on text. Left
out: grading (`grading.py`) and writing files (`compare.py`).
"""

import json
import sys
import time
from collections.abc import Callable, Sequence

from data.problem import Problem
from grpo import distributed
from grpo.dataloader import encode_all, refuse_lengths, refuse_unequal, render, stop_strings
from grpo.evaluation.protocol import EvalOptions
from grpo.sampler import Sampler
from grpo.tree import trunk_length


class Interrupted(Exception):
    """`should_stop` was True between two batches. `rows` holds the answers so far of all ranks, on every rank."""

    def __init__(self, rows: list[dict]):
        super().__init__()
        self.rows = rows


def say_progress(text: str) -> None:
    """Print progress on stderr, from rank 0: an evaluation may take hours."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def transcribe(
    sampler: Sampler,
    problems: Sequence[Problem],
    options: EvalOptions,
    should_stop: Callable[[], bool] = lambda: False,
    answered: Sequence[dict] = (),
    prompt_ids: Sequence | None = None,
) -> list[dict]:
    """Answer every problem. This is a collective call: ranks share the problems.

    Args:
        sampler: of the model.
        problems: all problems, the same on every rank.
        options: how to prompt and sample.
        should_stop: called between batches; True interrupts.
        answered: rows of an earlier call; they are kept if their problem is still the same.
        prompt_ids: the problems' prompts in tokens; None: they are tokenized here.

    Returns:
        On every rank, one row per problem and sample, in that order. A row holds:

        - index, sample, question, prompt, answer, info, stop, stop_early;
        - completion: the whole text, or the text up to the stop string under `stop_early`;
        - ended: `eos`, `stop` or `limit`;
        - tokens: number of sampled tokens;
        - stop_tokens: number of tokens up to the end of the first stop string, or None if there is none.

    Raises:
        ValueError: there is no problem, ranks have different problems, or a prompt is too long.
        Interrupted: `should_stop()` was True on some rank.
    """
    refuse_unequal(problems)
    if not problems:
        raise ValueError("data: there is no problem to evaluate")
    if prompt_ids is None:
        prompt_ids = encode_all(problems, sampler.tokenizer, options.chat)
    refuse_lengths(prompt_ids, options.max_prompt_tokens)
    trunk = trunk_length(prompt_ids)
    known = [row for row in answered if _is_of(row, problems, sampler.tokenizer, options.chat)]
    asked = set(range(len(problems))) - {row["index"] for row in known}
    # Prompts of similar length share a batch, which saves padding. No result depends on this order.
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
    """Whether a row read from a file still answers the problem that has its index now."""
    if row["index"] >= len(problems):
        return False
    asks = json.loads(json.dumps(_asks(problems[row["index"]], tokenizer, chat)))
    return all(row[name] == value for name, value in asks.items())


def _asks(problem: Problem, tokenizer, chat: bool) -> dict:
    """The fields of a row that describe its problem."""
    return {
        "question": problem.info.get("question", problem.prompt),
        "prompt": render(problem, tokenizer, chat),
        "answer": problem.answer,
        "info": problem.info,
    }


def _answer(sampler: Sampler, problems, prompt_ids, trunk: int, index: list[int], options: EvalOptions) -> list[dict]:
    """Rows for the problems with these indices."""
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
