"""What ended a process, out of all that it wrote: its exception, its abort, or what ended it from outside. Pure.

The last line is seldom the one: C++ prints a stack below its message, CUDA three lines of advice, torchrun a table,
the interpreter whatever it could not clean up. A word in the lines before is not the one either: libraries warn, and
report what they have handled. So the lines are read as what they are: tracebacks, aborts, messages of the loader and
of shells, log lines, and noise; of these, one ended the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache

from runner.results.logs import printable

LAST_LINES = 20  # for people: of what was said last
_WIDTH = 1000  # characters of a line that are kept: a list of loaded extensions has many times that
_FRAMES = 4  # lines of a traceback that are kept above its exception
_MESSAGE = 24  # lines of one message
_ROWS = 256  # lines of tables of ranks and nodes
_WARNINGS = 8  # of NCCL on a rank's stdout
_CAUSES = 4  # exceptions that led to another


class Form(IntEnum):
    """The forms in which the end of a process is told; of those that a process left, the smallest is its end."""

    RAISED = 1  # a traceback, or the one line of a rank that ends itself with a message
    ABORTED = 2  # the uncaught exception of C++, or a failed assertion
    REFUSED = 3  # the dynamic loader, a shell or an interpreter could not start it; the kernel or Slurm ended it
    BARE = 4  # an exception whose traceback is missing
    LOGGED = 5  # a line of an error log
    SIGNALLED = 6  # a signal, without any message
    STOPPED = 7  # an exception that another process caused by a signal
    ASIDE = 8  # an exception that need not end the process: of a thread or a child
    LAUNCHER = 9  # a launcher, about the ranks that it started
    PLAIN = 10  # the last line that is none of these, and not noise
    IGNORED = 11  # an exception of a destructor, or at the interpreter's exit


@dataclass(frozen=True)
class Ending:
    """What ended a process: `said` in one line, `text` its whole message.

    `also` explains it, the nearest first: the exceptions that directly caused it, the abort that it led to, the log
    lines that explain it, and what was told before it where it refers to that. `last` is the index of its last line,
    `writer` who wrote it, where several did.
    """

    form: Form
    said: str
    text: str
    also: tuple[str, ...] = ()
    last: int = 0
    writer: str = ""

    @property
    def fatal(self) -> bool:
        """Whether this ends a process, by its form; else it is only the last that is known."""
        return self.form <= Form.BARE or self.form == Form.SIGNALLED


def endings(lines: Sequence[str]) -> list[Ending]:
    """What ended the process that wrote `lines`; one for each where several wrote them, each with its prefix.

    Empty where nothing but noise was written.
    """
    found = [(writer, _chosen(_blocks(stream))) for writer, stream in _streams(lines).items()]
    return sorted((replace(each, writer=writer) for writer, each in found if each), key=lambda each: each.last)


def keep(lines: Sequence[str]) -> list[str]:
    """The few of `lines` that tell what ended the process: `endings` of them is the same. For transfer.

    An empty line stands for noise that was left out.
    """
    wanted = set([index for index, line in enumerate(lines) if _TABLES.search(line) or _STARTS.search(line)][-_ROWS:])
    for stream in _streams(lines).values():
        blocks = _blocks(stream)
        ending = _chosen(blocks)
        texts = {ending.text, *ending.also} if ending else set()
        said = [index for index, text in stream if text.strip() and not _NOISE.search(text)]
        start = said[-LAST_LINES] if len(said) > LAST_LINES else 0
        wanted.update(index for index in said if index >= start)
        told = [block for block in blocks if block.text in texts or block.last >= start]
        for block in told:  # which grows: what an exception came after tells what it is
            if block.after and block.after not in told:
                told.append(block.after)
            wanted -= set(range(block.first, block.message))
            wanted.update(block.worth())
    kept: list[str] = []
    before = -1
    for index in sorted(wanted):
        if index > before + 1 and kept and kept[-1] and not _in_traceback(lines[index]):
            kept.append("")
        kept.append(printable(lines[index])[:_WIDTH])
        before = index
    return kept


def warnings(lines: Sequence[str]) -> list[str]:
    """The last few of `lines` in which NCCL warns."""
    return [line for line in lines if _NCCL_WARNS.search(line)][-_WARNINGS:]


def evidence(lines: Sequence[str], ending: Ending | None) -> list[str]:
    """The last LAST_LINES of `lines` up to the end of `ending`, for people; without empty lines."""
    upto = lines[: ending.last + 1] if ending else lines
    return [line for line in upto if line.strip()][-LAST_LINES:]


# --- lines ----------------------------------------------------------------------------------------

# Who wrote a line: torch's and torchrun's prefixes, those of mpirun --tag-output and of Ray.
_TAG = re.compile(
    r"\s*(?:(?:\[(?:rank|Rank |default|trainer|worker)\s*\d+\]|\[\d+,\d+\]<std(?:err|out)>|\(\w+ pid=\d+[^)]*\)):? ?)+"
)
# When it was written: Slurm's, Kubernetes' and loggers' stamps.
_STAMP = re.compile(r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.,]*(?:Z|[+-]\d\d:?\d\d)?\]?:? +")
# The writers of srun --label and pdsh: only if nearly every line has one.
_LABEL = re.compile(r"\s*([\w.-]*\d[\w.-]*): ?")

_Line = tuple[int, str]  # its index, and its text without the writer's prefix


def _streams(lines: Sequence[str]) -> dict[str, list[_Line]]:
    """The lines by writer."""
    texts = [printable(line[-65536:])[: 4 * _WIDTH] for line in lines]
    labels = [_LABEL.match(text) for text in texts if text.strip()]
    labelled = [label[1] for label in labels if label]
    by_label = len(labels) > 2 and len(labelled) > 0.9 * len(labels) and len(set(labelled)) <= len(labelled) / 2
    streams: dict[str, list[_Line]] = {}
    for index, text in enumerate(texts):
        writer = ""
        if by_label and (label := _LABEL.match(text)):
            writer, text = label[1], text[label.end() :]
        if stamp := _STAMP.match(text):
            text = text[stamp.end() :]
        if tag := _TAG.match(text):
            writer, text = writer + tag[0].strip(" :"), text[tag.end() :]
        streams.setdefault(writer, []).append((index, text))
    if len(streams.keys() - {""}) < 2 and not by_label:  # torch marks some of the lines of one process
        return {"": sorted(line for stream in streams.values() for line in stream)}
    return streams


_HEADER = re.compile(r"(?P<lead>.*?)(?:Exception Group |Original )?Traceback \(most recent call last\):\s*$")
_DIRECT = "The above exception was the direct cause of the following exception"
_HANDLING = "During handling of the above exception, another exception occurred"
_EXCEPTION = re.compile(r"(?P<name>(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*)(?::(?: |$)|$)")
# An exception's line without a traceback above it is known by its name alone.
_NAMED = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Failure|Timeout)(?:: |:?$)"
    r"|^(?:[a-z_]\w*\.)+(?:[A-Z]\w*|\w*error): "
)
_ASIDES = {
    Form.IGNORED: re.compile(
        r"Exception ignored (?:in|on|while)|Error in atexit|Error in sys\.excepthook|--- Logging error"
    ),
    Form.ASIDE: re.compile(
        r"Exception in thread |^Process \S+:$|exception was never retrieved|Exception in callback|Error caught was"
    ),
}
_FROM_OUTSIDE = re.compile(r"(?:[\w.]+\.)?(?:KeyboardInterrupt|SystemExit|SignalException)\b")
_OF_LAUNCHERS = re.compile(r"(?:[\w.]+\.)?(?:ChildFailedError|ProcessExitedException|CalledProcessError)\b")

_HELP = (  # of CUDA and c10, below the message of an exception
    r"^CUDA kernel errors might be asynchronously reported|^For debugging consider passing CUDA_LAUNCH_BLOCKING"
    r"|^Compile with .?TORCH_USE_CUDA_DSA|^Device-side assertion tracking|^Search for .?cuda\w*' in https?:"
)
_STACK = (
    r"^\s*frame #\d+:|^Exception raised from |^C\+\+ CapturedTraceback:|^\s*#\d+ .* (?:from|at) "
    r"|^<omitting python frames>|^(?:Current t|T)hread 0x|^Stack \(most recent call first\)|most recent call first\)?:$"
    r'|^  File ".*", line \d+ in |^\s+Binary file "|^Extension modules:|^  <no Python frame>|^\[bt\]'
    r"|^object (?:address|re\w+|type|type name)\s*: |^lost sys\.stderr$"
)
_WARNING = (
    r"^\[?[WI]\d{4} |^\[[WI]\b|^\[[WI]\d|\w*Warning: |^\s*warnings\.warn\(|^\s*warning_cache\.warn\(|\bWARNING\b"
    r"|leaked \w+ objects to clean up|\bNCCL INFO\b|^NCCL version |^\*\*\*\*\*+$"
)
# The tables of ranks that failed: torchrun's and mpirun's. No end of the launcher, but kept for whoever reads them.
_TABLE = (
    r"^Failures:$|^Root Cause \(first observed failure\):|^\s+(?:rank|exitcode)\s+:"
    r"|\bnoticed that process rank \d|^(?:exited on )?signal \d+ \(|\bThe first process to do so was:$"
    r"|^\s+(?:Process name|Exit code): "
)
# Those of srun and pdsh are kept as well, and may be all that is known of an end.
_TABLES = re.compile(_TABLE + r"|^srun: error: \S+: tasks? [\d,-]+: |^pdsh@\S+: \S+: ssh exited with")
_OF_OTHERS = (  # launchers about the processes that they started
    _TABLE + r"|^[=─-]{5,}$|^\s*<(?:N/A|NO_OTHER_FAILURES)>$|^\[\d+\]:$"
    r"|^\s+(?:time|host|error_file|traceback)\s+:|^\S+ FAILED$|closing signal SIG"
    r"|^(?:[EWI]\d{4} |[A-Z]+:).*distributed[./]elastic|^torch\.distributed\.elastic\S*: \["
    r"|^srun: (?:error: )?(?:.*Exited with exit code|.*: (?:Killed|Terminated|Aborted))"
    r"|^srun: (?:error: )?(?:Job step aborted|Terminating|[Ff]orcing|got SIG|Force)"
    r"|^slurmstepd: error: \*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ \*\*\*"
    r"|Killing subprocess \d+|sigkill_handler|Main process received SIG"
    r"|^(?:mpi|orte|prte)run (?:detected|noticed) that"
    r"|^(?:Primary job|a non-zero exit code|(?:thus causing )?the job to be terminated)"
)
_ALIVE = r"\d+%\|.*\||\bit/s\b|s/it\b|\bINFO\b|\b(?:step|iteration|iter|epoch)\b[ =:/]*\d+"
_NOISE = re.compile("|".join((_HELP, _STACK, _WARNING, _OF_OTHERS, r"^Fatal Python error: Aborted")))
_HELPS, _LIVES = re.compile(_HELP), re.compile(_ALIVE, re.IGNORECASE)

# Why a launcher could not start ranks on a node, and which: mpirun writes paragraphs of advice below it.
_STARTS = re.compile(
    r"^ssh: |^Host key verification failed|Permission denied \([\w,-]*\)|^(?:kex|ssh)_exchange_identification: "
    r"|^Connection (?:closed|reset) by |host key is known for |unable to (?:reliably )?start one or more daemons"
    r"|mismatch in versions between|unable to (?:launch|find) the specified|^There are not enough slots"
    r"|lost communication with a remote daemon"
    r"|^\s*(?:target node|Peer host|(?:Local|Peer) \S+(?: MPI)? version|Executable|Node|Remote daemon)\s*:"
)

_WHAT = re.compile(r"^\s*what\(\):\s*(.*)")
_ABORTS = re.compile(
    r"^terminate called |^libc\+\+abi: terminating |^F\d{4} [\d:.]+ +\d+ [^\]]+\] |^\[F[\d ][^\]]*\] "
    r"|: Assertion .*failed"
    r"|^(?:free|malloc|realloc|munmap_chunk)\(\): |^double free or corruption|^corrupted (?:size|double)"
    r"|^\*\*\* stack smashing|^Fatal Python error: (?!Aborted|Seg|Bus|Illegal|Floating)"
)
_SIGNALS = re.compile(
    r"^Fatal Python error: |\bCaught signal \d+|^\[\S+\] Signal: |Segfault encountered"
    r"|(?:^|: line \d+: +\d+ )(?:Segmentation fault|Bus error|Illegal instruction|Killed|Aborted)\b"
)
_REFUSALS = re.compile(
    r"error while loading shared libraries: |symbol lookup error: |version [`'‘]?(?:GLIBC|CXXABI)\S* not found"
    r"|^(?:\S*/)?(?:(?:ba|da|z|k)?sh|env|exec|nohup|timeout|setsid|numactl|taskset|python[\d.]*|torchrun|mpirun|orted|prted)"
    r": .|^srun: error: |^slurmstepd: error: |\bTest (?:CUDA|NCCL) failure\b|^CUDA error at |^OCI runtime |^docker: "
    r"|^nvidia-container-cli: |^NVIDIA-SMI has failed|^Unable to determine the device handle"
    r"|Out of memory: Kill|oom-kill:|\bNVRM: |nvidia-nvswitch\d+: SXid"
)
_LOGGED = re.compile(
    r"^\[[EF][\d ][^\]]*\] ?|^[EF]\d{4} [^\]]*\] ?|^(?:\[[^\]]*\]|[\d:,. -])*\[?(?:ERROR|CRITICAL|FATAL)\b\]?:? ?"
    r"|^.*\bNCCL WARN |^Error: "
)
_NCCL_WARNS = re.compile(r"\bNCCL WARN ")
# What an exception mentions, and the log lines that explain it: NCCL's warnings, and how a data loader lost a worker.
_EXPLAINED = (
    (re.compile("nccl", re.IGNORECASE), _NCCL_WARNS),
    (re.compile("DataLoader worker"), re.compile(r"\bworker\b")),
)
# vLLM's, of an engine in another process, which has told its exception before.
_ABOVE = re.compile(r"\bSee root cause above\b")
_OWN = re.compile(r"^rank \d+: ")  # of a rank that ends itself: runner.workloads


def _in_traceback(line: str) -> bool:
    return bool(_HEADER.match(line)) or line.startswith((" ", "\t"))


def _ends_message(text: str) -> bool:
    """Whether a message ends before this line."""
    return any(
        found.search(text)
        for found in (
            _NOISE,
            _HEADER,
            _WHAT,
            _ABORTS,
            _SIGNALS,
            _REFUSALS,
            _LOGGED,
            _LIVES,
            _OWN,
            _NAMED,
            *_ASIDES.values(),
        )
    ) or any(words in text for words in (_DIRECT, _HANDLING))


# --- what was written, as what it is --------------------------------------------------------------


@dataclass
class _Block:
    """One thing that was said: lines `first` to `last`, its message from line `message` on.

    `frames` are the lines of its traceback to be kept; `lead` the line above that says what it is, and `after` what it
    came after, if that line is of a chain.
    """

    form: Form
    first: int
    message: int
    last: int
    text: str
    frames: list[int] = field(default_factory=list)
    causes: list[str] = field(default_factory=list)
    lead: int | None = None
    after: _Block | None = None

    def worth(self) -> list[int]:
        """The lines that are worth keeping."""
        lead = [] if self.lead is None else [self.lead]
        return [*lead, *self.frames, *range(self.message, min(self.last, self.message + _MESSAGE) + 1)]


def _blocks(stream: Sequence[_Line]) -> list[_Block]:
    """All that was said by one writer, in order; noise left out."""
    found: list[_Block] = []
    at, link = 0, ""
    lead: int | None = None
    aside: Form | None = None  # of the traceback below this line
    while at < len(stream):
        index, text = stream[at]
        if header := _HEADER.match(text):
            block, at = _traceback(stream, at, header["lead"])
            if not block:
                continue
            if link and found:
                block.after = found[-1]
                aside = found[-1].form if found[-1].form in _ASIDES else None
                block.causes = [found[-1].text, *found[-1].causes][:_CAUSES] if link == _DIRECT else []
            block.form, block.lead = aside or _aside(header["lead"]) or block.form, lead
            found.append(block)
            aside, link, lead = None, "", None
            continue
        if text.strip():
            link = next((words for words in (_DIRECT, _HANDLING) if words in text), "")
            aside = _aside(text)
            lead = index if link or aside else None
        form = None if not text.strip() or link else _form(text)
        if form is None:
            at += 1
            continue
        start = at
        words, at = ([text], at + 1) if form == Form.PLAIN else _message(stream, at)
        said = _WHAT.match(words[0])
        if said:
            words[0] = said[1]
        elif own := _OWN.match(words[0]):
            words[0] = words[0][own.end() :]
        elif logged := _LOGGED.match(words[0]):
            words[0] = words[0] if _NCCL_WARNS.search(words[0]) else words[0][logged.end() :]
        found.append(_Block(form, index, index, stream[max(at - 1, start)][0], "\n".join(words).strip()))
    return found


@lru_cache(4096)  # the ranks of one cell say the same lines
def _form(text: str) -> Form | None:
    """The form of a line outside tracebacks; None for noise."""
    if _NOISE.search(text) or _aside(text):
        return None
    if _OWN.match(text):
        return Form.RAISED
    if _WHAT.match(text) or _ABORTS.search(text):
        return Form.ABORTED
    if _REFUSALS.search(text):
        return Form.REFUSED
    if _SIGNALS.search(text):
        return Form.SIGNALLED
    if _NAMED.match(text):
        return _raised(text, Form.BARE)
    if _LOGGED.match(text):
        return Form.LOGGED
    return Form.PLAIN


def _aside(text: str) -> Form | None:
    """The form of an exception below this line, if it tells that it ends no process."""
    return next((form for form, words in _ASIDES.items() if words.search(text)), None)


def _raised(text: str, otherwise: Form) -> Form:
    if _FROM_OUTSIDE.match(text):
        return Form.STOPPED
    return Form.LAUNCHER if _OF_LAUNCHERS.match(text) else otherwise


def _traceback(stream: Sequence[_Line], at: int, lead: str) -> tuple[_Block | None, int]:
    """The traceback whose header is line `at`, and the number of the line after it; None if it has no exception."""
    first, shape = stream[at][0], _shape(lead)
    at += 1
    frames: list[int] = []

    def stripped(text: str) -> str:
        return text[len(lead) :] if lead and _shape(text[: len(lead)]) == shape else text

    while at < len(stream):
        index, text = stream[at][0], re.sub(r"^\s+[|+] ", "", stripped(stream[at][1]))
        if _HEADER.match(text) or any(words in text for words in (_DIRECT, _HANDLING)):
            return None, at
        if text[:1].isspace():
            frames.append(index)
        elif _WHAT.match(text) or _ABORTS.search(text):
            return None, at
        elif text.strip() and not _NOISE.search(text) and _EXCEPTION.match(text):
            rest = [(i, stripped(t)) for i, t in stream[at : at + 4 * _MESSAGE]]
            words, after = _message([(index, text), *rest[1:]], 0)
            block = _Block(_raised(text, Form.RAISED), first, index, rest[after - 1][0], "\n".join(words).strip())
            block.frames = [first, *frames[-_FRAMES:]]
            return block, at + after
        at += 1
    return None, at


def _shape(text: str) -> str:
    return re.sub(r"\d", "0", text)


def _message(stream: Sequence[_Line], at: int) -> tuple[list[str], int]:
    """The lines of the message from line `at` on, without CUDA's advice, and the number of the line after it."""
    words = [stream[at][1]]
    at += 1
    empty = re.search(r"(?:Error|Exception|what\(\)):\s*$", words[0])
    while at < len(stream) and len(words) < _MESSAGE:
        text = stream[at][1]
        if _HELPS.search(text):
            at += 1
            continue
        if (not text.strip() and not empty) or (_ends_message(text) and not words[-1].startswith("Last error:")):
            break
        if text.strip():
            empty = None
            words.append(text)
        at += 1
    return words, at


