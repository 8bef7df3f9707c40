"""What tuning found is used where nothing else decides a setting, with the global batch as it was planned."""

from __future__ import annotations

from dataclasses import replace

import plans
import pytest

from runner.errors import UsageError
from runner.launch import tuned as use
from runner.plan import build, config, tuned
from runner.plan.describe import describe
from runner.plan.plan import Batch, Plan
from runner.results import tuned as results
from runner.results.tuned import Tuned

SETTINGS = {
    "sft.micro_batch": 4,
    "sft.gradient_accumulation": 4,
    "sft.recompute": "none",
    "deepspeed.zero_optimization.stage": 1,
    "deepspeed.zero_optimization.reduce_bucket_size": 800000000,
}
BATCH = Batch(1024, 1, 16)


def found(request, settings=SETTINGS, **changes) -> Tuned:
    subject = replace(tuned.subject(request), **changes.pop("subject", {}))
    made = Tuned(subject, {}, "2026-01-31T12:00:00Z", "runner tune", 1024, settings, 8000.0, ())
    return replace(made, **changes)


@pytest.fixture
def request_7b(cluster):
    return plans.request(cluster, model="llama-2-7b")


def file_of(name: str) -> dict:
    return config.load_deepspeed(name, {})


def holds(*settings: str, file: dict | None = None, params: dict | None = None, shipped: bool = True) -> dict[str, str]:
    overrides = config.parse_settings(settings)
    defaults = config.load_test("sft", {}).model_dump() | (params or {})
    return tuned.held(overrides, defaults, file or file_of("ds_config_7b"), "FILE", shipped)


# --- what holds a setting ---------------------------------------------------------------------------


def test_of_the_products_own_files_nothing_holds_a_setting():
    for name in config.names("deepspeed", ".json"):
        assert holds(file=file_of(name)) == {}


@pytest.mark.parametrize(
    ("setting", "held"),
    [
        ("sft.micro_batch=2", {"sft.micro_batch", "sft.gradient_accumulation"}),
        ("sft.gradient_accumulation=16", {"sft.micro_batch", "sft.gradient_accumulation"}),
        ("deepspeed.gradient_accumulation_steps=16", {"sft.micro_batch", "sft.gradient_accumulation"}),
        ("deepspeed.train_micro_batch_size_per_gpu=1", {"sft.micro_batch", "sft.gradient_accumulation"}),
        ("sft.recompute=full", {"sft.recompute"}),
        ("sft.compile=false", {"sft.compile"}),
        ("deepspeed.zero_optimization.stage=2", {"deepspeed.zero_optimization.stage"}),
        ("deepspeed.zero_optimization.reduce_bucket_size=5", {"deepspeed.zero_optimization.reduce_bucket_size"}),
        (
            "deepspeed.zero_optimization={stage: 2}",
            {key for key in tuned.TUNABLE if key.startswith("deepspeed.zero_optimization.")},
        ),
        ("sft.micro_batch=null", set()),
        ("sft.recompute=auto", set()),
        ("deepspeed.gradient_accumulation_steps=auto", set()),
        ("sft.steps=20", set()),
        ("sft.global_batch=512", set()),
    ],
)
def test_what_a_user_sets_is_held_and_what_follows_from_it(setting, held):
    assert set(holds(setting)) == held
    assert "--set" in holds(setting).values() or not held


