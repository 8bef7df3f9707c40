"""The plan: pure, complete before anything runs, and refused with the nearest values that work."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import mpi_probe
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import chain, request

from golden_files import check as golden
from runner.errors import UsageError
from runner.plan import build, config, describe, plan
from runner.plan.batch import resolve_batch
from runner.plan.engines.registry import offered
from runner.plan.request import Link
from runner.system import nodeset
from runner.workloads.registry import TESTS


@pytest.mark.parametrize("backend", ["local", "ssh"])
@pytest.mark.parametrize("engine", offered())
def test_every_engine_on_every_backend(cluster, machine, engine, backend):
    source = machine if backend == "local" else cluster
    asked = request(source, engine=engine, node_counts=(1,) if backend == "local" else (3,))
    golden(f"plan/{engine}-{backend}.txt", describe.describe(build.build(asked, source.nodes), nodeset.fold) + "\n")


@pytest.mark.parametrize("backend", ["local", "ssh"])
@pytest.mark.parametrize("engine", offered())
def test_every_engine_on_every_backend_with_the_built_nccl(cluster, machine, engine, backend):
    source = machine if backend == "local" else cluster
    counts = (1,) if backend == "local" else (2,)
    asked = request(source, engine=engine, node_counts=counts, nccl="built", nccl_root="/opt/nccl")
    text = describe.describe(build.build(asked, source.nodes), nodeset.fold)
    golden(f"plan/{engine}-{backend}-built-nccl.txt", text + "\n")


def test_ranks_of_a_profile_are_started_by_its_python_and_measure_something_else(cluster):
    asked = request(cluster, node_counts=(2,))
    plain, of_profile = (build.build(replace(asked, profile=name), cluster.nodes) for name in ("", "gpu-vllm"))
    pythons = [[argv[0] for argv in each.cells[0].launch.argv if argv] for each in (plain, of_profile)]
    assert pythons == [["/opt/shakedown/env/bin/python"] * 2, ["/opt/shakedown/env-gpu-vllm/bin/python"] * 2]
    assert {node.python for node in of_profile.nodes} == {"/opt/shakedown/env/bin/python"}  # agents stay where they are
    prints = [plan.fingerprint(each, each.cells[0]) for each in (plain, of_profile)]
    assert prints[0] != prints[1]
    assert plan.Plan.from_dict(json.loads(json.dumps(of_profile.to_dict()))).cells[0].profile == "gpu-vllm"
    with pytest.raises(UsageError, match=r"runner_pythons .*: unknown profile 'gpu-vlm'; did you mean 'gpu-vllm'"):
        build.build(replace(asked, profile="gpu-vlm"), cluster.nodes)


@pytest.mark.parametrize("backend", ["local", "ssh"])
def test_each_gpu_by_itself_is_started_as_training_is_and_gets_the_model_alone(cluster, machine, backend):
    source = machine if backend == "local" else cluster
    gpu = {"gpu": config.load_test("gpu", {}).model_dump()}
    asked = request(source, tests=gpu, model="llama-2-7b", node_counts=(1,) if backend == "local" else (2,))
    built = build.build(asked, source.nodes)
    golden(f"plan/gpu-{backend}.txt", describe.describe(built, nodeset.fold) + "\n")
    (cell,) = built.cells
    assert (cell.batch, cell.deepspeed, cell.expected) == (None, None, None)
    job = plan.job(built, cell, source.nodes[0], None)
    assert (job["model"]["name"], job["weights"], job["params"]["soak_s"]) == (
        "llama-2-7b",
        None,
        {"cuda": 20, "cpu": 2}[cell.device],
    )


@pytest.mark.parametrize("root", [None, "/srv/own"])
def test_where_nccl_tests_are_is_decided_by_the_plan_which_has_their_command(cluster, root):
    nodes = tuple(replace(node, nccl_root="/data/nccl") for node in cluster.nodes)
    settings = {"root": root, "collectives": ["all_reduce", "send_recv"], "splits": ["none", "rail"]}
    tests = {"nccl": config.load_test("nccl", settings).model_dump()}
    built = build.build(request(cluster, tests=tests, node_counts=(2,)), nodes)
    assert {cell.params["root"] for cell in built.cells} == {root or "/data/nccl"}
    programs = [f"{root or '/data/nccl'}/current/bin/{name}_perf" for name in ("all_reduce", "sendrecv")]
    assert plan.rank_programs(built.cells) == programs
    text = describe.describe(built, nodeset.fold)
    golden(f"plan/nccl-{'own' if root else 'ssh'}.txt", text + "\n")
    assert f"{programs[0]} -b 8 -e 8G -f 2 " in text


@pytest.fixture
def mpi_test(monkeypatch):
    mpi_probe.register(monkeypatch)
    return {mpi_probe.NAME: config.load_test("torch", {}).model_dump()}


@pytest.mark.parametrize(("backend", "count"), [("local", 1), ("ssh", 1), ("ssh", 3)])
def test_mpirun_starts_an_mpi_test_whatever_engine_the_others_have(cluster, machine, mpi_test, backend, count):
    source = machine if backend == "local" else cluster
    given = dict(tests=mpi_test, node_counts=(count,), engine="deepspeed", nccl="built", nccl_root="/opt/nccl")
    text = describe.describe(build.build(request(source, **given), source.nodes), nodeset.fold)
    golden(f"plan/mpirun-{backend}-{count}.txt", text + "\n")


def test_a_test_with_variants_has_a_cell_for_each(cluster, mpi_test):
    built = build.build(request(cluster, tests=mpi_test, node_counts=(1, 2), repeats=2), cluster.nodes)
    assert [cell.id for cell in built.cells] == [
        "probe-all_reduce-1n-r1", "probe-alltoall-1n-r1", "probe-all_reduce-1n-r2", "probe-alltoall-1n-r2",
        "probe-all_reduce-2n-r1", "probe-alltoall-2n-r1", "probe-all_reduce-rail-2n-r1",
        "probe-all_reduce-2n-r2", "probe-alltoall-2n-r2", "probe-all_reduce-rail-2n-r2",
    ]  # fmt: skip
    assert {cell.params["collective"] for cell in built.cells} == {"all_reduce", "alltoall"}
    assert len({plan.fingerprint(built, cell) for cell in built.cells}) == len(built.cells)
    assert len({cell.master_port for cell in built.cells}) == len(built.cells)


def test_each_cell_has_its_engine_and_an_older_plan_the_one_that_it_had(cluster, mpi_test):
    tests = {"torch": config.load_test("torch", {}).model_dump(), **mpi_test}
    built = build.build(request(cluster, tests=tests, node_counts=(2,)), cluster.nodes)
    assert [cell.engine for cell in built.cells] == ["torchrun", "mpirun", "mpirun", "mpirun"]
    saved = json.loads(json.dumps(built.to_dict()))
    assert [cell.engine for cell in plan.Plan.from_dict(saved).cells] == [cell.engine for cell in built.cells]
    for cell in saved["cells"]:
        del cell["engine"]
    assert {cell.engine for cell in plan.Plan.from_dict(saved).cells} == {"torchrun"}


# --- a chain --------------------------------------------------------------------------------------------


@pytest.fixture
def on_one(monkeypatch):
    """Tests whose cells have a single rank: on one node, and with the GPUs of all nodes."""
    for runs in ("one", "once"):
        monkeypatch.setitem(TESTS, runs, replace(TESTS["torch"], runs=runs))
    return config.load_test("torch", {}).model_dump()


def test_cells_of_a_chain_have_the_names_and_the_order_of_its_links_each_after_the_one_before(cluster, on_one):
    links = (*chain("sft"), Link("merge-sft", "one", on_one), Link("ppo", "once", on_one), Link("merge", "one", on_one))
    asked = request(cluster, tests={}, chain=links, node_counts=(2, 3), repeats=2)
    built = build.build(asked, cluster.nodes)
    assert [(cell.id, cell.test, cell.after) for cell in built.cells] == [
        ("sft", "torch", None),
        ("merge-sft", "one", "sft"),
        ("ppo", "once", "merge-sft"),
        ("merge", "one", "ppo"),
    ]
    shapes = [(cell.num_nodes, cell.gpus_per_node, cell.world_size) for cell in built.cells]
    assert shapes == [(3, 8, 24), (1, 1, 1), (3, 8, 1), (1, 1, 1)]
    first = [node.name for node in cluster.nodes[:3]]
    assert [list(cell.hosts) for cell in built.cells] == [first, first[:1], first, first[:1]]
    assert len({cell.master_port for cell in built.cells}) == len(built.cells)
    assert built.cells[0].inputs == {"setting": "sft"}
    text = describe.describe(built, nodeset.fold)
    assert "cell merge-sft: 1 rank (1 × 1, cuda), once sft is complete\n" in text


def test_a_chain_is_the_same_after_it_was_saved_and_an_older_plan_has_none(cluster):
    built = build.build(request(cluster, tests={}, chain=chain("first", "second"), node_counts=(2,)), cluster.nodes)
    saved = json.loads(json.dumps(built.to_dict()))
    assert [(cell.after, cell.inputs) for cell in plan.Plan.from_dict(saved).cells] == [
        (None, {"setting": "first"}),
        ("first", {"setting": "second"}),
    ]
    for cell in saved["cells"]:
        del cell["after"], cell["inputs"]
    assert [(cell.after, cell.inputs) for cell in plan.Plan.from_dict(saved).cells] == [(None, {}), (None, {})]


def test_an_engine_that_cannot_start_the_ranks_of_a_chain_is_refused_as_for_tests(cluster, mpi_test):
    nodes = tuple(replace(node, become=True) for node in cluster.nodes)
    links = (Link("meet", mpi_probe.NAME, mpi_test[mpi_probe.NAME]),)
    with pytest.raises(UsageError, match="ansible_become: engine mpirun"):
        build.build(request(cluster, tests={}, chain=links, node_counts=(2,)), nodes)


def test_mpi_programs_do_not_meet_on_bridges_of_containers_unless_the_inventory_names_interfaces(cluster, mpi_test):
    def environment(**own):
        nodes = tuple(replace(node, env={**node.env, **own}) for node in cluster.nodes)
        built = build.build(request(cluster, tests=mpi_test, node_counts=(2,)), nodes)
        found = plan.rank_environment(built.cells[0], nodes[0])
        return {name: value for name, value in found.items() if name.startswith("OMPI_MCA_btl_tcp_if_")}

    (excluded,) = environment().values()
    assert {"127.0.0.1/8", "docker0"} <= {*excluded.split(",")}
    # Open MPI refuses both together.
    assert environment(OMPI_MCA_btl_tcp_if_include="eth0") == {"OMPI_MCA_btl_tcp_if_include": "eth0"}
    assert environment(OMPI_MCA_btl_tcp_if_exclude="ib0") == {"OMPI_MCA_btl_tcp_if_exclude": "ib0"}


def test_mpirun_logs_in_as_the_user_of_the_ranks_and_finds_one_python(cluster, mpi_test):
    for change, said in (
        ({"become": "bench"}, r"log in as that user \(ansible_user\), or leave this test out$"),
        ({"python": "/usr/bin/python3"}, "install alike, or leave this test out$"),
    ):
        odd = (*cluster.nodes[:7], replace(cluster.nodes[7], **change))
        with pytest.raises(UsageError, match=said) as error:
            build.build(request(cluster, tests=mpi_test), odd)
        assert "engine mpirun" in str(error.value)


def test_the_users_own_lists_follow_the_built_nccl(cluster):
    built = build.build(request(cluster, node_counts=(1,), nccl="built", nccl_root="/opt/nccl"), cluster.nodes)
    node = replace(cluster.nodes[0], env={"LD_PRELOAD": "/usr/lib/libjemalloc.so.2", "OMP_NUM_THREADS": "4"})
    assert plan.rank_environment(built.cells[0], node) == {
        "LD_PRELOAD": "/opt/nccl/current/lib/libnccl.so.2:/usr/lib/libjemalloc.so.2",
        "PYTHONPATH": "/opt/nccl/python",
        "OMP_NUM_THREADS": "4",
    }


def test_another_nccl_is_another_measurement(cluster):
    plans = [
        build.build(request(cluster, node_counts=(1,), nccl=choice, nccl_root=root), cluster.nodes)
        for choice, root in (("torch", None), ("built", "/opt/nccl"))
    ]
    assert len({plan.fingerprint(each, each.cells[0]) for each in plans}) == 2


def test_the_plan_is_plain_json_and_says_the_same_twice(cluster):
    built = build.build(request(cluster), cluster.nodes)
    assert json.loads(json.dumps(built.to_dict())) == json.loads(
        json.dumps(build.build(request(cluster), cluster.nodes).to_dict())
    )


@pytest.mark.parametrize("model", config.names("models"))
def test_every_shipped_model_plans(cluster, model):
    cell = build.build(request(cluster, model=model, node_counts=(8,)), cluster.nodes).cells[0]
    assert cell.batch.micro_batch * cell.batch.gradient_accumulation * cell.world_size == cell.batch.global_batch
    assert "auto" not in json.dumps([cell.deepspeed[k] for k in cell.deepspeed if "batch" in k])


@pytest.mark.parametrize(("model", "batch"), [("llama-2-7b", 1024), ("llama-2-13b", 512), ("llama-2-70b", 256)])
def test_the_users_batches_are_in_the_deepspeed_files(model, batch):
    loaded = config.load_deepspeed(config.load_model(model).deepspeed, {})
    assert (loaded["train_batch_size"], loaded["gradient_accumulation_steps"]) == (batch, "auto")
    assert loaded["zero_optimization"]["stage"] == 3 and loaded["bf16"]["enabled"] is True


def test_weak_scaling_keeps_the_work_per_gpu_and_strong_the_global_batch(cluster):
    literal = ["sft.gradient_accumulation=16"]
    for settings, micros in ((literal, ([1, 1, 1, 1], [8, 4, 2, 1])), ([], ([4, 4, 4, 4], [4, 4, 4, 4]))):
        asked = request(cluster, model="llama-2-7b", node_counts=(1, 2, 4, 8), settings=settings)
        weak = [cell.batch for cell in build.build(asked, cluster.nodes).cells]
        assert [batch.global_batch for batch in weak] == [128, 256, 512, 1024]
        strong = [cell.batch for cell in build.build(replace(asked, scaling="strong"), cluster.nodes).cells]
        assert {batch.global_batch for batch in strong} == {1024}
        assert ([b.micro_batch for b in weak], [b.micro_batch for b in strong]) == micros


def test_what_does_not_divide_is_refused_with_values_that_work(cluster):
    with pytest.raises(UsageError) as error:
        literal = ["sft.gradient_accumulation=16"]
        build.build(request(cluster, model="llama-2-13b", settings=literal), cluster.nodes)
    settings = re.findall(r"--set (sft\.\w+=\d+)", str(error.value))
    assert settings == ["sft.gradient_accumulation=8", "sft.global_batch=1024"]
    for setting in settings:
        build.build(request(cluster, model="llama-2-13b", settings=[*literal, setting]), cluster.nodes)


@given(
    st.none() | st.integers(1, 5000),
    st.none() | st.integers(1, 16),
    st.none() | st.integers(1, 64),
    st.sampled_from([1, 2, 3, 8, 16, 64]),
)
def test_a_batch_holds_or_its_hint_does(global_batch, micro, accumulation, world):
    try:
        batch = resolve_batch(global_batch, micro, accumulation, world)
    except UsageError as error:
        hints = dict(re.findall(r"sft\.(\w+)=(\d+)", str(error)))
        assert hints
        for key, value in hints.items():
            changed = {"global_batch": global_batch, "gradient_accumulation": accumulation, key: int(value)}
            resolve_batch(changed["global_batch"], micro, changed["gradient_accumulation"], world)
    else:
        assert batch.micro_batch * batch.gradient_accumulation * world == batch.global_batch
        assert micro in (None, batch.micro_batch) and global_batch in (None, batch.global_batch)


def test_too_many_nodes_is_one_line(cluster):
    with pytest.raises(UsageError, match="9 nodes asked for: the inventory inventory/fukushimadc-02 has 8"):
        build.build(request(cluster, node_counts=(9,)), cluster.nodes)


def test_repeats_and_tests_each_have_their_cell_and_port(cluster):
    tests = {name: config.load_test(name, {}).model_dump() for name in ("torch", "sft")}
    cells = build.build(request(cluster, tests=tests, node_counts=(1, 2), repeats=3), cluster.nodes).cells
    assert len({c.id for c in cells}) == len(cells) == 12
    assert all(20000 <= c.master_port < 30000 for c in cells)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", c.id) for c in cells)


def test_deepspeed_needs_one_python_for_all_nodes(cluster):
    odd = (*cluster.nodes[:7], replace(cluster.nodes[7], python="/usr/bin/python3"))
    with pytest.raises(UsageError, match="use --engine torchrun"):
        build.build(request(cluster, engine="deepspeed"), odd)


def test_a_deepspeed_setting_reaches_the_job(cluster):
    built = build.build(request(cluster, settings=["deepspeed.zero_optimization.stage=1"]), cluster.nodes)
    job = plan.job(built, built.cells[0], built.nodes[0], "/data/x")
    assert job["deepspeed"]["zero_optimization"]["stage"] == 1 and job["data"] == "/data/x"


def test_a_plan_for_512_nodes_takes_no_time(cluster):
    nodes = tuple(replace(cluster.nodes[0], name=f"n{i:04d}", alias=f"node{i:04d}") for i in range(512))
    started = time.perf_counter()
    built = build.build(request(cluster, node_counts=(512,)), nodes)
    assert built.cells[0].world_size == 4096
    assert time.perf_counter() - started < 20  # a guard against a quadratic plan, not a measurement


def test_each_node_keeps_its_own_environment(cluster):
    """NICs may be named differently: what differs is said per node and reaches that node's ranks alone."""
    odd = (*cluster.nodes[:2], replace(cluster.nodes[2], env={"NCCL_IB_HCA": "mlx5_7"}))
    built = build.build(request(cluster, node_counts=(3,)), odd)
    text = describe.describe(built, nodeset.fold)
    assert "NCCL_IB_HCA=mlx5_0,mlx5_1 on node[001-002]" in text and "NCCL_IB_HCA=mlx5_7 on node003" in text
    sent = [plan.job(built, built.cells[0], node, None)["env"]["NCCL_IB_HCA"] for node in built.nodes]
    assert sent == ["mlx5_0,mlx5_1", "mlx5_0,mlx5_1", "mlx5_7"]


