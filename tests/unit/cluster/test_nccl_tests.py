"""What nccl-tests and rccl-tests print, in every layout, torn, interleaved and labelled."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cluster.tools import nccl_tests

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "nccl-tests"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")


def captured(name):
    return (CAPTURED / name).read_text(errors="replace")


# File: rows, smallest and largest size, best in place, ranks that are listed, whether its footer is there.
TABLES = {
    "1gpu-2n-mpirun-xtrace.txt": (24, 1024, 8 << 30, 31.88, 2, True),
    "a100x128-16n-all_reduce-slow-noroot.txt": (30, 4, 2 << 30, 45.44, 5, True),
    "a100x16-2n-all_reduce-float-error.txt": (30, 8, 4 << 30, 188.7, 0, True),
    "a100x16-2n-all_reduce-nccl2.12.txt": (6, 32 << 20, 1 << 30, 181.39, 16, True),
    "a100x16-2n-nccltests-2.17.9-newlayout.txt": (2, 1 << 30, 10 << 30, 191.22, 4, True),
    "a100x16-2n-roce-k8s-wait-lines.txt": (3, 1 << 30, 4 << 30, 190.09, 16, True),
    "a100x16-2n-roce-ssh-warnings.txt": (2, 1 << 30, 10 << 30, 180.08, 16, True),
    "a100x16-2n-srun-l-nccl-debug-info.txt": (29, 0, 2 << 30, 81.09, 16, True),
    "a100x8-1n-all_gather-oldcols.txt": (34, 0, 8 << 30, 230.07, 8, True),
    "a100x8-1n-all_reduce-nccl2.16.txt": (6, 32 << 20, 1 << 30, 231.7, 8, True),
    "a100x8-1n-all_reduce-oldcols-na-error.txt": (34, 0, 8 << 30, 235.03, 8, True),
    "a100x8-1n-reduce-oldcols-root.txt": (34, 0, 8 << 30, 231.28, 8, True),
    "a100x8-1n-reduce_scatter-oldcols.txt": (34, 0, 8 << 30, 231.25, 8, True),
    "b200x2-1n-all_gather-no-footer.txt": (8, 64 << 20, 8 << 30, 564.14, 2, False),
    "b200x2-2n-all_gather-gib.txt": (28, 0, 1 << 30, 45.14, 2, True),
    "gb200x144-2rack-all_reduce.txt": (6, 512 << 20, 16 << 30, 820.36, 1, True),
    "gb200x72-1rack-all_reduce-noname.txt": (5, 512 << 20, 8 << 30, 846.82, 1, True),
    "gh200x2-2n-wrong-values-FAILED-2.17.8.txt": (25, 8, 128 << 20, 22.8, 2, True),
    "h100x16-2n-mpi-tag-output-elided.txt": (7, 0, 2 << 30, 437.89, 0, True),
    "h100x16-2n-xe9680-mpi-help-inside-ranklist.txt": (32, 8, 16 << 30, 469.1, 16, True),
    "h100x64-8n-all_reduce-elided-header.txt": (5, 512 << 20, 8 << 30, 385.56, 0, True),
    "h100x8-1n-all_reduce-sidework-header.txt": (32, 8, 16 << 30, 479.99, 8, True),
    "h200-p5en-multinode-elided-nofirstheader.txt": (3, 8, 16 << 30, 369.42, 0, True),
    "h200x16-2n-all_gather-gib-reorder.txt": (24, 1024, 8 << 30, 268.59, 16, True),
    "v100x16-2n-roce-all_reduce-jitter.txt": (29, 8, 2 << 30, 22.9, 0, True),
}
# What ended without a row of its table, and the failure that it tells.
FAILED = {
    "b200x16-4n-all_gather-aligned.txt": None,  # only its rows were left out
    "b200x16-4n-all_gather-misaligned-slow.txt": None,
    "fail-no-driver-2.19.6-mpirun-2ranks.txt": "host: CUDA failure: CUDA driver version is insufficient",
    "fail-system-not-yet-initialized-mpirun.txt": "gpu: CUDA failure: system not yet initialized",
    "invalid-device-ordinal-nvls-warn.txt": "nccl-gib-test-4w-3: CUDA failure: invalid device ordinal",
    "mpirun-not-enough-slots.txt": "There are not enough slots available",
}


@real_output
def test_every_captured_output_is_known():
    assert {path.name for path in CAPTURED.glob("*.txt")} == TABLES.keys() | FAILED.keys()


@real_output
@pytest.mark.parametrize("name", TABLES)
def test_a_captured_table_is_read_whole(name):
    rows, smallest, largest, best, ranks, complete = TABLES[name]
    (output,) = nccl_tests.parse_all(captured(name))
    inside = [each for each in output.measurements if each.in_place]
    assert len(inside) * 2 == len(output.measurements) == rows * 2
    assert [each.size_bytes for each in inside] == [
        each.size_bytes for each in output.measurements if not each.in_place
    ]
    assert min(each.size_bytes for each in inside) == smallest
    assert max(each.size_bytes for each in inside) == largest
    assert max(each.busbw_gb_per_s for each in inside) == best
    assert len(output.devices) == ranks
    assert output.complete is complete
    assert output.problems == () and output.torn == 0
    assert output.out_of_bounds is (True if "wrong-values" in name else False if complete else None)


@real_output
@pytest.mark.parametrize("name", FAILED)
def test_a_captured_failure_is_told_and_has_no_rows(name):
    (output,) = nccl_tests.parse_all(captured(name))
    assert output.measurements == () and not output.complete
    problem = FAILED[name]
    assert output.problems == () if problem is None else output.problems[0].startswith(problem)


# Rows as the tests print them: printf's widths, times and bandwidths that agree with the size.
MESSAGES = (
    "node1:12:34 [0] NCCL INFO AllReduce: 8 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..0}\n",
    "node1:12:99 [3] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM\n",
    "\nnode1:12:34 [0] transport/net.cc:12 NCCL WARN Something is odd 1 2 3\n",
    "[2026-11-27 09:00:00] node1:12:34 [0] init.cc:12 NCCL WARN Something is odd\n",
)
PREAMBLE = (
    "# nThread 1 nGpus 1 minBytes 8 maxBytes 8589934592 step: 2(factor) warmup iters: 1 iters: 20 agg iters: 1 validation: 1 graph: 0\n"
    "#\n# Using devices\n"
    "#  Rank  0 Group  0 Pid   4711 on      node1 device  0 [0000:19:00] NVIDIA H100 80GB HBM3\n"
    "#  Rank  1 Group  0 Pid   4712 on      node2 device  0 [0000:19:00] NVIDIA H100 80GB HBM3\n"
    "node1:12:34 [0] NCCL INFO cudaDriverVersion 13000\nnode1:12:34 [0] NCCL INFO Connected all rings\n#\n"
)
FOOTER = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 31.337 \n#\n"


def header(*columns):
    return "#  size  count  type  " + "  ".join(columns) + "\n"


WIDE = header("redop", "root", *("time", "algbw", "busbw", "#wrong") * 2)


def body(size, time_us, wrong, width=6):
    """Half a row, and whether the tests would print the time so."""
    time = f"{time_us:7.2f}" if time_us < 100 else f"{time_us:7.1f}" if time_us < 10000 else f"{time_us:7.0f}"
    algbw = size / time_us / 1e3
    return f"  {time}  {algbw:6.2f}  {algbw * 1.0:6.2f}  {wrong:>{width}}"


def begin(size, dtype="float", redop="sum", root="-1"):
    element = nccl_tests.ELEMENT_BYTES[dtype]
    return f"{size:12d}  {size // element:12d}  {dtype:>8}  {redop:>6}  {root:>6}"


times = st.floats(1, 90000)
rows = st.tuples(
    st.integers(3, 33).map(lambda power: 1 << power), times, times, st.sampled_from(["0", "0", "96", "N/A"])
)


def table(drawn):
    return [
        begin(size) + body(size, out, wrong) + body(size, inside, wrong) + "\n" for size, out, inside, wrong in drawn
    ]


def sizes(output):
    return [each.size_bytes for each in output.measurements if each.in_place]


@given(st.lists(rows, min_size=1, max_size=8))
def test_every_row_that_is_printed_is_a_pair_of_measurements(drawn):
    output = nccl_tests.parse(PREAMBLE + WIDE + "".join(table(drawn)) + FOOTER)
    assert sizes(output) == [size for size, *_ in drawn]
    for (_, out, inside, wrong), first, second in zip(
        drawn, output.measurements[::2], output.measurements[1::2], strict=True
    ):
        assert first.time_us == pytest.approx(out, rel=0.01) and second.time_us == pytest.approx(inside, rel=0.01)
        assert first.wrong == second.wrong == (None if wrong == "N/A" else int(wrong))
    assert output.complete and output.problems == () and output.torn == 0 and output.average_busbw_gb_per_s == 31.337


@given(st.lists(rows, min_size=2, max_size=6), st.data())
def test_a_torn_row_is_no_measurement_and_the_others_remain(drawn, data):
    lines = table(drawn)
    whole = nccl_tests.parse(WIDE + "".join(lines)).measurements
    i = data.draw(st.integers(0, len(lines) - 1))
    line = lines[i].rstrip("\n")
    start = data.draw(st.integers(0, len(line) - 1))
    end = data.draw(st.integers(start + 1, len(line)))
    how = data.draw(st.sampled_from(["lost", "head", "tail", "other", "broken", "merged"]))
    torn = {
        "lost": line[:start] + line[end:],
        "head": line[end:],
        "tail": line[:start],
        "other": line[:start] + "Warning: something 12 " + line[start:],
        "broken": line[:start] + "\n" + line[start:],
        "merged": line[:start] + lines[i - 1].rstrip("\n"),
    }[how]
    output = nccl_tests.parse(WIDE + "".join(lines[:i]) + torn + "\n" + "".join(lines[i + 1 :]) + FOOTER)
    # A sign that is lost before the root leaves a row that is possible: nothing else of it may be wrong.
    assert {replace(each, root=None) for each in output.measurements} <= set(whole)
    rest = [each for j, each in enumerate(whole) if j // 2 != i]
    assert set(rest) <= set(output.measurements)


@given(st.lists(rows, min_size=1, max_size=6), st.data())
def test_messages_inside_a_row_do_not_lose_it(drawn, data):
    """NCCL writes its messages between the parts of a row: the row goes on behind them."""
    some = st.lists(st.sampled_from(MESSAGES), max_size=2).map("".join)
    text = PREAMBLE + WIDE
    for size, out, inside, wrong in drawn:
        parts = begin(size), body(size, out, wrong), body(size, inside, wrong)
        text += parts[0] + data.draw(some) + parts[1] + data.draw(some) + parts[2] + "\n"
    output = nccl_tests.parse(text + FOOTER)
    assert output.measurements == nccl_tests.parse(PREAMBLE + WIDE + "".join(table(drawn))).measurements
    assert output.problems == () and output.torn == 0


@given(st.lists(rows, min_size=1, max_size=6), st.data())
def test_tagged_pieces_of_several_ranks_are_put_together(drawn, data):
    text = PREAMBLE + WIDE + "".join(table(drawn)) + FOOTER
    tag, other = data.draw(
        st.sampled_from(
            [("[1,0]<stdout>:", "[1,7]<stderr>:"), ("[prterun-n-1@1,0]<stdout>: ", "[prterun-n-1@1,7]<stderr>: ")]
        )
    )
    mixed, at = "", 0
    while at < len(text):
        piece = text[at : at + data.draw(st.integers(10, 400))]
        at += len(piece)
        mixed += tag + piece[:-1].replace("\n", "\n" + tag) + piece[-1]
        mixed += data.draw(
            st.sampled_from(["", other + "node2:5:6 [0] NCCL INFO Connected all trees\n", other + "abc 1 2 3\n"])
        )
    assert nccl_tests.parse(mixed) == nccl_tests.parse(text)


@given(st.lists(rows, min_size=1, max_size=6), st.data())
def test_a_reader_gives_each_measurement_once_however_the_output_arrives(drawn, data):
    text = PREAMBLE + WIDE + "".join(table(drawn)) + FOOTER
    reader, given_out, at = nccl_tests.Reader(), [], 0
    while at < len(text):
        step = data.draw(st.integers(10, 400))
        given_out += reader.feed(text[at : at + step])
        at += step
    given_out += reader.close()
    (output,) = reader.outputs
    assert tuple(given_out) == output.measurements and output == nccl_tests.parse(text)


@given(st.text(max_size=200))
def test_nothing_raises_and_nothing_is_made_of_other_text(text):
    assert nccl_tests.parse(text).measurements == ()


@given(st.text("0123456789 .-+eN/Afloatsum#\n\r\t[],:<>stdout", max_size=400))
def test_nothing_raises_on_what_resembles_a_table(text):
    nccl_tests.parse(WIDE + text)


@pytest.mark.parametrize("prefix", [
    "2026-11-27T22:00:00.123456789Z ", "[pod/launcher-abc/mpi] ", "Nov 27 22:00:00 node1 nccl[123]: ", "node001: ",
    "launcher-1  | ", "[0] ", " 3: ", "[1,0]<stdout>:", "\x1b[32m", "[default0]:", "2026-11-27 22:00:00,123 INFO nccl: ",
    "Fri Nov 27 10:00:00 2026<stdout>:", "Fri Nov  6 10:00:00 2026[1,0]<stdout>:", "<Fri Nov 27 10:00:00 2026> ",
])  # fmt: skip
@pytest.mark.parametrize("change", ["", "stripped", "squeezed", "crlf", "nbsp"])
def test_labels_and_what_collectors_of_logs_do_to_lines(prefix, change):
    plain = PREAMBLE + WIDE + "".join(table([(8, 17.49, 16.41, "0"), (1 << 30, 2984.6, 2979.7, "0")])) + FOOTER
    lines = plain.splitlines()
    if change == "stripped":
        lines = [line.strip() for line in lines]
    elif change == "squeezed":
        lines = [" ".join(line.split()) for line in lines]
    elif change == "nbsp":
        lines = [line.replace(" ", "\u00a0") for line in lines]
    text = ("\r\n" if change == "crlf" else "\n").join(prefix + line for line in lines) + "\n"
    output = nccl_tests.parse(text)
    assert sizes(output) == [8, 1 << 30] and output.complete and len(output.devices) == 2


@pytest.mark.parametrize(
    "around", ['        "{}",', '{{"log":"{}\\n","stream":"stdout","time":"2026-11-27T22:00:00.1Z"}}']
)
def test_lines_that_were_made_strings_of_json(around):
    """As Ansible prints a list of lines, and as a container's log has them."""
    plain = PREAMBLE + WIDE + "".join(table([(8, 17.49, 16.41, "0"), (1 << 30, 2984.6, 2979.7, "0")])) + FOOTER
    text = "\n".join(around.format(json.dumps(line)[1:-1]) for line in plain.splitlines())
    output = nccl_tests.parse(text)
    assert sizes(output) == [8, 1 << 30] and output.complete and len(output.devices) == 2


