"""Test `nccl`: its cells, the command of each, and what a rank makes of how nccl-tests ended."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import pytest

import golden_files
from runner.cluster.tools import nccl_log, nccl_tests
from runner.errors import UsageError
from runner.launch.spellings import kind_of
from runner.node import lastwords
from runner.plan import config
from runner.workloads.nccl import command, rank
from runner.workloads.nccl.variants import variants

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "nccl-tests"


def settings(*given: str) -> dict:
    params = config.load_test("nccl", config.parse_settings(given).get("nccl", {})).model_dump()
    return {**params, "max_bytes": params["max_bytes"] or 8 << 30, "root": params["root"] or "/opt/nccl"}


# --- cells ------------------------------------------------------------------------------------------------


def test_each_collective_is_a_cell_and_so_is_each_rail_and_the_inside_of_nodes():
    cells = variants(settings("nccl.collectives=[all_reduce, all_gather]"), num_nodes=2, gpus_per_node=4)
    rails = [f"all_reduce-rail{rail}" for rail in range(4)]
    assert list(cells) == ["all_reduce", "all_gather", "all_reduce-node", *rails]
    assert [cell["split"] for cell in cells.values()] == ["none", "none", "node"] + 4 * ["rail"]
    assert [cell["rail"] for cell in cells.values()] == [None, None, None, 0, 1, 2, 3]
    assert cells["all_gather"]["min_bytes"] == 8 and cells["all_reduce-rail2"]["min_bytes"] == 1 << 20


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 1), (1, 1)])
def test_where_a_split_is_the_whole_it_is_not_measured_twice(nodes, gpus):
    assert {cell["split"] for cell in variants(settings(), nodes, gpus).values()} == {"none"}


@pytest.mark.parametrize(("nodes", "measured"), [(1, True), (2, True), (3, False), (4, True)])
def test_a_hypercube_needs_a_power_of_two(nodes, measured):
    assert ("hypercube" in variants(settings(), nodes, 8)) is measured


def test_a_split_begins_no_higher_than_it_ends():
    cells = variants(settings("nccl.max_bytes=64K"), 2, 2)
    assert {cell["min_bytes"] for cell in cells.values() if cell["split"] == "rail"} == {64 << 10}


@pytest.mark.parametrize("given", ["nccl.splits=[node, rail]", "nccl.collectives=[hypercube]"])
def test_where_nothing_is_left_to_measure_that_is_said(given):
    with pytest.raises(UsageError, match=r"leaves nothing to measure on .*: add none, or all_reduce"):
        variants(settings(given), 1, 3)


# --- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nccl.variables={NCCL_DEBUG: TRACE}", "NCCL_DEBUG is set by the test itself"),
        ("nccl.variables={LD_PRELOAD: /x.so}", "variables.*: give NCCL's variables with their values"),
        ("nccl.variables=NCCL_IB_TC", "give NCCL's variables with their values"),
        ("nccl.variables={NCCL_IB_TC:106}", "give NCCL's variables with their values"),
        ("nccl.collectives=all_redcue", "did you mean 'all_reduce'"),
        ("nccl.collectives=5", "give a list"),
        ("nccl.buffsize=8X", "buffsize = '8X': give a number of bytes, such as"),
        ("nccl.algo=Rign", "did you mean 'Ring'"),
        ("nccl.hca=mlx5_0; reboot", "give NICs as NCCL_IB_HCA names them"),
        ("nccl.max_bytes=4", "max_bytes 4 is below min_bytes 8"),
        ("nccl.nvsl=true", "did you mean 'nvls'"),
        ("nccl.root=opt/nccl", "root = .*: give an absolute path"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(given, said):
    with pytest.raises(UsageError, match=said) as refused:
        settings(given)
    assert "\n" not in str(refused.value)


def test_what_is_null_is_left_to_nccl_and_to_the_inventory():
    assert command.variables(settings()) == {}
    inherited = {"NCCL_IB_HCA": "mlx5_7", "NCCL_BUFFSIZE": "4194304"}
    cell = variants(settings("nccl.buffsize=8M"), 2, 8)["all_reduce"]
    env = command.environment(cell, 8, True, "/c/log", inherited)
    assert (env["NCCL_IB_HCA"], env["NCCL_BUFFSIZE"]) == ("mlx5_7", "8388608")


# --- the command of a rank --------------------------------------------------------------------------------


def shown(suffix: str, params: dict, inherited: dict) -> str:
    cell = variants(params, 2, 8)[suffix]
    env = command.environment(cell, 8, True, "/cell/log", inherited)
    lines = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(env.items())]
    return "\n".join([f"# {suffix}", *lines, shlex.join(command.argv(cell)), ""])


def test_the_command_and_the_environment_of_a_rank():
    plain, asked = settings("nccl.collectives=[all_reduce, all_to_all, send_recv]"), settings(
        "nccl.nvls=false", "nccl.collnet=true", "nccl.gpudirect=true", "nccl.buffsize=8M", "nccl.algo=Tree",
        "nccl.proto=LL128", "nccl.net=IB", "nccl.hca==mlx5_0,mlx5_1", "nccl.qps_per_connection=4",
        "nccl.variables={NCCL_IB_TC: 106}", "nccl.dtype=bfloat16", "nccl.check=false", "nccl.max_bytes=1G",
    )  # fmt: skip
    dropped = {"NCCL_TESTS_MIN_BW": "100", "NCCL_TESTS_DEVICE": "3", "NCCL_TESTS_SPLIT": "MOD 2"}
    text = [
        shown("all_reduce", plain, {"LD_LIBRARY_PATH": "/usr/lib/mpi", **dropped}),
        shown("all_to_all", plain, {}),
        shown("send_recv", plain, {}),
        shown("all_reduce-node", plain, dropped),
        shown("all_reduce-rail0", plain, {}),
        shown("all_reduce-rail3", plain, {}),
        shown("all_reduce-rail2", plain, {"CUDA_VISIBLE_DEVICES": "8,9,10,11,12,13,14,15"}),
        shown("all_reduce", asked, {}),
    ]
    golden_files.check("nccl/commands.txt", "\n".join(text))


@pytest.mark.parametrize("gpus", range(1, 17))
def test_the_groups_are_nodes_or_rails_as_nccl_tests_computes_them(gpus):
    """A rank's colour by NCCL_TESTS_SPLIT, or by the mask, which is read first: common.cu of nccl-tests."""

    def colours(variables: dict[str, str]) -> list[int]:
        word, value = variables["NCCL_TESTS_SPLIT"].split()
        by_word = [rank // int(value) if word == "DIV" else rank % int(value) for rank in range(4 * gpus)]
        if "NCCL_TESTS_SPLIT_MASK" in variables:
            by_mask = [rank & int(variables["NCCL_TESTS_SPLIT_MASK"], 16) for rank in range(4 * gpus)]
            same = {(a, b) for a, b in zip(by_word, by_mask, strict=True)}
            assert len(same) == len(set(by_word)) == len(set(by_mask))
        return by_word

    assert colours(command.split("node", gpus)) == [rank // gpus for rank in range(4 * gpus)]
    assert colours(command.split("rail", gpus)) == [rank % gpus for rank in range(4 * gpus)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("min_bytes=8", "max_bytes=64"), [8, 16, 32, 64]), (("min_bytes=8", "max_bytes=100", "factor=4"), [8, 32])],
)
def test_sizes_are_those_that_nccl_tests_goes_through(given, expected):
    assert command.sizes(settings(*(f"nccl.{each}" for each in given))) == expected


