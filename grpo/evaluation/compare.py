"""Evaluation: one generation, many gradings. Transcripts of base and tuned model, and what `grading.py` makes of them.

Each (model, shots) is generated once, greedily unless asked otherwise, to `budget` tokens with only EOS ending it; the
stop policy and the grader are applied to the same texts afterwards. `stop_early` ends rows at the stop string, for
speed, when no run-on grading is wanted: so a training run evaluates itself. One that is cut short goes on where it was.
Left out: judging by another model.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

import data
from data.problem import Problem
from grpo import distributed
from grpo.config import Config
from grpo.evaluation import grading, headline, transcripts
from grpo.evaluation.protocol import EvalOptions, planned
from grpo.files import write_lines
from grpo.options import read_yaml, write_yaml
from grpo.policy import load_policy, load_shapes, model_directory
from grpo.rollout import encode_prompts, refuse_unequal, render, stop_strings
from grpo.sampler import Sampler
from grpo.tree import trunk_length

T = TypeVar("T")


def problems_of(options: EvalOptions, shots: int) -> list[Problem]:
    """The problems of an evaluation, with so many worked examples in each prompt."""
    problems = data.load(options.data, options.split, path=options.data_path, num_shots=shots, seed=options.seed)
    return problems[: options.limit or None]


def check(config: Config, tokenizer) -> None:
    """Load what a run's evaluations will need, so that a mistake shows before the first step and not after the last.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are not there, or a prompt is too long.
    """
    for options in planned(config):
        prepare(options, [tokenizer])


def prepare(options: EvalOptions, tokenizers: Sequence) -> dict[int, list[Problem]]:
    """The problems by number of shots, when everything that can be mistyped has been looked at.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are not there, or a prompt is too long.
    """
    grading.check_graders((*options.graders, options.format))
    problems = {shots: problems_of(options, shots) for shots in options.shots}
    for tokenizer in tokenizers:
        for asked in problems.values():
            encode_prompts(asked, tokenizer, chat=options.chat, max_prompt_tokens=options.max_prompt_tokens)
    return problems


class Interrupted(Exception):
    """The caller's `should_stop` said so between two batches. `rows`: what had been answered, on every rank."""

    def __init__(self, rows: list[dict]):
        super().__init__()
        self.rows = rows


def compare(
    options: EvalOptions,
    device: torch.device,
    precision: str,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    instead: bool = False,
    kernels: bool = True,
) -> dict:
    """Evaluate base and tuned model at every number of shots; write transcripts, options and `eval.json` to `out`.

    A collective call: ranks share the problems, rank 0 writes. Both models are looked at before either is asked. What
    was answered is in `out` when it is cut short, and is not asked again by the next call with the same options.

    Args:
        options: what to evaluate, and how.
        device, precision: where and how to compute.
        should_stop: asked between batches.
        instead: whether it takes the place of whatever else `out` holds.
        kernels: whether the sampler may use those of a GPU.

    Returns:
        The content of `eval.json`, cells of base before those of tuned.

    Raises:
        ValueError: a model, the data or a grader can not be used, or `out` holds another evaluation.
        Interrupted: `should_stop()` was True on some rank.
    """
    out = Path(options.out or "eval")
    models = {"base": (options.model, options.revision), "tuned": (options.tuned, None)}
    models = {name: where for name, where in models.items() if where[0] is not None}
    sources = {name: model_directory(path) for name, (path, _) in models.items()}
    ingredients = distributed.on_main(lambda: transcripts.made_of(options, precision, sources))
    answered = distributed.on_main(lambda: transcripts.left(out, ingredients, instead))
    problems = prepare(options, [_named(name, load_shapes, *where)[1] for name, where in models.items()])
    if len(models) > 1:  # weights that can not be read show now too, and not when the base has been asked
        _named("tuned", load_policy, options.tuned, device=device, precision=precision)
    distributed.on_main(lambda: transcripts.begin(out, ingredients, instead))
    texts: dict[str, list[dict]] = {}
    for name, (path, revision) in models.items():
        policy, tokenizer = load_policy(path, revision=revision, device=device, precision=precision)
        sampler = Sampler(policy, tokenizer, kernels=kernels)
        for shots, asked in problems.items():
            start, file = time.perf_counter(), f"{name}_{shots}shots"
            rows, cut = answered.get(file, []), None
            try:
                rows = transcribe(sampler, asked, options, should_stop, rows)
            except Interrupted as interrupted:
                rows, cut = interrupted.rows, interrupted
            rows = texts[file] = [{"model": name, "shots": shots, **row} for row in rows]
            distributed.on_main(partial(write_lines, out / f"{file}.jsonl", rows))
            if cut:
                raise cut
            _say(f"{name}, {headline.shots(shots)}: {len(rows):,} completions in {time.perf_counter() - start:.0f} s")
    result = _summarize(texts, options, options.stops)

    def write() -> None:
        write_yaml(replace(options, out=None), out / "options.yaml")  # wherever it lies now
        transcripts.finish(out, result)

    distributed.on_main(write)
    return result