def test_a_failure_behind_a_timestamp_has_its_hosts_name():
    line = "node7: Test CUDA failure common.cu:1370 'out of memory'"
    assert nccl_tests.parse(f"Fri Nov 27 10:00:00 2026<stderr>:{line}\n").problems == (
        "node7: CUDA failure: out of memory",
    )
    assert nccl_tests.parse("2026-11-27T10:00:00Z srun: error: node7: task 3: Killed\n").problems


@pytest.mark.parametrize(
    ("printed", "wrong"), [("96", 96), ("999999", 999999), ("1e+06", 10**6), ("1.34218e+08", 134218000), ("N/A", None)]
)
def test_the_number_of_wrong_values_however_large(printed, wrong):
    """%g prints six digits of it."""
    text = WIDE + begin(1 << 30) + body(1 << 30, 2984.6, printed) + body(1 << 30, 2979.7, printed) + "\n"
    assert [each.wrong for each in nccl_tests.parse(text).measurements] == [wrong, wrong]


def numbers(*values):
    return "  ".join(str(value) for value in values) + "\n"


HALF = (17.49, 0.46, 0.46)
PER_ITERATION = ("i_min", "i_max", "i_p99", "i_cv%")


@pytest.mark.parametrize("columns, cells, halves", [
    # per iteration (-I), with a timestamp (-S), of the CPU (-u)
    (("redop", "root", *("time", "algbw", "busbw", "#wrong", *PER_ITERATION) * 2),
     ("sum", -1, *(*HALF, 0, 15.1, 20.2, 19.9, 3.21) * 2), 2),
    (("redop", "root", *("time", "algbw", "busbw", "#wrong") * 2, "timestamp"),
     ("sum", -1, *(*HALF, 0) * 2, "2026-11-27 22:00:00"), 2),
    (("redop", "root", *("time", "algbw", "busbw", "#wrong", *PER_ITERATION) * 2, "timestamp"),
     ("sum", -1, *(*HALF, 0, 15.1, 20.2, 19.9, 3.21) * 2, "2026-11-27 22:00:00"), 2),
    (("redop", "root", *("cputime", "algbw", "busbw", "#wrong") * 2), ("sum", -1, *("91.20", "0.46", "0.46", 0) * 2), 2),
    # columns in another order, one more, and without root or redop
    (("redop", "root", *("time", "busbw", "algbw", "#wrong") * 2), ("sum", -1, *(*HALF, 0) * 2), 2),
    (("redop", "root", *("time", "algbw", "busbw", "sidebw", "#wrong") * 2), ("sum", -1, *(*HALF, "0.12", 0) * 2), 2),
    (("redop", *("time", "algbw", "busbw", "error") * 2), ("sum", *(*HALF, "5e-07") * 2), 2),
    (("root", *("time", "algbw", "busbw", "error") * 2), (0, *(*HALF, "0e+00*") * 2), 2),
    (tuple(("time", "algbw", "busbw", "error") * 2), (*HALF, "N/A", *HALF, "N/A"), 2),
])  # fmt: skip
def test_columns_are_read_by_their_header(columns, cells, halves):
    text = header(*columns) + numbers(8000, 2000, "float", *cells)
    measured = nccl_tests.parse(text).measurements
    assert [(each.algbw_gb_per_s, each.busbw_gb_per_s) for each in measured] == [(0.46, 0.46)] * halves
    assert [each.in_place for each in measured] == [False, True]
    assert {each.wrong for each in measured} == {0 if "#wrong" in columns else None}


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("columns, after", [
    (("redop", "time", "algbw", "busbw", "error"), "          89.00    0.00    0.00    N/A    85.13    0.00    0.00    N/A"),
    (("redop", "root", "time", "algbw", "busbw", "#wrong"), "              -1    89.00    0.00    0.00      0    85.13    0.00    0.00      0"),
])  # fmt: skip
def test_a_blank_column_of_redop(columns, after, squeezed):
    """As hypercube and old versions of alltoall leave it."""
    names = [name for name in columns if name in ("redop", "root")]
    row = "          32             1   float  " + after
    text = header(*names, *columns[len(names) :] * 2) + (" ".join(row.split()) if squeezed else row) + "\n"
    first, second = nccl_tests.parse(text).measurements
    assert (first.time_us, second.time_us, first.redop, first.size_bytes) == (89.0, 85.13, None, 32)


