"""Make the base model of the demo from nothing, in minutes: corpus, tokenizer and a Qwen2 of a million parameters.

The corpus is uneven, like the web:

- most solutions jump to an answer and are often wrong;
- some work step by step and are right;
- some of both kinds lack the answer line;
- every solution is followed by another question.

So the model can solve problems but seldom does so, follows the examples in its prompt, and does not stop. This is what
reinforcement learning then changes. The corpus uses the train split only. Left out: the GRPO engine; this is a plain
language-model training loop.

    python -m grpo.pretrain --out DIR       (the shipped model is in grpo/base_model)
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data import arithmetic, prompts
from data.prompts import answer_line
from grpo.files import give_usual_mode

# The share of careful (worked) solutions is drawn for each document from Beta(CAREFUL, HASTY); its mean is 0.32. So a
# model that has seen careful solutions in its context expects another one.
CAREFUL, HASTY = 1.3, 2.8
GUESSED_RIGHT = 0.5
OFF_FORMAT = 0.1
MOST_PROBLEMS = 10
SHEETS = 0.3  # share of documents that are bare equations, without words
GUESSES = ("I think it is {}.", "I guess it is {}.", "I would say {}.")
OFF_FORMAT_ENDINGS = ("#### {}", "The answer is {}.", "Answer: {}")

EQUATION = re.compile(r"\d+ [-+*/] \d+ = \d+")
VOCAB_SIZE = 640


def document(rng: random.Random, examples: Iterator[dict]) -> str:
    """A document of the corpus: some problems and solutions in a row, in the prompt format."""
    carefulness = rng.betavariate(CAREFUL, HASTY)
    texts = []
    for _ in range(min(MOST_PROBLEMS, 1 + int(rng.expovariate(1 / 3)))):
        example = next(examples)
        completion = worked(example, rng) if rng.random() < carefulness else guessed(example, rng)
        texts.append(f"{prompts.ask(example['question'])} {completion}")
    return "\n\n".join(texts)


def sheet(examples: Iterator[dict]) -> str:
    """A document with only the equations of some worked solutions."""
    return "\n".join(equation for _ in range(12) for equation in EQUATION.findall(next(examples)["solution"]))


def worked(example: dict, rng: random.Random) -> str:
    """A right solution, step by step."""
    return f"{example['solution']}\n{_ending(example['answer'], rng)}"


def guessed(example: dict, rng: random.Random) -> str:
    """A guess, right with probability `GUESSED_RIGHT`; else a number from the problem or a near miss."""
    right = int(example["answer"])
    seen = {int(number) for number in re.findall(r"\d+", example["question"] + example["solution"])}
    slips = {right + slip for slip in (-10, -2, -1, 1, 2, 10) if right + slip > 0}
    wrong = rng.choice([sorted(seen - {right}), sorted(slips)])
    guess = str(right if rng.random() < GUESSED_RIGHT else rng.choice(wrong))
    return f"{rng.choice(GUESSES).format(guess)}\n{_ending(guess, rng)}"


def corpus(seed: int) -> Iterator[str]:
    """An endless stream of documents, made from problems of the train split only."""
    rng = random.Random(f"corpus {seed}")
    examples = arithmetic.stream("train", rng)
    while True:
        yield sheet(examples) if rng.random() < SHEETS else document(rng, examples)


def train_tokenizer(texts: list[str]) -> Qwen2Tokenizer:
    """Train a lossless byte-level BPE of `VOCAB_SIZE` tokens. It splits text as Qwen2's does, into single digits."""
    return Qwen2Tokenizer().train_new_from_iterator(texts, VOCAB_SIZE, show_progress=False)


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A new Qwen2 with just under a million parameters, whose head is tied to the embeddings."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def batches(tokenizer: Qwen2Tokenizer, texts: Iterator[str], tokens_per_batch: int) -> Iterator[torch.Tensor]:
    """An endless stream of batches. Documents of similar length share a batch, which saves padding.

    Args:
      tokenizer: of the model.
      texts: an endless stream of documents.
      tokens_per_batch: at most this many tokens in a batch, padding included, unless one document is longer.

    Yields:
      Token ids [rows, length], int64, padded with -100. Each row is a document followed by EOS.
    """
    rng = random.Random("batches")
    while True:
        rows = tokenizer([next(texts) for _ in range(1024)])["input_ids"]
        rows = sorted(([*row, tokenizer.eos_token_id] for row in rows), key=len)
        groups = []
        while rows:
            size = max(1, tokens_per_batch // len(rows[-1]))
            groups.append(rows[-size:])
            del rows[-size:]
        rng.shuffle(groups)
        for group in groups:
            tensors = [torch.tensor(row) for row in group]
            yield torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and vectors. AdamW alone takes twice as many steps."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = matrices if parameter.ndim == 2 and "embed" not in name else others
        group.append(parameter)
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up over the first 2 %, then linear down to 0."""
    return min((step + 1) / (0.02 * steps + 1), (steps - step) / steps)


def main(out: Path, steps: int = 2600, tokens_per_batch: int = 2048, seed: int = 0) -> None:
    """Make the base model of the demo. The same arguments, versions, threads and processor give the same bits.

    Muon multiplies in bfloat16. Where the processor cannot, a step takes three times as long. The shipped model was
    made with 2,000 steps.

    Args:
      out: directory to create, for safetensors, config, generation config and tokenizer.
      steps: optimiser steps, >= 1.
      tokens_per_batch: tokens of a step, including padding. >= 1.
      seed: of the corpus and the initial weights.
    """
    if steps < 1 or tokens_per_batch < 1:
        _refuse(f"steps ({steps}) and tokens_per_batch ({tokens_per_batch}) must be >= 1")
    try:
        out.mkdir(parents=True)  # fail now, not after minutes of work
    except OSError as error:
        _refuse(f"out: {out} can not be made ({error.strerror})")
    torch.manual_seed(seed)
    texts = corpus(seed)
    tokenizer = train_tokenizer([next(texts) for _ in range(2000)])
    model = new_model(tokenizer).train()
    optims = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optim, lambda step: rate(step, steps)) for optim in optims]
    stream = batches(tokenizer, texts, tokens_per_batch)
    for step in range(1, steps + 1):
        ids = next(stream)
        loss = model(input_ids=ids.clamp(min=0), labels=ids).loss  # without the padding, which is -100
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim, schedule in zip(optims, schedules, strict=True):
            optim.step()
            optim.zero_grad()
            schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    give_usual_mode(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {out}")


def _refuse(reason: str) -> NoReturn:
    print(f"grpo.pretrain: error: {reason}", file=sys.stderr)
    sys.exit(2)


def _ending(answer: str, rng: random.Random) -> str:
    if rng.random() < OFF_FORMAT:
        return rng.choice(OFF_FORMAT_ENDINGS).format(answer)
    return answer_line(answer)


if __name__ == "__main__":
    tyro.cli(main)
