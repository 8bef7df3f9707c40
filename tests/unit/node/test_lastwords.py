"""What ended a process, out of all that it wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.node import output
from runner.node.lastwords import Form, endings, evidence, keep

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured"


def said(text: str) -> list[str]:
    return [ending.said for ending in endings(text.splitlines())]


TRACE = """Traceback (most recent call last):
  File "/env/train.py", line 9, in <module>
    main()
{}"""
HANDLING = "\nDuring handling of the above exception, another exception occurred:\n"
DIRECT = "\nThe above exception was the direct cause of the following exception:\n"
FRAMES = "\n".join(f"frame #{n}: c10::f(int) + 0x42 (0x7f6c80e858f9 in /env/torch/lib/libc10.so)" for n in range(24))
ABORT = (
    "terminate called after throwing an instance of 'c10::Error'\n  what():  {}\n"
    "CUDA kernel errors might be asynchronously reported at some other API call\n"
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1.\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n\n"
    "Exception raised from f at ../c10/cuda/CUDAException.cpp:44 (most recent call first):\n" + FRAMES
)

ENDS = [
    pytest.param(TRACE.format("ValueError: bad"), "ValueError: bad", id="traceback"),
    pytest.param(TRACE.format("ValueError: bad\n  and more\nof it"), "ValueError: bad", id="of several lines"),
    pytest.param(TRACE.format("AssertionError"), "AssertionError", id="without a message"),
    pytest.param(TRACE.format("ImportError: \nflash_attn is needed"), "ImportError: flash_attn is needed", id="empty"),
    pytest.param(
        TRACE.format("KeyError: 1") + "\n" + HANDLING + TRACE.format("ValueError: bad"), "ValueError: bad", id="chain"
    ),
    pytest.param(
        TRACE.format("KeyError: 1") + "\n" + DIRECT + "\n" + TRACE.format("OSError: bad"), "OSError: bad", id="cause"
    ),
    pytest.param(
        TRACE.format("OSError: bad") + "\nException ignored in: <_io>\n" + TRACE.format("BrokenPipeError: gone"),
        "OSError: bad",
        id="before an ignored one",
    ),
    pytest.param(
        "Exception in thread Thread-1 (run):\n" + TRACE.format("EOFError") + "\n" + TRACE.format("ValueError: bad"),
        "ValueError: bad",
        id="not of a thread",
    ),
    pytest.param(
        TRACE.format("ValueError: bad")
        + "\nError in atexit._run_exitfuncs:\n"
        + TRACE.format("KeyError: 2")
        + "\n"
        + HANDLING
        + TRACE.format("KeyError: 3"),
        "ValueError: bad",
        id="not at exit, nor what that led to",
    ),
    pytest.param(
        TRACE.format("RuntimeError: Caught X in DataLoader worker process 0.\nOriginal ") + TRACE.format("OSError: bad"),
        "OSError: bad",
        id="of a data loader's worker",
    ),
    pytest.param("\n".join(f"[rank3]: {x}" for x in TRACE.format("ValueError: bad").splitlines()), "ValueError: bad", id="tag"),
    pytest.param("\n".join(f"[default3]:{x}" for x in TRACE.format("ValueError: bad").splitlines()), "ValueError: bad", id="tee"),
    pytest.param("\n".join(f"node-7: {x}" for x in TRACE.format("ValueError: bad").splitlines()), "ValueError: bad", id="pdsh"),
    pytest.param("\n".join(f" 7: {x}" for x in TRACE.format("ValueError: bad").splitlines()), "ValueError: bad", id="srun -l"),
    pytest.param(
        "\n".join(f"ERROR 03-02 19:49:00 [executor.py:783] {x}" for x in TRACE.format("ValueError: bad").splitlines()),
        "ValueError: bad",
        id="logged",
    ),
    pytest.param(
        "  + Exception Group Traceback (most recent call last):\n  |   File 'x', line 1\n  | ExceptionGroup: two (1 sub-exception)\n"
        "  +-+---------------- 1 ----------------\n    | Traceback (most recent call last):\n    | ValueError: bad\n    +---",
        "ValueError: bad",
        id="group",
    ),
    pytest.param(ABORT.format("CUDA error: uncorrectable ECC error encountered"), "CUDA error: uncorrectable ECC error encountered", id="what"),
    pytest.param(TRACE.format("ValueError: bad") + "\n" + ABORT.format("CUDA error: driver shutting down"), "ValueError: bad", id="teardown"),
    pytest.param(
        "WARNING could not import:\n" + TRACE.format("ModuleNotFoundError: No module named 'triton'")
        + "\n  5%|▌     | 5/100 [00:05<01:40,  1.05s/it]\n" + ABORT.format("CUDA error: bad"),
        "CUDA error: bad",
        id="the process lived on after a traceback",
    ),
    pytest.param("terminate called without an active exception", "terminate called without an active exception", id="terminate"),
    pytest.param("libc++abi: terminating due to uncaught exception of type X: bad", "libc++abi: terminating due to uncaught exception of type X: bad", id="libc++"),
    pytest.param("python: f.cc:12: int f(): Assertion `x' failed.", "python: f.cc:12: int f(): Assertion `x' failed.", id="assert"),
    pytest.param("double free or corruption (!prev)\n[W1 x] y", "double free or corruption (!prev)", id="glibc"),
    pytest.param(
        'Fatal Python error: Segmentation fault\n\nCurrent thread 0x00007f (most recent call first):\n  File "/a.py", line 3 in f\n'
        "Extension modules: numpy, torch (total: 300)",
        "Fatal Python error: Segmentation fault",
        id="faulthandler",
    ),
    pytest.param("[E1121 04:58:56.5 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught it", "[Rank 1] Watchdog caught it", id="c10"),
    pytest.param(TRACE.format("KeyboardInterrupt") + "\n[E1 x.cpp:1] bad", "bad", id="stopped by another"),
    pytest.param("run.sh: line 53:  5954 Bus error               (core dumped) python x.py", "run.sh: line 53:  5954 Bus error               (core dumped) python x.py", id="shell"),
    pytest.param("Retrying in 4s [Retry 3/5].\nrank 0: cannot read weights: bad\nsecond line", "cannot read weights: bad", id="own"),
    pytest.param(
        "rank 0: bad\n" + TRACE.format("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "=" * 60),
        "bad",
        id="torchrun's own traceback",
    ),
    pytest.param(
        "\n".join(f"[2026-04-07 14:53:04] [rank1]: {x}" for x in TRACE.format("ValueError: bad").splitlines()),
        "ValueError: bad",
        id="stamps",
    ),
    pytest.param("\x1b[31mValueError: bad\x1b[0m", "ValueError: bad", id="colours"),
    pytest.param("one\ntwo", "two", id="no exception at all"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "end"), ENDS)
def test_the_end_of_a_process_is_found(text, end):
    assert said(text) == [end]


@pytest.mark.parametrize(("text", "end"), ENDS)
def test_what_is_kept_tells_the_same(text, end):
    noise = ["[W1121 socket.cpp:697] failed: Connection refused", "x.py:3: UserWarning: No module named 'a'"] * 300
    kept = keep([*noise, *text.splitlines(), *FRAMES.splitlines()])
    assert [ending.said for ending in endings(kept)] == [end]
    assert len(kept) < 60 and not any(line.startswith("frame #") for line in kept)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "[W1121 x.cpp:1] y",
        FRAMES,
        "srun: error: n1: task 3: Exited with exit code 1",
        "object repr     : KeyboardInterrupt()\nlost sys.stderr",
    ],
)
def test_noise_ends_nothing(text):
    assert said(text) == []


def test_a_direct_cause_explains_and_a_handled_exception_does_not():
    cause = TRACE.format("OSError: no space")
    (ending,) = endings((cause + "\n" + DIRECT + "\n" + TRACE.format("RuntimeError: bad")).splitlines())
    assert ending.also == ("OSError: no space",)
    (ending,) = endings((cause + "\n" + HANDLING + "\n" + TRACE.format("RuntimeError: bad")).splitlines())
    assert ending.also == ()


def test_what_nccl_warned_of_explains_its_exception_and_no_other():
    warned = "n1:48:66 [1] include/socket.h:403 NCCL WARN Connect to 10.0.0.2<56821> failed : Connection refused"
    (ending,) = endings(
        [warned, *TRACE.format("RuntimeError: NCCL error in: x.cpp:825, unhandled system error").splitlines()]
    )
    assert "Connect to 10.0.0.2" in ending.also[0]
    (ending,) = endings([warned, *TRACE.format("ValueError: bad").splitlines()])
    assert ending.also == ()


def test_nccls_last_error_is_told_with_its_exception():
    text = "RuntimeError: NCCL error in: x.cpp:1, unhandled\nncclSystemError: System call\nLast error:\nError: failed to open"
    assert said(text) == ["RuntimeError: NCCL error in: x.cpp:1, unhandled: Error: failed to open"]


def test_each_of_several_writers_has_its_own_end():
    lines = [f"[rank{n}]: {line}" for line in TRACE.format("{}").splitlines() for n in (0, 1)]
    lines[-2:] = ["[rank0]: ValueError: bad", "[rank1]: KeyError: 'worse'"]
    assert said("\n".join(lines)) == ["ValueError: bad", "KeyError: 'worse'"]


def test_what_people_see_ends_with_what_ended_the_process():
    lines = [*TRACE.format("ValueError: bad").splitlines(), "", *FRAMES.splitlines()]
    assert evidence(lines, endings(lines)[0]) == TRACE.format("ValueError: bad").splitlines()
    assert evidence(["a", "", "b"], None) == ["a", "b"]


def test_the_end_of_a_large_file_is_enough(tmp_path):
    path = tmp_path / "rank0.stderr"
    path.write_text("x" * 100 + "\n" + "noise\n" * 400_000 + TRACE.format("ValueError: bad") + "\n")
    assert [e.said for e in endings(output.last_lines(path))] == ["ValueError: bad"]
    assert output.last_lines(tmp_path / "none") == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", [*" \t-=.,:;^#|/_~0aE[]({'\"", "[0] ", "- ", "0:", "a.", "E ", "--- "])
def test_a_line_of_one_thing_over_and_over_takes_no_time(unit):
    """As the carets below a call in a traceback: an expression that may divide it in many ways would try them all."""
    line = 400 * unit
    for lines in (
        [line],
        [line + "!"],
        ["Error: x", line + "^"],
        ["Traceback (most recent call last):", line + "x", "A: b"],
    ):
        assert isinstance(keep(lines), list)


def test_what_nccl_warned_of_on_stdout_explains_a_ranks_exception(tmp_path):
    out, err = tmp_path / "rank0.stdout", tmp_path / "rank0.stderr"
    out.write_text(
        "step 1\nn1:48:66 [1] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-a to 9637892 bytes\n"
    )
    err.write_text(TRACE.format("RuntimeError: NCCL error in: x.cpp:825, unhandled system error, NCCL version 2.7.8"))
    (ending,) = endings(output.last_lines(err, out))
    assert ending.said.startswith("RuntimeError: NCCL") and "failed to extend /dev/shm" in ending.also[0]
    err.write_text("")
    assert "failed to extend" in endings(output.last_lines(err, out))[0].said


@given(st.lists(st.sampled_from([line for p in ENDS for line in p.values[0].splitlines()] + [""]), max_size=60))
def test_anything_may_be_written_in_any_order(lines):
    kept = keep(lines)
    assert len(endings(kept)) <= len(lines) and len(kept) <= 2 * len(lines)
    assert all(ending.said and ending.form in Form for ending in endings(lines))


CAPTURES = {
    "torch/bloom-cuda-unknown-error-default3.txt": "CUDA error: unknown error",
    "torch/ecc-uncorrectable-traceback.txt": "uncorrectable ECC error encountered",
    "torch/dataloader-bus-error-shm.txt": "workers are out of shared memory",
    "torch/h100x16-nccl-watchdog-allreduce-abort.txt": "CUDA error: unspecified launch failure",
    "torch/nccl-connect-refused-socket.txt": "unhandled system error",
    "nccl-tests/fail-no-driver-2.19.6-mpirun-2ranks.txt": "CUDA driver version is insufficient",
    "nccl-tests/fail-system-not-yet-initialized-mpirun.txt": "system not yet initialized",
}


@pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")
@pytest.mark.parametrize("name", CAPTURES)
def test_real_output_is_understood(name):
    lines = (CAPTURED / name).read_text(errors="replace").splitlines()
    assert CAPTURES[name] in "\n".join(ending.text for ending in endings(lines))
    assert {e.said for e in endings(keep(lines))} == {e.said for e in endings(lines)}


def test_an_exception_that_refers_to_what_was_told_before_it_is_explained_by_that():
    lines = [
        "(EngineCore_DP0 pid=7) ValueError: No available memory for the cache blocks.",
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in <module>',
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ]
    (ending,) = endings(lines)
    assert ending.said.startswith("RuntimeError: Engine core") and "No available memory" in ending.also[0]
    lines[-1] = "RuntimeError: something else"
    assert endings(lines)[0].also == ()
