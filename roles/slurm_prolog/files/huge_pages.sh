#!/bin/sh
# Written by the Ansible role slurm_prolog; changes made here are lost.
# Part: free memory in one piece, then HUGE_PAGES pages of 2 MiB. Environment: HUGE_PAGES, COMPACT (0 or 1), RUN_TEST.
vm=${VM:-/proc/sys/vm}
if [ "$RUN_TEST" = 0 ]; then
    if [ "$COMPACT" = 1 ]; then
        { echo 1 >"$vm/compact_memory"; } 2>/dev/null || { echo "$vm/compact_memory cannot be written"; exit 2; }
    fi
    if [ "$HUGE_PAGES" -gt 0 ] && [ "$(cat "$vm/nr_hugepages")" -lt "$HUGE_PAGES" ]; then
        { echo "$HUGE_PAGES" >"$vm/nr_hugepages"; } 2>/dev/null || { echo "$vm/nr_hugepages cannot be written"; exit 2; }
    fi
fi
reserved=$(cat "$vm/nr_hugepages")
echo "$reserved of $HUGE_PAGES huge pages are reserved"
# Before the first prolog there may be none yet, so a test does not judge them.
[ "$RUN_TEST" = 1 ] || [ "$reserved" -ge "$HUGE_PAGES" ] || exit 1
