"""run, complete, convert, eval, list, rm, show: on a tiny model folder and on every preset."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hadal.config import PRESETS
from tests.cli.helpers import ROOT, hadal, program

Capture = pytest.CaptureFixture[str]


def test_run_answers_once(tiny_folder: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "run", str(tiny_folder), "12 + 35?", "--max-tokens", "12", "--seed", "1")
    assert shown.status == 0, shown.err
    assert shown.out.startswith("│ "), "R1's template begins inside the reasoning"
    assert "tiny: a deepseek_v3 model with" in shown.err
    assert "tokens/s · first token after" in shown.err
    assert "of this machine's memory bandwidth" in shown.err


def test_run_as_json_is_reproducible_by_seed(tiny_folder: Path, capsys: Capture) -> None:
    def ask(seed: int) -> dict[str, object]:
        arguments = ("run", str(tiny_folder), "12 + 35?", "--max-tokens", "16", "--seed", str(seed), "--json")
        shown = hadal(capsys, *arguments)
        assert shown.status == 0, shown.err
        assert shown.err == ""
        found = json.loads(shown.out)
        assert isinstance(found, dict)
        return found

    first, again, other = ask(1), ask(1), ask(2)
    assert first["reasoning"] == again["reasoning"] != other["reasoning"]
    assert first["model"] == "tiny"
    assert first["completion_tokens"] == 16
    assert first["finish_reason"] == "length"
    assert float(str(first["tokens_per_s"])) > 0
    assert float(str(first["memory_bandwidth_share"])) > 0


def test_the_model_on_board_answers_the_first_question(capsys: Capture) -> None:
    shown = hadal(capsys, "run", "hadal-mini", "What is 12 + 35?", "--json")
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert "47" in found["content"]
    assert "2+5=7" in found["reasoning"]
    assert found["finish_reason"] == "stop"


def test_the_student_on_board_is_run_by_its_name(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model in its place: names, prompts and lists are what is looked at."""
    from hadal.weights import hub
    from tests.post.bases import base

    (tmp_path / "hadal-mini").symlink_to(hub.resolve("hadal-mini"))
    base(tmp_path / "hadal-mini-dense", "qwen2", template="hadal-mini")
    monkeypatch.setattr(hub, "_ASSETS", tmp_path)
    shown = hadal(capsys, "run", "hadal-mini-dense", "12 + 35?", "--max-tokens", "4", "--json")
    found = json.loads(shown.out)
    assert shown.status == 0 and found["model"] == "hadal-mini-dense" and found["reasoning"], shown.err
    listed = json.loads(hadal(capsys, "list", "--json").out)
    assert [one["name"] for one in listed][:2] == ["hadal-mini", "hadal-mini-dense"]
    about = json.loads(hadal(capsys, "show", "hadal-mini-dense", "--json").out)
    assert about["template"] == "hadal-mini" and "dense" in about["title"]


def test_no_think_is_refused_where_the_model_always_thinks(capsys: Capture) -> None:
    shown = hadal(capsys, "run", "hadal-mini", "What is 12 + 35?", "--no-think")
    assert shown.status == 2
    assert "hadal-mini always reasons" in shown.err and "Traceback" not in shown.err
    assert shown.out == ""


def test_the_model_s_own_sampling_is_the_default(tiny_folder: Path) -> None:
    from hadal.cli.options import Sampling
    from hadal.engine.defaults import sampling_defaults

    defaults = sampling_defaults(tiny_folder)
    assert defaults == {"temperature": 0.6, "top_p": 0.95}
    assert Sampling(temperature=0.0).params(defaults).temperature == 0.0
    assert Sampling().params(defaults).top_p == 0.95


def test_run_reads_stdin_and_prints_no_escapes(tiny_folder: Path) -> None:
    shown = program("run", str(tiny_folder), "-", "--max-tokens", "4", "--seed", "3", stdin="12 + 35?")
    assert shown.status == 0, shown.err
    assert "\x1b" not in shown.err
    assert "4 tokens" in shown.err
    empty = program("run", str(tiny_folder), "-", stdin=" ")
    assert empty.status == 2
    assert "no question" in empty.err


def test_then_chat_ends_with_0_without_a_terminal(tiny_folder: Path) -> None:
    shown = program("run", str(tiny_folder), "12 + 35?", "--then-chat", "--max-tokens", "4", "--seed", "3")
    assert shown.status == 0, shown.err
    assert shown.out.startswith(">>> 12 + 35?\n│ ")