def test_a_table_of_one_half_says_which():
    """rccl-tests with out-of-place switched off has only the half in place."""
    text = "#              in-place          \n" + header("redop", "root", "time", "algbw", "busbw", "#wrong")
    (measured,) = nccl_tests.parse(text + numbers(8000, 2000, "float", "sum", -1, *HALF, 0)).measurements
    assert measured.in_place and measured.redop == "sum" and measured.root is None


def test_half_a_row_is_none_where_rows_have_two():
    assert nccl_tests.parse(WIDE + begin(8) + body(8, 17.49, "0") + "\n").measurements == ()
    assert nccl_tests.parse(begin(8) + body(8, 17.49, "0") + "\n").measurements == ()


def test_torn_rows_are_counted():
    lines = table([(8, 17.49, 16.41, "0"), (1 << 30, 2984.6, 2979.7, "0")])
    assert nccl_tests.parse(WIDE + lines[0][:40] + "\n" + lines[1]).torn == 1
    assert nccl_tests.parse(WIDE + lines[0] + lines[1]).torn == 0


@pytest.mark.parametrize("last, kept", [("0", True), ("N/A", True), ("96", False)])
def test_a_last_row_without_its_end_counts_only_if_nothing_can_follow(last, kept):
    text = WIDE + begin(8) + body(8, 17.49, last) + body(8, 16.41, last)
    assert bool(nccl_tests.parse(text).measurements) is kept