def test_the_numbers_of_a_users_own_file_are_held_and_what_it_leaves_open_is_not():
    own = file_of("ds_config_7b") | {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    assert holds(file=own, shipped=False) == dict.fromkeys(
        [
            "deepspeed.zero_optimization.stage",
            "deepspeed.zero_optimization.reduce_bucket_size",
            "deepspeed.zero_optimization.stage3_prefetch_bucket_size",
        ],
        "FILE",
    )
    batch = holds(file={**own, "gradient_accumulation_steps": 16}, shipped=False)
    assert batch["sft.gradient_accumulation"] == "FILE"
    assert batch["sft.micro_batch"] == "sft.gradient_accumulation of FILE"
    assert holds(file={"zero_optimization": "wrong"}, shipped=False) == {}
    assert holds(params={"micro_batch": 2})["sft.micro_batch"] == "configs/tests/sft.yaml"


# --- what it is for ---------------------------------------------------------------------------------


def test_a_subject_is_the_largest_number_of_nodes_and_none_without_training(request_7b):
    assert tuned.subject(replace(request_7b, node_counts=(1, 4, 2))).num_nodes == 4
    subject = tuned.subject(request_7b)
    assert (subject.num_nodes, subject.world_size, subject.seq_len) == (8, 64, 4096)
    assert tuned.subject(replace(request_7b, tests={})) is None


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (["sft.steps=50", "sft.lr=1e-4", "sft.samples=100", "sft.timeout_s=5", "sft.warmup_steps=0"], True),
        (["sft.micro_batch=2", "sft.recompute=none", "deepspeed.zero_optimization.stage=1", "sft.compile=true"], True),
        (["sft.global_batch=512"], True),
        (["deepspeed.optimizer.params.lr=1", "deepspeed.gradient_clipping=2", "deepspeed.steps_per_print=1"], True),
        (["deepspeed.train_batch_size=512", "deepspeed.zero_optimization.reduce_bucket_size=7"], True),
        (["sft.attention=eager"], False),
        (["sft.liger=false"], False),
        (["sft.seq_len=2048"], False),
        (["deepspeed.zero_optimization.overlap_comm=false"], False),
        (["deepspeed.zero_optimization.offload_optimizer.device=cpu"], False),
        (["deepspeed.optimizer.type=Lion"], False),
        (["deepspeed.bf16.enabled=false"], False),
    ],
)
def test_what_tuning_changes_and_what_speed_does_not_depend_on_is_no_part_of_it(cluster, settings, same):
    one, other = (
        tuned.subject(plans.request(cluster, model="llama-2-7b", settings=list(each))) for each in ([], settings)
    )
    assert (one.digest == other.digest) is same, one.differs(other)
    assert bool(one.differs(other)) is not same


# --- what is used -----------------------------------------------------------------------------------


def test_all_that_is_open_is_used_and_the_global_batch_stays(request_7b):
    changed = tuned.apply(request_7b, found(request_7b), {}, BATCH)
    params = changed.tests["sft"]
    assert (params["micro_batch"], params["gradient_accumulation"], params["recompute"]) == (4, 4, "none")
    zero = changed.deepspeed["zero_optimization"]
    assert zero["stage"] == 1 and zero["reduce_bucket_size"] == 800000000 and zero["overlap_comm"] is True
    assert request_7b.deepspeed["zero_optimization"]["stage"] == 3
    assert changed.tuned["settings"] == SETTINGS and changed.tuned["overridden"] == {}


@pytest.mark.parametrize(
    ("batch", "micro", "accumulation"), [(Batch(256, 4, 1), 4, 1), (Batch(2048, 1, 32), 4, 8), (Batch(768, 3, 4), 4, 3)]
)
def test_another_global_batch_keeps_the_micro_batch(request_7b, batch, micro, accumulation):
    used = tuned.apply(request_7b, found(request_7b), {}, batch).tuned["settings"]
    assert (used["sft.micro_batch"], used["sft.gradient_accumulation"]) == (micro, accumulation)


def test_a_micro_batch_that_does_not_divide_is_not_used_and_the_rest_is(request_7b):
    changed = tuned.apply(request_7b, found(request_7b), {}, Batch(384, 6, 1))
    assert changed.tests["sft"]["micro_batch"] is None
    assert changed.tuned["settings"]["sft.recompute"] == "none" and "sft.micro_batch" not in changed.tuned["settings"]
    assert changed.tuned["overridden"] == {"sft.micro_batch=4": "it does not divide 6 sequences a GPU and step"}


def test_what_is_held_wins_and_is_named(request_7b):
    held = {"sft.recompute": "--set", "deepspeed.zero_optimization.stage": "FILE"}
    changed = tuned.apply(request_7b, found(request_7b), held, BATCH)
    assert changed.deepspeed["zero_optimization"]["stage"] == 3 and changed.tests["sft"]["recompute"] == "auto"
    assert changed.tuned["overridden"] == {
        "sft.recompute=none": "--set",
        "deepspeed.zero_optimization.stage=1": "FILE",
    }


