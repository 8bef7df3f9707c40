"""What nccl-tests and rccl-tests print, in every layout, torn, interleaved and labelled."""

from pathlib import Path

import pytest

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
    assert output.problems == ()
    assert output.out_of_bounds is (True if "wrong-values" in name else False if complete else None)


@real_output
@pytest.mark.parametrize("name", FAILED)
def test_a_captured_failure_is_told_and_has_no_rows(name):
    (output,) = nccl_tests.parse_all(captured(name))
    assert output.measurements == () and not output.complete
    problem = FAILED[name]
    assert output.problems == () if problem is None else output.problems[0].startswith(problem)
