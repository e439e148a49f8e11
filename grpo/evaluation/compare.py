"""Evaluation, start to end: base and tuned model are asked, graded and compared; a run's validation; regrading.

One generation, many gradings: texts come from `transcribe.py`, cells and differences from `grading.py`. An evaluation
that is cut short goes on where it was. Left out: judging by another model.
"""

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
from grpo.dataloader import encode_prompts
from grpo.evaluation import grading, headline, transcripts
from grpo.evaluation.protocol import EvalOptions, planned
from grpo.evaluation.transcribe import Interrupted, say_progress, transcribe
from grpo.files import write_lines
from grpo.options import read_yaml, write_yaml
from grpo.policy import learned_positions, load_policy, load_shapes, model_directory, refuse_beyond_positions
from grpo.sampler import Sampler

T = TypeVar("T")


def problems_of(options: EvalOptions, shots: int) -> list[Problem]:
    """The problems of an evaluation, with so many worked examples in each prompt."""
    problems = data.load(options.data, options.split, path=options.data_path, num_shots=shots, seed=options.seed)
    return problems[: options.limit or None]


def check_planned(config: Config, tokenizer, positions: int | None = None) -> None:
    """Load what a run's evaluations will need, so that a mistake shows before the first step and not after the last.

    Args:
        config: the run's.
        tokenizer: its model's.
        positions: that its model has learned (`learned_positions`); None: no bound.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are not there, or a prompt is too long.
    """
    for options in planned(config):
        prepare(options, [(tokenizer, positions)], "max_new_tokens")


def prepare(options: EvalOptions, models: Sequence[tuple], option: str = "budget") -> dict[int, list[Problem]]:
    """The problems by number of shots, when everything that can be mistyped has been looked at.

    Args:
        options: what to evaluate, and how.
        models: of each its tokenizer and the positions that it has learned (`learned_positions`).
        option: that says how long completions may be, for a message.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are not there, or a prompt is too long.
    """
    grading.check_graders((*options.graders, options.format))
    problems = {shots: problems_of(options, shots) for shots in options.shots}
    for tokenizer, positions in models:
        for asked in problems.values():
            ids = encode_prompts(asked, tokenizer, chat=options.chat, max_prompt_tokens=options.max_prompt_tokens)
            refuse_beyond_positions(positions, ids, options.budget, option)
    return problems


def compare_models(
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
    shapes = [_named(name, load_shapes, *where) for name, where in models.items()]
    problems = prepare(options, [(tokenizer, learned_positions(model)) for model, tokenizer in shapes])
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
            seconds = time.perf_counter() - start
            say_progress(f"{name}, {headline.shots(shots)}: {len(rows):,} completions in {seconds:.0f} s")
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