# --- how it ended -----------------------------------------------------------------------------------------

HEADER = """#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
"""
ROWS = [
    "           8             2     float     sum      -1    17.49    0.00    0.00       0    16.41    0.00    0.00       0\n",
    "     1048576        262144     float     sum      -1   477.32    2.20    2.20      96   492.81    2.13    2.13      32\n",
]
WRONG = "# Out of bounds values : 4 FAILED\n# Avg bus bandwidth    : 4.79995\n"
RELAY = " .. node001 pid 662195: Test failure common.cu:1189\n"


def ended(
    status: int, text: str, said: str = "", log: str = "", printed: bool = True, driver: bool = True
) -> str | None:
    return rank.failure(status, nccl_tests.parse(text), nccl_log.parse(log), said, printed, driver)


def kind(reason: str | None) -> str | None:
    """The kind that the controller gives to a rank that ends with such a line."""
    (ending,) = lastwords.endings([f"rank 3: all_reduce_perf {reason}"])
    return kind_of([ending.text, *ending.also])


def test_wrong_values_were_measured_on_every_rank_and_are_no_failure():
    table = HEADER + "".join(ROWS)
    assert ended(7, table + WRONG + RELAY) is None
    assert ended(7, table) is None, "a torn footer does not hide them"
    assert ended(7, RELAY, printed=False) is None
    assert ended(1, "", printed=False) is None, "versions before 2.17 say nothing"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("all CUDA-capable devices are busy or unavailable", "in_use"),
        ("system not yet initialized", "fabric_not_ready"),
        ("CUDA driver version is insufficient for CUDA runtime version", "driver_too_old"),
        ("out of memory", "cuda_out_of_memory"),
        ("uncorrectable ECC error encountered", "gpu_failed"),
    ],
)
@pytest.mark.parametrize("printed", [True, False])
def test_a_rank_ends_with_the_words_of_cuda(said, expected, printed):
    text = f"node003: Test CUDA failure util.cu:674 '{said}'\n .. node003 pid 19987: Test failure common.cu:1454\n"
    reason = ended(2, text, printed=printed)
    assert reason == f"failed with status 2: node003: CUDA failure: {said}"
    assert kind(reason) == expected


