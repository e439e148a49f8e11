"""Train with TRL as a recipe of ours says, for some minutes, and note its rewards by the clock.

    python train.py --recipe FILE --run_name ours
    python -m bench.clock --recipe FILE --run_name trl --minutes 30
    python docs/pictures/by_the_clock.py rewards.png "What is compared" runs/ours runs/trl

Both draw the same prompts in the same order. The run directory gets `metrics.jsonl`, with keys of ours, and `final/`
for eval.py. Left out: stop strings, which TRL's trainer does not have, so the recipe must ask by chat; and every option
of ours that TRL has no word for.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from bench.ours import now
from bench.theirs import for_trl, load_trl
from grpo import distributed, options
from grpo.config import Config
from grpo.dataloader import ProblemSets, render
from grpo.files import make_directory
from grpo.options import option
from grpo.policy import eos_ids, model_directory
from grpo.prompts.order import draw_prompts
from grpo.run.directory import place_of

FOLLOWED = {
    *("model", "data", "data_path", "chat", "num_shots", "system_prompt", "prompt_template", "seed"),
    *("num_steps", "prompts_per_step", "group_size", "max_new_tokens", "temperature", "device"),
    *("rewards", "reward_weights", "advantage", "clip_low", "clip_high", "kl_coef", "mask_truncated"),
    *("lora_rank", "lora_alpha", "learning_rate", "schedule", "warmup_steps", "adam_beta1", "adam_beta2"),
    *("weight_decay", "max_grad_norm", "minutes", "trl_batch"),
}
"""Options that TRL gets. Those that may change in a resumed run are ignored; of others it has our default alone."""
SCALES = {"grpo": "group", "dr_grpo": "none"}
"""By what TRL divides the rewards of a group, for each advantage that it has."""


@dataclass(frozen=True)
class Clock(Config):
    """Train with TRL as --recipe FILE says, in float32, and write the rewards of each step by the clock."""

    minutes: float = option(30.0, "> 0 and finite")
    """Minutes after which no further step begins."""
    trl_batch: int = option(8, ">= 1")
    """Sequences in a forward and backward pass of TRL; more are faster, as long as the memory suffices."""

    def __post_init__(self) -> None:
        """Raises ValueError for the first option that is not allowed, or that TRL can not follow."""
        super().__post_init__()
        ignored = {*options.facts_of(Config, "may_change"), *options.facts_of(Config, "task"), "max_prompt_tokens"}
        for field in fields(Config):
            value, ours = getattr(self, field.name), field.default
            same = value == ours or (field.name, value) == ("precision", "fp32")
            if field.name not in FOLLOWED | ignored and not same:
                raise ValueError(f"{field.name} is {value!r}: must be {ours!r}, since TRL is not told of another")
        if self.advantage not in SCALES:
            raise ValueError(f"advantage is {self.advantage!r}: must be one of {', '.join(SCALES)}, which TRL has, too")
        if self.check or self.resume != "never":
            raise ValueError("check and resume must be left out: there is neither with TRL")
        if not self.chat:
            raise ValueError("chat is False: must be True, since TRL's trainer ends no completion at a stop string")
        if self.prompts_per_step * self.group_size % self.trl_batch:
            raise ValueError(f"trl_batch is {self.trl_batch}: must divide prompts_per_step x group_size")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 for a wrong option."""
    asked = options.parse(Clock, argv, "bench.clock")
    directory = place_of(asked)
    try:
        load_trl()
        if directory.exists():
            raise ValueError(f"run_name is {asked.run_name!r}: must be new, but {directory} exists")
        train(asked, directory)
    except (ValueError, OSError) as error:
        print(f"bench.clock: error: {error}", file=sys.stderr)
        return 2
    return 0


def train(asked: Clock, directory: Path) -> None:
    """Train until the minutes or the steps have passed; write a line of metrics after each step, and final/ at last."""
    import datasets

    _, GRPOTrainer = load_trl()
    sets = ProblemSets(asked)
    problems, (shapes, tokenizer) = sets.problems("train", asked.num_shots), sets.shapes
    ends = eos_ids(shapes, tokenizer)
    rows = [
        problems[i]
        for step in range(1, asked.num_steps + 1)
        for i in draw_prompts(len(problems), asked.prompts_per_step, asked.seed, step)
    ]
    prompts = [{"prompt": render(problem, tokenizer, asked.chat), "row": i} for i, problem in enumerate(rows)]
    given, adapters = arguments(asked, directory), _adapters(asked) if asked.lora_rank else None
    scores = [for_trl(name, rows, asked.max_new_tokens, ends) for name in asked.rewards]
    make_directory(directory, "out_dir")  # not before: a refused command leaves nothing behind
    trainer = GRPOTrainer(
        model_directory(asked.model),
        reward_funcs=scores,
        args=given,
        train_dataset=datasets.Dataset.from_list(prompts),
        peft_config=adapters,
    )
    note_steps(trainer, asked, directory / "metrics.jsonl")
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    (model.merge_and_unload() if asked.lora_rank else model).save_pretrained(directory / "final")
    tokenizer.save_pretrained(directory / "final")


def _adapters(asked: Clock):
    """Adapters as peft describes them. Raises ValueError where it is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(f"lora_rank is {asked.lora_rank}: needs peft, which can not be loaded ({error})") from error
    return LoraConfig(r=asked.lora_rank, lora_alpha=asked.lora_alpha, target_modules="all-linear")


def arguments(asked: Clock, directory: Path):
    """TRL's arguments for our options."""
    GRPOConfig, _ = load_trl()
    device = distributed.init(asked.device)
    return GRPOConfig(
        output_dir=str(directory),
        max_steps=asked.num_steps,
        per_device_train_batch_size=asked.trl_batch,
        gradient_accumulation_steps=asked.prompts_per_step * asked.group_size // asked.trl_batch,
        num_generations=asked.group_size,
        max_completion_length=asked.max_new_tokens,
        shuffle_dataset=False,
        temperature=asked.temperature,
        reward_weights=list(asked.reward_weights),
        scale_rewards=SCALES[asked.advantage],
        beta=asked.kl_coef,
        epsilon=asked.clip_low,
        epsilon_high=asked.clip_high,
        mask_truncated_completions=asked.mask_truncated,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant_with_warmup" if asked.schedule == "constant" else asked.schedule,
        warmup_steps=asked.warmup_steps,
        adam_beta1=asked.adam_beta1,
        adam_beta2=asked.adam_beta2,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=device.type == "cpu",
        seed=asked.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def note_steps(trainer, asked: Clock, file: Path) -> None:
    """Write a line after each step, and end training when the minutes have passed."""
    from transformers import TrainerCallback

    device, began = trainer.accelerator.device, []

    class Note(TrainerCallback):
        def on_step_begin(self, *_, **__):
            began.append(now(device))

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= now(device) - began[0] >= 60 * asked.minutes

        def on_log(self, args, state, control, logs, **_):
            if "reward" not in logs:  # the summary at the end
                return
            line = {"step": state.global_step, "time/step": now(device) - began[-1], "reward/mean": logs["reward"]}
            line |= {f"reward/{name}": logs[f"rewards/{name}/mean"] for name in asked.rewards}
            line |= {"completion/length": logs["completions/mean_length"]}
            print(json.dumps(line), flush=True)
            with file.open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps(line) + "\n")

    trainer.add_callback(Note())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
