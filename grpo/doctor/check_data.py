"""Check what a recipe uses: prompts, solutions, graders, splits and memory.

Each check is a pure function `(config, facts) -> Iterator[Finding]`. `DATA_CHECKS` lists them, and `diagnose.py` runs
them. Left out: the options of the algorithm (`check_algorithm.py`).
"""

from collections.abc import Iterator

from grpo.config import Config
from grpo.doctor import memory
from grpo.doctor.facts import Facts, Finding


def would_stop(c: Config, facts: Facts) -> Iterator[Finding]:
    """Errors that would stop the run before its first step."""
    for sentence in facts.errors:
        yield Finding("sure", sentence, "The run would stop before its first step.", "Correct what the sentence names.")


def long_prompts(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts that are over their limit, in training or in evaluations."""
    over = sum(length > c.max_prompt_tokens for length in facts.prompt_tokens)
    means = "Prompts are never cut. The run stops before its first step."
    if over:
        longest = facts.prompt_tokens[-1]
        what = f"{over} of {len(facts.prompt_tokens)} training prompts exceed max_prompt_tokens ({c.max_prompt_tokens})"
        do = f"max_prompt_tokens {longest}, fewer shots, or skip_long_prompts True to leave them out of training."
        yield Finding("sure", what, means, do)
    if facts.left_out:
        yield Finding(
            "note",
            f"skip_long_prompts leaves out {facts.left_out} of {facts.left_out + len(facts.prompt_tokens)} training "
            "prompts",
            "They have no token, or more than max_prompt_tokens: nothing is learned from them.",
            "A higher max_prompt_tokens keeps more of them.",
        )
    for e in facts.evaluations:
        if e.longest_prompt > e.prompt_limit:
            what = f"{e.split} prompts with {e.shots} shots have up to {e.longest_prompt} tokens, over {e.prompt_limit}"
            yield Finding("sure", what, means, f"max_prompt_tokens {e.longest_prompt}, or fewer shots in eval_shots.")


def context(c: Config, facts: Facts) -> Iterator[Finding]:
    """Prompts and completions that are longer than the model's context."""
    longest = max([facts.prompt_tokens[-1], *(e.longest_prompt for e in facts.evaluations)]) + c.max_new_tokens
    if facts.sizes.context and longest > facts.sizes.context:
        over = facts.sizes.ends
        ends = "Its positions (a learned table, or a sliding window) end there: the run stops before its first step."
        noise = "Beyond its positions a model writes noise, which would be learned from."
        yield Finding(
            "sure" if over else "warning",
            f"prompt and completion reach {longest} tokens, the model was made for {facts.sizes.context}",
            ends if over else noise,
            "Lower max_new_tokens or the number of shots.",
        )


def short_completions(c: Config, facts: Facts) -> Iterator[Finding]:
    """A max_new_tokens that is too small for the data's own solutions."""
    lengths = facts.solution_tokens
    cut = sum(length >= c.max_new_tokens for length in lengths) / max(1, len(lengths))
    if cut >= 0.05:
        masked = ". With mask_truncated they are left out of the loss" if c.mask_truncated else ""
        yield Finding(
            "sure" if cut >= 0.9 else "warning",
            f"{cut:.0%} of the data's own solutions do not fit into max_new_tokens ({c.max_new_tokens})",
            f"Completions of that length are cut and graded without their answer{masked}.",
            f"max_new_tokens {lengths[int(0.98 * (len(lengths) - 1))] + 16} would hold 98 % of them.",
        )
    elif c.mask_truncated:
        yield Finding(
            "note",
            "mask_truncated leaves cut completions out of the loss",
            "Nothing teaches the model to stop then. If many completions are cut, little is learned.",
            "Watch completion/truncated. Below 0.05, mask_truncated works as intended.",
        )


def no_stop(c: Config, facts: Facts) -> Iterator[Finding]:
    """Plain-text prompts whose completions only EOS can end."""
    if not c.chat and not facts.stop:
        yield Finding(
            "warning",
            "completion prompts without a stop string",
            "A base model answers and then writes the next question. Most completions are cut at max_new_tokens, and "
            "their last lines answer something else. A gain may then come from learning to stop alone.",
            'Give the data a `stop`, such as ["\\n\\nQuestion:"]. For a chat model use --chat True.',
        )


def chat_model(c: Config, facts: Facts) -> Iterator[Finding]:
    """A chat template that is not used."""
    if facts.has_chat_template and not c.chat:
        yield Finding(
            "note",
            "the tokenizer has a chat template, and prompts are plain text",
            "This is right for a base model. An Instruct model was tuned on another form of prompt.",
            "For an Instruct model: --chat True.",
        )


def out_of_reach(c: Config, facts: Facts) -> Iterator[Finding]:
    """Gold answers that a reward or a grader never accepts."""
    for grader in facts.graders:
        share = len(grader.never) / grader.graded
        if not share or grader.fails:
            continue
        shown = ", ".join(repr(answer) for answer in dict.fromkeys(grader.never[:3]))
        training = grader.name in c.rewards
        level = "warning" if share < 0.2 or not grader.reads_answers else "sure"
        means = "A right answer to these problems never gets this reward, however it is written."
        if not training:
            means = f"No model can reach more than {1 - share:.1%}."
        if share == 1:
            level = level if grader.reads_answers else "note"
            means = "It reads answers of another form than `#### The final answer is 18`, or it is a penalty."
        grants, value = "grants nothing", f"{grader.needed:g}"
        mend = "Use another reward (rewards/gsm8k.py reads commas, signs, units), or mend this one."
        if grader.name.startswith("gsm8k."):
            mend = "Write each gold as one number (1080, 1,080 or 12.5), or use a reward that reads golds of this form."
        if 0 < grader.highest < grader.needed:
            grants, means = f"grants less than {value}", f"In evaluations a part of {value} does not count."
            mend = f"State its full value beside the function: {grader.name.partition('.')[2]}.full_value = "
            mend += f"{grader.highest:g}" + (", or --eval_threshold." if grader.name == c.eval_correct else ".")
        yield Finding(
            level,
            f"{grader.name} {grants} to {share:.2%} of the gold answers ({len(grader.never)} of {grader.graded}: "
            f"{shown}), even written as the exemplars are",
            means,
            mend,
        )


def fails_always(c: Config, facts: Facts) -> Iterator[Finding]:
    """A reward or a grader that fails on every text."""
    for grader in facts.graders:
        if grader.fails:
            yield Finding(
                "sure",
                f"{grader.name} fails on every text it was tried on: {grader.fails}",
                "Where a reward fails, nothing is learned. Where a grader fails, the text counts as wrong.",
                f"Correct {grader.name.replace('.', '.py, function ')}.",
            )


def graders_disagree(c: Config, facts: Facts) -> Iterator[Finding]:
    """Answers that the training reward and the grader of evaluations judge differently."""
    for d in facts.disagreements:
        pays, counts = ("pays for", "wrong") if d.earned else ("does not pay for", "right")
        yield Finding(
            "warning",
            f"{d.reward} {pays} what {c.eval_correct} counts as {counts}: {d.writing} ({d.count} of {d.probed} answers "
            f"tried), such as {d.text[-60:]!r} for {d.answer!r}",
            "Training follows one and is measured by the other. A gain or a loss may come from the grader alone.",
            f"--eval_correct {d.reward}, or train with {c.eval_correct}.",
        )


def trained_on_test(c: Config, facts: Facts) -> Iterator[Finding]:
    """Evaluation questions that are training questions too."""
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
    """Questions whose answer is in their own prompt."""
    cases = [("training", facts.also_shown, facts.num_train)]
    cases += [(e.split, e.also_shown, e.n) for e in facts.evaluations]
    for where, questions, n in cases:
        if questions:
            yield Finding(
                "sure",
                f"{len(questions)} of {n} {where} questions are exemplars of their own prompt: {questions[0][:60]!r}",
                "Their answer can be copied from the prompt.",
                "Remove the exemplars from the questions (data/prompts.py: without_shots), or use another seed.",
            )


def evaluation_plan(c: Config, facts: Facts) -> Iterator[Finding]:
    """Evaluations that never happen, measure another prompt, or have too few problems."""
    if c.eval_every > c.num_steps:
        what = f"eval_every ({c.eval_every}) is more than num_steps ({c.num_steps})"
        yield Finding("warning", what, "The run is never evaluated during training.", "A smaller eval_every, or 0.")
    if c.final_eval and c.eval_shots and c.num_shots not in c.eval_shots:
        yield Finding(
            "warning",
            f"trained with {c.num_shots} shots and evaluated with {', '.join(map(str, c.eval_shots))}",
            "The number of shots used in training is never measured.",
            f"eval_shots with {c.num_shots} in it.",
        )
    smallest = min((e.n for e in facts.evaluations), default=0)
    if 0 < smallest < 400:
        yield Finding(
            "note",
            f"an evaluation has {smallest} problems",
            f"Its 95 % interval is up to +-{100 / smallest**0.5:.0f} points. Smaller differences may be chance.",
            "final_eval_limit 0, eval_limit 500.",
        )


def fits(c: Config, facts: Facts) -> Iterator[Finding]:
    """Whether the memory that is needed fits on the device."""
    parts, (held, sampling, learning) = memory.by_holder(c, facts), memory.least(c, facts)
    exact, peak = memory.exact(parts) * facts.sharing, memory.peak(parts) * facts.sharing
    if peak > facts.device_bytes:
        yield Finding(
            "sure" if (held + max(sampling, learning)) * facts.sharing > facts.device_bytes else "warning",
            f"about {peak / 1e9:.1f} GB are needed, {exact / 1e9:.1f} GB of them for weights and optimiser; the device "
            f"has {facts.device_bytes / 1e9:.1f} GB",
            "The run would go out of memory in its first steps.",
            "kl_coef 0 (no reference), activation_checkpointing, a smaller max_tokens_per_microbatch, a smaller model.",
        )


DATA_CHECKS = (
    *(would_stop, long_prompts, context, short_completions, no_stop, chat_model, fails_always, out_of_reach),
    *(graders_disagree, trained_on_test, leaking_exemplars, evaluation_plan, fits),
)
