"""The stages of a workflow as the links of a chain: what each trainer is told, what it is made from, and where it
leaves what it makes. Pure.

A folder has the digest of what is made in it in its name. So a stage that is interrupted goes on in its own folder, and
one whose inputs have changed begins in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from runner.launch.prepare import Selected
from runner.plan.request import Link
from runner.system.schema import check
from runner.workflow import verl
from runner.workflow.asked import Options, Settings, strategy, training
from runner.workflow.prepare import Prepared
from runner.workflow.stages import MODEL, RL_DATA, SFT_DATA, Program, Stage, digest, inputs, stages_of
from runner.workloads.registry import TESTS

TEST: Mapping[Program, str] = {
    Program.SFT: "rl-sft",
    Program.PPO: "rl",
    Program.GRPO: "rl",
    Program.MERGE: "rl-merge",
}
_DATA: Mapping[Program, str] = {Program.SFT: SFT_DATA, Program.PPO: RL_DATA, Program.GRPO: RL_DATA}

# Settings that say where something is, who is told of it and what is kept on the way, not what is made.
_NO_INPUTS = {
    *(key for key, option in verl.OWN.items() if option in ("--results", "--resume RUN", "--model", "--data")),
    "trainer.experiment_name",
    "trainer.project_name",
    "trainer.logger",
    "trainer.save_freq",
    "trainer.max_ckpt_to_keep",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep",
    "reward.custom_reward_function.path",
}


@dataclass(frozen=True)
class Maker:
    """Makes links of what a user asks for, on the nodes `selected`, in `profile`, from what was found."""

    options: Options
    given: Settings
    selected: Selected
    profile: str
    found: Prepared

    def overrides(self, stage: Stage, model: str = "", folder: str = "", experiment: str = "") -> dict[str, Any]:
        """What the trainer of a stage is told. Raises UsageError for what cannot work on these nodes."""
        asked = training(
            stage.program,
            self.options,
            self.selected,
            verl.PROFILES[self.profile],
            self.given.verl.get(stage.program, {}),
            model=model,
            files=self.found.data[_DATA[stage.program]],
            folder=folder,
            experiment=experiment,
            reward=str(self.found.reward) if self.found.reward and stage.program is not Program.SFT else None,
        )
        return verl.overrides(stage.program, asked)

    def inputs(self) -> dict[str, dict[str, str]]:
        """By stage, what it is made from (`stages.inputs`)."""
        made: dict[str, dict[str, Any]] = {}
        for stage in stages_of(self.options.workflow):
            if stage.program in _DATA:
                made[stage.name] = {k: v for k, v in self.overrides(stage).items() if k not in _NO_INPUTS}
                if stage.program is not Program.SFT and self.found.reward_sha256:
                    made[stage.name]["reward"] = self.found.reward_sha256
            elif stage.program is Program.MERGE:
                made[stage.name] = {"question": self.found.question, "backend": self._backend}
            elif stage.program is Program.PUBLISH:
                made[stage.name] = {"target": self.options.publish}
        return inputs(self.options.workflow, made, self.found.checksums)

    @property
    def _backend(self) -> str:
        return verl.engine(strategy(self.options))

    def links(self, stages: Sequence[Stage], folder: PurePath) -> tuple[Link, ...]:
        """The links of those of `stages` that run on nodes; `folder` is the run's, which all nodes see."""
        made = self.inputs()
        models = {MODEL: str(self.found.model)}
        checkpoints: dict[str, tuple[Stage, str]] = {}
        links = []
        for stage in stages_of(self.options.workflow):
            if stage.program not in TEST:
                continue
            (left,) = stage.leaves
            params: dict[str, Any]
            if stage.program is Program.MERGE:
                trained, checkpoint = next(checkpoints[need] for need in stage.needs if need in checkpoints)
                models[left] = str(model_folder(folder, stage, made[stage.name]))
                params = {"program": trained.program.value, "checkpoint": checkpoint, "target": models[left]}
                params |= {"backend": self._backend, "question": self.found.question}
            else:
                where = str(checkpoint_folder(folder, stage, made[stage.name]))
                checkpoints[left] = stage, where
                start = next(models[need] for need in stage.needs if need in models)
                words = verl.words(
                    stage.program, self.overrides(stage, start, where, f"{self.options.workflow}-{folder.name}")
                )
                params = {"words": words, "checkpoint": where}
                if stage.program is not Program.SFT:
                    params["program"] = stage.program.value
            if stage in stages:
                params |= self.given.seconds.get(stage.name, {})
                test = TEST[stage.program]
                checked = check(TESTS[test].load_settings(), params, f"stage {stage.name}").model_dump()
                links.append(Link(stage.name, test, checked, made[stage.name]))
        return tuple(links)


def checkpoint_folder(folder: PurePath, stage: Stage, inputs: Mapping[str, str]) -> PurePath:
    """Where a stage that trains leaves its checkpoints in the run's folder."""
    return folder / "checkpoints" / f"{stage.name}.{digest(inputs)}"


def model_folder(folder: PurePath, stage: Stage, inputs: Mapping[str, str]) -> PurePath:
    """Where a merge leaves its model in the run's folder."""
    return folder / "models" / f"{stage.name}.{digest(inputs)}"
