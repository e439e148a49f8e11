"""Checks of what a recipe uses: prompts, solutions, graders, splits, memory. Pure functions.

Each is `(config, facts) -> Iterator[Finding]`, listed in `DATA_CHECKS` and run by `doctor.py`. Left out: the
options of the algorithm (`check_algorithm.py`).
"""

from collections.abc import Iterator

from grpo.config import Config
from grpo.doctor import memory
from grpo.doctor.facts import Facts, Finding


def would_stop(c: Config, facts: Facts) -> Iterator[Finding]:
    """What a run would end with before its first step."""
    for sentence in facts.errors:
        yield Finding("sure", sentence, "The run would stop before its first step.", "Mend what it names.")


def long_prompts(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts over their limit, of training and of evaluations."""
    over = sum(length > c.max_prompt_tokens for length in facts.prompt_tokens)
    means = "Nothing is cut: the run stops before its first step."
    if over:
        longest = facts.prompt_tokens[-1]
        what = f"{over} of {len(facts.prompt_tokens)} training prompts exceed max_prompt_tokens ({c.max_prompt_tokens})"
        yield Finding("sure", what, means, f"max_prompt_tokens {longest}, or fewer shots.")
    for e in facts.evaluations:
        if e.longest_prompt > e.prompt_limit:
            what = f"{e.split} prompts with {e.shots} shots have up to {e.longest_prompt} tokens, over {e.prompt_limit}"
            yield Finding("sure", what, means, f"max_prompt_tokens {e.longest_prompt}, or fewer shots in eval_shots.")


def context(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompt and completion beyond the positions of the model."""
    longest = max([facts.prompt_tokens[-1], *(e.longest_prompt for e in facts.evaluations)]) + c.max_new_tokens
    if facts.sizes.context and longest > facts.sizes.context:
        learned = facts.sizes.learned_positions
        ends = "Its positions are a learned table that ends there: the run stops before its first step."
        noise = "Beyond its positions a model writes noise, which would be learned from."
        yield Finding(
            "sure" if learned else "warning",
            f"prompt and completion reach {longest} tokens, the model was made for {facts.sizes.context}",
            ends if learned else noise,
            "Lower max_new_tokens or the number of shots.",
        )


def short_completions(c: Config, facts: Facts) -> Iterator[Finding]:
    """A budget that the data's own solutions do not fit into."""
    lengths = facts.solution_tokens
    cut = sum(length >= c.max_new_tokens for length in lengths) / max(1, len(lengths))
    if cut >= 0.05:
        masked = " and, with mask_truncated, never learned from" if c.mask_truncated else ""
        yield Finding(
            "sure" if cut >= 0.9 else "warning",
            f"{cut:.0%} of the data's own solutions do not fit into max_new_tokens ({c.max_new_tokens})",
            f"Completions of that length are cut, graded without their answer{masked}.",
            f"max_new_tokens {lengths[int(0.98 * (len(lengths) - 1))] + 16} would hold 98 % of them.",
        )
    elif c.mask_truncated:
        yield Finding(
            "note",
            "mask_truncated leaves cut completions out of the loss",
            "Nothing then teaches the model to stop; where many are cut (completion/truncated) little is learned.",
            "Watch completion/truncated; below 0.05 it does what it is meant for.",
        )


def no_stop(c: Config, facts: Facts) -> Iterator[Finding]:
    """Completion prompts that only EOS ends."""
    if not c.chat and not facts.stop:
        yield Finding(
            "warning",
            "completion prompts without a stop string",
            "A base model answers and goes on with the next question: most completions are cut at max_new_tokens, "
            "their last lines answer something else, and a gain may come from learning to stop alone.",
            'Give the data a `stop`, such as ["\\n\\nQuestion:"]; or chat True for a chat model.',
        )


def chat_model(c: Config, facts: Facts) -> Iterator[Finding]:
    """A chat template that is not used."""
    if facts.has_chat_template and not c.chat:
        yield Finding(
            "note",
            "the tokenizer has a chat template, and prompts are plain text",
            "Right for a base model; an Instruct model is taken out of the form that it was tuned in.",
            "For an Instruct model: --chat True.",
        )


def out_of_reach(c: Config, facts: Facts) -> Iterator[Finding]:
    """Gold answers that a reward or a grader never grants."""
    for grader in facts.graders:
        share = len(grader.never) / grader.graded
        if not share or grader.fails:
            continue
        shown = ", ".join(repr(answer) for answer in dict.fromkeys(grader.never[:3]))
        training = grader.name in c.rewards
        level = "warning" if share < 0.2 or not grader.reads_answers else "sure"
        means = "A right answer to these problems goes without this reward, whatever is written."
        if not training:
            means = f"No model can be measured above {1 - share:.1%}."
        if share == 1:
            means = "It reads answers of another form than `#### The final answer is 18`, or it is a penalty."
        yield Finding(
            level,
            f"{grader.name} grants nothing to {share:.2%} of the gold answers ({len(grader.never)} of {grader.graded}: "
            f"{shown}), even written as the exemplars are",
            means,
            "Use another reward (rewards/gsm8k.py reads commas, signs, units), or mend this one.",
        )


def fails_always(c: Config, facts: Facts) -> Iterator[Finding]:
    """A reward or a grader that is broken."""
    for grader in facts.graders:
        if grader.fails:
            yield Finding(
                "sure",
                f"{grader.name} fails on every text it was tried on: {grader.fails}",
                "A text on which a reward fails teaches nothing, and one on which a grader fails counts as wrong.",
                f"Mend {grader.name.replace('.', '.py, function ')}.",
            )


def graders_disagree(c: Config, facts: Facts) -> Iterator[Finding]:
    """What is paid in training and what counts in evaluations."""
    for d in facts.disagreements:
        pays, counts = ("pays for", "wrong") if d.earned else ("does not pay for", "right")
        yield Finding(
            "warning",
            f"{d.reward} {pays} what {c.eval_correct} counts as {counts}: {d.writing} ({d.count} of {d.probed} answers "
            f"tried), such as {d.text[-60:]!r} for {d.answer!r}",
            "Training moves towards one reading and is measured by the other: a gain or a loss may be the grader's.",
            f"--eval_correct {d.reward}, or train with {c.eval_correct}.",
        )


def trained_on_test(c: Config, facts: Facts) -> Iterator[Finding]:
    """Questions of an evaluation that are asked in training too."""
    for e in facts.evaluations:
        if e.also_trained:
            yield Finding(
                "sure" if len(e.also_trained) >= 0.01 * e.n else "warning",
                f"{len(e.also_trained)} of {e.n} {e.split} questions are training questions, such as "
                f"{e.also_trained[0][:60]!r}",
                "Accuracy on them shows memory, not skill.",
                "Remove them from the training file.",
            )


def leaking_exemplars(c: Config, facts: Facts) -> Iterator[Finding]:
    """Questions whose answer stands in their own prompt."""
    cases = [("training", facts.also_shown, facts.num_train)]
    cases += [(e.split, e.also_shown, e.n) for e in facts.evaluations]
    for where, questions, n in cases:
        if questions:
            yield Finding(
                "sure",
                f"{len(questions)} of {n} {where} questions are exemplars of their own prompt: {questions[0][:60]!r}",
                "Their answer can be copied from the prompt.",
                "Take exemplars out of what is asked (data/prompts.py: without_shots), or another seed.",
            )


def evaluation_plan(c: Config, facts: Facts) -> Iterator[Finding]:
    """Evaluations that say less than they seem to."""
    if c.eval_every > c.num_steps:
        what = f"eval_every ({c.eval_every}) is more than num_steps ({c.num_steps})"
        yield Finding("warning", what, "The run is never evaluated while it goes.", "A smaller eval_every, or 0.")
    if c.final_eval and c.eval_shots and c.num_shots not in c.eval_shots:
        yield Finding(
            "warning",
            f"trained with {c.num_shots} shots and evaluated with {', '.join(map(str, c.eval_shots))}",
            "The prompt that was trained is never measured.",
            f"eval_shots with {c.num_shots} in it.",
        )
    smallest = min((e.n for e in facts.evaluations), default=0)
    if 0 < smallest < 400:
        yield Finding(
            "note",
            f"an evaluation has {smallest} problems",
            f"Its 95 % interval is up to +-{100 / smallest**0.5:.0f} points: less can not be told from chance.",
            "final_eval_limit 0, eval_limit 500.",
        )


def fits(c: Config, facts: Facts) -> Iterator[Finding]:
    """Memory of a process against that of its device."""
    parts, (held, sampling, learning) = memory.by_holder(c, facts), memory.least(c, facts)
    exact, peak = memory.exact(parts) * facts.sharing, memory.peak(parts) * facts.sharing
    if peak > facts.device_bytes:
        yield Finding(
            "sure" if (held + max(sampling, learning)) * facts.sharing > facts.device_bytes else "warning",
            f"about {peak / 1e9:.1f} GB are needed, {exact / 1e9:.1f} GB of them for weights and optimiser; the device "
            f"has {facts.device_bytes / 1e9:.1f} GB",
            "Out of memory in the first steps.",
            "kl_coef 0 (no reference), activation_checkpointing, a smaller max_tokens_per_microbatch, a smaller model.",
        )


DATA_CHECKS = (
    *(would_stop, long_prompts, context, short_completions, no_stop, chat_model, fails_always, out_of_reach),
    *(graders_disagree, trained_on_test, leaking_exemplars, evaluation_plan, fits),
)
