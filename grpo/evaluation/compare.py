"""Evaluation from start to end: compare a base and a tuned model, validate during a run, and regrade old transcripts.

Each answer is generated once and can be graded many times. `transcribe.py` makes the texts; `grading.py` computes rates
and differences. An evaluation that was interrupted continues where it stopped. Left out: grading by another model.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from grpo.evaluation.transcribe import say_progress, transcribe
from grpo.options import read_yaml, write_yaml
from grpo.policy import load_policy, load_shapes, model_directory, positions_of, refuse_beyond_positions
from grpo.run.hosts import at_hand
from grpo.sampler import Sampler

T = TypeVar("T")


def problems_of(options: EvalOptions, shots: int) -> list[Problem]:
    """The problems of an evaluation, with `shots` worked examples in each prompt."""
    problems = data.load(options.data, options.split, path=options.data_path, num_shots=shots, seed=options.seed)
    return problems[: options.limit or None]


def check_planned(config: Config, tokenizer, positions: int | None = None) -> None:
    """Load what a run's evaluations will need, so that a mistake shows before the first step instead of after the last.

    Args:
        config: the run's.
        tokenizer: its model's.
        positions: that its model has (`positions_of`); None: no bound.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are missing, or a prompt is too long.
    """
    for options in planned(config):
        prepare(options, [(tokenizer, positions)], "max_new_tokens")


def prepare(options: EvalOptions, models: Sequence[tuple], option: str = "budget") -> dict[int, list[Problem]]:
    """Load the problems, and check every option that can be mistyped.

    Args:
        options: of the evaluation.
        models: (tokenizer, learned positions or None) of all models; every prompt must fit with each of them.
        option: the one that says how many new tokens there are, for the message.

    Returns:
        {number of shots: its problems}.

    Raises:
        ValueError: a grader is unknown, a split or its exemplars are missing, or a prompt is too long.
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

    This is a collective call: ranks share the problems, and rank 0 writes. The tuned model answers first, because its
    weights are new: if they cannot be read, that shows before any work. After an interruption `out` holds the answers
    so far. The next call with the same options keeps them.

    Args:
        options: what to evaluate, and how.
        device, precision: where and how to compute.
        should_stop: called between batches; True interrupts the evaluation.
        instead: whether to replace another evaluation that `out` holds.
        kernels: whether the sampler may use the GPU kernels.

    Returns:
        The content of `eval.json`, with the cells of the base model first.

    Raises:
        ValueError: a model, the data or a grader cannot be used, or `out` holds another evaluation.
        Interrupted: `should_stop()` was True on some rank.
    """
    out = Path(options.out or "eval")
    texts = []
    with at_hand(options.tuned) as tuned:
        models = {"base": (options.model, options.revision)}
        if tuned is not None:
            models = {"tuned": (tuned, None)} | models
        sources = {name: model_directory(path) for name, (path, _) in models.items()}
        ingredients = distributed.on_main(lambda: transcripts.made_of(options, precision, sources))
        shapes = [_named(name, load_shapes, *where) for name, where in models.items()]
        problems = prepare(options, [(tokenizer, positions_of(model)) for model, tokenizer in shapes])
        distributed.on_main(lambda: transcripts.begin(out, ingredients, instead))
        for name, (path, revision) in models.items():
            policy, tokenizer = _named(name, load_policy, path, revision=revision, device=device, precision=precision)
            sampler = Sampler(policy, tokenizer, kernels=kernels)
            for shots, asked in problems.items():
                start = time.perf_counter()
                file = out / transcripts.FILE.format(model=name, shots=shots)
                rows = transcribe(sampler, asked, options, model=name, shots=shots, should_stop=should_stop, file=file)
                texts.append(rows)
                seconds = time.perf_counter() - start
                say_progress(f"{name}, {headline.shots(shots)}: {len(rows):,} completions in {seconds:.0f} s")
            del policy, sampler  # before the next model is loaded
    result = _summarize(texts, options)
    made = replace(options, out=None)  # without its place: the directory may be moved
    distributed.on_main(lambda: write_yaml(made, out / "options.yaml"))
    distributed.on_main(lambda: transcripts.finish(out, result))
    return result


def _named(name: str, load: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call `load` for the model of one option (`model` or `tuned`); an error message starts with that option."""
    try:
        return load(*arguments, **options)
    except ValueError as error:
        raise ValueError(str(error) if name == "base" else re.sub("^model", "tuned", str(error))) from error


def regrade(options: EvalOptions) -> dict:
    """Grade the transcripts of an earlier evaluation again, without a model, and write `eval.json`.

    Raises:
        ValueError: there are no transcripts, one is empty or incomplete, or a grader is unknown.
    """
    directory = Path(options.regrade)
    out = Path(options.out or directory)
    texts = transcripts.read_all(directory)
    if out.resolve() != directory.resolve():
        transcripts.refuse_taken(out)
    result = _summarize(texts, options)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "options.yaml"
    if file.exists():  # of the transcripts; the cells are now by these graders
        made = read_yaml(EvalOptions, file)
        graded = replace(made, graders=options.graders, format=options.format, threshold=options.threshold)
        write_yaml(graded, file)
    transcripts.finish(out, result)
    return result


def _summarize(texts: list[list[dict]], options: EvalOptions) -> dict:
    graded = []
    for rows in texts:
        graded += grading.grade(rows, options)
    return grading.summarize(graded)


def evaluate(sampler: Sampler, problems: Sequence[Problem], options: EvalOptions) -> dict:
    """The evaluation during training: the cell of the first number of shots, stop policy and grader.

    This is a collective call, with the same problems on every rank. All ranks grade, so that none waits long for
    another. The result of rank 0 counts, because a grader may exceed its time limit on one rank only.
    """
    rows = transcribe(sampler, problems, options, shots=options.shots[0])
    return distributed.broadcast_object(grading.grade(rows, options)[0].cell)
