"""GRPO from start to end: sample completions, reward them, compute advantages, update; then log, evaluate and save.

    python train.py                                        the embedded demo, on any machine
    python train.py --recipe recipes/X.yaml --seed 1       flags override the recipe
    torchrun --nproc_per_node 8 train.py --recipe ...      more processes, the same completions and updates

`train` is the whole algorithm; each of its lines calls a function of one file. Left out: replay buffers and
asynchronous rollouts, of which `lag` shows the effect.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpo  # noqa: F401  before torch, which reads settings when it is loaded

# isort: split
import torch
from torch import nn

from grpo import distributed
from grpo.config import Config, parse_args
from grpo.dataloader import ProblemSets
from grpo.doctor import diagnose
from grpo.doctor.watch import Watch
from grpo.evaluation import headline, protocol
from grpo.evaluation.compare import check_planned, compare_models, evaluate
from grpo.evaluation.transcribe import Interrupted
from grpo.metrics import Sums
from grpo.optimizer import next_coefs
from grpo.policy import Policy, load_policy, model_directory, prepare_saving, save_adapters, save_model, shards
from grpo.record import measure, write_transcripts
from grpo.replay.saved import save_step
from grpo.report import write_report
from grpo.rollout import Collector
from grpo.run import inputs
from grpo.run.directory import (
    after_rehearsal,
    begun,
    claim,
    is_trained,
    keep_smaller,
    open_directory,
    rehearsal,
    sole_user,
    take_evaluation,
)
from grpo.run.log import Clock, Log, say
from grpo.run.machine import device_memory, peak_bytes, settings, settle
from grpo.run.signals import Signals
from grpo.run.state import State, Stopped, due, restore_state, save_state, stop_before, why_stop
from grpo.sampler import Sampler
from grpo.update import Learner, make_ready
from rewards.runner import RewardRunner


def train(config: Config, sets: ProblemSets, directory: Path, device: torch.device, signals: Signals) -> None:
    """Do all steps that are left, then write `final/`, and `adapter/` if there is one.

    Raises:
        Stopped: after a signal, or after several updates without a finite gradient. The state is saved.
        ValueError: an option is wrong, or a step does not fit into memory.
    """
    problems, prompt_ids = sets.problems("train", config.num_shots), sets.prompt_ids("train", config.num_shots)
    free = least_free(device)
    distributed.on_main(lambda: diagnose.refuse_unfit(config, sets, device, free))
    policy, tokenizer, reference, base = load(config, device)
    own = config.lag > 0 or shards(config.shard)
    sampler = Sampler(policy, tokenizer, kernels=config.compile, own=own, device=device)
    learner = Learner(config, policy, reference)  # it shards the policy, of which no copy can be made then
    older = sampler.policy if config.lag else None
    how = {"reasoning_end": config.reasoning_end, "chat": config.chat}
    with RewardRunner(config.rewards, config.reward_timeout, config.reward_workers, **how) as rewards:
        facts = rewards.prepare()
        if distributed.is_main():
            for name, text in facts.items():
                say(f"{name}: {text}")
        collector = Collector(config, problems, sampler, rewards, prompt_ids)
        final_dtype = look_ahead(config, sets, policy, tokenizer, device, signals)
        state = restore_state(directory, learner, sampler=older)
        stop_before(state, signals)
        made_of = inputs.look(config, base, problems, collector.prompt_ids)
        claim(directory, config, device, state.step, made_of, facts)
        watch, first = Watch(config), state.step + 1
        with Log(directory, config, state.step) as log:
            while state.step < config.num_steps:
                step = state.step + 1
                sums, clock = Sums(), Clock(log.display.phase)
                if not config.lag:
                    with clock("rollout"):
                        sampler.refresh(policy)
                rollout = collector.collect(step, clock, state.pass_rates)
                learned = collector.choose(rollout, sums)
                save_step(directory, config, step, rollout, learned)
                if config.lag:
                    sampler.refresh(policy)  # the next step samples with what this one began with
                if step == first:
                    rehearse(config, directory, learner, prompt_ids)
                with clock("learn"):
                    budget = learner.max_tokens
                    finite = learner.learn(learned.batch, step, sums, state.coefs)
                    learner.renew_reference(step)
                    keep_smaller(directory, config, budget, learner.max_tokens, log.display)

                measure(rollout, config.rewards, sums, rewards.reported())
                pass_rates = collector.pass_rates(rollout, step, state.pass_rates, sums)
                write_transcripts(directory / "rollouts" / f"step_{step:06d}.jsonl", rollout, config.rewards, tokenizer)
                metrics = sums.reduce() | clock.seconds() | peak_bytes(device)
                coefs = next_coefs(config, state.coefs, metrics)
                state = state.after(step, finite, coefs=coefs, pass_rates=pass_rates)
                if due(step, config.eval_every):
                    with clock("evaluate"), sampler.refreshed(policy, take_back=config.lag > 0):
                        state, measured = validate(config, sets, sampler, state)
                    metrics |= measured
                log.write(step, metrics)
                for trouble in watch.see(step, metrics, distributed.gather_objects(rewards.first_errors)):
                    log.display.say(trouble)
                stop = why_stop(state, signals, metrics)
                best = config.checkpoint_every > 0 and state.best_step == step
                if stop or best or step == config.num_steps or due(step, config.checkpoint_every):
                    save_state(directory, learner, state, config.keep_checkpoints, older)
                if stop:
                    raise Stopped(*stop)
    save_adapters(policy, directory / "adapter", config.model, config.revision)
    save_model(policy, tokenizer, directory / "final", final_dtype)


def load(config: Config, device: torch.device) -> tuple[Policy, Any, nn.Module | None, dict]:
    """The policy that a run begins with, its tokenizer, the reference for the KL, and what `inputs` says of it."""
    policy, tokenizer = load_policy(
        config.model,
        revision=config.revision,
        device="cpu" if shards(config.shard) else device,  # sharding moves what a process keeps
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
    )
    base = inputs.of_model(policy)
    return policy, tokenizer, make_ready(policy, config, config.kl_coef > 0), base


def look_ahead(
    config: Config, sets: ProblemSets, policy: Policy, tokenizer, device: torch.device, signals: Signals
) -> torch.dtype:
    """Find what would go wrong later, before the first step: in evaluations, in writing `final/`, and by the doctor.

    Returns:
        the dtype for `final/`.

    Raises:
        ValueError: the run could not come to its end.
    """
    check_planned(config, sets)
    dtype = distributed.on_main(
        lambda: prepare_saving(policy, tokenizer, config.model, config.revision, dtype=config.final_dtype)
    )
    distributed.on_main(lambda: diagnose.warn(config, sets, device, signals.asked))
    return dtype


def rehearse(config: Config, directory: Path, learner: Learner, prompt_ids: Sequence[Sequence[int]]) -> None:
    """Show before the first update whether learning fits into memory, where processes could not go on without it."""
    if shards(config.shard):
        with rehearsal(directory, learner.max_tokens):
            learner.rehearse(max(map(len, prompt_ids)) + config.max_new_tokens)


def validate(config: Config, sets: ProblemSets, sampler: Sampler, state: State) -> tuple[State, dict[str, float]]:
    """Evaluate on the validation split. Returns the state, with the best step updated, and the `eval/...` metrics."""
    options = protocol.validation_options(config)
    asked = options.split, config.num_shots, options.limit
    cell = evaluate(sampler, sets.problems(*asked), options, sets.prompt_ids(*asked))
    if cell["accuracy"] > state.best_accuracy:
        state = replace(state, best_step=state.step, best_accuracy=cell["accuracy"])
    numbers = {name: value for name, value in cell.items() if isinstance(value, int | float) and name != "shots"}
    return state, {f"eval/{name}": value for name, value in numbers.items()}


def compare(config: Config, sets: ProblemSets, directory: Path, device: torch.device, signals: Signals) -> None:
    """Evaluate the base model and `final/` on the test split, if this was not done before, and print both."""
    result = directory / "eval" / "eval.json"
    options = protocol.options_of(config, result.parent)
    if not distributed.on_main(lambda: protocol.is_evaluated(options)):
        # An older evaluation with other options stays in place until this one is finished.
        beside = replace(options, out=str(directory / "eval.new"))
        kernels = bool(config.compile)
        compare_models(beside, device, config.precision, signals.asked, instead=True, kernels=kernels, sets=sets)
        take_evaluation(directory)
    if distributed.is_main():
        print(headline.table_of(result))
        print(f"transcripts: {result.parent}")


def report(directory: Path) -> None:
    """Write `report.html` if it is missing or old. The run is saved already, so a failure here is only a warning."""
    page, lines = directory / "report.html", directory / "metrics.jsonl"
    try:
        drawn = page.exists() and page.stat().st_mtime >= lines.stat().st_mtime
        print(f"report: {page if drawn else write_report([directory])}")
    except Exception as error:
        say(f"warning: {directory} has no report.html ({type(error).__name__}: {error}); try python -m grpo.report")


def settled(asked: Config, sets: ProblemSets, device: torch.device, before: Config | None) -> Config:
    """The config of a run: each `auto` has a value, the same on all ranks. `before`: what a resumed run began with."""
    free = least_free(device)

    def budget(known: Config) -> int:
        return diagnose.budget(known, sets, device, free)

    return distributed.on_main(lambda: settle(asked, device, before, budget))


def least_free(device: torch.device) -> int:
    """Bytes of memory that are free now, the smallest number of all ranks."""
    return min(distributed.gather_objects(device_memory(device)[0]))


def check(asked: Config, sets: ProblemSets, device: torch.device) -> int:
    """Print what is wrong with the recipe, from data, tokenizer and sizes. Returns 1 for a finding `sure`, else 0."""

    def before() -> Config | None:
        with suppress(ValueError):  # the doctor says why
            return begun(asked)

    config = settled(asked, sets, device, distributed.on_main(before))
    report, code = distributed.on_main(lambda: diagnose.check(config, sets, device))
    if distributed.is_main():
        print(report)
    return code


def run(config: Config, sets: ProblemSets, directory: Path, device: torch.device, signals: Signals) -> None:
    """Train if there are steps left, then evaluate and report."""
    if distributed.is_main():
        print(f"base model: {model_directory(config.model)}", flush=True)
    with sole_user(directory):
        if not is_trained(directory, config):
            train(config, sets, directory, device, signals)
        if config.final_eval:
            compare(config, sets, directory, device, signals)
        if distributed.is_main():
            report(directory)


def main(argv: list[str]) -> int:
    """Train, evaluate and report. Returns the exit code.

    It is 0, that of `Stopped`, 1 if another process is lost, or 2 for a wrong option or input.
    """
    asked, code = parse_args(argv), 0
    try:
        device = distributed.init(asked.device, asked.ddp_timeout)
        sets = ProblemSets(asked)
        if asked.check:
            code = check(asked, sets, device)
        else:
            with Signals() as signals, settings(device):
                before = distributed.on_main(lambda: begun(asked))
                config = settled(asked, sets, device, before)
                config = distributed.on_main(lambda: after_rehearsal(config))
                directory = distributed.on_main(lambda: open_directory(config, before))
                run(config, sets, directory, device, signals)
    except Stopped as reason:
        say(reason)
        code = reason.code
    except Interrupted:
        say("stopped during the evaluation; the model is saved, evaluate it with --resume auto")
    except torch.OutOfMemoryError as error:
        options = "prompts_per_step, group_size, max_new_tokens or eval_batch"
        say(f"train.py: error: out of memory, and a smaller micro-batch does not help; lower {options} ({error})")
        return 2
    except (ValueError, OSError) as error:
        say(f"train.py: error: {error}")
        return 2
    except RuntimeError as error:
        if not (sentence := distributed.lost(error, asked.ddp_timeout)):
            raise
        say(f"train.py: error: {sentence}")
        return 1
    distributed.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