@pytest.mark.parametrize(
    "line", ["a." * 100000, "1 " * 100000, "1" * 200000, "-1" * 100000, "a:1:" * 50000, "[a.b-" * 40000]
)
def test_long_lines_take_no_longer_than_short_ones(line):
    started = time.process_time()
    assert nccl_tests.parse(line + "\n" + line).measurements == ()
    assert time.process_time() - started < 5


def test_numbers_that_disagree_are_no_measurement():
    """A lost digit that leaves the columns in place: bandwidth is size by time."""
    row = begin(1 << 30) + body(1 << 30, 2984.6, "0") + body(1 << 30, 2979.7, "0") + "\n"
    assert nccl_tests.parse(WIDE + row).measurements
    assert not nccl_tests.parse(WIDE + row.replace(" 2984.6", " 1984.6")).measurements
    assert not nccl_tests.parse(WIDE + row.replace("1073741824", "1073741820")).measurements


def test_a_last_digit_that_is_lost_is_seen_by_the_width_of_its_column():
    """Neither the number of wrong values nor a bandwidth says by itself that a digit of it is missing."""
    row = begin(1 << 30) + body(1 << 30, 2984.6, "96") + body(1 << 30, 2979.7, "96") + "\n"
    assert nccl_tests.parse(WIDE + row).measurements
    assert not nccl_tests.parse(WIDE + row.replace("96\n", "9\n")).measurements
    assert not nccl_tests.parse(WIDE + row.replace("359.76  359.76", "359.76   359.7")).measurements


