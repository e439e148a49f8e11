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
from grpo.policy import EMBEDDED
from grpo.pretrain import __main__ as pretrain
from grpo.pretrain import corpus_arithmetic

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPENING = "\nSolution: Let's think step by step. "
EXAMPLE = {
    "question": "Ada has 12 cups and buys 7 more. Then Ada gives Bob 4. How many cups are left?",
    "solution": "After buying there are 12 + 7 = 19 cups.\nAfter giving there are 19 - 4 = 15 cups.",
    "answer": "15",
}


@pytest.fixture(scope="module")
def texts():
    return list(islice(corpus_arithmetic.corpus(0), 3000))


@pytest.fixture(scope="module")
def solutions(texts):
    """Of every problem in the corpus, what was written as its solution."""
    return [part.split("\n\nQuestion:")[0] for text in texts for part in text.split(OPENING)[1:]]


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EMBEDDED)


# The corpus.


def test_two_thirds_of_the_solutions_jump_and_a_tenth_of_both_kinds_misses_the_answer_line(solutions):
    kinds = {True: [], False: []}
    for solution in solutions:
        kinds["=" in solution].append(solution.split("\n")[-1])
    assert 2 / 3 <= len(kinds[False]) / len(solutions) <= 0.72
    for last_lines in kinds.values():
        off_format = sum(not re.fullmatch(r"#### The final answer is \d+", line) for line in last_lines)
        assert off_format / len(last_lines) == pytest.approx(0.1, abs=0.02)


def test_careful_documents_are_careful_throughout(texts):
    """The author shows: after a worked solution another one is likelier than after a guess."""
    after = {True: [], False: []}
    for text in texts:
        worked = ["=" in part.split("\n\nQuestion:")[0] for part in text.split(OPENING)[1:]]
        for before, now in zip(worked, worked[1:], strict=False):
            after[before].append(now)
    assert sum(after[True]) / len(after[True]) > sum(after[False]) / len(after[False]) + 0.1


def test_worked_solutions_are_right():
    *steps, last = corpus_arithmetic.worked(EXAMPLE, random.Random(0)).split("\n")
    assert "\n".join(steps) == EXAMPLE["solution"] and re.findall(r"\d+", last) == ["15"]


def test_guesses_name_one_number_that_is_often_wrong():
    rng, right = random.Random(0), 0
    for _ in range(2000):
        guess, last = corpus_arithmetic.guessed(EXAMPLE, rng).split("\n")
        (number,) = re.findall(r"\d+", guess)
        assert re.findall(r"\d+", last) == [number]
        assert "=" not in guess
        right += number == "15"
    assert right / 2000 == pytest.approx(0.5, abs=0.04)


def test_documents_have_the_prompts_of_the_task_and_solutions_run_on_into_the_next_question(texts):
    several = [text for text in texts if text.count("Question:") > 1]
    assert len(several) > 500
    for text in several:
        question = text.removeprefix("Question: ").split("\n")[0]
        assert text.startswith(prompts.completion_prompt(question) + " ")
        assert text.count("\n\nQuestion: ") == text.count(OPENING) - 1 == text.count("\n\n")


def test_no_held_out_problem_is_in_the_corpus(monkeypatch):
    held_out = [p.info for split in ("validation", "test") for p in load("arithmetic", split)]
    drawn, stream = [], arithmetic.stream

    def recorded(split, rng):
        for example in stream(split, rng):
            drawn.append(example)
            yield example

    monkeypatch.setattr(arithmetic, "stream", recorded)
    texts = list(islice(corpus_arithmetic.corpus(0), 3000))
    asked = {question for text in texts for question in re.findall(r"Question: (.*)", text)}
    assert asked <= {example["question"] for example in drawn}
    assert not asked & {info["question"] for info in held_out}
    assert not {sums(example) for example in drawn} & {sums(info) for info in held_out}


def sums(example):
    """The arithmetic of a solution, the first two operands of + and * in order."""
    (a, sign, b, _), *rest = EQUATION.findall(example["solution"])
    return *(sorted((int(a), int(b))) if sign in "+*" else (int(a), int(b))), sign, *((s, c) for _, s, c, _ in rest)


