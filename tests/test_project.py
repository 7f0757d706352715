"""The files around the code: the license, the CI workflow, the pre-commit hooks and the pages for contributors."""

import hashlib
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from tptrain.config import load_config
from tptrain.config.schema import ClusterConfig

ROOT = Path(__file__).parent.parent
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # sha256 of the published text
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def _check_workflow(file: Path) -> subprocess.CompletedProcess[str]:
    """Check a file against GitHub's schema of workflows, which check-jsonschema carries with it: no network is used."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_license_is_the_unmodified_apache_2_0() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_the_workflow_is_valid() -> None:
    checked = _check_workflow(WORKFLOW)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_broken_workflow_is_noticed(tmp_path: Path) -> None:
    broken = tmp_path / "ci.yml"
    broken.write_text(WORKFLOW.read_text().replace("runs-on:", "run-on:"))
    checked = _check_workflow(broken)
    assert checked.returncode == 1
    assert "'runs-on' is a required property" in checked.stdout


def test_the_workflow_runs_the_one_check() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    assert len(jobs) == 1
    (job,) = jobs.values()
    assert job["steps"][-1]["run"] == ".ci/run"


def test_pre_commit_hooks_use_the_tools_of_the_environment() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    for hook in repos[0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")


def _local_links(page: Path) -> list[str]:
    """The files that a Markdown page links to in this checkout, without links to the web."""
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    return [target for target in targets if "://" not in target]


def test_the_readme_links_to_the_pages_for_contributors() -> None:
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"} <= set(_local_links(ROOT / "README.md"))


def test_no_page_and_no_preset_loads_a_cuda_module() -> None:
    """A CUDA of the system in front of torch's own can shadow its libraries."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    assert len(files) > 20
    assert [file.name for file in files if re.search(r"module (load|add)", file.read_text())] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_linked_files_exist(page: str) -> None:
    missing = [target for target in _local_links(ROOT / page) if not (ROOT / target).exists()]
    assert not missing


def _sections(page: str) -> dict[str, str]:
    """The parts of a page of docs, by heading."""
    parts = re.split(r"^## (.*)\n", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_for_a_site_says_what_each_setting_does() -> None:
    sections = _sections("cluster.md")
    assert {"What a cluster must have", "Containers", "What has never run"} <= sections.keys()
    words = re.findall(r"\w+", " ".join(re.findall(r"^\| (`.*?`) \|", sections["What the settings do"], re.MULTILINE)))
    elsewhere = {"kind", "dry_run"}  # `cluster=slurm`, and the eighth command
    assert {field.name for field in fields(ClusterConfig)} - elsewhere <= set(words)


def test_the_first_day_has_ten_commands_that_load() -> None:
    text = _sections("cluster.md")["A first day in ten commands"].replace("\\\n", " ")
    assert re.findall(r"# (\d+)\. ", text) == [str(n) for n in range(1, 11)]
    launches = re.findall(r"python -m tptrain (?:launch|plan) ((?:[\w.]+=\S+ *)+)", text)
    assert len(launches) >= 3
    for words in launches:
        load_config(words.split())
