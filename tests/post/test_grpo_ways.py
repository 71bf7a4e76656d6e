"""`hadal grpo`: each variant's update from tokens to gradient, and the ways that a run can be set up."""

from __future__ import annotations

import gc
import json
import math
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.engine import Engine, SamplingParams
from hadal.model.context import Context
from hadal.model.transformer import Transformer
from hadal.post import rollout
from hadal.post.grpo import grpo, open_run
from hadal.post.objectives import VARIANTS
from hadal.post.policy import Rollout, Sums
from hadal.post.rewards import Completion, RewardError, sandbox
from hadal.post.rewards.judge import Messages
from hadal.post.score import Sample, pack, score
from tests.post.bases import SHAPES, base, user
from tests.post.grpo_runs import QUIET, needs_exact, parameters, recipe, records, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("start") / "base")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a template that opens no `<think>`."""
    return base(tmp_path_factory.mktemp("plain") / "base", "v2-lite")


# --- from tokens to the gradient ---


def literal_loss(model: Transformer, rollout: Rollout, name: str, reference: list[torch.Tensor]) -> Any:
    """−J as it is printed, in loops over completions and tokens, each sequence alone through the model."""
    low, high, beta = VARIANTS[name].clip_low, VARIANTS[name].clip_high, VARIANTS[name].kl_weight
    total, count = torch.zeros(()), len(rollout.samples)
    tokens = sum(len(sample.completion) for sample in rollout.samples)
    for i, sample in enumerate(rollout.samples):
        ids = torch.tensor([*sample.prompt, *sample.completion])
        log_p = model.logits(model(ids, Context.packed([len(ids)]))).log_softmax(-1)
        size, reward = 4, rollout.reward_B
        group = reward[i // size * size : i // size * size + size]
        advantage = reward[i] - group.mean()
        if name == "rloo":
            advantage = reward[i] - (group.sum() - reward[i]) / (size - 1)
        if name not in ("rloo", "dr-grpo"):
            advantage = advantage / (group.std() + 1e-6)
        new = [log_p[len(sample.prompt) - 1 + t, o] for t, o in enumerate(sample.completion)]
        whole = math.e ** (sum(n - o for n, o in zip(new, rollout.old[i], strict=True)) / len(new))
        terms = []
        for t, one in enumerate(new):
            ratio = whole if name == "gspo" else (one - rollout.old[i][t]).exp()
            term = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            if beta:
                quotient = (reference[i][t] - one).exp()
                term = term - beta * (quotient - quotient.log() - 1)
            terms.append(term)
        over = {"dapo": tokens / count, "dr-grpo": 12, "rloo": 1}.get(name, len(terms))
        total = total - sum(terms) / over / count
    return total


@pytest.mark.parametrize("name", list(VARIANTS))
def test_an_update_is_the_formula(name: str, start: Path, tmp_path: Path) -> None:
    """Loss and gradient of a sampled step, with old log-probabilities that were moved so that clips bite,
    against the variant's formula on whole logits."""
    path = recipe(
        tmp_path / "r", start, objective={"variant": name}, mtp={"weight": 0.0}, optimizer={"clip": 1e9}
    )
    with open_run(path, False, (), tmp_path / "run", "cpu", QUIET) as one:
        policy = one.policy
        objective = policy._objective(0.0)
        rollout = policy._rollout(policy.sampler.draw(0, 0.0, policy._tells(objective)), objective)
        generator = torch.Generator().manual_seed(0)
        spread = 1e-3 if name == "gspo" else 0.3
        noise = [torch.randn(len(x), generator=generator) for x in rollout.old]
        if objective.kl_weight:
            rollout.reference = [x + 0.5 * e for x, e in zip(rollout.old, noise, strict=True)]
        rollout.old = [x + spread * (1 + e) for x, e in zip(rollout.old, noise, strict=True)]
        want = literal_loss(one.model, rollout, name, rollout.reference)
        want.backward()
        norm = math.sqrt(
            sum(float(p.grad.square().sum()) for p in one.model.parameters() if p.grad is not None)
        )
        one.model.zero_grad()
        sums = Sums.on(one.model.device)
        policy._update(rollout, range(len(rollout.samples)), objective, sums)
        loss, _, clipped, tokens = sums.values[:4].tolist()
    assert loss == pytest.approx(want.item(), rel=1e-4, abs=1e-6)
    assert sums.norms == [pytest.approx(norm, rel=1e-3)] and norm > 1e-3
    assert tokens == sum(len(x) for x in rollout.old)
    assert (clipped > 0) == (name != "r1-zero")


