"""The options that say what a model is asked, and how: the same for training (`Config`) and evaluation (`EvalOptions`).

Left out: how the problems are loaded (`data/`), and how they become tokens (`grpo/dataloader.py`).
"""

from dataclasses import dataclass
from typing import Any

from grpo import options
from grpo.options import option


@dataclass(frozen=True)
class Source:
    """Model, data and prompts. Facts are those of both kinds of options; `loads`: it is an argument of `data.load`."""

    model: str = option("embedded", evaluation="model")
    """embedded, embedded_programs: the small base models in this repository, one for each demo; otherwise a local
    directory (of a model, or of an adapter, which is merged) or a Hugging Face hub name."""
    revision: str | None = option(None, evaluation="revision")
    """Commit, tag or branch of a hub model; None: its default branch."""
    data: str = option("arithmetic", evaluation="data")
    """Name of a file in data/: arithmetic, gsm8k, hub, jsonl, ... Or the path of a file of your own: my/task.py."""
    data_path: str | None = option(None, may_change=True, evaluation="data_path", no_result=True)
    """Directory with train.jsonl and test.jsonl (or .json, .parquet, .csv), or one file; data hub: also a name on the
    hub, org/name:configuration. None: the data's own source."""
    prompt_column: str | None = option(None, evaluation="prompt_column", loads=True)
    """Data hub: column of the prompt, a text or chat messages; None: prompt, question or problem."""
    answer_column: str | None = option(None, evaluation="answer_column", loads=True)
    """Data hub: column of the answer, a.b for an entry in it; None: answer or solution."""
    answer_rule: str | None = option(None, evaluation="answer_rule", loads=True)
    """Data hub: how the answer is taken from its column: as_is, after_hashes (####), boxed or regex:PATTERN. None: as
    it is."""
    chat: bool = option(False, evaluation="chat")
    """Render prompts with the tokenizer's chat template; worked examples become turns of the chat."""
    system_prompt: str | None = option(None, evaluation="system_prompt", loads=True)
    """Text of the system turn, or a file with it (.txt, .md); without chat it stands before the prompt. None: the
    data's own."""
    prompt_template: str | None = option(None, evaluation="prompt_template", loads=True)
    """The question's turn, or without chat the prompt: r1_zero, think or boxed (data/prompts.py), or a text or file
    with {question} in it. None: the data's own."""
    reasoning_end: str | None = option(None, evaluation="reasoning_end", regrades=True)
    """Text that ends the reasoning, such as </think>: rewards and graders do not see what stands before its last one.
    None: they see all. Without it in a completion they see all, too."""
    seed: int = option(0, ">= 0 and < 2**63", evaluation="seed")
    """Seed of worked examples, of the order of data and minibatches, and of sampling."""

    def loading(self) -> dict[str, Any]:
        """The arguments of `data.load` beside its split and number of shots."""
        named = options.facts_of(Source, "loads")
        return {"path": self.data_path, "seed": self.seed, **{name: getattr(self, name) for name in named}}