def test_compiled_kernels_are_kept_on_the_node_for_the_next_cell(cluster):
    own = replace(cluster.nodes[0], scratch="/local/s", env={"TRITON_CACHE_DIR": "/mine"})
    built = build.build(request(cluster, node_counts=(1,)), (own,))
    first, again = (plan.job(built, cell, own, None)["env"] for cell in (built.cells[0], built.cells[-1]))
    assert first["TORCHINDUCTOR_CACHE_DIR"] == again["TORCHINDUCTOR_CACHE_DIR"] == "/local/s/kernels/inductor"
    assert first["TRITON_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize(
    ("setting", "works"),
    [
        ("sft.attention=varlen", "auto or sdpa or eager"),
        ("sft.attention=flash_attention_2", "auto or sdpa or eager"),
        ("sft.attention=flash_attention_3", "auto or sdpa or eager"),
        ("sft.attention=flash_attention_4", "auto or sdpa or eager"),
        ("sft.liger=true", "auto or false"),
        ("sft.precision=fp8", "auto"),
    ],
)
def test_what_needs_a_gpu_is_refused_for_cpus_before_anything_starts(cluster, setting, works):
    with pytest.raises(UsageError, match=rf"^{setting} needs a GPU; on the CPUs of these nodes take {works}$"):
        build.build(replace(request(cluster, settings=[setting]), device="cpu"), cluster.nodes)
    assert build.build(request(cluster, settings=[setting]), cluster.nodes).cells


@pytest.mark.parametrize(
    "setting", ["sft.seq_len=99999", "deepspeed.train_batch_size=-8", "deepspeed.gradient_accumulation_steps=1.5"]
)
def test_what_no_rank_could_run_is_refused_before_it_starts(cluster, setting):
    with pytest.raises(UsageError):
        build.build(request(cluster, settings=[setting]), cluster.nodes)
