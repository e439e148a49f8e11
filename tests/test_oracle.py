"""`python -m grpo.oracle`: its numbers against closed forms and against sums over plain Python lists.

The tables in docs/algorithm.md are what the command prints. To write them again, after a change that is meant to change
them:

    python -m tests.test_oracle
"""

import contextlib
import io
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo import advantages, corrections, kl, losses, weighting
from grpo.advantages import ADVANTAGES, STD_EPS
from grpo.config import Config
from grpo.objective import objective
from grpo.oracle import exact
from grpo.oracle.__main__ import main
from grpo.oracle.exact import POLICY, SAMPLINGS, Choice, Groups, compare, question_weight
from grpo.tables import constants

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "algorithm.md"
CHANCES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
EVERY = exact.completions()
P = (EVERY.probabilities(POLICY) @ EVERY.rewards).item()
every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def max_rl(rewards, valid=None):
    """(r - mean) / mean, 0 where the mean is 0: a rule that the table lacks, with a closed form."""
    mean = rewards.mean(-1, keepdim=True)
    return torch.where(mean > 0, (rewards - mean) / mean, 0)


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def grpo_weight(n: int, p: float) -> float:
    """E[K (N - K) / (std + eps)] / (N^2 p (1 - p)), std with ddof 1."""
    std = [math.sqrt(k * (n - k) / n / (n - 1)) for k in range(n + 1)]
    terms = [chance * k * (n - k) / (std[k] + STD_EPS) for k, chance in enumerate(binomial(n, p))]
    return math.fsum(terms) / (n * n * p * (1 - p))


CLOSED = {
    "rloo": (ADVANTAGES["rloo"], lambda n, p: 1.0),
    "dr_grpo": (ADVANTAGES["dr_grpo"], lambda n, p: (n - 1) / n),
    "grpo": (ADVANTAGES["grpo"], grpo_weight),
    "max_rl": (max_rl, lambda n, p: (1 - (1 - p) ** (n - 1)) / p),
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("n", [2, 3, 8, 32])
def test_weights_of_questions_have_their_closed_form(name, n):
    rule, closed = CLOSED[name]
    for p in CHANCES:
        assert question_weight(rule, n, p, Config()) == pytest.approx(closed(n, p), rel=1e-12)


def test_weights_of_questions_as_published():
    assert question_weight(ADVANTAGES["grpo"], 8, 0.5, Config()) == pytest.approx(1.7358, abs=4e-4)  # without eps
    assert question_weight(ADVANTAGES["grpo"], 8, 0.01, Config()) == pytest.approx(2.4404, abs=1e-3)
    assert question_weight(max_rl, 8, 0.1, Config()) == pytest.approx(5.2170, abs=5e-5)
    assert [round(exact.refill(8, p), 4) for p in (0.01, 0.05, 0.5)] == [12.9441, 2.9711, 1.0079]


def score(n: int, rule, p: float, kept=lambda rewards: True) -> float:
    """E[sum A_i dlog P(r_i) / dp] / N over all outcomes of a group, given that it is kept: the weight by definition."""
    total, mass = 0.0, 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=n):
        chance = math.prod(p if r else 1 - p for r in outcome)
        if kept(outcome):
            values = rule(torch.tensor([outcome], dtype=torch.float64))[0].tolist()
            mass += chance
            total += chance * sum(a * (r / p - (1 - r) / (1 - p)) for a, r in zip(values, outcome, strict=True)) / n
    return total / mass


@pytest.mark.parametrize("name", ADVANTAGES)
def test_weights_of_questions_are_expected_scores(name):
    for p in (0.05, 0.6):
        expected = pytest.approx(score(4, ADVANTAGES[name], p), rel=1e-12, abs=1e-12)
        assert question_weight(ADVANTAGES[name], 4, p, Config()) == expected


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_groups_drawn_again_multiply_the_weight_of_a_rule_that_is_0_in_flat_groups(name):
    for p in (0.05, 0.6):
        again = score(4, ADVANTAGES[name], p, lambda rewards: 0 < sum(rewards) < 4)
        assert question_weight(ADVANTAGES[name], 4, p, Config()) * exact.refill(4, p) == pytest.approx(again, rel=1e-12)


