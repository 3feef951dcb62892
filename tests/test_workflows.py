"""The workflows parse, name what exists, run with few permissions, and test the Pythons that the metadata promises."""

import re
import tomllib

import pytest
import yaml
from processes import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FILES}
JOBS = {
    f"{workflow}: {name}": job for workflow, document in WORKFLOWS.items() for name, job in document["jobs"].items()
}
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def triggers(workflow):
    return WORKFLOWS[workflow][True]  # YAML 1.1 reads the key `on` as true


def commands(job):
    return "\n".join(step.get("run", "") for step in job["steps"])


def make_targets(text):
    """The targets of every `make` in a script: words that are neither variables nor options."""
    lines = re.findall(r"(?:^|&&|;)[ \t]*make[ \t]+([^\n;&|]*)", text, re.MULTILINE)
    return [word for line in lines for word in line.split() if "=" not in word and not word.startswith("-")]


def test_make_targets_are_read_from_scripts():
    assert make_targets("make lint type\ncd x && make test PYTHON=python -k\necho make nothing") == [
        "lint",
        "type",
        "test",
    ]


def test_the_three_workflows_are_there():
    assert set(WORKFLOWS) == {"ci", "nightly", "release"}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_every_make_target_and_script_of_a_job_exists(job):
    text = commands(job)
    assert set(make_targets(text)) <= TARGETS
    scripts = set(re.findall(r"\b((?:bench|tests|\.ci)/[\w/.]+)", text))
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_every_make_target_of_the_entry_point_of_ci_exists():
    targets = make_targets((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert targets == ["lint", "type", "test"]
    assert set(targets) <= TARGETS
    assert "bash .ci/run" in commands(WORKFLOWS["ci"]["jobs"]["test"])


def test_the_classifiers_are_the_pythons_of_the_matrix():
    matrix = WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]
    versions = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if name.startswith("Programming Language")]
    assert versions == matrix["python"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert [(entry["os"], entry["python"]) for entry in matrix["include"]] == [("macos-latest", "3.11")]


def test_every_slow_suite_is_a_nightly_job():
    assert triggers("nightly").keys() == {"schedule", "workflow_dispatch"}
    jobs = WORKFLOWS["nightly"]["jobs"].values()
    assert [target for job in jobs for target in make_targets(commands(job))] == [
        "test-slow", "torture", "soak", "test-browser", "test-ray", "setup-dev",
    ]  # fmt: skip


def test_known_faults_of_the_tested_versions_are_looked_up_every_night():
    text = commands(WORKFLOWS["nightly"]["jobs"]["vulnerabilities"])
    assert "pip_audit --requirement constraints.txt" in text and "cyclonedx-json" in text


# Package -> the first version without a known fault that we depend on not having.
SAFE_FROM = {
    "torch": "2.10",  # weights_only=True can be bypassed before
    "jinja2": "3.1.6",  # a template can leave the sandbox before
    "ray": "2.59",  # anybody who reaches a port can run code before
    "transformers": "5.0",  # trust_remote_code is honoured by every loader
    "PyYAML": "6.0",
}


def test_the_floors_are_above_known_faults_and_below_what_was_tested():
    listed = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    floors = {found[1]: found[2] for line in listed if (found := re.match(r"([\w-]+)>=([\d.]+)", line))}
    tested = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for package, first in SAFE_FROM.items():
        assert number(first) <= number(floors[package]) <= number(tested[package.lower()]), package


def number(version):
    return [int(part) for part in version.split(".")]


def test_outputs_are_compared_with_the_whole_history_at_hand():
    job = WORKFLOWS["nightly"]["jobs"]["compare"]
    assert 'bench/compare.py "$before" HEAD --assert-equal' in commands(job)
    (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"]["fetch-depth"] == 0


def test_a_release_is_checked_before_it_is_published():
    jobs = WORKFLOWS["release"]["jobs"]
    assert triggers("release") == {"push": {"tags": ["v*"]}}
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["environment"] == "pypi"
    for check in ("$GITHUB_REF_NAME", "-m build", "gemma2 --help", "GEMMA2_DIST=dist .venv/bin/python -m pytest"):
        assert check in commands(jobs["build"])


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_only_the_publishing_job_has_more_than_read_access(workflow):
    assert WORKFLOWS[workflow]["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in WORKFLOWS[workflow]["jobs"].items() if "permissions" in job}
    assert granted == ({"publish": {"id-token": "write"}} if workflow == "release" else {})


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_every_job_has_a_time_limit(job):
    assert 0 < job["timeout-minutes"] <= 180