def test_a_rollout_may_be_gone_through_again(start: Path, tmp_path: Path) -> None:
    """Three epochs in two parts: six updates on one roll-out; the clip is felt after the first, and the gap
    is measured before it."""
    path = recipe(
        tmp_path / "r", start, objective={"variant": "dapo", "clip_low": 1e-4, "clip_high": 1e-4},
        train={"steps": 1, "epochs": 3, "mini_batches": 2},
    )  # fmt: skip
    run(path, tmp_path / "thrice")
    run(path, tmp_path / "once", "train.epochs=1", "train.mini_batches=1")
    thrice, once = records(tmp_path / "thrice")[0], records(tmp_path / "once")[0]
    assert (thrice["updates"], once["updates"]) == (6, 1)
    assert thrice["fed_tokens"] == 3 * once["fed_tokens"] and thrice["tokens"] == once["tokens"]
    assert thrice["ratio_max"] > 1.01 > once["ratio_max"] and thrice["clipped"] > 0.1 > once["clipped"]
    assert thrice["gap_max"] < 1e-3 and thrice["reward"] == once["reward"]


def test_a_kl_term_acts_on_groups_that_say_nothing(start: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path / "r", start, "always", objective={"variant": "grpo", "kl_weight": 0.5})
    with open_run(path, False, ("train.steps=1",), tmp_path / "run", "cpu", QUIET) as one:
        reference = one.policy.reference
        assert reference is not None and reference.kept is not None
        reference.kept["model.norm.weight" if "model.norm.weight" in reference.kept else "norm.weight"].mul_(
            2
        )
        _, stats = one.policy.step()
    assert stats.zero_variance == 4 and stats.updates == 1
    assert stats.kl is not None and stats.kl > 1e-3 and stats.grad_norm is not None and stats.grad_norm > 1e-3


# --- sampling ---


def test_a_longer_limit_from_a_share_of_the_run_on(start: Path, tmp_path: Path) -> None:
    """Dr. GRPO's constant is the limit of the moment."""
    path = recipe(
        tmp_path / "r", start, train={"steps": 4},
        sample={"max_tokens": 3, "max_tokens_late": 6, "late": 0.5},
    )  # fmt: skip
    run(path, tmp_path / "run")
    assert [step["length_max"] for step in records(tmp_path / "run")] == [3, 3, 6, 6]
    with open_run(path, False, (), tmp_path / "again", "cpu", QUIET) as one:
        assert [one.policy._objective(x).constant for x in (0.0, 0.49, 0.5, 1.0)] == [3, 3, 6, 6]