def asked(folder, **changes) -> use.Asked:
    return use.Asked(folder, "runner tune -i x", **changes)


def test_a_sweep_uses_one_result_on_every_number_of_nodes(cluster, tmp_path):
    """So that its cells differ in nothing but their nodes."""
    request = plans.request(cluster, model="llama-2-7b", node_counts=(1, 2, 4, 8))
    smaller = {**SETTINGS, "deepspeed.zero_optimization.stage": 3}
    results.save(tmp_path, found(request, smaller))
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {})
    batches = {cell.num_nodes: cell.batch for cell in settled.plan.cells}
    assert {count: batch.global_batch for count, batch in batches.items()} == {1: 128, 2: 256, 4: 512, 8: 1024}
    assert {(b.micro_batch, b.gradient_accumulation) for b in batches.values()} == {(4, 4)}
    strong = replace(request, scaling="strong")
    settled = use.settle(strong, cluster.nodes, asked(tmp_path), {})
    assert {c.num_nodes: (c.batch.global_batch, c.batch.micro_batch) for c in settled.plan.cells} == dict.fromkeys(
        (1, 2, 4, 8), (1024, 4)
    )


def test_the_dry_run_says_what_is_used_since_when_and_the_plan_keeps_it(cluster, tmp_path):
    request = plans.request(cluster, model="llama-2-7b")
    results.save(tmp_path, found(request))
    settled = use.settle(request, cluster.nodes, asked(tmp_path, held={"sft.recompute": "--set"}), {})
    text = describe(settled.plan, ",".join)
    assert "tuned: sft.micro_batch=4 sft.gradient_accumulation=4 deepspeed.zero_optimization.stage=1" in text
    assert "(runner tune on 2026-01-31)" in text and "  not sft.recompute=none: --set" in text
    assert settled.notes == ()
    [chosen] = {cell.chosen for cell in settled.plan.cells}  # which the report shows
    assert chosen.startswith("sft.micro_batch=4 ") and "found by runner tune on 2026-01-31" in chosen
    assert Plan.from_dict(settled.plan.to_dict()).tuned == settled.plan.tuned
    assert "tuned" not in describe(build.build(request, cluster.nodes), ",".join)


def test_without_a_result_gpus_are_told_how_to_get_one_and_cpus_are_not(cluster, machine, tmp_path):
    request = plans.request(cluster, model="llama-2-7b")
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {})
    assert settled.request == request and settled.plan.tuned is None
    assert settled.notes == ("not tuned for llama-2-7b, h200-sxm, 8 nodes (64 ranks), 4096 tokens: runner tune -i x",)
    assert use.settle(plans.request(machine), machine.nodes, asked(tmp_path), {}).notes == ()
    results.save(tmp_path, found(request, subject={"num_nodes": 4, "world_size": 32}))
    [note] = use.settle(request, cluster.nodes, asked(tmp_path), {}).notes
    assert "what was tuned on 2026-01-31 has num_nodes 4, not 8, world_size 32, not 64" in note
    assert use.settle(request, cluster.nodes, asked(tmp_path, use=False), {}).notes == ()
    small = plans.request(machine)
    results.save(tmp_path, found(small, subject={"seq_len": 64}))
    [note] = use.settle(small, machine.nodes, asked(tmp_path), {}).notes
    assert note.startswith("not tuned for tiny, ") and "has seq_len 64, not 256" in note