def test_the_tiny_policy_lists_every_completion():
    texts = [
        "".join("01E"[token] for token, kept in zip(tokens, mask, strict=True) if kept)
        for tokens, mask in zip(EVERY.tokens.tolist(), EVERY.mask.tolist(), strict=True)
    ]
    assert dict(zip(texts, EVERY.rewards.tolist(), strict=True)) == {
        "E": 0, "0E": 0, "00": 0, "01": 1, "1E": 1, "10": 1, "11": 1,
    }  # fmt: skip
    after = POLICY.softmax(-1).tolist()  # of the empty prefix, of 0, of 1
    by_hand = {"E": after[0][2]} | {f"{a}{'01E'[b]}": after[0][a] * after[a + 1][b] for a in (0, 1) for b in range(3)}
    assert dict(zip(texts, EVERY.probabilities(POLICY).tolist(), strict=True)) == pytest.approx(by_hand, rel=1e-14)


def one_by_one(choice: Choice, sampling: str) -> tuple[torch.Tensor, float]:
    """Mean and variance of the step over all ordered pairs of completions, with autograd to the logits of each pair."""
    sampler, old = SAMPLINGS[sampling]
    chances, steps = [], []
    for pair in itertools.product(range(len(EVERY.rewards)), repeat=2):
        rows, logits = list(pair), POLICY.clone().requires_grad_()
        mask, rewards = EVERY.mask[rows], EVERY.rewards[rows]
        found = objective(
            EVERY.logprobs(logits)[rows],
            EVERY.logprobs(old)[rows],
            EVERY.logprobs(sampler)[rows],
            EVERY.logprobs(exact.REFERENCE)[rows] if choice.kl else None,
            ADVANTAGES[choice.advantage](rewards[None])[0] if choice.advantage else torch.zeros(2),
            mask,
            loss=losses.LOSSES[choice.loss],
            constants=constants(losses.LOSSES[choice.loss], Config()),
            correction=corrections.CORRECTIONS[choice.sampler_correction],
            bounds=constants(corrections.CORRECTIONS[choice.sampler_correction], Config(), "sampler_correction"),
            kl=kl.KL.get(choice.kl),
            kl_coef=1.0,
        )
        num_tokens, num_sequences = weighting.count(mask)
        weights = weighting.WEIGHTINGS[choice.weighting](
            mask, num_tokens=num_tokens, num_sequences=num_sequences, max_new_tokens=2, dtype=torch.float64
        )
        (slope,) = torch.autograd.grad((weights * found.per_token_loss).sum(), logits)
        chances.append(EVERY.probabilities(sampler)[rows].prod().item())
        steps.append(-slope.flatten())
    mean = sum(chance * step for chance, step in zip(chances, steps, strict=True))
    scatter = [chance * (step - mean).square().sum().item() for chance, step in zip(chances, steps, strict=True)]
    return mean, math.fsum(scatter)


MIXED = [
    Choice(),
    Choice("grpo", "grpo", "token_mean", "truncate", "k3"),
    Choice("dr_grpo", "gspo", "sequence_mean", "mask", "k2"),
    Choice("rloo", "cispo", "sequence_mean", "truncate"),
    Choice(None, kl="k1"),
]


@every_sampling
@pytest.mark.parametrize("choice", MIXED, ids=lambda choice: "-".join(map(str, choice)))
def test_the_gradient_is_the_mean_over_all_pairs(choice, sampling):
    found, (mean, variance) = Groups(2).gradient(choice, sampling, Config()), one_by_one(choice, sampling)
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-14)
    assert found.variance == pytest.approx(variance, rel=1e-12)


