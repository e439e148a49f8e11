"""The measurements run, say what they promise, and count right; how fast anything is, no test asks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from bench import clock, floor, models, ours, peers, process, scaling, theirs
from bench.work import Work, work_of
from data.problem import Problem
from grpo.policy import EMBEDDED, load_policy
from grpo.prompts.order import draw_prompts
from grpo.tree import pack
from tests.fakes.models import save_tiny, tiny_model
from tests.fakes.runs import ROOT

TINY = ["--shots", "1", "--prompts", "2", "--group", "2", "--new-tokens", "3", "--threads", "1", "--trl-batch", "4"]
KEYS = {"rollout_s", "learn_s", "step_s", "peak_bytes", "tokens_sampled", "ratio"}
SETTING = {"gpu": None, "trunk_tokens": 5, "prompt_tokens": 9, "threads": 1}


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """A model that would end its completions with their first token: whoever lets EOS end one is found out."""
    path = save_tiny(tmp_path_factory.mktemp("brief"))
    model = AutoModelForCausalLM.from_pretrained(path)
    model.lm_head.weight.data[model.config.eos_token_id] *= 30
    model.save_pretrained(path)
    return path


@pytest.fixture
def here(monkeypatch):
    """What is measured is measured in this process, which has imported everything."""
    for bench in (peers, scaling):
        monkeypatch.setattr(bench, "call", lambda function, arguments, **_: process.answer(function, arguments))


def run_peers(tmp_path, *flags):
    out = tmp_path / "peers.json"
    code = peers.main([*TINY, "--out", str(out), *flags])
    return code, json.loads(out.read_text())


@pytest.mark.slow
def test_peers_side_by_side_and_one_that_can_not_run(brief, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peers.CONTESTANTS, "hf_continuous", "bench.absent:it")
    code, written = run_peers(tmp_path, "--model", brief, "--only", "hf_continuous", "ours", "hf_generate", "floor")
    assert code == 0 and written["machine"]["cores"] and written["versions"]["torch"]
    assert written["settings"]["shots"] == 1 and written["settings"]["warmup"] == 1
    assert written["settings"]["trunk_tokens"] > 100 and written["settings"]["threads"] == 1  # bytes of one exemplar
    found = written["contestants"]
    assert list(found) == ["hf_continuous", "ours", "hf_generate", "floor"]
    assert all(set(entry) >= KEYS for entry in found.values())
    broken, own, generate, least = found.values()
    assert own["trunk_tokens"] == generate["trunk_tokens"] == least["trunk_tokens"]
    assert own["tokens_sampled"] == generate["tokens_sampled"] == 2 * 2 * 3
    assert own["ratio"] == 1 and generate["ratio"] == pytest.approx(generate["rollout_s"] / own["rollout_s"])
    assert own["step_s"] >= own["rollout_s"] + own["learn_s"] and generate["learn_s"] is None
    assert min(own["peak_bytes"], generate["peak_bytes"]) > 1e8
    assert own["tokens_computed"] > 12 and own["sampler_gap_max"] < 1e-3
    assert least["ratio"] == pytest.approx(least["step_s"] / own["step_s"])
    assert "bench.absent" in broken["error"] and broken["step_s"] is None and broken["ratio"] is None
    assert "bench.absent" in capsys.readouterr().out


def test_our_config_is_the_work_whatever_a_recipe_says(tmp_path):
    recipe = {"kl_coef": 0.0, "kl": "k1", "temperature": 0.5, "rewards": ["gsm8k.format"], "reward_weights": [2.0]}
    recipe |= {"learning_rate": 1.0, "prompts_per_step": 1, "group_size": 3, "activation_checkpointing": True}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    made = ours.config_of(Work(recipe=str(tmp_path / "r.yaml"), prompts=5, group=6, new_tokens=7, shots=2, seed=9))
    assert (made.prompts_per_step, made.group_size, made.max_new_tokens, made.num_shots, made.seed) == (5, 6, 7, 2, 9)
    assert (made.kl, made.kl_coef, made.temperature, made.learning_rate) == ("k3", 0.04, 1.0, 1e-6)
    assert made.rewards == ("gsm8k.format", "gsm8k.correctness") and made.reward_weights == (1.0, 1.0)
    assert made.activation_checkpointing  # what is not compared is the recipe's


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_takes_the_same_step(checkpointing, brief, tmp_path):
    pytest.importorskip("trl", reason="trl is in bench/requirements.txt alone")
    options = "--model", brief, "--only", "trl", "--trl-checkpointing", str(checkpointing)
    code, written = run_peers(tmp_path, *options)
    trl = written["contestants"]["trl"]
    assert trl["gradient_checkpointing"] == checkpointing
    assert code == 0 and trl["tokens_sampled"] == 12 and trl["batch"] == 4
    assert trl["step_s"] == pytest.approx(trl["rollout_s"] + trl["reward_s"] + trl["learn_s"])
    assert min(trl["rollout_s"], trl["reward_s"], trl["learn_s"]) > 0
    assert trl["ratio"] is None  # ours did not run


def test_a_reward_of_ours_is_told_by_trl_what_it_asks_for(tmp_path):
    problems = [Problem("How many?", gold, {}) for gold in ("3", "4")]
    given = {"completions": ["3", "3"], "row": [0, 1], "completion_ids": [[5, 6, 0], [5] * 10], "prompts": ["", ""]}
    assert theirs.for_trl("gsm8k.last_number", problems, cap=10)(**given) == [1.0, 0.0]
    assert theirs.for_trl("length.soft_overlong", problems, cap=10)(**given) == [-0.3, -1.0]  # (10 - 10 - length) / 10
    assert theirs.for_trl("length.repetition", problems, cap=10)(**given) == [0.0, 1 / 8 - 1]
    assert theirs.for_trl("length.stop_properly", problems, cap=10, ends={0, 1})(**given) == [0.0, -1.0]
    outside = "def told(completion, problem, *, whole):\n    return 1.0\n"
    (tmp_path / "my.py").write_text(outside)
    with pytest.raises(ValueError, match="told' asks for whole, which TRL's trainer does not tell"):
        theirs.for_trl(f"{tmp_path}/my.py:told", problems, cap=10)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_trl_trains_by_the_clock(rank, tmp_path, monkeypatch, capsys):
    for package in ("trl", "peft"):
        pytest.importorskip(package, reason=f"{package} is in bench/requirements.txt alone")
    asked = []

    def seen(name, problems, cap, ends):
        assert cap == 3 and ends

        def reward(completions, row, **_):
            asked.append([problems[i].prompt for i in row])
            return [0.0] * len(row)

        reward.__name__ = name
        return reward

    monkeypatch.setattr(clock, "for_trl", seen)
    model = save_tiny(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    flags = ["--model", model, "--chat", "True", "--prompts_per_step", "2", "--group_size", "2", "--trl_batch", "2"]
    flags += ["--max_new_tokens", "3", "--lora_rank", str(rank), "--out_dir", str(tmp_path), "--run_name", "trl"]
    assert clock.main([*flags, "--data", "jsonl"]) == 2
    assert "bench.clock: error: data_path: data 'jsonl' needs" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert clock.main([*flags, "--out_dir", str(tmp_path / "file")]) == 2
    assert "bench.clock: error: out_dir: " in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert clock.main([*flags, "--device", "cuda"]) == 2
    assert not (tmp_path / "trl").exists()
    assert clock.main([*flags, "--num_steps", "2", "--rewards", "gsm8k.format"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "trl" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["time/step"] > 0 for line in lines)
    assert {"reward/mean", "reward/gsm8k.format", "completion/length"} <= set(lines[0])
    problems = data.load("arithmetic", "train", num_shots=0, seed=0)
    ours = [[problems[i].prompt for i in draw_prompts(len(problems), 2, 0, step)] for step in (1, 2)]
    assert asked == [[prompt for prompt in prompts for _ in range(2)] for prompts in ours]
    learned, base = (load_policy(path)[0].state_dict() for path in (tmp_path / "trl" / "final", model))
    assert all(torch.equal(learned[name], base[name]) for name in base)  # no reward differed, so nothing was learned
    assert clock.main(flags) == 2 and "run_name is 'trl': must be new" in capsys.readouterr().err
    flags[-1] = "short"
    assert clock.main([*flags, "--num_steps", "9", "--minutes", "1e-9", "--precision", "fp32"]) == 0
    assert len((tmp_path / "short" / "metrics.jsonl").read_text().splitlines()) == 1


def test_without_trl_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match="requirements.txt"):
        theirs.trl(work_of(Work()), batch=4)


def test_the_process_that_starts_measurements_stays_without_torch():
    said = "import sys; from bench import peers; peers.surroundings(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_of_several_runs_the_median_counts(tmp_path, monkeypatch):
    seconds = {"ours": iter([5.0, 4.0, 9.0]), "trl": iter([20.0, None, 10.0])}
    asked = []

    def call(function, arguments, **_):
        name = function.partition(":")[2]
        asked.append((name, arguments.get("batch"), arguments.get("checkpointing")))
        rollout = next(seconds[name])
        return {"error": "no"} if rollout is None else SETTING | {"rollout_s": rollout, "peak_bytes": 1e9}

    monkeypatch.setattr(peers, "call", call)
    code, written = run_peers(tmp_path, "--only", *["ours", "trl"] * 3, "--trl-checkpointing", "True")
    found = written["contestants"]
    assert code == 0 and asked == [("ours", None, None), ("trl", 4, True)] * 3
    assert found["ours"]["rollout_s"] == 5.0 and found["ours"]["runs_s"] == [5.0, 4.0, 9.0]
    assert found["trl"]["ratio"] == 2.0 and found["trl"]["runs_s"] == [20.0, None, 10.0]


def test_a_process_has_a_limit_and_its_end_is_an_error():
    assert process.call("subprocess:run", {"args": ["sleep", "5"]}, limit=0.3) == {"error": "took longer than 0 s"}
    assert process.call("os:_exit", {"status": 3}, limit=60) == {"error": "ended with code 3"}
    assert process.call("bench.models:make", {"model": "/absent", "directory": ""}, limit=60)["error"].startswith("mod")


@pytest.mark.parametrize(
    ("bench", "flags", "said"),
    [
        *((peers, ["--group", n], "group is") for n in ("1", "-3", "99999999999999999999")),
        *((peers, [f"--{name}", "0"], f"{name} is 0") for name in ("prompts", "new_tokens", "steps", "trl_batch")),
        *((peers, [f"--{name}", "-1"], f"{name} is -1") for name in ("shots", "warmup", "threads", "seed", "one_in")),
        (peers, ["--train", "absent.jsonl"], "train is 'absent.jsonl': must be a file"),
        (peers, ["--recipe", "absent.yaml"], "recipe is 'absent.yaml': must be a file"),
        (peers, ["--only", "vllm"], "--only is 'vllm': must be a list, each item one of ours, trl"),
        (peers, ["--only"], "only is"),
        (peers, ["--one-in", "32"], "one_in is 32: no other contestant can do that; use it with --only ours"),
        (peers, ["--trl-batch", "5"], "trl_batch is 5: must divide prompts x group, 32"),
        (clock, ["--chat", "False"], "chat is False: must be True"),
        (clock, ["--chat", "True", "--loss", "gspo"], "loss is 'gspo': must be 'grpo', since TRL is not told of"),
        (clock, ["--chat", "True", "--advantage", "rloo"], "advantage is 'rloo': must be one of grpo, dr_grpo"),
        (clock, ["--chat", "True", "--flat_groups", "drop"], "flat_groups is 'drop': must be 'keep'"),
        (clock, ["--chat", "True", "--precision", "bf16"], "precision is 'bf16': must be 'auto'"),
        (clock, ["--chat", "True", "--trl_batch", "3"], "trl_batch is 3: must divide prompts_per_step x group_size"),
        (clock, ["--minutes", "0"], "minutes is 0"),
        (clock, ["--chat", "True", "--check", "True"], "check and resume must be left out"),
        (clock, ["--chat", "True", "--resume", "auto"], "check and resume must be left out"),
        *((bench, ["--limit", n], "limit is") for bench in (peers, scaling) for n in ("nan", "-1", "inf")),
        (scaling, ["--shots", "-1"], "shots is (-1,)"),
        (scaling, ["--group", "8", "1"], "group is (8, 1): must be at least 2"),
        (scaling, ["--vocabulary", "-1"], "vocabulary is (-1,)"),
        (scaling, ["--new-tokens"], "new_tokens is ()"),
    ],
)
def test_a_wrong_option_is_one_sentence(bench, flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(flags)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("out", ["absent/x.json", "/proc/x.json", "."])
def test_a_file_that_can_not_be_written_shows_before_the_work(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "measure", None)
    assert peers.main(["--out", out]) == 2
    err = capsys.readouterr().err
    assert f"error: out is {out!r}: must be a file that can be written" in err and err.count("\n") == 1


def test_a_directory_that_can_not_be_made_names_its_option(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert scaling.main(["--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert f"out is '{tmp_path / 'file'}': " in err and err.count("\n") == 1


NO_GPU = [] if torch.cuda.is_available() else [(1, ["--device", "cuda"], "device is 'cuda'")]


@pytest.mark.parametrize(
    ("code", "flags", "said"),
    [
        (1, ["--model", "/absent"], "/absent"),
        (2, ["--random-weights", "--model", "/absent"], "model: '/absent' with tokenizer None can not be loaded"),
        (1, ["--shots", "100000"], "100000 is not between 0 and"),
        *NO_GPU,
    ],
)
def test_work_that_can_not_be_read_is_one_sentence_and_overwrites_nothing(code, flags, said, tmp_path, capsys, here):
    out = tmp_path / "old.json"
    out.write_text("old")
    assert peers.main(["--only", "ours", "--out", str(out), *flags]) == code
    printed, err = capsys.readouterr()
    assert said in printed + err and "Traceback" not in printed + err
    assert out.read_text() == "old"


def test_all_contestants_ask_what_our_loop_asks_and_nothing_stops_them(tmp_path):
    train = tmp_path / "any_name.jsonl"
    train.write_text("".join(f'{{"question": "{i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(40)))
    wanted = Work(train=str(train), shots=1, prompts=3)
    problems = ours.problems_of(wanted)
    asked = ours.problems_of_step(wanted, problems, 2)
    assert len({p.prompt for p in asked}) == 3 and all(p in problems and p.info["stop"] == [] for p in asked)


def test_unequal_work_is_an_error():
    step = {"rollout_s": 1.0, "tokens_sampled": 11}
    with pytest.raises(RuntimeError, match="11"):
        ours.result(Work(prompts=2, group=2, new_tokens=3, warmup=0), [step], [[1]], torch.device("cpu"))


def test_means_leave_the_warm_up_out():
    steps = [{"rollout_s": seconds, "tokens_sampled": 12} for seconds in (9.0, 1.0, 2.0)]
    wanted = Work(prompts=2, group=2, new_tokens=3, steps=2, warmup=1)
    means = ours.result(wanted, steps, [[1, 2], [1, 3]], torch.device("cpu"))
    assert means["rollout_s"] == 1.5 and "learn_s" not in means and means["sampled_per_s"] == 8
    assert means["trunk_tokens"] == 1 and means["warmup_steps"] == steps[:1] and means["steps"] == steps[1:]


def test_a_model_of_random_weights_has_its_whole_vocabulary(tmp_path):
    models.make("embedded", str(tmp_path), changes={"vocab_size": 700, "hidden_size": 64, "num_hidden_layers": 2})
    policy, tokenizer = load_policy(str(tmp_path))
    assert policy.head.shape == (700, 64) and policy.model.config.num_hidden_layers == 2
    text = "Tom has 3 apples."
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(EMBEDDED)(text).input_ids
    with pytest.raises(ValueError, match="more than the model's vocabulary of 100"):
        models.make("embedded", str(tmp_path), changes={"vocab_size": 100})


def test_the_work_of_a_step_counted_by_hand():
    asked = Work(prompts=2, group=2, new_tokens=3)
    prompts = [[1, 2, 3], [1, 2, 4, 5]]  # a tree of 5 tokens that see 1 + 2 + 3 + 3 + 4 keys, and a trunk of 2
    layers = 2 * ((32 + 1) * 32 + 2 * (32 + 1) * 16 + 32 * 32 + 3 * 32 * 48)  # query, key and value with bias, ...
    head, per_key = 257 * 32, 4 * 2 * 32
    assert len(pack(prompts, [[[9, 9, 9], [8, 8, 8]]] * 2).input_ids) == 13  # a last token is only predicted
    prefill, decode, reference, forward, backward, optimiser = floor.parts(asked, tiny_model(), 257, prompts)
    assert prefill.operations == 2 * (5 * layers + 2 * head) + 13 * per_key
    keys = 2 * (4 + 5 + 5 + 6)
    assert decode.operations == 2 * (layers + head) * 4 * 2 + keys * per_key
    assert decode.read_and_written == 4 * (layers + head) * 2 + 2 * 2 * 16 * 4 * (5 + 4 + 5 + 8)
    assert forward.operations == 2 * (13 * layers + 12 * head) + (13 + keys) * per_key
    assert forward.operations == backward.operations / 2 == reference.operations
    assert optimiser.read_and_written == 28 * sum(p.numel() for p in tiny_model().parameters())
    assert decode.seconds(1e30, 1.0) == decode.read_and_written and forward.seconds(1.0, 1e30) == forward.operations


def test_the_floor_is_the_sum_over_parts_at_the_measured_speeds(brief, monkeypatch):
    shapes = []
    monkeypatch.setattr(floor, "_seconds_of_product", lambda rows, i, o, *_: shapes.append((i, o)) or rows * i * 1e-6)
    monkeypatch.setattr(floor, "fastest", lambda *_: 1.0)
    found = floor.floor(work_of(Work(model=str(brief), shots=1, prompts=2, group=2, new_tokens=3)))
    assert sorted(shapes) == [(32, 16), (32, 32), (32, 48), (32, 260), (48, 32)]  # equal ones are timed once
    outputs = {32: 2 * (32 + 16 + 16 + 32 + 48 + 48) + 260, 48: 2 * 32}  # all rows of matrices that read so many
    matrices = {32: 2 * 6 + 1, 48: 2}
    work, seconds = (sum(i * of[i] for i in of) for of in (outputs, matrices))
    assert found["flops"] == pytest.approx(2e6 * work / seconds)
    assert found["bytes_per_s"] == 2 * 4 * floor.COPIED["cpu"]
    for phase, parts in {"rollout": 2, "learn": 4}.items():
        floors = [row["floor_s"] for row in found["parts"] if row["phase"] == phase]
        assert len(floors) == parts and found[f"{phase}_s"] == pytest.approx(sum(floors))
    assert found["step_s"] == found["rollout_s"] + found["learn_s"]
    optimiser = found["parts"][-1]
    assert optimiser["floor_s"] == optimiser["read_and_written"] / found["bytes_per_s"]


def test_scaling_varies_one_thing_at_a_time_and_measures_equal_points_once(monkeypatch, tmp_path):
    measured = []

    def answer(function, arguments, **_):
        if function == "bench.models:make":
            Path(arguments["directory"]).mkdir()
            return {}
        measured.append(arguments["work"])
        if arguments["work"]["group"] == 16:
            return {"error": "no room"}
        names = ("rollout_s", "learn_s", "step_s", "tokens_computed", "trunk_tokens", "peak_bytes", "state_bytes")
        return dict.fromkeys(names, 10.0) | {"tokens_sampled": 100}

    monkeypatch.setattr(scaling, "call", answer)
    flags = ["--shots", "0", "4", "--group", "8", "16", "--new-tokens", "64", "--vocabulary", "32768", "65536"]
    assert scaling.main([*flags, "--out", str(tmp_path)]) == 1  # a point has failed
    assert len(measured) == 4 and [work["shots"] for work in measured] == [0, 4, 4, 4]
    rows = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [row["axis"] for row in rows] == ["shots"] * 2 + ["group"] * 2 + ["new_tokens"] + ["vocabulary"] * 2
    assert rows[0]["ms_per_token"] == 1000 and rows[-1]["logits_bytes"] == 4 * 100 * 65536
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    assert len(lines) == 2 + 7 and "no room" in lines[5] and len({line.count("|") for line in lines}) == 1
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_a_point_of_scaling_is_a_real_step(tmp_path, here):
    asked = scaling.Scaling(model=save_tiny(tmp_path / "tiny"))
    sizes = {"shots": 0, "prompts": 1, "group": 2, "new_tokens": 2}
    row = scaling._point(asked, tmp_path / "300", sizes, 300)
    parameters = sum(p.numel() for p in tiny_model(vocab_size=300).parameters())
    assert row["logits_bytes"] == 4 * 4 * 300 and row["tokens_computed"] > 4
    assert 5 * 4 * parameters <= row["state_bytes"] < 5 * 4 * parameters + 1000  # and the optimiser's step counters
    assert scaling.markdown([{"axis": "shots", "value": 0} | row]).count("\n") == 3


def test_rows_that_end_early_are_counted(tmp_path, capsys, here):
    flags = ["--model", save_tiny(tmp_path / "tiny"), "--only", "ours", "--new-tokens", "12", "--warmup", "0"]
    _, whole = run_peers(tmp_path, *flags)
    _, cut = run_peers(tmp_path, *flags, "--one-in", "4")
    whole, cut = (written["contestants"]["ours"] for written in (whole, cut))
    assert whole["tokens_sampled"] == whole["padded"] == 48
    assert cut["tokens_sampled"] < cut["padded"] <= 48 and cut["tokens_computed"] < whole["tokens_computed"]
    said = f"ours: {cut['tokens_sampled']:.0f} tokens sampled, {cut['padded']:.0f} if every row were as long"
    assert said in capsys.readouterr().out


def test_one_in_so_many_tokens_ends_a_row():
    assert ours.ending(64_000, 0).sum() == 0
    assert ours.ending(64_000, 32).sum() == pytest.approx(2000, rel=0.1)
    assert ours.ending(64_000, 32)[:6400].sum() == pytest.approx(200, rel=0.2)


def test_the_table_shows_every_contestant():
    result = {"rollout_s": 1.0, "step_s": 4.0, "learn_s": 3.0, "peak_bytes": 2e9, "tokens_sampled": 8}
    written = peers.report(peers.Peers(), {"ours": [result | SETTING], "trl": [{"error": "no"}]})
    console = Console(width=120, record=True, quiet=True)
    with console.capture():
        console.print(peers.table(written))
    assert written["contestants"]["ours"]["ratio"] == 1 and peers.notes(written)[-1] == "trl: no"
    assert peers.table(written).row_count == 2


def test_no_extra_of_the_project_names_trl():
    root = Path(__file__).parents[2]
    assert "trl" not in (root / "setup.cfg").read_text()
    assert "trl==1.16.*" in (root / "bench" / "requirements.txt").read_text()