def _named(name: str, load: Callable[..., T], *arguments: object, **options: object) -> T:
    """What `load` makes of a model; an error names the option that the model is."""
    try:
        return load(*arguments, **options)
    except ValueError as error:
        raise ValueError(str(error) if name == "base" else f"tuned{str(error).removeprefix('model')}") from error


def _say(text: str) -> None:
    """How far it is, on stderr: an evaluation may take hours."""
    if distributed.is_main():
        print(text, file=sys.stderr, flush=True)


def regrade(options: EvalOptions) -> dict:
    """Grade the transcripts of an earlier evaluation again, without a model, and write `eval.json`.

    Raises:
        ValueError: there are no transcripts, or empty ones, or a grader is unknown.
    """
    directory = Path(options.regrade)
    files = sorted(directory.glob("*_*shots.jsonl"))
    if not files:
        raise ValueError(f"regrade: {directory} holds no transcripts (base_0shots.jsonl, ...)")
    if (directory / transcripts.UNFINISHED).exists() and not (directory / "eval.json").exists():
        raise ValueError(f"regrade: {directory} holds a part of an evaluation; finish it by the command that began it")
    texts = {file.stem: transcripts.read(file, "regrade") for file in files}
    if not all(texts.values()):
        raise ValueError(f"regrade: a transcript in {directory} is empty")
    transcripts.refuse_partial(texts, directory)
    out = Path(options.out) if options.out else directory
    if out.resolve() != directory.resolve():
        transcripts.refuse_taken(out)
    early = any(row["stop_early"] for rows in texts.values() for row in rows)
    result = _summarize(texts, options, ("stop_string",) if early else grading.STOPS)
    out.mkdir(parents=True, exist_ok=True)
    if (out / "options.yaml").exists():  # of the transcripts; the cells are now by these graders
        made = replace(read_yaml(EvalOptions, out / "options.yaml"), graders=options.graders, format=options.format)
        write_yaml(made, out / "options.yaml")
    transcripts.finish(out, result)
    return result


def _summarize(texts: dict[str, list[dict]], options: EvalOptions, stops: Sequence[str]) -> dict:
    return grading.summarize(
        [
            grades
            for rows in texts.values()
            for grades in grading.grade(rows, options.graders, stops, options.format, options.timeout)
        ]
    )


def evaluate(sampler: Sampler, problems: Sequence[Problem], options: EvalOptions) -> dict:
    """The first cell (first stop policy, first grader) of a model on some problems: the evaluation during training.

    A collective call. All ranks grade, so that none waits long for another; what rank 0 finds counts, since a grader
    may run into its time limit on one rank only.
    """
    answers = transcribe(sampler, problems, options)
    rows = [{"model": "tuned", "shots": options.shots[0], **row} for row in answers]
    grades = grading.grade(rows, options.graders[:1], options.stops[:1], options.format, options.timeout)
    return distributed.broadcast_object(grading.cell(grades[0]))


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
            _say(f"  {k / rounds:.0%} of {len(problems):,} problems after {(said - start) / 60:.0f} min")
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