def test_several_runs_in_one_file_are_told_apart():
    def run(collective, row):
        return (
            f"# nccl-tests version 2.19.6 nccl-headers=23007 nccl-library=23007\n# Collective test starting: {collective}_perf\n"
            + PREAMBLE
            + WIDE
            + row
            + FOOTER
        )

    first, second = table([(8, 17.49, 16.41, "0"), (1 << 30, 2984.6, 2979.7, "0")])
    text = run("all_reduce", first) + run("sendrecv", second)
    outputs = nccl_tests.parse_all(text)
    assert [(each.collective, sizes(each), each.nccl_version) for each in outputs] == [
        ("all_reduce", [8], "2.30.7"), ("sendrecv", [1 << 30], "2.30.7")
    ]  # fmt: skip
    together = nccl_tests.parse(text)
    assert together.collective is None and together.version == "2.19.6" and together.complete
    assert together.average_busbw_gb_per_s is None and sizes(together) == [8, 1 << 30]
    assert not nccl_tests.parse(text.removesuffix(FOOTER)).complete


def test_rccl_tests_are_read_as_well():
    text = (
        "# nThread 1 nGpus 8 minBytes 8 maxBytes 128 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0\n#\n"
        "rccl-tests: Version develop:abcdef0\n# Using devices\n"
        "#   Rank  0 Pid   4711 on      node1 device  0 [0002:00:00.0] AMD Instinct MI300X VF\n"
        "RCCL version : 2.27.7-develop:29e1567\nHIP version  : 7.0.51831\n" + WIDE + "".join(table([(8, 17.49, 16.41, "0")]))
        + "# Errors with asterisks indicate errors that have exceeded the maximum threshold.\n" + FOOTER
    )  # fmt: skip
    output = nccl_tests.parse(text)
    assert (output.version, output.nccl_version) == ("develop:abcdef0", "2.27.7-develop:29e1567")
    assert output.devices == (nccl_tests.Device(0, "node1", 0, "0002:00:00.0", "AMD Instinct MI300X VF", None, 4711),)
    assert sizes(output) == [8] and output.complete


def test_the_footers_average_is_only_kept():
    """A high average is not a result, and a missing one no failure: nothing but the rows is measured."""
    text = PREAMBLE + WIDE + FOOTER.replace("31.337", "999.9")
    output = nccl_tests.parse(text)
    assert output.average_busbw_gb_per_s == 999.9 and output.measurements == () and not output.complete