def test_ctrl_c_stops_an_answer_with_130_and_no_traceback(tiny_folder: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "hadal", "run", str(tiny_folder), "go on", "--temperature", "5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.read(3) == "│".encode(), "the answer has begun"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert b"stopped" in err


def test_ctrl_c_while_loading_leaves_quietly(tiny_folder: Path) -> None:
    slow = (
        "import os, signal, threading; from hadal import cli; import hadal.cli.loading as l;"
        "l.prepare_model = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT);"
        f"raise SystemExit(cli.status(['run', {str(tiny_folder)!r}, 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_complete_with_logprobs(tiny_folder: Path, capsys: Capture) -> None:
    arguments = ("complete", str(tiny_folder), "2, 4, 6,", "--max-tokens", "5", "--temperature", "0")
    shown = hadal(capsys, *arguments, "--logprobs", "3", "--json")
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert len(found["logprobs"]) == 5
    for entry in found["logprobs"]:
        assert entry["logprob"] <= 0
        assert len(entry["top"]) == 3
        assert entry["id"] == entry["top"][0]["id"], "greedy takes the likeliest token"
    plain = hadal(capsys, *arguments, "--echo")
    assert plain.out == "2, 4, 6," + found["text"] + "\n"
    stopped = hadal(capsys, *arguments, "--stop", found["text"][:1], "--json")
    assert json.loads(stopped.out)["text"] == ""
    assert json.loads(stopped.out)["finish_reason"] == "stop"


def test_complete_reads_stdin(tiny_folder: Path) -> None:
    shown = program("complete", str(tiny_folder), "--max-tokens", "3", "--echo", stdin="2, 4,")
    assert shown.status == 0, shown.err
    assert shown.out.startswith("2, 4,")


def test_convert_to_fp8_and_back(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "convert", str(tiny_folder), str(tmp_path / "fp8"), "--fp8", "--json")
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert "quantization_config" in json.loads((tmp_path / "fp8" / "config.json").read_text("utf-8"))
    assert found["size_bytes"] < (tiny_folder / "model.safetensors").stat().st_size
    again = hadal(capsys, "convert", str(tiny_folder), str(tmp_path / "fp8"))
    assert again.status == 1
    assert again.err.count("\n") == 1, "an existing model is not overwritten"
    back = hadal(capsys, "convert", str(tmp_path / "fp8"), str(tmp_path / "fp32"), "--dtype", "float32")
    assert back.status == 0, back.err
    answer = hadal(capsys, "run", str(tmp_path / "fp32"), "12 + 35?", "--max-tokens", "3", "--json")
    assert json.loads(answer.out)["completion_tokens"] == 3


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_show_of_every_preset(name: str, capsys: Capture) -> None:
    known = PRESETS[name]
    shown = hadal(capsys, "show", name, "--json")
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert found["parameters"]["total"] == known.config.parameters().main
    assert found["kv_bytes_per_token"] == known.config.kv_bytes_per_token()
    assert found["is_distill"] is known.is_distill
    assert isinstance(found["runs_here"], bool)
    text = hadal(capsys, "show", name)
    assert f"{known.config.parameters().main:,}" in text.out
    if known.is_distill:
        assert str(known.base) in text.out
        assert "A distill is not R1" in text.err
        assert "not R1" in text.out


def test_show_of_all_and_of_a_folder(tiny_folder: Path, capsys: Capture) -> None:
    everything = hadal(capsys, "show")
    assert everything.status == 0
    assert all(name in everything.out for name in PRESETS)
    found = json.loads(hadal(capsys, "show", str(tiny_folder), "--json").out)
    assert found["name"] == "tiny"
    assert found["runs_here"] is True
    assert "MoE (8 experts, 2 a token, 1 shared, sigmoid gate)" in found["architecture"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "deepseek-r2"], "deepseek-r"),
        (["run", "no-such-model", "hi"], "no-such-model"),
        (["run", "./nowhere", "hi"], "nowhere"),
        (["show", "../../etc/passwd"], "passwd"),
        (["convert", "nowhere-model", "x"], "nowhere-model"),
        (["rm", "hadal-mini", "--yes"], "part of Hadal"),
        (["rm", "hadal-mini-dense", "--yes"], "part of Hadal"),
        (["rm", "deepseek-v2-lite", "--yes"], "is not on this machine"),
        (["bench", "./nowhere"], "nowhere"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (
            ["run", "deepseek-r1-distill-qwen-1.5b", "hi", "--force"],
            "hadal pull deepseek-r1-distill-qwen-1.5b",
        ),
    ],
)
def test_faults_are_one_line_with_status_1(arguments: list[str], expected: str, capsys: Capture) -> None:
    shown = hadal(capsys, *arguments)
    assert shown.status in (1, 2)
    faults = [line for line in shown.err.splitlines() if line.startswith("hadal: ")]
    assert len(faults) == 1, shown.err
    assert expected in faults[0]
    assert "Traceback" not in shown.err
    assert "unexpected" not in faults[0]


@pytest.mark.parametrize("option", [("--device", "tpu"), ("--dtype", "int3"), ("--max-model-len", "999999")])
def test_bad_engine_options(option: tuple[str, str], tiny_folder: Path, capsys: Capture) -> None:
    shown = hadal(capsys, "run", str(tiny_folder), "hi", *option)
    assert shown.status in (1, 2)
    assert option[1] in shown.err
    assert "unexpected" not in shown.err


def test_a_damaged_folder_is_refused_by_name(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    shown = hadal(capsys, "run", str(broken), "hi")
    assert shown.status == 1
    assert "model.safetensors" in shown.err
    assert "Traceback" not in shown.err


def test_eval_of_a_few_problems(tiny_folder: Path, capsys: Capture) -> None:
    arguments = ("--limit", "3", "--max-tokens", "4", "--json")
    shown = hadal(capsys, "eval", str(tiny_folder), *arguments)
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert found["suite"] == "puzzles"
    assert found["tasks"]
    assert all(row["total"] == 3 and 0 <= row["correct"] <= row["total"] for row in found["tasks"])
    assert found["settings"]["max_tokens"] == 4


def test_doctor(capsys: Capture) -> None:
    shown = hadal(capsys, "doctor", "--json", "--no-measure")
    assert shown.status == 0, shown.err
    found = json.loads(shown.out)
    assert found["operations"], "no operation is listed"
    assert all(entry["path"] and entry["reason"] for entry in found["operations"])
    text = hadal(capsys, "doctor")
    assert "GB/s" in text.out
    assert found["operations"][0]["operation"] in text.out
    assert found["versions"]["torch"] in text.out