def on_policy(size: int = 3, **names) -> tuple[float, float]:
    """(length, angle) against the gradient of the mean reward."""
    return compare(Groups(size).gradient(Choice(**names), "on-policy", Config()).mean, exact.reward_gradient())


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "cispo", "reinforce"])
def test_rloo_with_a_constant_length_is_unbiased_whatever_the_loss(loss, size):
    assert on_policy(size, loss=loss) == (pytest.approx(1 / 2, rel=1e-12), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_an_advantage_changes_the_length_by_the_weight_of_the_question_and_no_angle(name, size):
    length = CLOSED[name][1](size, P) / 2
    assert on_policy(size, advantage=name) == (pytest.approx(length, rel=1e-12), pytest.approx(0, abs=1e-9))


def test_a_sequence_mean_follows_the_reward_over_the_length():
    """E[(r - p) / length d log P]: the baseline of `rloo` is independent of the sample."""
    logits = POLICY.clone().requires_grad_()
    centred = (EVERY.rewards - P) / EVERY.mask.sum(-1) * EVERY.probabilities(POLICY)
    (expected,) = torch.autograd.grad((centred * EVERY.probabilities(logits).log()).sum(), logits)
    found = Groups(3).gradient(Choice(weighting="sequence_mean"), "on-policy", Config()).mean
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-12, atol=1e-14)
    assert on_policy(weighting="sequence_mean")[1] > 10


def test_the_mean_reward_and_both_kl_have_the_gradient_of_finite_differences():
    def slope(function) -> torch.Tensor:
        values, h = [], 1e-5
        for index in range(POLICY.numel()):
            step = torch.zeros(POLICY.numel(), dtype=torch.float64)
            step[index] = h
            step = step.view_as(POLICY)
            values.append((function(POLICY + step) - function(POLICY - step)) / (2 * h))
        return torch.stack(values)

    def of_prefixes(logits) -> torch.Tensor:
        p, q = logits.softmax(-1), exact.REFERENCE.softmax(-1)
        visits = torch.tensor([1.0, *POLICY.softmax(-1)[0, :2]], dtype=torch.float64)  # the empty prefix, 0, 1
        return visits @ (p * (p / q).log()).sum(-1)

    def whole(logits) -> torch.Tensor:
        p, q = EVERY.probabilities(logits), EVERY.probabilities(exact.REFERENCE)
        return (p * (p / q).log()).sum()

    close = {"rtol": 1e-7, "atol": 1e-10}
    torch.testing.assert_close(
        exact.reward_gradient(), slope(lambda x: EVERY.probabilities(x) @ EVERY.rewards), **close
    )
    torch.testing.assert_close(exact.kl_gradient(prefixes_given=True), -slope(of_prefixes), **close)
    torch.testing.assert_close(exact.kl_gradient(prefixes_given=False), -slope(whole), **close)


def test_of_the_penalties_k2_follows_the_kl_k1_nothing_and_k3_another_one():
    found = {name: Groups(2).gradient(Choice(None, kl=name), "on-policy", Config()) for name in ("k1", "k2", "k3")}
    target = exact.kl_gradient(prefixes_given=True)
    assert found["k1"].mean.abs().max() < 1e-15 and found["k1"].variance > 1e-3
    assert compare(found["k2"].mean, target) == (pytest.approx(1 / 2, rel=1e-12), pytest.approx(0, abs=1e-9))
    assert compare(found["k3"].mean, target)[1] > 5
    assert compare(found["k2"].mean, exact.kl_gradient(prefixes_given=False))[1] > 5


def test_an_angle_and_a_length_by_hand():
    exactly = torch.tensor([2.0, 0.0], dtype=torch.float64)
    for mean, length, angle in (
        ([1, 1], 0.5**0.5, 45),
        ([-4, 0], 2, 180),
        ([0, 2], 1, 90),
        ([1e-7, 1e-14], 5e-8, 6e-6),
    ):
        found = compare(torch.tensor(mean, dtype=torch.float64), exactly)
        assert found == (pytest.approx(length), pytest.approx(angle, rel=0.05))
    length, angle = compare(torch.zeros(2, dtype=torch.float64), exactly)
    assert length == 0 and math.isnan(angle)


