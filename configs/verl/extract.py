"""Writes what `runner.workflow.verl_settings` knows of verl: its trainers' configuration, and its classes' fields.

    pip install hydra-core==1.3.8; pip download --no-deps verl==0.9.1; unzip -d SOURCE verl-0.9.1-*.whl
    python configs/verl/extract.py SOURCE > configs/verl/0.9.1.json

It needs hydra alone: configurations are composed from verl's files, and classes are read as syntax trees. Neither torch
nor Ray is imported, nor verl itself.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

# {trainer: (its configuration, the module that is started, {variant: the overrides that select it})}
TRAINERS = {
    "ppo": ("ppo_trainer", "verl.trainer.main_ppo", {"fsdp": [], "megatron": ["model_engine=megatron"]}),
    "sft": (
        "sft_trainer_engine",
        "verl.trainer.sft_trainer",
        {"fsdp": [], "megatron": ["engine=megatron", "optim=megatron"]},
    ),
}


def compose(folder: Path) -> dict[str, Any]:
    """{trainer: {"module", "variants": {variant: {"select": overrides, "tree": configuration}}}}, as written."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    found: dict[str, Any] = {}
    with initialize_config_dir(str(folder.resolve()), version_base=None):
        for trainer, (name, module, variants) in TRAINERS.items():
            trees = {
                variant: {"select": select, "tree": OmegaConf.to_container(compose(name, overrides=select))}
                for variant, select in variants.items()
            }
            found[trainer] = {"module": module, "variants": trees}
    return found


def classes(source: Path) -> dict[str, dict[str, str]]:
    """{class: {field: its type as written}} of every dataclass of verl, with the fields that it inherits."""
    own: dict[str, tuple[list[str], dict[str, str]]] = {}
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                fields = {
                    field.target.id: ast.unparse(field.annotation)
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
                own[node.name] = ([ast.unparse(base) for base in node.bases], fields)

    def all_fields(name: str) -> dict[str, str]:
        bases, fields = own.get(name, ([], {}))
        inherited: dict[str, str] = {}
        for base in bases:
            inherited.update(all_fields(base))
        return {**inherited, **fields}

    return {name: all_fields(name) for name in own}


def targets(tree: object) -> set[str]:
    """The names of the classes that the nodes of a configuration become (`_target_`)."""
    if not isinstance(tree, dict):
        return set()
    here = {str(tree["_target_"]).rpartition(".")[2]} if "_target_" in tree else set()
    return here.union(*map(targets, tree.values()))


def extract(source: Path) -> dict[str, Any]:
    """All of it, for the verl that is unpacked or installed in `source` (the folder with the package `verl`)."""
    trainers = compose(source / "verl" / "trainer" / "config")
    named = set().union(*(targets(v["tree"]) for t in trainers.values() for v in t["variants"].values()))
    every = classes(source / "verl")
    used = {
        name: {field: kind for field, kind in sorted(every[name].items()) if not field.startswith("_")}
        for name in sorted(named & set(every))
    }
    return {"verl": (source / "verl/version/version").read_text().strip(), "classes": used, "trainers": trainers}


def text(found: dict[str, Any]) -> str:
    """As JSON, with a line for each class and for each section of a configuration."""

    def lines(value: Any, depth: int) -> str:
        if not depth or not isinstance(value, dict):
            return json.dumps(value, separators=(",", ":"))
        inner = ",\n".join(f"{json.dumps(key)}:{lines(item, depth - 1)}" for key, item in value.items())
        return "{\n" + inner + "\n}"

    return (
        "{"
        + f'"verl":{json.dumps(found["verl"])},\n"classes":{lines(found["classes"], 1)},\n'
        + f'"trainers":{lines(found["trainers"], 5)}'
        + "}\n"
    )


if __name__ == "__main__":
    sys.stdout.write(text(extract(Path(sys.argv[1]))))