def acceptance(folder: Path) -> float:
    """Share of the MTP module's drafts that a model takes when it answers greedily."""
    engine = Engine.load(
        folder, device="cpu", max_num_seqs=1, max_model_len=64, speculation="mtp", speculation_adaptive=False
    )
    for number in range(4):
        engine.chat([user(f"Say {number}")], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
    found = engine.stats().speculation
    assert found is not None and found.drafted > 10 and found.acceptance is not None
    return found.acceptance


def test_drafts_keep_up_with_the_policy(start: Path, tmp_path: Path) -> None:
    """The MTP module learns what the policy says, and speculation still pays after the run."""
    path = recipe(
        tmp_path / "r", start, mtp={"weight": 1.0}, learning_rate={"peak": 5e-2}, train={"steps": 18},
        sample={"prompts": 2, "group": 8, "max_tokens": 4},
    )  # fmt: skip
    kept = run(path, tmp_path / "kept")
    left = run(path, tmp_path / "left", "mtp.weight=0", "train.steps=1")
    told = [step["mtp_loss"] for step in records(kept.folder) if step["mtp_loss"] is not None]
    assert min(told) < told[0] - 2 and records(left.folder)[0]["mtp_loss"] is None
    before, after = acceptance(start), acceptance(kept.export)
    assert after > 0.5 > before, (before, after)
    frozen, moved = parameters(start), parameters(left.export)
    assert all(torch.equal(x, moved[name]) for name, x in frozen.items() if name.startswith("mtp."))


@needs_exact
def test_sampling_with_drafts_is_sampling(start: Path, tmp_path: Path) -> None:
    """In exact mode, to the bit: drafts change how fast a roll-out comes, not what it is."""
    path = recipe(
        tmp_path / "r", start, train={"steps": 2, "exact": True},
        sample={"prompts": 2, "group": 2, "max_tokens": 8, "max_seqs": 1},
    )  # fmt: skip
    found = []
    for method in ("off", "mtp"):
        with open_run(path, False, (f"sample.speculation={method}",), tmp_path / method, "cpu", QUIET) as one:
            speculator = one.policy.sampler.engine.speculation
            if speculator is not None:
                speculator.policy.adaptive = False
            steps = [one.policy.step() for _ in range(2)]
            found.append([(r.samples, r.old, s.loss, s.grad_norm, s.gap_max) for r, s in steps])
    assert speculator is not None and speculator.stats.drafted > 10
    for (samples, old, *numbers), (others, olds, *same) in zip(*found, strict=True):
        assert samples == others and numbers == same and numbers[-1] == 0.0
        assert all(torch.equal(a, b) for a, b in zip(old, olds, strict=True))


# --- what judges ---


def test_a_judge_and_a_reward_model_in_a_run(start: Path, tmp_path: Path) -> None:
    """Both are asked once a roll-out, about all of its completions; what they say is what is learnt from."""
    asked: list[int] = []

    def judge(chats: list[Messages]) -> list[str]:
        asked.append(len(chats))
        return [f"Score: {len(chat[0]['content']) % 11}" for chat in chats]

    def measure(completions: Sequence[Completion]) -> list[float]:
        asked.append(len(completions))
        return [float(len(c.text) % 5) for c in completions]

    path = recipe(tmp_path / "r", start)
    table = json.loads(path.read_text())
    table["reward"] = [{"kind": "judge"}, {"kind": "model", "weight": 2.0}]
    path.write_text(json.dumps(table))
    grpo(path, out=tmp_path / "run", overrides=["train.steps=1"], device="cpu", console=QUIET, judge=judge,
         model=measure)  # fmt: skip
    assert asked == [16, 16] and gc.isenabled()
    step = records(tmp_path / "run")[0]
    assert step["reward_std"] > 0 and step["updates"] == 1 and step["accuracy"] is None
    line = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    for one in line["completions"]:
        parts = one["parts"]
        assert one["reward"] == pytest.approx(parts["judge"]["value"] + 2 * parts["model"]["value"])


def test_tasks_of_reasoning_gym_in_a_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in with the library's interface, since its dependencies are many: records, the locked
    worker that scores them, accuracy."""
    if not sandbox.guarantees()["seccomp"]:
        pytest.skip("needs Linux with seccomp, for locked workers")
    from hadal.post.rewards import gym

    library = tmp_path / "library" / "reasoning_gym"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text(
        "from reasoning_gym.factory import DATASETS\n"
        "def create_dataset(name, size, seed, **config):\n"
        "    return DATASETS[name](size, seed)\n"
    )
    (library / "factory.py").write_text(
        "class Letters:\n"
        "    def __init__(self, size, seed):\n"
        "        self.seed = seed\n"
        "    def __getitem__(self, i):\n"
        "        return {'question': f'Say {i}', 'answer': 'e', 'metadata': {'seed': self.seed}}\n"
        "    def score_answer(self, answer, entry):\n"
        "        return 1.0 if entry['answer'] in answer else 0.25\n"
        "DATASETS = {'letters': Letters}\n"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(library.parent)
    gym.dataset.cache_clear()
    try:
        path = recipe(tmp_path / "r", plain)
        table = json.loads(path.read_text())
        table |= {
            "tasks": [{"source": "gym", "name": "letters", "size": 8}],
            "reward": [{"kind": "gym", "extract": ["all"]}],
        }
        path.write_text(json.dumps(table))
        run(path, tmp_path / "run", "train.steps=1", "log.samples=4")
    finally:
        gym.dataset.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
            sys.modules.pop(name)
    step = records(tmp_path / "run")[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    found = [one["parts"]["gym"]["answer"] for line in lines for one in line["completions"]]
    want = [0.0 if answer is None else 1.0 if "e" in answer else 0.25 for answer in found]
    assert step["reward"] == pytest.approx(sum(want) / 16) and 1.0 in want
    assert step["accuracy"] == want.count(1.0) / 16 < 1
    assert lines[0]["record"]["task"] == "letters" and lines[0]["record"]["gym"]["dataset"] == "letters"
    assert records(tmp_path / "run", "stop")[0]["failures"] == {}


def test_rewards_know_of_a_think_tag_that_the_template_opens(
    start: Path, plain: Path, tmp_path: Path
) -> None:
    """DeepSeek-R1's template ends the prompt with it, so that completions lack it; V2's does not."""
    seen = []
    for number, folder in enumerate((start, plain)):
        found: list[bool] = []

        def measure(completions: Sequence[Completion], found: list[bool] = found) -> list[float]:
            found += [completion.opened for completion in completions]
            return [0.0] * len(completions)

        path = recipe(tmp_path / f"r{number}", folder)
        table = json.loads(path.read_text())
        table["reward"] = [{"kind": "model"}]
        path.write_text(json.dumps(table))
        grpo(path, out=tmp_path / f"run{number}", overrides=["train.steps=1"], device="cpu", console=QUIET,
             model=measure)  # fmt: skip
        seen.append(set(found))
    assert seen == [{True}, {False}]


# --- what is not to be lost ---


def test_a_padding_token_that_was_sampled_is_a_token() -> None:
    """Packs have no padding, so that no id can be taken for it: tokens count by lengths."""
    config, _ = SHAPES["v3"]
    model = Transformer(config).init_weights(1, 0.06)
    for pad in (0, 1, 2):  # BOS, EOS, and what DeepSeek-R1's tokenizer calls padding
        sample = Sample([5, 6, pad], [7, pad, pad, 8])
        packed = pack([sample, Sample([9], [pad])])
        assert packed.lengths == [4, 1] and packed.target_N.tolist() == [7, pad, pad, 8, pad]
        found = score(model, packed).logprob_N
        log_p = model.logits(model(torch.tensor([5, 6, pad, 7, pad, pad]), Context.packed([6]))).log_softmax(
            -1
        )
        want = [log_p[2 + t, o] for t, o in enumerate(sample.completion)]
        torch.testing.assert_close(found[:4], torch.stack(want), rtol=1e-4, atol=1e-4)


def test_gates_score_in_fp32_whatever_the_weights_are() -> None:
    """In BF16 equal scores are frequent, and sampler and trainer would choose different experts."""
    config, _ = SHAPES["v3"]
    model = Transformer(config, dtype=torch.bfloat16).init_weights(1, 0.06)
    packed = pack([Sample([5, 6, 7], [8, 9, 10, 11])])
    found = score(model, packed, record_routing=True).routing
    assert found
    for one in found:
        assert one.score_TE.dtype == torch.float32
        assert not torch.equal(one.score_TE, one.score_TE.bfloat16().float())


def test_a_prompt_whose_gold_cannot_be_read_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    path = recipe(tmp_path / "r", base(tmp_path / "base"))
    rows = [{"prompt": "x?", "equation": "x = 1"}, {"prompt": "y?", "equation": "y"}]
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reward": [{"kind": "equation"}]}))
    with pytest.raises(RewardError, match=r"r\.jsonl, line 2: the record's equation is 'y'; one = and"):
        grpo(path, out=tmp_path / "run", device="cpu", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_collector_leaves_a_roll_outs_records_alone() -> None:
    """Neither during nor after it; what was left out is looked at again after the next."""

    class Ring:
        def __init__(self) -> None:
            self.own = self

    with rollout._uncollected():
        assert not gc.isenabled()
        held = [[n] for n in range(1000)]
        lost = weakref.ref(Ring())  # garbage, as a ring of references
    try:
        assert gc.isenabled() and gc.get_freeze_count() > len(held)
        gc.collect()
        assert lost() is not None
        with rollout._uncollected():
            gc.collect()
        assert lost() is None
    finally:
        gc.unfreeze()
