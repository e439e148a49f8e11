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

import torch
import torch.nn.functional as F
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
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


def loss_of(model: Qwen2ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token in nats, without padding. `ids` is [rows, length], padded with -100."""
    logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-100)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest matrix with orthonormal rows, or columns if there are fewer of them.

    X <- a X + (b G + c G²) X with G = X Xᵀ, starting from X / |X|. See https://kellerjordan.github.io/posts/muon

    Args:
      matrix: [rows, columns], float32.

    Returns:
      [rows, columns], float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # after five steps singular values are in 0.7 .. 1.2, which is enough for Muon
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if len(matrix) <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` in float32. On a CPU without bfloat16 products, torch's bfloat16 is ten times slower."""

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and vectors. AdamW alone takes twice as long."""
    named = [(name, p, p.ndim == 2 and "embed" not in name) for name, p in model.named_parameters()]
    matrices, others = ([p for _, p, inner in named if inner is kind] for kind in (True, False))
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate: a linear warm-up over the first 2 %, then linear down to 0."""
    return min((step + 1) / (0.02 * steps + 1), (steps - step) / steps)


def main(out: Path, steps: int = 2600, tokens_per_batch: int = 2048, seed: int = 0) -> None:
    """Make the base model of the demo. The same arguments, versions, threads and processor give the same bits.

    The shipped model was made before `Muon` used float32: 2,000 steps with torch's own Muon. It behaves similarly.

    Args:
      out: directory to create, for safetensors, config, generation config and tokenizer.
      steps: optimiser steps, >= 1.
      tokens_per_batch: tokens of a step, including padding. >= 1.
      seed: of the corpus and the initial weights.
    """
    try:
        if steps < 1 or tokens_per_batch < 1:
            raise ValueError(f"steps ({steps}) and tokens_per_batch ({tokens_per_batch}) must be >= 1")
        out.mkdir(parents=True)  # fail now, not after minutes of work
    except (ValueError, OSError) as error:
        reason = f"out: {out} can not be made ({error.strerror})" if isinstance(error, OSError) else error
        print(f"grpo.pretrain: error: {reason}", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(seed)
    texts = corpus(seed)
    tokenizer = train_tokenizer([next(texts) for _ in range(2000)])
    model = new_model(tokenizer).train()
    optims = optimizers(model)
    peaks = [group["lr"] for optimizer in optims for group in optimizer.param_groups]
    stream = batches(tokenizer, texts, tokens_per_batch)
    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        for step in range(steps):
            groups = [group for optimizer in optims for group in optimizer.param_groups]
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * rate(step, steps)
            loss = loss_of(model, next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optims:
                optimizer.step()
                optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    give_usual_mode(Path(out))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters written to {out}")


def _ending(answer: str, rng: random.Random) -> str:
    if rng.random() < OFF_FORMAT:
        return rng.choice(OFF_FORMAT_ENDINGS).format(answer)
    return answer_line(answer)


if __name__ == "__main__":
    tyro.cli(main)