def printed(*argv: str) -> str:
    """What the command prints, which must end well."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(argv)) == 0
    return out.getvalue()


def read_tables(text: str) -> list[str]:
    return [table.strip() for table in re.findall(r"^\|.*?(?=\n\n|\Z)", text, re.M | re.S)]


def test_a_function_of_ones_own_is_in_the_tables_without_a_further_line(monkeypatch):
    def loss(logprobs, old_logprobs, advantages, mask, *, clip_high):
        return losses.Surrogate(-(1 + clip_high) * advantages[:, None] * logprobs, mask)

    monkeypatch.setitem(advantages.ADVANTAGES, "my_advantage", max_rl)
    monkeypatch.setitem(losses.LOSSES, "my_loss", loss)
    monkeypatch.setitem(weighting.WEIGHTINGS, "my_weighting", lambda mask, *, dtype, **counts: mask.to(dtype))
    monkeypatch.setitem(corrections.CORRECTIONS, "my_correction", lambda *inputs, **bounds: torch.zeros_like(inputs[0]))
    monkeypatch.setitem(kl.KL, "my_kl", lambda logprobs, *others: -logprobs)
    weights, on_policy, penalties, _, _, other, _ = read_tables(printed("--group", "3", "--p", "0.5,0.1"))
    assert "| my_advantage | 1.5000 | 1.9000 |" in weights  # (1 - (1 - p)^2) / p
    assert (
        f"| my_advantage | reinforce | constant_length | none | {(1 - (1 - P) ** 2) / P / 2:.4f} | 0.0° |" in on_policy
    )
    assert "| rloo | my_loss | constant_length | none | 0.6000 | 0.0° |" in on_policy  # 1 + clip_high, 0.2
    assert "| rloo | reinforce | my_weighting | none | 3.0000 | 0.0° |" in on_policy  # a sum over 3 completions
    assert "| rloo | reinforce | constant_length | my_correction | 0.0000 | - | inf |" in other
    assert "| my_kl | constant_length | 0.0000 | - |" in penalties


def test_names_are_combined_and_sizes_and_chances_are_those_given():
    text = printed("--group", "2,13", "--p", "0.3", "--advantage", "rloo,dr_grpo", "--weighting", "all", "--kl", "k2")
    weights, on_policy, *_, penalties, large = read_tables(text)
    assert weights.startswith("| advantage | p = 0.3 |\n") and weights.count("\n") == 4
    names = {tuple(line.split(" | ")[:3]) for line in on_policy.split("\n")[2:]}
    assert names == {(f"| {a}", "reinforce", w) for a in ("rloo", "dr_grpo") for w in weighting.WEIGHTINGS}
    assert {line.split(" | ")[0] for line in penalties.split("\n")[2:]} == {"| k2"}
    assert "| dr_grpo | 0.9231 |" in large and text.count("groups up to 12") == 1  # 12 / 13


def test_constants_are_those_of_a_recipe():
    Path("tight.yaml").write_text("clip_low: 0.01\nclip_high: 0.01\n")
    usual, tight = (printed("--group", "2", "--loss", "grpo", *more) for more in ([], ["--recipe", "tight.yaml"]))
    (before, after) = (read_tables(text) for text in (usual, tight))
    assert before[1] == after[1] and before[3] != after[3]  # on-policy, from an old policy


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--advantage", "grop"], "advantage is 'grop': must be one of grpo, dr_grpo, rloo"),
        (["--group", "1"], "group is (1,): must be"),
        (["--p", "1"], "p is (1.0,): must be"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, argv, sentence):
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and sentence in err
    assert err.startswith("grpo.oracle: error: ") and err.count("\n") == 1


def test_as_a_command():
    command = [sys.executable, "-m", "grpo.oracle", "--group", "2", "--loss", "grpo", "--kl", "k2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Groups of 2\n") and len(read_tables(done.stdout)) == 7


def renewed(page: str) -> str:
    """The page with each table below a comment `<!-- python -m grpo.oracle ARGUMENTS : LINE -->` written again.

    It is the table below the line of the command's output that begins with LINE.
    """

    def table(comment: re.Match) -> str:
        pieces = printed(*comment["argv"].split()).split("\n\n")
        (found,) = [piece for line, piece in itertools.pairwise(pieces) if line.startswith(comment["line"])]
        return f"{comment[1]}\n\n{found}\n\n"

    comments = r"(<!-- python -m grpo.oracle (?P<argv>.*?) : (?P<line>.*?) -->)\n+(?:\|.*\n)*\n*"
    return re.sub(comments, table, page)


def test_the_tables_of_the_page_are_what_the_command_prints():
    page = PAGE.read_text()
    assert page.count("<!-- python -m grpo.oracle") == 5
    assert renewed(page) == page, "to write them again: python -m tests.test_oracle"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