def test_a_machine_without_a_driver_is_told_from_one_with_an_old_driver():
    """CUDA says the same of both."""
    text = "node003: Test CUDA failure util.cu:674 'CUDA driver version is insufficient for CUDA runtime version'\n"
    none = ended(2, text, printed=False, driver=False)
    assert none == (
        "failed with status 2: no NVIDIA driver is loaded here; node003: CUDA failure: CUDA driver version is "
        "insufficient for CUDA runtime version"
    )
    assert (kind(none), kind(ended(2, text, printed=False))) == ("gpu_unavailable", "driver_too_old")
    assert "no NVIDIA driver" not in ended(2, "node003: Test CUDA failure x.cu:1 'out of memory'\n", driver=False)


def test_ncclis_warning_tells_what_its_error_does_not():
    log = "node003:12:12 [0] transport/net_ib.cc:1 NCCL WARN NET/IB : Got completion from peer with status=12\n"
    text = "node003: Test NCCL failure common.cu:573 'unhandled system error (run with NCCL_DEBUG=INFO for details)'\n"
    reason = ended(3, text, log=log, printed=False)
    assert (
        "unhandled system error" in reason
        and reason.count("status=12") == 1
        and reason.endswith("NET/IB : Got completion from peer with status=12")
    )


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (-11, "", "was killed by SIGSEGV"),
        (-9, "", "was killed by SIGKILL"),
        (127, "x_perf: error while loading shared libraries: libmpi.so.40: cannot open", "libmpi.so.40"),
        (1, "[node003:1] *** An error occurred in MPI_Init", "An error occurred in MPI_Init"),
    ],
)
def test_what_is_no_failure_of_a_test_is_told_too(status, said, expected):
    reason = ended(status, "", said, printed=False)
    assert expected in reason and (kind(reason) == "rank_killed") is (status == -signal.SIGKILL)


def test_a_program_that_mpi_ends_has_lost_another():
    """Whoever fails says why; MPI ends the others, which have nothing to say."""
    assert (reason := ended(14, "", printed=False)) == "failed with status 14 without a word"
    assert kind(reason) == "lost_peers"
    assert kind(ended(14, HEADER + ROWS[0])) == "lost_peers"


