"""Make the base models of the demos from nothing, in minutes: corpus, tokenizer and a Qwen2 of a million parameters.

What a model reads is in `corpus_arithmetic.py` and `corpus_programs.py`. Left out: the GRPO engine; this is a plain
language-model training loop.

    python -m grpo.pretrain --out DIR                      (the shipped models are in grpo/base_model
    python -m grpo.pretrain --out DIR --task programs       and grpo/base_model_programs)
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NoReturn

import torch
import tyro
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from grpo.files import give_usual_mode
from grpo.pretrain import corpus_arithmetic, corpus_programs

VOCAB_SIZE = 640
CORPORA = {"arithmetic": corpus_arithmetic.corpus, "programs": corpus_programs.corpus}
"""{task: an endless stream of documents for a seed}."""


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


def main(
    out: Path,
    task: Literal["arithmetic", "programs"] = "arithmetic",
    steps: int = 2600,
    tokens_per_batch: int = 2048,
    seed: int = 0,
) -> None:
    """Make the base model of a demo. The same arguments, versions, threads and processor give the same bits.

    Muon multiplies in bfloat16. Where the processor cannot, a step takes three times as long. The shipped models were
    made with 2,000 steps (arithmetic) and 800 (programs).

    Args:
      out: directory to create, for safetensors, config, generation config and tokenizer.
      task: what it reads: word problems or programs.
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
    texts = CORPORA[task](seed)
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


if __name__ == "__main__":
    tyro.cli(main)