# --- which of it ended the process ----------------------------------------------------------------


def _chosen(blocks: Sequence[_Block]) -> Ending | None:
    """The last block of the best form, the first abort; None if there is none.

    A process aborts once: the aborts after the first are of others, which may have lost it. An exception is not the end
    of a process that went on after it, as an abort further down shows.
    """
    ends: dict[Form, _Block] = {}
    for block in blocks:
        if block.form != Form.ABORTED or Form.ABORTED not in ends or _empty(ends[Form.ABORTED]):
            ends[block.form] = block
        if block.form == Form.ABORTED and Form.RAISED in ends and _lived(blocks, ends[Form.RAISED], block):
            del ends[Form.RAISED]
    if not ends:
        return None
    best = ends[min(ends)]
    also = list(best.causes)
    if best.form == Form.RAISED:
        also += [b.text for b in blocks if b.form == Form.ABORTED and b.first > best.last and not _empty(b)]
    if best.form == Form.ABORTED and _empty(best):
        best = ends.get(Form.LOGGED, best)
    for mentioned, explains in _EXPLAINED:
        if mentioned.search(best.text):
            also += [b.text for b in blocks if b.form == Form.LOGGED and explains.search(b.text) and b is not best]
    if _ABOVE.search(best.text):
        told = (Form.RAISED, Form.BARE, Form.LOGGED, Form.ASIDE)
        also += [b.text for b in reversed(blocks) if b.last < best.first and b.form in told]
    return Ending(best.form, _in_one_line(best.text), best.text, tuple(also), best.last)


def _empty(block: _Block) -> bool:
    """Whether an abort says only that there was one."""
    return block.text.startswith("terminate called ")


def _lived(blocks: Iterable[_Block], raised: _Block, aborted: _Block) -> bool:
    between = (b for b in blocks if b.first > raised.last and b.last < aborted.first)
    return any(b.form == Form.PLAIN and _LIVES.search(b.text) for b in between)


def _in_one_line(text: str) -> str:
    """The first line of a message; with NCCL's last error, which tells what the first does not."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    first = lines[0]
    if first.endswith(":") and len(lines) > 1:
        first = f"{first} {lines[1]}"
    last = next((lines[at + 1] for at, line in enumerate(lines[:-1]) if line.startswith("Last error:")), "")
    return f"{first}: {last}" if last else first
