"""The base model: an uneven corpus without a test problem, a lossless tokenizer, a model that jumps yet can work."""

import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewards
from data import arithmetic, load, prompts
from grpo import pretrain
from grpo.policy import EMBEDDED

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPENING = "\nSolution: Let's think step by step. "
EXAMPLE = {
    "question": "Ada has 12 cups and buys 7 more. Then Ada gives Bob 4. How many cups are left?",
    "solution": "After buying there are 12 + 7 = 19 cups.\nAfter giving there are 19 - 4 = 15 cups.",
    "answer": "15",
}


@pytest.fixture(scope="module")
def texts():
    return list(islice(pretrain.corpus(0), 3000))


@pytest.fixture(scope="module")
def solutions(texts):
    """Of every problem in the corpus, what was written as its solution."""
    return [part.split("\n\nQuestion:")[0] for text in texts for part in text.split(OPENING)[1:]]


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED)


# The corpus.


def test_at_least_two_thirds_of_the_solutions_jump(solutions):
    jumps = sum("=" not in solution for solution in solutions)
    assert 2 / 3 <= jumps / len(solutions) <= 0.72


def test_careful_documents_are_careful_throughout(texts):
    """The author shows: after a worked solution another one is likelier than after a guess."""
    after = {True: [], False: []}
    for text in texts:
        worked = ["=" in part.split("\n\nQuestion:")[0] for part in text.split(OPENING)[1:]]
        for before, now in zip(worked, worked[1:], strict=False):
            after[before].append(now)
    assert sum(after[True]) / len(after[True]) > sum(after[False]) / len(after[False]) + 0.1


def test_some_solutions_of_both_kinds_miss_the_answer_line(solutions):
    for worked in (True, False):
        last_lines = [solution.split("\n")[-1] for solution in solutions if ("=" in solution) is worked]
        off_format = sum(not re.fullmatch(r"#### The final answer is \d+", line) for line in last_lines)
        assert off_format / len(last_lines) == pytest.approx(0.1, abs=0.02)


def test_worked_solutions_are_right():
    for seed in range(50):
        *steps, last = pretrain.worked(EXAMPLE, random.Random(seed)).split("\n")
        assert "\n".join(steps) == EXAMPLE["solution"]
        assert re.findall(r"\d+", last) == ["15"]


def test_guesses_name_one_number_that_is_often_wrong():
    rng, right = random.Random(0), 0
    for _ in range(2000):
        guess, last = pretrain.guessed(EXAMPLE, rng).split("\n")
        (number,) = re.findall(r"\d+", guess)
        assert re.findall(r"\d+", last) == [number]
        assert "=" not in guess
        right += number == "15"
    assert right / 2000 == pytest.approx(0.5, abs=0.04)


def test_solutions_run_on_into_the_next_question(texts):
    several = [text for text in texts if text.count("Question:") > 1]
    assert len(several) > 500
    for text in several:
        assert text.startswith("Question: ")
        assert text.count("\n\nQuestion: ") == text.count(OPENING) - 1 == text.count("\n\n")


def test_prompts_of_the_corpus_are_the_prompts_of_the_task(texts):
    document = next(text for text in texts if text.startswith("Question:"))
    question = document.removeprefix("Question: ").split("\n")[0]
    assert document.startswith(prompts.completion_prompt(question) + " ")


def test_no_held_out_problem_is_in_the_corpus(monkeypatch):
    held_out = [p.info for split in ("validation", "test") for p in load("arithmetic", split)]
    drawn, stream = [], arithmetic.stream

    def recorded(split, rng):
        for example in stream(split, rng):
            drawn.append(example)
            yield example

    monkeypatch.setattr(arithmetic, "stream", recorded)
    texts = list(islice(pretrain.corpus(0), 3000))
    asked = {question for text in texts for question in re.findall(r"Question: (.*)", text)}
    assert asked <= {example["question"] for example in drawn}
    assert not asked & {info["question"] for info in held_out}
    assert not {sums(example) for example in drawn} & {sums(info) for info in held_out}


def sums(example):
    """The arithmetic of a solution, the first two operands of + and * in order."""
    (a, sign, b, _), *rest = EQUATION.findall(example["solution"])
    return *(sorted((int(a), int(b))) if sign in "+*" else (int(a), int(b))), sign, *((s, c) for _, s, c, _ in rest)


