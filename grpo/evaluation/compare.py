"""Evaluation from start to end: compare a base and a tuned model, validate during a run, and regrade old transcripts.

Each answer is generated once and can be graded many times. `transcribe.py` makes the texts; `grading.py` computes rates
and differences. An evaluation that was interrupted continues where it stopped. Left out: grading by another model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from data.problem import Problem
from grpo import distributed
from grpo.config import Config
from grpo.dataloader import ProblemSets, refuse_lengths
from grpo.evaluation import grading, headline, transcripts
from grpo.evaluation.protocol import EvalOptions, planned
from grpo.evaluation.transcribe import Interrupted, say_progress, transcribe
from grpo.files import write_lines
from grpo.options import read_yaml, write_yaml
from grpo.policy import learned_positions, load_policy, model_directory, refuse_beyond_positions
from grpo.run.hosts import at_hand
from grpo.sampler import Sampler

T = TypeVar("T")


def check_planned(config: Config, sets: ProblemSets) -> None:
    """Look at what a run's evaluations will need, so that a mistake shows before the first step, not after the last.

    Args:
        config: the run's.
        sets: its problems, prompts and shapes.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are missing, or a prompt is too long.
    """
    for options in planned(config):
        prepare(options, sets, "max_new_tokens")


def prepare(options: EvalOptions, sets: ProblemSets, option: str = "budget") -> None:
    """Look at all problems of an evaluation for a model, and check every option that can be mistyped.

    Args:
        options: of the evaluation.
        sets: the problems, prompts and shapes of the model.
        option: the one that says how many new tokens there are, for the message.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are missing, or a prompt is too long.
    """
    grading.check_graders((*options.graders, options.format))
    for shots in options.shots:
        prompt_ids = sets.prompt_ids(options.split, shots, options.limit)
        refuse_lengths(prompt_ids, options.max_prompt_tokens)
        refuse_beyond_positions(learned_positions(sets.shapes[0]), prompt_ids, options.budget, option)


def compare_models(
    options: EvalOptions,
    device: torch.device,
    precision: str,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    instead: bool = False,
    kernels: bool = True,
    sets: ProblemSets | None = None,
) -> dict:
    """Evaluate base and tuned model at every number of shots; write transcripts, options and `eval.json` to `out`.

    This is a collective call: ranks share the problems, and rank 0 writes. Both models are checked before either
    answers. After an interruption `out` holds the answers so far. The next call with the same options keeps them.

    Args:
        options: what to evaluate, and how.
        device, precision: where and how to compute.
        should_stop: called between batches; True interrupts the evaluation.
        instead: whether to replace another evaluation that `out` holds.
        kernels: whether the sampler may use the GPU kernels.
        sets: the base model's problems, if they were loaded before.

    Returns:
        The content of `eval.json`, with the cells of the base model first.

    Raises:
        ValueError: a model, the data or a grader cannot be used, or `out` holds another evaluation.
        Interrupted: `should_stop()` was True on some rank.
    """
    with at_hand(options.tuned) as tuned:
        options = replace(options, tuned=tuned)
        return _compare_models(options, device, precision, should_stop, instead, kernels, sets or ProblemSets(options))


def _compare_models(
    options: EvalOptions,
    device: torch.device,
    precision: str,
    should_stop: Callable[[], bool],
    instead: bool,
    kernels: bool,
    sets: ProblemSets,
) -> dict:
    """As `compare_models`, where every rank has the tuned model at hand."""
    out = Path(options.out or "eval")
    models = {"base": (options.model, options.revision), "tuned": (options.tuned, None)}
    models = {name: where for name, where in models.items() if where[0] is not None}
    sources = {name: model_directory(path) for name, (path, _) in models.items()}
    ingredients = distributed.on_main(lambda: transcripts.made_of(options, precision, sources))
    answered = distributed.on_main(lambda: transcripts.left(out, ingredients, instead))
    asked = {"base": sets}
    prepare(options, sets)
    if options.tuned is not None:  # what cannot be read must fail now, not after the base model has answered
        asked["tuned"] = _named("tuned", sets.of_model, options.tuned)
        prepare(options, asked["tuned"])
        _named("tuned", load_policy, options.tuned, device=device, precision=precision)
    distributed.on_main(lambda: transcripts.begin(out, ingredients, instead))
    texts: dict[str, list[dict]] = {}
    for name, (path, revision) in models.items():
        policy, tokenizer = load_policy(path, revision=revision, device=device, precision=precision)
        sampler = Sampler(policy, tokenizer, kernels=kernels)
        for shots in options.shots:
            questions = options.split, shots, options.limit
            problems, prompt_ids = asked[name].problems(*questions), asked[name].prompt_ids(*questions)
            start, file = time.perf_counter(), f"{name}_{shots}shots"
            rows, cut = answered.get(file, []), None
            try:
                rows = transcribe(sampler, problems, options, should_stop, rows, prompt_ids)
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
        write_yaml(replace(options, out=None), out / "options.yaml")  # without its place: the directory may be moved
        transcripts.finish(out, result)

    distributed.on_main(write)
    return result


def _named(name: str, load: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call `load` for the model of one option (`model` or `tuned`); an error message starts with that option."""
    try:
        return load(*arguments, **options)
    except ValueError as error:
        raise ValueError(str(error) if name == "base" else f"tuned{str(error).removeprefix('model')}") from error


def regrade(options: EvalOptions) -> dict:
    """Grade the transcripts of an earlier evaluation again, without a model, and write `eval.json`.

    Raises:
        ValueError: there are no transcripts, one is empty or incomplete, or a grader is unknown.
    """
    directory = Path(options.regrade)
    files = sorted(directory.glob("*_*shots.jsonl"))
    if not files:
        raise ValueError(f"regrade: {directory} holds no transcripts (base_0shots.jsonl, ...)")
    if (directory / transcripts.UNFINISHED).exists() and not (directory / "eval.json").exists():
        raise ValueError(f"regrade: {directory} holds an unfinished evaluation; finish it with its own command")
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
        now = {name: getattr(options, name) for name in ("graders", "format", "threshold")}
        made = replace(read_yaml(EvalOptions, out / "options.yaml"), **now)
        write_yaml(made, out / "options.yaml")
    transcripts.finish(out, result)
    return result


def _summarize(texts: dict[str, list[dict]], options: EvalOptions, stops: Sequence[str]) -> dict:
    return grading.summarize(
        [
            grades
            for rows in texts.values()
            for grades in grading.grade(
                rows, options.graders, stops, options.format, options.timeout, options.threshold
            )
        ]
    )


def evaluate(
    sampler: Sampler, problems: Sequence[Problem], options: EvalOptions, prompt_ids: Sequence | None = None
) -> dict:
    """The evaluation during training: one cell, for the first number of shots, stop policy and grader.

    This is a collective call. All ranks grade, so that none waits long for another. The result of rank 0 counts,
    because a grader may exceed its time limit on one rank only.

    Args:
        sampler: of the model.
        problems: to answer, the same on every rank.
        options: how to prompt, sample and grade.
        prompt_ids: the problems' prompts in tokens; None: they are tokenized here.

    Returns:
        A cell, as `grading.cell` makes it.
    """
    answers = transcribe(sampler, problems, options, prompt_ids=prompt_ids)
    rows = [{"model": "tuned", "shots": options.shots[0], **row} for row in answers]
    grades = grading.grade(
        rows, options.graders[:1], options.stops[:1], options.format, options.timeout, options.threshold
    )
    return distributed.broadcast_object(grading.cell(grades[0]))
