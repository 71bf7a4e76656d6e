"""datatrove's Slurm executor with a Slurm of three shell scripts: the tasks and the shards are the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hadal.data import clusters
from hadal.data.prepare import prepare
from hadal.data.recipe import load
from hadal.data.tasks import Task, TaskError
from tests.data.conftest import Corpus
from tests.data.test_prepare import ROOT, files_of

# A job array runs at once, one after the other; a job with a dependency (datatrove's statistics) is not run.
SBATCH = """#!/bin/bash
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
echo "$(grep -c '' "$script") lines, last $last" >> "$SLURM_DIARY"
if [ -n "$last" ] && ! grep -q dependency "$script"; then
  for ((i = 0; i <= last; i++)); do
    SLURM_ARRAY_TASK_ID=$i RUN_OFFSET=0 SLURM_NODELIST=localhost bash "$script" >> "$SLURM_DIARY" 2>&1
  done
fi
echo "Submitted batch job 7"
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [ "$1" = -n ] && shift; shift; done\nexec "$@"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The diary of the scripts."""
    pytest.importorskip("datatrove")
    programs = {
        "sbatch": SBATCH, "srun": SRUN, "squeue": "#!/bin/bash\n", "scontrol": "#!/bin/bash\necho localhost\n"
    }  # fmt: skip
    for name, text in programs.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_DIARY", str(tmp_path / "diary"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(clusters, "POLL_S", 0.01)
    monkeypatch.setattr(clusters, "GRACE_S", 0.1)
    return tmp_path / "diary"


def test_slurm_makes_the_same_set(corpus: Corpus, slurm: Path, tmp_path: Path) -> None:
    small = load(corpus.recipe, ["mixture.tokens=0", "tokens.per_shard=1000000", "heldout.share=0"])
    here = prepare(small, tmp_path / "here", base=corpus.folder)
    seen: list[tuple[str, int, int]] = []
    there = prepare(
        small, tmp_path / "there", base=corpus.folder, executor=clusters.Slurm("cpu"),
        progress=lambda *tick: seen.append(tick),
    )  # fmt: skip
    assert files_of(there.folder) == files_of(here.folder)
    assert "Processing done for" in slurm.read_text()
    assert all(done <= total for _, done, total in seen)


def test_a_job_that_fails_is_told(slurm: Path, tmp_path: Path) -> None:
    task = Task("hadal.data.steps:pack", str(tmp_path / "w" / "s" / "0"), {})
    with pytest.raises(TaskError, match="Slurm job 7 ended with 1 tasks undone; see "):
        clusters.Slurm("cpu")([task], lambda amount: None)


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("hadal.data.steps:pack", str(tmp_path / "w" / "s" / "0"), {})
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="--executor ray needs ray; `pip install ray` gives it"):
        clusters.Ray()([task], lambda amount: None)