def test_a_program_that_ends_well_without_a_row_has_measured_nothing():
    """As nccl-tests does for an option that it does not know, and for a hypercube of three."""
    assert ended(0, "invalid option '?'\nUSAGE: all_reduce_perf\n", "unrecognized option '-Q'") == (
        "ended without a measurement: unrecognized option '-Q'"
    )
    assert ended(0, "", printed=False) is None, "only rank 0 prints"
    nothing = "           0             0     float     sum      -1    10.00    0.00    0.00       0    10.00    0.00    0.00       0"
    assert ended(0, HEADER + nothing + "\n").startswith("sent nothing: every size is less than an element for each")
    assert ended(0, HEADER + nothing + "\n" + ROWS[0]) is None


@pytest.mark.skipif(not CAPTURED.exists(), reason=f"no captured outputs in {CAPTURED}")
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("fail-no-driver-2.19.6-mpirun-2ranks.txt", "CUDA driver version is insufficient for CUDA runtime version"),
        ("fail-system-not-yet-initialized-mpirun.txt", "system not yet initialized"),
        ("invalid-device-ordinal-nvls-warn.txt", "invalid device ordinal"),
    ],
)
def test_captured_failures_are_told_as_what_they_are(file, expected):
    assert expected in ended(2, (CAPTURED / file).read_text())


def test_rows_that_did_not_arrive_are_counted():
    params = settings("nccl.min_bytes=8", "nccl.max_bytes=32", "nccl.factor=2")
    whole = nccl_tests.parse(HEADER + ROWS[0])
    assert rank.lost(params, whole, shortened=False) == 2
    assert rank.lost(params, whole, shortened=True) == 0, "nccl-tests said that they do not fit"
    torn = nccl_tests.parse(HEADER + ROWS[0] + ROWS[1][:70] + "\n" + ROWS[0])
    assert rank.lost({**params, "max_bytes": 16}, torn, shortened=False) == 1


@pytest.mark.parametrize(("split", "groups", "fails"), [("rail", 4, False), ("rail", 1, True), ("node", 2, False)])
def test_groups_that_nccl_tests_did_not_make_are_a_failure(split, groups, fails):
    lines = [
        f"#  Rank {rank:2} Group {rank % groups:2} Pid {rank:6} on node001 device {rank % 4} [0000:1b:00] H200"
        for rank in range(8)
    ]
    output = nccl_tests.parse("\n".join(lines))
    reason = rank.unsplit({"split": split}, 2, 4, output)
    assert bool(reason) is fails and (not fails or "NCCL_TESTS_SPLIT" in reason)
    assert os.linesep not in (reason or "")


@pytest.mark.parametrize(
    ("collective", "row", "wrong"),
    [
        # sendrecv does not check what it does in place, hypercube has no operator.
        (
            "sendrecv",
            "        4096          1024     float     sum      -1     3.59    1.14    1.14       0     4.58    0.89    0.89"
            "    N/A",
            [0, None],
        ),
        (
            "hypercube",
            "        8192          1024     float              -1     5.90    0.69    0.69       0     6.40    0.64    0.64"
            "       0",
            [0, 0],
        ),
    ],
)
def test_the_rows_of_each_program_are_read(collective, row, wrong):
    ranks = "".join(
        f"#  Rank {number:2} Group  0 Pid {number:6} on node001 device {number:2} [0000:1b:00] H200\n"
        for number in (0, 1)
    )
    output = nccl_tests.parse(f"# Collective test starting: {collective}_perf\n{ranks}{HEADER}{row}\n")
    assert [one.wrong for one in output.measurements] == wrong and output.problems == ()
    cut = nccl_tests.parse(f"# Collective test starting: {collective}_perf\n{ranks}{HEADER}{row[:38]}{row[50:]}\n")
    assert cut.measurements == ()
