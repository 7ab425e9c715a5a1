"""Paths are shared by a tenant's own answers where its tier says so: from the configuration file to the step's rows."""

from hashlib import sha256
from pathlib import Path

from buddy_server.config import load_config
from buddy_server.engine.batch import Batch, Work
from buddy_server.engine.runner import step_rows
from fakes.site import Serve
from tiny_engine import new_sequence

CONFIG = """
tiers:
  shared: {align_paths: true}
  own: {}
tenants:
"""
TIERS = {"acme": "shared", "hobby": "shared", "lone": "own"}


def test_answers_share_paths_within_a_tenant_and_depth_and_never_across(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    tenants = [
        f"  {name}: {{tier: {tier}, key_sha256: [{sha256(f'sk-{name}'.encode()).hexdigest()}]}}\n"
        for name, tier in TIERS.items()
    ]
    file.write_text(CONFIG + "".join(tenants))
    site = serve(config=load_config(file))
    asked = [("acme", 0.5), ("hobby", 0.5), ("acme", 0.5), ("acme", 0.75), ("hobby", 0.5), ("lone", 0.5), ("lone", 0.5)]
    for tenant, budget in asked:
        answer = site.chat({"authorization": f"Bearer sk-{tenant}"}, budget=budget)
        assert answer.status_code == 200
    works = []
    for request in site.engine.requests:
        sequence = new_sequence(request)
        sequence.tokens.append(1)
        sequence.num_computed = sequence.num_prompt
        works.append(Work(sequence, sequence.num_prompt, 1, request.max_cost))
    rows = step_rows(Batch(works, 0), reroute_every=1)
    assert list(rows.aligned) == [0, 1, 0, 3, 1, 5, 6]
    prompts = [Work(new_sequence(request), 0, len(request.prompt_tokens), 4000) for request in site.engine.requests]
    assert list(step_rows(Batch(prompts, len(prompts)), reroute_every=1).aligned) == list(range(len(asked)))
