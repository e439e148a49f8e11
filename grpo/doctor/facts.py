"""Collect the facts of a recipe before it runs: data, token counts, model sizes, and what is found while looking.

Data and tokenizer are the real ones; from the model only the shapes are used. Left out: what follows from the facts
(`check_data.py`, `check_algorithm.py`), memory (`memory.py`), and anything that needs a completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import rewards
from data.problem import Problem
from data.prompts import worked_answer
from grpo import distributed
from grpo.advantages import ADVANTAGES, FACTS
from grpo.config import Config
from grpo.corrections import CORRECTIONS
from grpo.dataloader import ProblemSets, refuse_lengths, skip_long, stop_strings
from grpo.doctor.check_graders import LOOK_S, examine
from grpo.doctor.check_tokens import look_at_tokens
from grpo.doctor.finding import Finding
from grpo.evaluation import protocol
from grpo.kl import KL
from grpo.losses import LOSSES
from grpo.policy import head_sizes, linear_layers, positions_of
from grpo.run.directory import refusal
from grpo.run.machine import device_memory
from grpo.tables import constants, lookup
from grpo.tree import shared_prefix
from grpo.weighting import WEIGHTINGS

NO_LIMIT = 1 << 40


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model. They count numbers, not bytes."""

    parameters: int
    rounded: int
    """The parameters in linear layers except the head. Copies of the model store these in the compute dtype."""
    layers: int
    width: int
    intermediate: int
    key_width: int
    """Number of key heads times head size: the keys of one token in one layer."""
    vocabulary: int
    context: int | None
    """The largest number of positions that the model was made for; None: unknown."""
    ends: bool = False
    """They are a learned table or a sliding window: beyond their end nothing can be computed."""
    adapted: int = 0
    """Inputs and outputs of the linear layers in `lora_targets`: the parameters of adapters of rank 1."""
    dtype: torch.dtype | None = None
    """Of the model's files; None: unknown."""


@dataclass(frozen=True)
class Evaluation:
    """One set of questions that the run will be evaluated on."""

    split: str
    shots: int
    n: int
    longest_prompt: int
    """In tokens."""
    prompt_limit: int
    """In tokens."""
    also_trained: tuple[str, ...]
    """Its questions that are training questions too."""


@dataclass(frozen=True)
class Facts:
    """Everything that the checks use besides the config."""

    sizes: Sizes
    num_train: int
    prompt_tokens: tuple[int, ...]
    """Lengths of the training prompts, sorted."""
    shared_tokens: int
    """Common to all of them: the exemplars."""
    left_out: int = 0
    """Training prompts that `skip_long_prompts` leaves out."""
    solution_tokens: tuple[int, ...] = ()
    """Lengths of the data's worked answers, sorted; empty if the data has none."""
    evaluations: tuple[Evaluation, ...] = ()
    found: tuple[Finding, ...] = ()
    """What was found while looking: what would stop the run, and what the checks of tokens and graders say."""
    world_size: int = 1
    nearby: int = 1
    """Processes on this machine."""
    sharing: int = 1
    """Processes that share the device's memory: all of this machine on a CPU, one on a GPU."""
    device: str = "cpu"
    device_bytes: int = NO_LIMIT
    free_bytes: int = NO_LIMIT
    """The bytes that were free when the facts were collected."""


