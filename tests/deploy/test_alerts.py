"""The rules of deploy/prometheus: promtool's unit tests of them, and that they are about metrics that exist."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from buddy_server.metrics import Metrics
from fakes.engine import INFO

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules"
UNIT_TESTS = Path(__file__).with_name("alerts.test.yml")


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]


METRICS = sorted(
    {
        name
        for rule in (*rules("alerts.yml"), *rules("recording.yml"))
        for name in re.findall(r"(?<!:)\bbuddy_\w+", rule["expr"])
    }
)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="NOT TESTED: alerts. apt-get install prometheus")
def test_unit_tests_of_the_rules_pass() -> None:
    command = ["promtool", "test", "rules", str(UNIT_TESTS)]
    tested = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_is_tested_silent_and_firing() -> None:
    cases = [case for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    for is_firing in (False, True):
        tested = {case["alertname"] for case in cases if bool(case["exp_alerts"]) == is_firing}
        assert tested == {rule["alert"] for rule in rules("alerts.yml")}


@pytest.mark.parametrize("name", METRICS)
def test_rules_are_about_metrics_of_the_server(name: str) -> None:
    metrics = Metrics(INFO, [])
    metrics.store_up(True)
    metrics.limits_up(True)
    assert name.removesuffix("_bucket").removesuffix("_total") in {family.name for family in metrics.registry.collect()}


def test_every_alert_has_a_severity_and_says_what_is_wrong() -> None:
    for alert in rules("alerts.yml"):
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert set(alert["annotations"]) == {"summary", "description"}
