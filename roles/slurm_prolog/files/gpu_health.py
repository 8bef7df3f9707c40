#!/usr/bin/python3 -IS
# Written by the Ansible role slurm_prolog; changes made here are lost.
"""Part: every GPU answers, without uncorrectable errors, without a row remapping to be done, without a fatal Xid.

Environment: GPUS (how many there must be), NVIDIA_SMI (its path), XID_WINDOW_S (older Xids are forgotten).
"""

import csv
import os
import subprocess
import sys
import time

# xids.py is in the folder above the parts', where -I keeps Python from looking by itself.
HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.dont_write_bytecode = True
sys.path.insert(0, HOME)
try:
    import xids
except ImportError:
    xids = None

FIELDS = (
    "index",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)


def judge(text, gpus):
    """What is wrong with the GPUs of `text`, the answer to --query-gpu=FIELDS; [] for nothing. N/A is not judged."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    rows = [row for row in rows if len(row) == len(FIELDS) and row[0].isdigit()]
    wrong = [] if len(rows) >= gpus else [f"{len(rows)} of {gpus} {'GPU answers' if gpus == 1 else 'GPUs answer'}"]
    for index, uncorrected, pending, failure in rows:
        if uncorrected.isdigit() and int(uncorrected):
            wrong.append(f"GPU {index}: {uncorrected} uncorrectable ECC error{'' if uncorrected == '1' else 's'}")
        if failure.lower() in ("yes", "1"):
            wrong.append(f"GPU {index}: row remapping failed")
        elif pending.lower() in ("yes", "1"):
            wrong.append(f"GPU {index}: row remapping pending, reset the GPU")
    return wrong


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
    if xids is None:
        print(f"{HOME}/xids.py is missing: the role slurm_prolog installs it")
        return 2
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
    wrong += [f"{xid.name} on {xid.pci}" for xid in xids.serious("\n".join(messages))]
    print("; ".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