def gather(
    config: Config,
    sets: ProblemSets,
    device: torch.device,
    at_most: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Facts:
    """Collect the facts about everything that a run will use.

    Args:
        config: of the run.
        sets: its problems, prompts and shapes.
        device: where the run will compute.
        at_most: grade answers to this many training problems, evenly spread; 0: all.
        should_stop: ends the test of the rewards, which may be slow.

    Raises:
        ValueError: the training problems cannot be loaded.
    """
    train, tokenizer = sets.problems("train", config.num_shots), sets.shapes[1]
    seen = spread(train, at_most)
    worked = [worked_answer({**p.info, "answer": p.answer}) for p in spread(seen, 1000) if "solution" in p.info]
    errors: list[str] = []
    evaluations = _evaluations(config, sets, errors)
    errors += wrong_algorithm(config) + _unknown_rewards(config)
    found: list[Finding] = []
    readers, judges = (None, []) if errors else _readers(config, bool(evaluations))
    if readers is not None:
        seconds = min(LOOK_S, config.ddp_timeout / 4)  # the other ranks wait
        found += examine(readers, judges, seen, seconds=seconds, should_stop=should_stop)
    if sentence := refusal(config):
        errors.append(sentence)
    for sentence in errors:
        means = "The run would stop before its first step."
        found.append(Finding("sure", sentence, means, "Correct what the sentence names."))
    known = outline(config, sets, device)
    return replace(
        known,
        solution_tokens=tuple(sorted(map(len, tokenizer(worked).input_ids))) if worked else (),
        evaluations=evaluations,
        found=(*known.found, *found),
    )


def outline(config: Config, sets: ProblemSets, device: torch.device) -> Facts:
    """The facts that decide whether a step fits into memory. The arguments are as in `gather`."""
    train, encoded = sets.problems("train", config.num_shots), sets.prompt_ids("train", config.num_shots)
    if config.skip_long_prompts:
        train, encoded = skip_long(train, encoded, config.max_prompt_tokens)
    else:
        refuse_lengths(encoded, NO_LIMIT)
    model, tokenizer = sets.shapes
    processes, (free, total) = distributed.world_size(), device_memory(device)
    nearby = distributed.nearby()
    return Facts(
        sizes=sizes(model, config.lora_targets),
        num_train=len(train),
        left_out=len(sets.problems("train", config.num_shots)) - len(train),
        prompt_tokens=tuple(sorted(map(len, encoded))),
        shared_tokens=shared_prefix(encoded),
        found=tuple(look_at_tokens(model, tokenizer, config.chat, train, encoded, stop_strings(train, config.chat))),
        world_size=processes,
        nearby=nearby,
        sharing=1 if device.type == "cuda" else nearby,
        device=device.type,
        device_bytes=total,
        free_bytes=free,
    )


def spread(items: Sequence, at_most: int) -> list:
    """At most `at_most` of the items, evenly spread; 0: all."""
    return list(items[:: max(1, -(-len(items) // at_most))] if at_most else items)


def sizes(model: nn.Module, targets: str | Sequence[str] = "all") -> Sizes:
    """The sizes of a model on any device, `meta` included; `targets` as in `linear_layers`."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    heads, positions = head_sizes(config), positions_of(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    adapted = linear_layers(model, targets).values() if linear else ()
    return Sizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rounded=sum(parameter.numel() for module in linear for parameter in module.parameters()),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        key_width=heads.width * heads.key_heads,
        vocabulary=len(head.weight),
        context=positions or getattr(config, "max_position_embeddings", None),
        ends=positions is not None,
        adapted=sum(layer.in_features + layer.out_features for layer in adapted),
        dtype=config.dtype if isinstance(config.dtype, torch.dtype) else None,
    )


def _evaluations(config: Config, sets: ProblemSets, errors: list[str]) -> tuple[Evaluation, ...]:
    """The facts of each planned evaluation. If a set cannot be loaded, its message is added to `errors`."""
    trained, found = set(map(_question, sets.problems("train", config.num_shots))), []
    for options in protocol.planned(config):
        for shots in options.shots:
            try:
                problems = sets.problems(options.split, shots, options.limit)
            except (ValueError, OSError) as error:
                errors.append(str(error))
                continue
            encoded = sets.prompt_ids(options.split, shots, options.limit)
            refuse_lengths(encoded, NO_LIMIT)
            asked = map(_question, problems)
            found.append(
                Evaluation(
                    split=options.split,
                    shots=shots,
                    n=len(problems),
                    longest_prompt=max(map(len, encoded)),
                    prompt_limit=options.max_prompt_tokens,
                    also_trained=tuple(question for question in asked if question in trained),
                )
            )
    return tuple(found)


def wrong_algorithm(config: Config) -> list[str]:
    """Sentences for names of the algorithm that are in no table, and for a constant of the loss without an option."""
    tables = {"advantage": ADVANTAGES, "loss": LOSSES, "weighting": WEIGHTINGS, "kl": KL}
    tables |= {"sampler_correction": CORRECTIONS}
    lookups = [partial(lookup, table, getattr(config, name), name) for name, table in tables.items()]
    if config.loss in LOSSES:
        lookups.append(partial(constants, LOSSES[config.loss], config))
    if config.sampler_correction in CORRECTIONS:
        lookups.append(partial(constants, CORRECTIONS[config.sampler_correction], config, "sampler_correction"))
    if config.advantage in ADVANTAGES:
        lookups.append(partial(constants, ADVANTAGES[config.advantage], config, "advantage", FACTS))
    return _sentences(lookups)


def _readers(config: Config, evaluates: bool) -> tuple[Config | None, list[str]]:
    """The config with those rewards that judge a text alone, not how it was sampled; None: there are none.

    Also such graders of evaluations, of which the first decides what is right.
    """
    judges = _judges(config) if evaluates and "." in config.eval_correct else []
    named = [name for name in (*config.rewards, *judges) if "." in name]
    asking = [name for name in named if set(rewards.asks_for(rewards.load(name))) - set(rewards.OF_TEXT)]
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    kept = {name: weight for name, weight in pairs if name not in asking}
    if config.eval_correct in asking:
        judges = []
    readers = replace(config, rewards=tuple(kept), reward_weights=tuple(kept.values())) if kept else None
    return readers, [name for name in judges if name not in asking]


def _unknown_rewards(config: Config) -> list[str]:
    """The sentences for rewards that are in no file."""
    judges = [name for name in _judges(config) if "." in name]
    return _sentences([partial(rewards.load, name) for name in dict.fromkeys([*config.rewards, *judges])])


def _judges(config: Config) -> list[str]:
    """What decides in evaluations: of the answer, then of the format if there is one."""
    return [name for name in (config.eval_correct, config.eval_format) if name is not None]


def _sentences(lookups: Sequence[Callable]) -> list[str]:
    """What those say that raise a ValueError."""
    sentences = []
    for look in lookups:
        try:
            look()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def _question(problem: Problem) -> str:
    return " ".join(problem.info.get("question", problem.prompt).split())
