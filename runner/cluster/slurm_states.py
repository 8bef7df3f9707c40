"""Which states of a node Slurm starts jobs in: one list for the planner, and for the roles' modules on nodes.

Standard library and Python 3.9 only: plugins/module_utils has a link to this file, by which Ansible takes it to nodes.
Source of the words and flags: sinfo(1), "NODE STATE CODES", in their long and short forms, and scontrol's
`State=IDLE+CLOUD+POWERED_DOWN`.
"""

from __future__ import annotations

import re

USABLE = "usable"  # jobs start there, now or when Slurm has woken, rebooted or emptied the node
RESERVED = "reserved"  # only jobs of its reservation start there
UNUSABLE = "unusable"  # no job starts there until somebody has repaired or resumed it
UNKNOWN = "unknown"  # a word that is not in this list

_WORDS = {
    USABLE: "idle allocated alloc mixed mix completing comp planned plnd blocked block cloud dynamic_norm reboot boot "
    "reboot_requested cancel_reboot canc_r resume resm undrain perfctrs npc",
    RESERVED: "maint maintenance reserved resv",
    UNUSABLE: "down drain drained draining drng fail failing failg error inval invalid_reg future futr dynamic_future "
    "unknown unk",
    # Slurm wakes, boots or reboots such a node for a job; that it does not answer meanwhile is no fault.
    "wakes": "powered_down powered_dn power_down power_up powering_down powring_dn powering_up pow_dn pow_up "
    "reboot_issued",
    "silent": "not_responding no_respond no_resp",
}
_MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words.split()}
_FLAGS = re.compile(
    r"[*~#!%$@^-]"
)  # one of them after a state in sinfo's columns, and after a base state ("DOWN*+DRAIN")


def read(text: str) -> tuple[str, str]:
    """(the state in lower-case words without flags, one of USABLE, RESERVED, UNUSABLE and UNKNOWN) of a state's text.

    Of several words, as in "IDLE+DRAIN", the worst counts; one that is not known says nothing beside one that is.
    """
    text = text.strip().lower()
    signs, plain = {*_FLAGS.findall(text)}, _FLAGS.sub("", text).strip("+")
    meanings = {_MEANING.get(word) for word in plain.split("+")}
    wakes = "wakes" in meanings or bool(signs & set("~#!%^"))
    silent = not wakes and ("*" in signs or "silent" in meanings)
    if silent or UNUSABLE in meanings:
        verdict = UNUSABLE
    elif "$" in signs or RESERVED in meanings:
        verdict = RESERVED
    else:
        verdict = USABLE if meanings & {USABLE, "wakes"} else UNKNOWN
    return plain + (", not answering" if silent and "silent" not in meanings else ""), verdict