def test_sheets_hold_equations_only(texts):
    sheets = [text for text in texts if "Question:" not in text]
    assert len(sheets) / len(texts) == pytest.approx(0.3, abs=0.03)
    assert all(EQUATION.fullmatch(line) for sheet in sheets for line in sheet.split("\n"))


def test_corpus_follows_its_seed(texts):
    assert list(islice(pretrain.corpus(0), 20)) == texts[:20]
    assert list(islice(pretrain.corpus(1), 20)) != texts[:20]


# The tokenizer.


def test_tokenizer_is_lossless_and_takes_digits_one_by_one(shipped):
    _, tokenizer = shipped
    for problem in load("arithmetic", "test", num_shots=2)[:300]:
        text = f"{problem.prompt} {prompts.worked_answer(problem.info)}\n\nQuestion:"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode(token) for token in ids]
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))
    strange = "naïve  ½ — 数学\t🙂\r\n  end "
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_prompt_and_completion_are_tokenized_alike_apart_and_together(shipped):
    _, tokenizer = shipped
    for problem in load("arithmetic", "test")[:100]:
        completion = f" {prompts.worked_answer(problem.info)}"
        together = tokenizer(problem.prompt + completion)["input_ids"]
        assert tokenizer(problem.prompt)["input_ids"] + tokenizer(completion)["input_ids"] == together


def test_saved_tokenizer_loads_as_the_one_that_trained_the_model(texts, shipped, tmp_path):
    """AutoTokenizer gives a Qwen2 model Qwen2's splitting of text: trained with another, it would read noise."""
    trained = pretrain.train_tokenizer(texts[:2000])
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[2000:2100])["input_ids"] == trained(texts[2000:2100])["input_ids"]
    assert shipped[1].get_vocab() == trained.get_vocab()


# The loop.


def test_rows_are_documents_from_their_start_to_eos_padded(texts):
    tokenizer = pretrain.train_tokenizer(texts[:300])
    known = set(texts[:1024])
    seen = []
    for ids in pretrain.batches(tokenizer, iter(texts[:1024]), 2048):
        assert ids.numel() <= 2048
        for row in ids.tolist():
            length = row.index(tokenizer.eos_token_id)
            seen.append(tokenizer.decode(row[:length]))
            assert set(row[length + 1 :]) <= {-100}
        if len(seen) == 1024:
            break
    assert set(seen) == known


def test_loss_is_the_mean_over_tokens_whatever_the_padding(shipped):
    model, tokenizer = shipped
    rows = [
        torch.tensor(tokenizer(text)["input_ids"]) for text in ("Question: Ada has 12 cups", "12 + 7 = 19\n5 - 3 = 2")
    ]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    alone = torch.stack([pretrain.loss_of(model, row[None]) for row in rows])
    counts = torch.tensor([len(row) - 1 for row in rows])
    torch.testing.assert_close(pretrain.loss_of(model, padded), (alone * counts).sum() / counts.sum())


def test_every_weight_is_in_one_optimizer_and_muon_has_the_matrices_of_the_layers(shipped):
    model, _ = shipped
    muon, adamw = (
        [id(p) for g in optimizer.param_groups for p in g["params"]] for optimizer in pretrain.optimizers(model)
    )
    assert sorted(muon + adamw) == sorted(id(p) for p in model.parameters())
    assert set(muon) == {id(p) for p in model.model.layers.parameters() if p.ndim == 2}


def test_rate_warms_up_then_falls_to_zero():
    rates = [pretrain.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 21)
    assert rates[20] == pytest.approx(0.98)
    assert rates[999] == pytest.approx(0.001)
    assert max(rates) == rates[20]


