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

from data import load, task
from data.problem import Problem
from grpo import distributed
from grpo.config import Config
from grpo.dataloader import ProblemSets, refuse_lengths
from grpo.evaluation import grading, headline, transcripts
from grpo.evaluation.protocol import EvalOptions, planned
from grpo.evaluation.transcribe import say_progress, transcribe
from grpo.options import followed, read_yaml, write_yaml
from grpo.policy import load_policy, model_directory, positions_of, refuse_beyond_positions
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
    grading.check_graders(grading.graders_of(options))
    for shots in options.shots:
        prompt_ids = sets.prompt_ids(options.split, shots, options.limit)
        refuse_lengths(prompt_ids, options.max_prompt_tokens)
        refuse_beyond_positions(positions_of(sets.shapes[0]), prompt_ids, options.budget, option)


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

    This is a collective call: ranks share the problems, and rank 0 writes. The tuned model answers first, because its
    weights are new: if they cannot be read, that shows before any work. After an interruption `out` holds the answers
    so far. The next call with the same options keeps them.

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
    out = Path(options.out or "eval")
    texts = []
    with at_hand(options.tuned) as tuned:
        sets = sets or ProblemSets(options)
        prepare(options, sets)
        models, asked = {"base": (options.model, options.revision)}, {"base": sets}
        if tuned is not None:
            models = {"tuned": (tuned, None)} | models
            asked["tuned"] = _named("tuned", sets.of_model, tuned)
            prepare(options, asked["tuned"])
        sources = {name: model_directory(path) for name, (path, _) in models.items()}
        ingredients = distributed.on_main(lambda: transcripts.made_of(options, precision, sources))
        distributed.on_main(lambda: transcripts.begin(out, ingredients, instead))
        for name, (path, revision) in models.items():
            policy, tokenizer = _named(name, load_policy, path, revision=revision, device=device, precision=precision)
            sampler = Sampler(policy, tokenizer, kernels=kernels)
            for shots in options.shots:
                start, questions = time.perf_counter(), (options.split, shots, options.limit)
                rows = transcribe(
                    sampler,
                    asked[name].problems(*questions),
                    options,
                    prompt_ids=asked[name].prompt_ids(*questions),
                    model=name,
                    shots=shots,
                    should_stop=should_stop,
                    file=out / transcripts.FILE.format(model=name, shots=shots),
                )
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
        ValueError: there are no transcripts, one is missing, empty or incomplete, or a grader is unknown.
    """
    directory = Path(options.regrade)
    out = Path(options.out or directory)
    texts = transcripts.read_all(directory)
    if out.resolve() != directory.resolve():
        transcripts.refuse_taken(out)
    made = read_yaml(EvalOptions, file) if (file := directory / "options.yaml").exists() else None
    if made:
        transcripts.refuse_missing(directory, ["base"] + ["tuned"] * (made.tuned is not None), made.shots)
    options = replace(options, **followed(options, "task", task(made.data if made else EvalOptions.data)))
    result = _summarize([_with_tests(rows, made, directory) for rows in texts], options)
    out.mkdir(parents=True, exist_ok=True)
    if made and (out / "options.yaml").exists():  # of the transcripts; the cells are now by these graders
        names = ("graders", "lenient", "format", "threshold", "reasoning_end")
        write_yaml(replace(made, **{name: getattr(options, name) for name in names}), out / "options.yaml")
    transcripts.finish(out, result)
    return result


def _with_tests(rows: list[dict], made: EvalOptions | None, directory: Path) -> list[dict]:
    """Rows whose `info` has the tests of their problem, which transcripts leave out and the data has.

    Raises:
        ValueError: the data cannot be read, or has other problems by now.
    """
    if not any(row["info"].get("tests", 0) is None for row in rows):
        return rows
    if made is None:
        raise ValueError(f"regrade: {directory} has no options.yaml, which says where the tests of the problems are")
    problems = load(made.data, made.split, num_shots=rows[0]["shots"], **made.loading())
    found = []
    for row in rows:
        problem = problems[row["index"]] if row["index"] < len(problems) else None
        if problem is None or (problem.answer, problem.info["question"]) != (row["answer"], row["question"]):
            raise ValueError(f"regrade: problem {row['index']} of {made.data_path} is not the one that was asked")
        found.append(row | {"info": problem.info})
    return found


def _summarize(texts: list[list[dict]], options: EvalOptions) -> dict:
    graded = []
    for rows in texts:
        graded += grading.grade(rows, options)
    return grading.summarize(graded)


def evaluate(
    sampler: Sampler, problems: Sequence[Problem], options: EvalOptions, prompt_ids: Sequence | None = None
) -> dict:
    """The evaluation during training: the cell of the first number of shots, stop policy and grader.

    This is a collective call. All ranks grade, so that none waits long for another. The result of rank 0 counts,
    because a grader may exceed its time limit on one rank only.

    Args:
        sampler: of the model.
        problems: to answer, the same on every rank.
        options: how to prompt, sample and grade.
        prompt_ids: the problems' prompts in tokens; None: they are tokenized here.
    """
    rows = transcribe(sampler, problems, options, shots=options.shots[0], prompt_ids=prompt_ids)
    return distributed.broadcast_object(grading.grade(rows, options)[0].cell)
