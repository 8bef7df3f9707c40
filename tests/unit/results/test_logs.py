"""Log lines folded, and read from the end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.results.logs import Line, fold_lines, last_lines, parse_line, printable

CAPTURED = Path(__file__).resolve().parents[4] / "shared" / "captured" / "torch"
real_output = pytest.mark.skipif(not CAPTURED.is_dir(), reason="the captured outputs are not here")


def lines_of(texts):
    """One line per (second, host, text), as ranks say them."""
    return [Line(1e9 + second, text, "c", f"n{host}", f"rank{host}.stdout") for second, host, text in texts]


SAID = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from(["a", "b 1", "b 2", "x 1.5", "x 1.6"])))


@given(SAID)
def test_folding_loses_no_line_and_keeps_the_order_of_first_lines(texts):
    lines = lines_of(sorted(texts, key=lambda entry: entry[0]))
    groups = list(fold_lines(lines))
    told = sorted(
        (host, file, text) for g in groups for host, file, text in zip(g.hosts, g.files, g.texts, strict=True)
    )
    assert told == sorted((line.host, line.file, line.text) for line in lines)
    assert [g.moment for g in groups] == sorted(g.moment for g in groups)
    assert all(len(set(g.hosts)) == len(g.hosts) for g in groups)
    assert not any("x" in text for g in groups if len(set(g.texts)) > 1 for text in g.texts)


def test_what_rays_workers_say_is_folded_by_their_name_whichever_node_they_are_on():
    """All of it is in the output of the one rank that is Ray's job."""
    said = [
        "(WorkerDict pid=101) loading shard 0", "(WorkerDict pid=102) loading shard 1",
        "\x1b[36m(WorkerDict pid=77, ip=10.0.0.2)\x1b[0m loading shard 2", "(TaskRunner pid=9) loading shard 3",
        "(WorkerDict pid=101) loading shard 0", "plain", "(WorkerDict pid=101) step 1.5", "(WorkerDict pid=102) step 1.6",
    ]  # fmt: skip
    lines = [Line(1e9, printable(text), "ppo", "node001", "rank0.stdout") for text in said]
    assert [str(group).partition("rank0.stdout: ")[2] for group in fold_lines(lines)] == [
        "(WorkerDict ×3) loading shard [0-2]",
        "(TaskRunner pid=9) loading shard 3",
        "(WorkerDict pid=101) loading shard 0",
        "plain",
        "(WorkerDict pid=101) step 1.5",
        "(WorkerDict pid=102) step 1.6",
    ]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30)), st.integers(1, 5))
def test_any_bytes_are_read_from_the_end_in_whole_lines(texts, count):
    data = "".join(f"{text}\n" for text in texts).encode()
    lines, end = last_lines(io.BytesIO(data + b"torn"), count, lambda raw: parse_line(raw, ()))
    assert end == len(data)
    assert lines == [printable(text) for text in texts][-count:]


def test_a_long_log_is_read_from_its_end():
    """Blocks are joined where lines cross them, and what lies before is not read."""
    text = "".join(
        f"2026-01-02T{i // 3600 % 24:02d}:{i // 60 % 60:02d}:{i % 60:02d}Z {i} {'x' * 90}\n" for i in range(60_000)
    )

    class Counted(io.BytesIO):
        total = 0

        def read(self, size=-1):
            block = super().read(size)
            self.total += len(block)
            return block

    file = Counted(text.encode())
    lines, _ = last_lines(file, 3, lambda raw: parse_line(raw, ()))
    assert [line.split()[1] for line in lines] == ["59997", "59998", "59999"] and file.total < 3 << 20
    lines, _ = last_lines(file, 60_000, lambda raw: parse_line(raw, ()))
    assert [line.split()[1] for line in lines] == [str(i) for i in range(60_000)]


@real_output
@pytest.mark.parametrize(
    "name",
    ["h100x16-nccl-watchdog-allreduce-abort.txt", "megatron-deepspeed-2n-pdsh-prefix-then-killed.txt",
     "torch-all-reduce-bench-interleaved-ranks.txt", "bloom-cuda-unknown-error-default3.txt"],
)  # fmt: skip
def test_real_output_of_eight_nodes_folds_to_that_of_one(name):
    texts = (CAPTURED / name).read_text(errors="replace").splitlines()
    raws = [
        f"2026-01-02T03:04:01Z c node{n:03d} rank{n}.stderr: {text}".encode() for text in texts for n in range(1, 9)
    ]
    groups = list(fold_lines(parse_line(raw, ("c",)) for raw in raws))
    assert sum(len(g.hosts) for g in groups) == 8 * len(texts)
    assert all(str(g).startswith("03:04:01 c node[001-008] rank[1-8].stderr: ") for g in groups)