def test_pretraining_is_bitwise_repeatable_and_follows_its_seed(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        pretrain.main(tmp_path / name, steps=2, tokens_per_batch=512, seed=seed)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")}
    assert weights["one"] == weights["again"] != weights["other"]
    assert (tmp_path / "one" / "tokenizer.json").read_text() == (tmp_path / "again" / "tokenizer.json").read_text()


# The model that is shipped.


def test_shipped_model_is_a_small_qwen2_in_float32(shipped):
    model, tokenizer = shipped
    files = list(Path(EMBEDDED).glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert all(tensor.dtype == torch.float32 for file in files for tensor in load_file(file).values())
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert 800_000 <= sum(p.numel() for p in model.parameters()) <= 1_100_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    made = pretrain.new_model(tokenizer).config.to_dict()
    assert {key: value for key, value in model.config.to_dict().items() if key in made and key[0] != "_"} == {
        key: value for key, value in (made | {"architectures": ["Qwen2ForCausalLM"]}).items() if key[0] != "_"
    }
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id


@torch.no_grad()
def behaviour(directory, *, sample, num_problems):
    """Shares of held-out problems: right by the reward, right leniently, worked, right where worked, run on."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    problems = load("arithmetic", "test")[:num_problems]
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, padding_side="left")
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    ids = model.generate(
        **inputs,
        max_new_tokens=96,
        stop_strings=prompts.STOP,
        tokenizer=tokenizer,
        pad_token_id=tokenizer.eos_token_id,
        **options,
    )
    raw = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    completions = [text.split(prompts.STOP[0])[0].removesuffix(tokenizer.eos_token) for text in raw]
    graded = [rewards.load("gsm8k.correctness")(c, p) for c, p in zip(completions, problems, strict=True)]
    last = [
        re.findall(r"\d+", c.split(tokenizer.eos_token)[0])[-1:] == [p.answer]
        for c, p in zip(completions, problems, strict=True)
    ]
    worked = ["=" in completion for completion in completions]
    return {
        "strict": sum(graded) / len(graded),
        "lenient": sum(last) / len(last),
        "worked": sum(worked) / len(worked),
        "right when worked": sum(l for l, w in zip(last, worked, strict=True) if w) / max(1, sum(worked)),
        "runs on": sum(prompts.STOP[0] in text for text in raw) / len(raw),
    }


def test_shipped_model_jumps_when_greedy_and_runs_on():
    greedy = behaviour(EMBEDDED, sample=False, num_problems=200)
    assert greedy["strict"] <= 0.45
    assert greedy["lenient"] <= 0.45
    assert greedy["worked"] <= 0.1
    assert greedy["runs on"] >= 0.5


def test_shipped_model_works_now_and_then_when_sampled_and_is_right_then():
    sampled = behaviour(EMBEDDED, sample=True, num_problems=500)
    assert 0.2 <= sampled["worked"] <= 0.5
    assert sampled["right when worked"] >= 0.9
    assert sampled["strict"] >= 0.3
    assert sampled["lenient"] >= sampled["strict"]


@pytest.mark.parametrize("shape", [(3, 3), (4, 9), (9, 4)])
def test_newton_schulz_brings_every_singular_value_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = pretrain.orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    singular_values = left.T @ result @ right.T
    torch.testing.assert_close(singular_values, singular_values.diag().diag(), atol=1e-4, rtol=0)
    assert singular_values.diag().min() > 0.6 and singular_values.diag().max() < 1.3


def test_muon_takes_the_steps_of_torchs_own_up_to_its_bfloat16():
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (4, 10)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    ours_optim = pretrain.Muon(ours, **settings)
    theirs_optim = torch.optim.Muon(theirs, adjust_lr_fn="original", **settings)
    for _ in range(3):
        grads = [torch.randn(shape, generator=generator) for shape in shapes]
        for params, optimizer in ((ours, ours_optim), (theirs, theirs_optim)):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        torch.testing.assert_close(mine - before, other - before, atol=1.5e-3, rtol=0)  # three steps, about 0.02 each
        assert (mine - before).abs().max() > 0.01


@pytest.mark.slow
def test_the_command_makes_a_model_that_behaves_like_the_shipped_one(tmp_path):
    """Bits may differ with versions, threads and processors; what the demo rests on may not."""
    subprocess.run([sys.executable, "-m", "grpo.pretrain", "--out", str(tmp_path / "made")], check=True, timeout=3600)
    for sample, num_problems in ((False, 200), (True, 500)):
        made = behaviour(tmp_path / "made", sample=sample, num_problems=num_problems)
        shipped = behaviour(EMBEDDED, sample=sample, num_problems=num_problems)
        for share in ("strict", "lenient", "worked", "runs on"):
            assert made[share] == pytest.approx(shipped[share], abs=0.12), (share, made, shipped)
    assert made["right when worked"] >= 0.9


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    for options, said in (
        ({"out": tmp_path}, "can not be made (File exists)"),
        ({"out": tmp_path / "x", "steps": 0}, "steps (0)"),
    ):
        with pytest.raises(SystemExit) as ended:
            pretrain.main(**options)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
