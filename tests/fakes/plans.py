"""Requests for plans as a user would make them."""

from __future__ import annotations

from runner.cluster import inventory
from runner.plan import config
from runner.plan.request import Link, Request


def request(source: inventory.Inventory, **changes) -> Request:
    local = source.nodes[0].backend == "local"
    model = changes.pop("model", "tiny")
    settings = config.parse_settings(changes.pop("settings", []))
    architecture = config.load_model(model).model_dump()
    defaults = dict(
        run_id="20260102-030405-abcd",
        created="2026-01-02T03:04:05Z",
        command="runner bench",
        inventory=source.source,
        run_dir="/data/o'neill/$(x) é/results/20260102-030405-abcd" if local else "/srv/results/20260102-030405-abcd",
        tests={"sft": config.load_test("sft", settings.get("sft", {})).model_dump()},
        model=architecture,
        deepspeed=config.load_deepspeed(architecture["deepspeed"], settings.get("deepspeed", {})),
        hardware={"name": "h200-sxm", **config.load_hardware("h200-sxm").model_dump()},
        targets=config.load_targets(),
        node_counts=(len(source.nodes),),
        engine="torchrun",
        backend=source.nodes[0].backend,
        scaling="weak",
        repeats=1,
        gpus_per_node=2 if local else 8,
        device="cpu" if local else "cuda",
        ssh_config=None if local else "/tmp/shakedown-x/ssh_config",
    )
    return Request(**{**defaults, **changes})


def chain(*names: str, test: str = "torch", **settings) -> tuple[Link, ...]:
    """Links of these names, which run one `test`."""
    params = config.load_test(test, settings).model_dump()
    return tuple(Link(name, test, params, {"setting": name}) for name in names)
