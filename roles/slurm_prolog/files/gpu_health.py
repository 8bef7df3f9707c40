#!/usr/bin/python3 -IS
# Written by the Ansible role slurm_prolog; changes made here are lost.
"""Part: every GPU answers, without uncorrectable errors, without a row remapping to be done, without a fatal Xid.

Environment: GPUS (how many there must be), NVIDIA_SMI (its path), XID_WINDOW_S (older Xids are forgotten).
"""

import csv
import os
import re
import subprocess
import sys
import time

FIELDS = (
    "index",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
# What needs a reset or a reboot before the next job. Source: NVIDIA, "XID Errors", column of the immediate action.
FATAL_XIDS = {48, 54, 64, 79, 95, 109, 110, 119, 120, 136, 140, 143}
XID = re.compile(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)")


def judge(text, gpus):
    """What is wrong with the GPUs of `text`, the answer to --query-gpu=FIELDS; [] for nothing. N/A is not judged."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    rows = [row for row in rows if len(row) == len(FIELDS) and row[0].isdigit()]
    wrong = [] if len(rows) >= gpus else [f"{len(rows)} of {gpus} GPUs answer"]
    for index, uncorrected, pending, failure in rows:
        if uncorrected.isdigit() and int(uncorrected):
            wrong.append(f"GPU {index}: {uncorrected} uncorrectable ECC errors")
        if failure.lower() in ("yes", "1"):
            wrong.append(f"GPU {index}: row remapping failed")
        elif pending.lower() in ("yes", "1"):
            wrong.append(f"GPU {index}: row remapping pending, reset the GPU")
    return wrong


def fatal_xids(lines):
    """The fatal Xids of kernel messages, each (bus id, number) once, in order."""
    found = [(match.group(1), int(match.group(2))) for line in lines if (match := XID.search(line))]
    return list(dict.fromkeys(one for one in found if one[1] in FATAL_XIDS))


def recent(records, now_s, window_s):
    """Messages of /dev/kmsg's records (`priority,number,microseconds,…;text`) of the last `window_s`."""
    kept = []
    for record in records:
        head, _, text = record.partition(";")
        fields = head.split(",")
        if len(fields) >= 3 and fields[2].isdigit() and now_s - int(fields[2]) / 1e6 <= window_s:
            kept.append(text.split("\n")[0])
    return kept


def kernel_records():
    """All records of the kernel's ring buffer; none where it cannot be read."""
    records = []
    try:
        kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return records
    while True:
        try:
            records.append(os.read(kmsg, 8192).decode("utf-8", "replace"))
        except BrokenPipeError:
            continue  # overwritten while we read
        except OSError:
            return records


def main():
    argv = [os.environ["NVIDIA_SMI"], f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        print(f"{argv[0]}: {error.strerror}")
        return 2
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        lines = text.strip().splitlines()
        print(f"nvidia-smi ended with {done.returncode}" + (f": {lines[-1]}" if lines else ""))
        return 1
    wrong = judge(text, int(os.environ["GPUS"]))
    messages = recent(kernel_records(), time.monotonic(), float(os.environ["XID_WINDOW_S"]))
    wrong += [f"Xid {number} on {bus}" for bus, number in fatal_xids(messages)]
    print("; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