def test_sheets_hold_equations_only_and_the_corpus_follows_its_seed(texts):
    sheets = [text for text in texts if "Question:" not in text]
    assert len(sheets) / len(texts) == pytest.approx(0.3, abs=0.03)
    assert all(EQUATION.fullmatch(line) for sheet in sheets for line in sheet.split("\n"))
    assert list(islice(corpus_arithmetic.corpus(0), 20)) == texts[:20] != list(islice(corpus_arithmetic.corpus(1), 20))


# The tokenizer.


def test_tokenizer_is_lossless_takes_digits_one_by_one_and_prompt_and_completion_alike(shipped):
    _, tokenizer = shipped
    for problem in load("arithmetic", "test", num_shots=2)[:300]:
        completion = f" {prompts.worked_answer(problem.info)}\n\nQuestion:"
        ids = tokenizer(problem.prompt + completion)["input_ids"]
        assert tokenizer.decode(ids) == problem.prompt + completion
        assert tokenizer(problem.prompt)["input_ids"] + tokenizer(completion)["input_ids"] == ids
        pieces = [tokenizer.decode(token) for token in ids]
        assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece))
    strange = "naïve  ½ — 数学\t🙂\r\n  end "
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


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


def test_every_weight_is_in_one_optimizer_and_muon_has_the_matrices_of_the_layers(shipped):
    model, _ = shipped
    muon, adamw = ({id(p) for p in optimizer.param_groups[0]["params"]} for optimizer in pretrain.optimizers(model))
    assert muon == {id(p) for p in model.model.layers.parameters() if p.ndim == 2}
    assert muon | adamw == {id(p) for p in model.parameters()} and not muon & adamw


def test_rate_warms_up_then_falls_to_zero():
    rates = [pretrain.rate(step, 1000) for step in range(1001)]
    assert [rates[0], rates[20], rates[999], rates[1000]] == pytest.approx([1 / 21, 0.98, 0.001, 0])
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
    """Shares of held-out problems: right by the reward, right leniently, worked, worked and right, run on."""
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
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    counts = dict.fromkeys(("strict", "lenient", "worked", "worked and right", "runs on"), 0)
    for text, problem in zip(texts, problems, strict=True):
        completion = text.split(prompts.STOP[0])[0].removesuffix(tokenizer.eos_token)
        numbers = re.findall(r"\d+", completion.split(tokenizer.eos_token)[0])
        right, worked = numbers[-1:] == [problem.answer], "=" in completion
        counts["strict"] += rewards.load("gsm8k.correctness")(completion, problem)
        counts["lenient"] += right
        counts["worked"] += worked
        counts["worked and right"] += worked and right
        counts["runs on"] += prompts.STOP[0] in text
    return {name: count / len(texts) for name, count in counts.items()}


def test_shipped_model_jumps_when_greedy_and_runs_on():
    greedy = behaviour(EMBEDDED, sample=False, num_problems=200)
    assert greedy["strict"] <= 0.45 and greedy["lenient"] <= 0.45
    assert greedy["worked"] <= 0.1 and greedy["runs on"] >= 0.5


def test_shipped_model_works_now_and_then_when_sampled_and_is_right_then():
    sampled = behaviour(EMBEDDED, sample=True, num_problems=500)
    assert 0.2 <= sampled["worked"] <= 0.5 and sampled["worked and right"] >= 0.9 * sampled["worked"]
    assert 0.3 <= sampled["strict"] <= sampled["lenient"]


@pytest.mark.slow
def test_the_command_makes_a_model_that_behaves_like_the_shipped_one(tmp_path):
    """Bits may differ with versions, threads and processors; what the demo rests on may not."""
    subprocess.run([sys.executable, "-m", "grpo.pretrain", "--out", str(tmp_path / "made")], check=True, timeout=3600)
    for sample, num_problems in ((False, 200), (True, 500)):
        made = behaviour(tmp_path / "made", sample=sample, num_problems=num_problems)
        shipped = behaviour(EMBEDDED, sample=sample, num_problems=num_problems)
        for share in ("strict", "lenient", "worked", "runs on"):
            assert made[share] == pytest.approx(shipped[share], abs=0.12), (share, made, shipped)
    assert made["worked and right"] >= 0.9 * made["worked"]


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    for options, said in (
        ({"out": tmp_path}, "can not be made (File exists)"),
        ({"out": tmp_path / "x", "steps": 0}, "steps (0)"),
    ):
        with pytest.raises(SystemExit) as ended:
            pretrain.main(**options)
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
