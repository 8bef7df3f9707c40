"""The only rank of PPO and GRPO: it runs on Ray's head, and verl starts workers on all nodes of that Ray."""

from __future__ import annotations

import os
from typing import Any

from runner.workloads.job import Events, RankJob
from runner.workloads.rl import phases, trainer


def run(job: RankJob, events: Events) -> None:
    """Train until the last step, and leave checkpoints in the cell's folder of these."""
    variables = trainer.environment(events) | phases.environment(events.folder.phase, os.environ)

    def stay(verl: Any) -> None:
        start = verl.run_ppo
        verl.run_ppo = lambda config, task_runner_class: start(config, _Here(task_runner_class, variables))

    trainer.run("verl.trainer.main_ppo", job, events, stay)


class _Here:
    """An actor class of Ray whose actors start on this node, with `variables` in their environment.

    verl lets Ray choose where its controller runs; here is the folder that it is to write its metrics into.
    """

    def __init__(self, actor: Any, variables: dict[str, str]) -> None:
        self.actor, self.variables = actor, variables

    def options(self, **options: Any) -> _Here:
        """The same with other options, as of Ray's classes."""
        return _Here(self.actor.options(**options), self.variables)

    def remote(self, *args: Any, **named: Any) -> Any:
        """Start an actor."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = ray.get_runtime_context().get_node_id()
        place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        environment = {"env_vars": self.variables}
        return self.actor.options(scheduling_strategy=place, runtime_env=environment).remote(*args, **named)