def test_what_was_tuned_with_other_versions_is_not_used(cluster, tmp_path):
    request = plans.request(cluster, model="llama-2-7b")
    results.save(tmp_path, found(request, versions={"packages.torch": "2.11.0"}))
    assert use.settle(request, cluster.nodes, asked(tmp_path), {"packages.torch": "2.11.0"}).request.tuned
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {"packages.torch": "2.13.0"})
    assert settled.request == request
    assert settled.notes == (
        "what was tuned on 2026-01-31 is not used: it was tuned with torch 2.11.0, nodes have 2.13.0; "
        "tune again: runner tune -i x",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.micro_batch", "four"),
        ("sft.micro_batch", 0),
        ("sft.micro_batch", -4),
        ("sft.micro_batch", True),
        ("sft.recompute", "sometimes"),
        ("sft.nothing", 3),
        ("sft.steps", 100000),
        ("deepspeed.optimizer.params.lr", 7),
        ("nothing", 1),
    ],
)
def test_a_setting_that_tuning_does_not_find_leaves_the_request_as_it_was(cluster, tmp_path, key, value):
    request = plans.request(cluster, model="llama-2-7b")
    results.save(tmp_path, found(request, {**SETTINGS, key: value}))
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {})
    assert settled.request == request
    [note] = settled.notes
    assert note.startswith("what was tuned on 2026-01-31 is not used: ") and key.rpartition(".")[2] in note


def test_a_probe_without_a_recompute_measures_nothing(cluster, tmp_path):
    request = plans.request(cluster, model="llama-2-7b", node_counts=(1,))
    probe = results.Probe({"sft.micro_batch": 4, "deepspeed.zero_optimization.stage": 3}, "ok", 1.0, 1.0)
    assert tuned.rates(found(request, probes=(probe,)), request) == ()


def test_a_result_that_cannot_be_read_or_planned_leaves_the_request_as_it_was(cluster, tmp_path):
    request = plans.request(cluster, model="llama-2-7b")
    file = results.save(tmp_path, found(request))
    file.write_text("{")
    [note] = use.settle(request, cluster.nodes, asked(tmp_path), {}).notes
    assert str(file) in note and "runner tune -i x" in note
    results.save(tmp_path, found(request, {"sft.micro_batch": 16, "sft.recompute": "none"}))
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {})
    assert settled.request == request and "needs about" in settled.notes[0]
    with pytest.raises(UsageError, match="seq_len"):
        use.settle(
            replace(request, tests={"sft": {**request.tests["sft"], "seq_len": 8192}}),
            cluster.nodes,
            asked(tmp_path),
            {},
        )


def test_settings_as_they_are_typed():
    assert tuned.typed({"sft.micro_batch": 4, "sft.recompute": "none", "sft.compile": True}) == (
        "--set sft.micro_batch=4 --set sft.recompute=none --set sft.compile=true"
    )
    typed = config.parse_settings(["sft.micro_batch=4", "sft.recompute=none", "sft.compile=true"])
    assert typed == {"sft": {"micro_batch": 4, "recompute": "none", "compile": True}}


def test_what_was_measured_on_one_node_is_what_the_plan_predicts_from(cluster, tmp_path):
    request = plans.request(cluster, model="llama-2-7b")
    settings = {"sft.micro_batch": 4, "sft.recompute": "none", "deepspeed.zero_optimization.stage": 3}
    probes = (
        results.Probe(settings, "ok", 7600.0, 7777.0, 0.01),
        results.Probe({**settings, "sft.compile": True}, "ok", 9000.0, 9000.0, 0.01),
        results.Probe({**settings, "sft.micro_batch": 8}, "out_of_memory"),
    )
    one = found(request, settings, probes=probes, subject={"num_nodes": 1, "world_size": 8})
    results.save(tmp_path, one)
    settled = use.settle(request, cluster.nodes, asked(tmp_path), {})
    [rate] = settled.request.rates
    assert (rate.micro_batch, rate.recompute, rate.stage) == (4, "none", 3)
    assert (rate.positions_per_s_per_gpu, rate.source) == (7777.0, "measured by runner tune on 2026-01-31")
    literal = plans.request(cluster, model="llama-2-7b", settings=["sft.micro_batch=4", "sft.recompute=none"])
    text = describe(use.settle(literal, cluster.nodes, asked(tmp_path), {}).plan, ",".join)
    assert "measured by runner tune on 2026-01-31" in text
    compiled = plans.request(cluster, model="llama-2-7b", settings=["sft.compile=true"])
    [rate] = use.settle(compiled, cluster.nodes, asked(tmp_path), {}).request.rates
    assert rate.positions_per_s_per_gpu == 9000.0
