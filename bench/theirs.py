"""The other contestants: TRL's trainer, and two ways to sample with Hugging Face, for the rollout only.

Each does the same work as `ours.py` and returns the same numbers. It uses its own defaults, except for the options that
the work sets. Left out: comparing (`peers.py`).
"""

import tempfile
from collections.abc import Callable, Collection

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    TrainerCallback,
)

import rewards
from bench.ours import KL_COEF, LEARNING_RATE, LONGEST_PROMPT, REWARDS, now, problems_of, problems_of_step, result
from bench.work import Work
from data.problem import Problem
from grpo import distributed
from grpo.dataloader import encode_prompts
from grpo.policy import model_directory


def trl(work: dict, batch: int, checkpointing: bool = False) -> dict:
    """Run and time steps of TRL's GRPOTrainer, with `batch` sequences per pass."""
    asked = Work(**work)
    GRPOConfig, GRPOTrainer = load_trl()
    import datasets

    device = distributed.init(asked.device)
    problems = problems_of(asked)
    total = asked.warmup + asked.steps
    rows = [problem for step in range(1, total + 1) for problem in problems_of_step(asked, problems, step)]
    with tempfile.TemporaryDirectory() as place:
        args = GRPOConfig(
            output_dir=place,
            max_steps=total,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=asked.prompts * asked.group // batch,
            num_generations=asked.group,
            max_completion_length=asked.new_tokens,
            generation_kwargs={"min_new_tokens": asked.new_tokens},
            shuffle_dataset=False,
            temperature=1.0,
            beta=KL_COEF,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=checkpointing,
            model_init_kwargs={"dtype": "float32"},
            bf16=asked.dtype == "bf16",
            use_cpu=asked.device == "cpu",
            seed=asked.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model_directory(asked.model),
            reward_funcs=[for_trl(name, rows, asked.new_tokens) for name in REWARDS],
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": p.prompt, "row": i} for i, p in enumerate(rows)]),
        )
        steps, prompt_ids = _watch_trl(trainer, device)
        trainer.train()
    held = {
        "batch": trainer.args.per_device_train_batch_size,
        "gradient_checkpointing": trainer.model.is_gradient_checkpointing,
    }
    return result(asked, steps, prompt_ids, device) | held


def load_trl() -> tuple[type, type]:
    """TRL's (GRPOConfig, GRPOTrainer). Raises ValueError, which says how to install it, where it can not be loaded."""
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        said = f"trl can not be loaded ({error}): pip install -r bench/requirements.txt"
        raise ValueError(said) from error
    return GRPOConfig, GRPOTrainer


def for_trl(name: str, problems: list[Problem], cap: int, ends: Collection[int] = ()) -> Callable:
    """One of our rewards in the form that TRL calls. The column `row` is the index of the problem.

    Args:
        name: of the reward.
        problems: of all rows.
        cap: the most tokens of a completion.
        ends: the tokens that end one.

    Raises:
        ValueError: the reward asks for something that TRL's trainer does not tell.
    """
    reward = rewards.load(name)
    wanted = rewards.asks_for(reward)
    if unknown := [fact for fact in wanted if fact not in ("tokens", "length", "cap", "finished")]:
        raise ValueError(f"rewards: {name!r} asks for {', '.join(unknown)}, which TRL's trainer does not tell")

    def score(completions, row, completion_ids, **_):
        values = []
        for text, i, ids in zip(completions, row, completion_ids, strict=True):
            facts = {"tokens": ids, "length": len(ids), "cap": cap, "finished": ids[-1] in ends}
            values.append(reward(text, problems[i], **{fact: facts[fact] for fact in wanted}))
        return values

    score.__name__ = name
    return score


def _watch_trl(trainer, device: torch.device) -> tuple[list[dict], list]:
    """Time the steps of a trainer, with its generation and rewards.

    Returns:
        (numbers of each step, prompts of the last step); both lists fill while it trains.
    """
    steps: list[dict] = []
    prompt_ids: list[list[int]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append({"rollout_s": 0.0, "reward_s": 0.0, "started": now(device)})

        def on_step_end(self, *_, **__):
            step = steps[-1]
            step["step_s"] = now(device) - step.pop("started")
            step["learn_s"] = step["step_s"] - step["rollout_s"] - step["reward_s"]

    def timed(method, name):
        def wrapper(*args, **kwargs):
            start = now(device)
            outcome = method(*args, **kwargs)
            steps[-1][name] += now(device) - start
            if name == "rollout_s":
                prompt_ids[:] = outcome[0]
                steps[-1]["tokens_sampled"] = sum(map(len, outcome[1]))
            return outcome

        return wrapper

    trainer.add_callback(Watch())
    trainer._generate = timed(trainer._generate, "rollout_s")
    trainer._calculate_rewards = timed(trainer._calculate_rewards, "reward_s")
    return steps, prompt_ids


def hf_generate(work: dict) -> dict:
    """Rollouts with `model.generate`: prompts padded on the left, all completions in one batch."""

    def sample(model, tokenizer, prompt_ids: list[list[int]], asked: Work) -> list[list[int]]:
        tokenizer.padding_side = "left"
        batch = tokenizer.pad({"input_ids": prompt_ids}, return_tensors="pt").to(model.device)
        options = _generation(asked, tokenizer.pad_token_id, min_new_tokens=asked.new_tokens)
        ids = model.generate(**batch, generation_config=options)
        return ids[:, batch["input_ids"].shape[1] :].tolist()

    return _rollouts_alone(work, sample)


def hf_continuous(work: dict) -> dict:
    """Rollouts with `model.generate_batch`, the continuous batching of transformers."""

    def sample(model, tokenizer, prompt_ids: list[list[int]], asked: Work) -> list[list[int]]:
        options = _generation(asked, tokenizer.pad_token_id, eos_token_id=-1)
        batching = ContinuousBatchingConfig()
        if asked.device == "cpu":  # by default it takes most of the memory, and minutes to clear it
            rows, longest = len(prompt_ids) * asked.group, max(map(len, prompt_ids))
            batching.num_blocks = rows * -(-(longest + asked.new_tokens) // batching.page_size)
            batching.max_batch_tokens = max(rows, longest)
        outputs = model.generate_batch(
            prompt_ids, generation_config=options, continuous_batching_config=batching, progress_bar=False
        )
        return [output.generated_tokens for output in outputs.values()]

    return _rollouts_alone(work, sample)


def _generation(work: Work, pad: int, **ends: int) -> GenerationConfig:
    """Plain sampling at temperature 1. `ends` holds the options with which nothing ends a completion early."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=work.new_tokens,
        num_return_sequences=work.group,
        pad_token_id=pad,
        **ends,
    )


def _rollouts_alone(work: dict, sample: Callable) -> dict:
    """Time `sample(model, tokenizer, prompt_ids, work)` and decoding its result to text, over all steps."""
    asked = Work(**work)
    device = distributed.init(asked.device)
    source = model_directory(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[asked.dtype]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    problems = problems_of(asked)
    steps = []
    for step in range(1, asked.warmup + asked.steps + 1):
        chosen = problems_of_step(asked, problems, step)
        encoded = encode_prompts(chosen, tokenizer, chat=False, max_prompt_tokens=LONGEST_PROMPT)
        prompt_ids = [row.tolist() for row in encoded]
        start = now(device)
        completions = sample(model, tokenizer, prompt_ids, asked)
        tokenizer.batch_decode(completions, skip_special_tokens=True)
        steps.append({"rollout_s": now(device) - start, "tokens_sampled": sum(map(len, completions))})
    return result(asked, steps, prompt_ids, device)
