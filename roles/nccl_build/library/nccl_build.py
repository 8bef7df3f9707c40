#!/usr/bin/python
"""Module of the role nccl_build: NCCL and nccl-tests from source, built on one node and copied to the others.

The folder `root` (/opt/nccl) has

    2.30.7-cuda12.8-sm90-1f3a…/   one build: lib, include, bin and stamp.json; never changes once it exists
    current -> 2.30.7-…           the build in use
    2.26.2-….build.log            the output of make
    .lock, .build, .….partial     of a build in progress; leftovers of an interrupted run are removed by the next

The phase install has steps (setting `step`), since the nodes need what one of them builds: look, build and pack on
the node that builds, receive and unpack on the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from ansible.module_utils import nccl_tests
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.nccl_inputs import (
    KNOWN_SHA256,
    architectures,
    build_name,
    check_tools,
    cuda_toolkit,
    first_error,
    fixed_inputs,
    gencode,
    mpi_home,
    sources,
)
from ansible.module_utils.nccl_prefix import (
    RECEIVE_GIB,
    check_space,
    digest,
    drift,
    finish,
    fitting,
    manifest,
    pack,
    point,
    put_in_use,
    receive,
    stamp_of,
    unpack,
)
from ansible.module_utils.nvidia import query, version
from ansible.module_utils.phase import Stop, counted, main, read

SETUP = "run `runner setup --tags nccl_build`"
# torch loads the first file of this name below a folder of sys.path: with PYTHONPATH, the library in use.
LINK, TARGET = "python/nvidia/nccl/lib/libnccl.so.2", "../../../../current/lib/libnccl.so.2"
NAMED_FILES = 5  # the number of differing files that are listed; a wrong copy differs in all


# --- validate ---


def validate(phase):
    """Check settings, and for a build that is not installed, disk space, tools and archives.

    facts: installed (names of the builds that fit), wanted (name of the build, "" if unknown).
    """
    want = phase.want
    if not want["host_known"]:
        phase.problem("nccl_build_host", "a host of the inventory", want["host"], "see `ansible-inventory --list`")
    for name, ver, url, sha in sources(want):
        if not version(ver)[2:]:
            phase.problem(f"version of {name}", "three numbers such as 2.30.7", ver, "see its tags on GitHub")
        if sha and not re.fullmatch(r"[0-9a-f]{64}", sha):
            phase.problem(f"checksum of {name}", "64 hexadecimal digits", sha, f"see `sha256sum` of {url}")
        if not sha and not want["allow_unverified"]:
            prefix = "nccl_build_" if name == "nccl" else "nccl_build_tests_"
            known = ", ".join(v for n, v in KNOWN_SHA256 if n == name)
            phase.problem(
                f"checksum of {name} {ver}", "a SHA-256", "none given and none known",
                f"set {prefix}sha256 to what `curl -L {url} | sha256sum` prints on a machine that you trust, "
                f"or take a known {prefix}version ({known}), or set nccl_build_allow_unverified",
            )  # fmt: skip
    for name, value in sorted(want["conf"].items()):
        if not name.startswith("NCCL_") or isinstance(value, (dict, list, bool)) or "\n" in str(value):
            remedy = "see NCCL's user guide, Environment Variables"
            phase.problem(f"nccl_build_conf {name}", "a variable NCCL_… with a number or one line", value, remedy)
    for arch in want["archs"]:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            phase.problem("nccl_build_archs", "compute capabilities such as 90", arch, "9.0 is written 90")
    if want["sharp"] and not os.path.isfile(plugin := sharp_plugin(want["sharp"])):
        phase.problem("SHARP plugin", plugin, "nothing", "install HPC-X or nccl-rdma-sharp-plugins, or unset it")
    if phase.problems:
        return
    _, cuda, _ = cuda_toolkit(phase)
    archs, _ = architectures(phase)
    inputs = fixed_inputs(want)
    phase.facts["installed"] = list(fitting(want["root"], inputs, cuda, archs))
    phase.facts["wanted"] = build_name(inputs, cuda, archs) if cuda and archs else ""
    if not phase.facts["installed"]:
        check_space(phase, want["free_gib"] if want["builds"] else RECEIVE_GIB)
        if want["builds"]:
            check_tools(phase)
            for name, ver, url, _ in sources(want):
                _check_reachable(phase, f"{name} {ver}", url)


def _check_reachable(phase, what, url):
    try:
        urllib.request.urlopen(url, timeout=15).close()
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        phase.problem(f"archive of {what}", url, reason, "copy it to this node and give its file:// URL")


# --- install ---


def install(phase):
    """Run one step: look, build, pack on the node that builds; receive, unpack on the others."""
    steps = {"look": look, "build": build, "receive": receive, "pack": pack, "unpack": unpack}
    steps[phase.want["step"]](phase)


def look(phase):
    """Look for a build that fits, and put it in use. facts: ready, name, stamp (digest), archs."""
    want, inputs = phase.want, fixed_inputs(phase.want)
    _, cuda, _ = cuda_toolkit(phase)
    archs, _ = architectures(phase)
    name = build_name(inputs, cuda, archs) if cuda and archs else want["prefer"]
    found = next(fitting(want["root"], inputs, cuda, archs, name), "")
    phase.facts["ready"] = bool(found)
    if found:
        put_in_use(phase, found)
    elif phase.check:
        phase.facts["name"] = name = name or "a new build"
        phase.change(f"{want['root']}/{name}", None, "built here")


def build(phase):
    """Build where `look` finds nothing. Parallel runs wait for each other: the second finds the build of the first.

    Raises Stop where the build fails or another one takes too long.
    """
    want = phase.want
    os.makedirs(want["root"], exist_ok=True)
    with _lock(want["root"], want["timeout_s"]) as lock:
        look(phase)
        if phase.facts["ready"]:
            return
        check_tools(phase)
        if phase.problems:
            return
        home, cuda, _ = cuda_toolkit(phase)
        archs, _ = architectures(phase)
        inputs = fixed_inputs(want)
        name = build_name(inputs, cuda, archs)
        prefix, partial, work = f"{want['root']}/{name}", f"{want['root']}/.{name}.partial", f"{want['root']}/.build"
        with _emptied(work), _emptied(partial):
            for source, ver, url, sha in sources(want):
                fetch(phase, f"{source} {ver}", url, sha, f"{work}/{source}")
            _make_all(phase, work, prefix, partial, home, archs, lock)
            finish(partial, prefix, {"inputs": inputs, "cuda": cuda, "archs": archs, "files": manifest(partial)})
        phase.change(prefix, None, "built here")
        phase.done.append(f"built NCCL {want['version']} in {prefix}")
        put_in_use(phase, name)


@contextlib.contextmanager
def _emptied(folder):
    """Remove `folder` before the block, as left by a killed run, and after it."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(root, timeout_s):
    """Yields the descriptor of a locked file. make inherits it: a build that outlives its run still holds the lock."""
    with open(f"{root}/.lock", "w", encoding="utf-8") as file:
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    remedy = f"see `fuser {root}/.lock` for who holds it"
                    raise Stop("build of NCCL", "no other", f"another for over {timeout_s} s", remedy) from None
                time.sleep(0.5)
        yield file.fileno()


def fetch(phase, what, url, sha, folder):
    """Download `url`, compare its SHA-256 with `sha` ("" for none), and unpack it to `folder` without its top folder.

    Raises Stop where it cannot be downloaded or unpacked, or has another checksum.
    """
    os.makedirs(folder)
    archive = f"{folder}.archive"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(archive, "wb") as file:
            shutil.copyfileobj(response, file)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ValueError) as error:
        remedy = "copy it to this node and give its file:// URL"
        raise Stop(f"archive of {what}", url, str(getattr(error, "reason", error)), remedy) from None
    found = digest(archive)
    if sha and found != sha:
        raise Stop(f"checksum of {what}", sha, found, f"compare with a copy of {url} from elsewhere: do not trust it")
    argv = ["tar", "-x", "-f", archive, "-C", folder, "--strip-components=1", "--no-same-owner"]
    outcome = phase.run(argv, 600)
    if not outcome.ok:
        raise Stop(f"archive of {what}", "a tar archive", outcome.last_line, f"check {url}")


def _make_all(phase, work, prefix, partial, home, archs, lock):
    want = phase.want
    lib = f"{home}/lib64" if os.path.isdir(f"{home}/lib64") else f"{home}/lib"
    common = [
        f"CUDA_HOME={home}", f"CUDA_LIB={lib}", f"CUDA_INC={home}/include",
        f"NVCC_GENCODE={gencode(archs)}", f"CXX={want['cxx']}",
    ]  # fmt: skip
    mpi = mpi_home(phase)[0] if fixed_inputs(want)["mpi"] else ""
    # nccl-tests sets no run path: the linker takes it from here, so that the binaries use this NCCL, and this MPI where
    # it is one that the loader does not know (HPC-X).
    run_path = [f"{prefix}/lib", lib, *([f"{mpi}/lib"] if mpi else [])]
    env = dict(os.environ, LC_ALL="C.UTF-8", LD_RUN_PATH=":".join(run_path))
    log = f"{prefix}.build.log"
    if os.path.exists(log):
        os.unlink(log)
    give_up = time.monotonic() + want["timeout_s"]

    def make(what, folder, *words):
        argv = ["make", f"-j{want['jobs'] or os.cpu_count()}", "-C", folder, *words]
        rc = _logged(argv, env, log, lock, give_up)
        if rc == 0:
            return
        text = read(log)
        if rc > 0 and words[0].endswith(".o") and "No rule to make target" in text:
            return  # this version has no such file: there is no early check
        found = f"signal {-rc}" if rc < 0 else first_error(text) or f"status {rc}"
        raise Stop(f"build of {what}", "make succeeds", found, f"see {log} on the node, then {SETUP} again")

    nccl, objects = f"{work}/nccl", f"{work}/nccl/build"
    # One file that includes nearly all headers: a NCCL that is incompatible with CUDA fails here in seconds, instead
    # of after the device code, for which make waits about 20 minutes before it reports another file's error.
    make(f"NCCL {want['version']}", f"{nccl}/src", f"{objects}/obj/init.o", f"BUILDDIR={objects}", *common)
    make(f"NCCL {want['version']}", nccl, "src.build", f"BUILDDIR={objects}", f"PREFIX={prefix}", *common)
    make(f"NCCL {want['version']}", nccl, "install", f"BUILDDIR={objects}", f"PREFIX={partial}", *common)
    if want["tests"]:
        tests, words = f"{work}/nccl-tests", [f"NCCL_HOME={partial}", *common]
        if mpi:
            words += ["MPI=1", f"MPI_HOME={mpi}"]
        make(f"nccl-tests {want['tests_version']}", tests, f"BUILDDIR={tests}/build", *words)
        os.makedirs(f"{partial}/bin", exist_ok=True)  # NCCL itself installs ncclras there since 2.24
        for binary in sorted(os.listdir(f"{tests}/build")):
            if binary.endswith("_perf"):
                shutil.copy2(f"{tests}/build/{binary}", f"{partial}/bin/{binary}")


def _logged(argv, env, log, lock, give_up):
    """Run `argv`, append its output to `log`, and return its exit status. Leaves no process running. Raises Stop."""
    with open(log, "ab") as file:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=env, pass_fds=[lock], start_new_session=True
        )
    try:
        return child.wait(max(1, give_up - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise Stop("build", "done within nccl_build_timeout_s", "still running", f"see {log}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


# --- configure ---


def conf(want, roce):
    """{name: value} of nccl.conf, sorted by name; `roce` is the content of roce.fact, {} without one."""
    values = {}
    if want["buffsize"]:
        values["NCCL_BUFFSIZE"] = want["buffsize"]
    if roce.get("hca"):
        values["NCCL_IB_HCA"] = "=" + ",".join(roce["hca"])  # "=": exactly these names, not all that start with them
    gid_index = roce.get("gid_index") if want["ib_gid_index"] < 0 else want["ib_gid_index"]
    if gid_index is not None:
        values["NCCL_IB_GID_INDEX"] = gid_index
    if roce.get("traffic_class") is not None:
        values["NCCL_IB_TC"] = roce["traffic_class"]
    if want["socket_ifname"]:
        values["NCCL_SOCKET_IFNAME"] = want["socket_ifname"]
    if want["sharp"]:
        values.update(NCCL_COLLNET_ENABLE=1, NCCL_NET_PLUGIN=sharp_plugin(want["sharp"]))
    return {name: str(value) for name, value in sorted({**values, **want["conf"]}.items())}


def sharp_plugin(path):
    """The path of the SHARP plugin, from that of the file or of its folder."""
    return path if path.endswith(".so") else os.path.join(path, "libnccl-net.so")


def roce_fact(phase):
    """The content of roce.fact, {} where the role roce_qos did not run on this node. Raises Stop for a damaged file."""
    path = f"{phase.want['etc']}/ansible/facts.d/roce.fact"
    try:
        fact = json.loads(read(path) or "{}")
        return fact if isinstance(fact, dict) else {}
    except ValueError:
        raise Stop(path, "JSON of the role roce_qos", "a damaged file", "run `runner setup --tags roce_qos`") from None


def files(phase):
    """{path: content, None for no file} of the files that configure writes, for the build in use.

    Raises Stop without a complete build.
    """
    root, etc = phase.want["root"], phase.want["etc"]
    stamp = stamp_of(f"{root}/current")
    if not stamp:
        remedy = SETUP
        raise Stop(f"{root}/current", f"a build of NCCL {phase.want['version']}", "none that is complete", remedy)
    values = conf(phase.want, roce_fact(phase))
    # No "=" here: NCCL reads every line with one as a setting.
    lines = ["# Written by Shakedown's role nccl_build. Put settings of your own into its variable nccl_build_conf."]
    lines += [f"{name}={value}" for name, value in values.items()]
    tests = stamp["inputs"]["archives"].get("nccl-tests", {}).get("version")
    fact = {
        "version": stamp["inputs"]["archives"]["nccl"]["version"],
        "prefix": os.path.join(root, os.readlink(f"{root}/current")),
        "cuda": stamp["cuda"],
        "architectures": stamp["archs"],
        "nccl_tests": tests,
        "mpi": stamp["inputs"]["mpi"],
        "conf": values,
    }
    current = f"{root}/current"
    env = [
        "# Written by Shakedown's role nccl_build. Source it to build and run with this NCCL.",
        f"export NCCL_HOME={current}",
        f'export LD_LIBRARY_PATH={current}/lib"${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"',
        f'export PATH={current}/bin:"$PATH"',
    ]
    return {
        f"{etc}/nccl.conf": "\n".join(lines) + "\n",
        f"{root}/env.sh": "\n".join(env) + "\n",
        f"{etc}/ansible/facts.d/nccl.fact": json.dumps(fact, indent=1, sort_keys=True) + "\n",
        f"{etc}/ld.so.conf.d/90-shakedown-nccl.conf": f"{current}/lib\n" if phase.want["ld_so_conf"] else None,
    }


def configure(phase):
    """Write nccl.conf, env.sh, torch's link, the fact and the loader's configuration, for the build in use.

    Raises Stop without a complete build.
    """
    if phase.check and not os.path.exists(f"{phase.want['root']}/current"):
        phase.change(f"{phase.want['etc']}/nccl.conf", None, "settings of the build")
        return
    for path, content in files(phase).items():
        changed = phase.remove(path) if content is None else phase.write(path, content)
        if changed and path.endswith("90-shakedown-nccl.conf") and not phase.check:
            outcome = phase.run(["ldconfig"], 60)
            if not outcome.ok:
                phase.problem("ldconfig", "status 0", outcome.last_line, "run it manually")
    link = f"{phase.want['root']}/{LINK}"
    found = os.readlink(link) if os.path.islink(link) else "a file" if os.path.exists(link) else None
    if found != TARGET and phase.change(link, found, TARGET):
        os.makedirs(os.path.dirname(link), exist_ok=True)
        point(link, TARGET)


# --- verify ---


def verify(phase):
    """Check files, build, library and nccl-tests' libraries, and run one all-reduce. Raises Stop without a build.

    facts: library_version, all_reduce_busbw_gb_per_s.
    """
    want, current = phase.want, f"{phase.want['root']}/current"
    again = SETUP
    written = files(phase)
    for path, content in written.items():
        found = read(path)
        if found != content:
            phase.problem(path, *difference(content, found), again)
        elif content is not None:
            phase.own(path, 0o644, remedy=again)
    stamp = stamp_of(current)
    if stamp["inputs"] != fixed_inputs(want):
        expected, found = (json.dumps(inputs, sort_keys=True) for inputs in (fixed_inputs(want), stamp["inputs"]))
        phase.problem("build in use", expected, found, again)
    link = f"{want['root']}/{LINK}"
    if not os.path.exists(link) or not os.path.samefile(link, f"{current}/lib/libnccl.so.2"):
        phase.problem(link, f"a link to {TARGET}", "another" if os.path.lexists(link) else "nothing", again)
    differing = drift(current, stamp)
    for path, expected, found in differing[:NAMED_FILES]:
        phase.problem(f"{current}/{path}", expected, found, again)
    if len(differing) > NAMED_FILES:
        phase.problem("files of the build", "as stamped", f"{len(differing)} differ", again)
    _verify_library(phase, f"{current}/lib/libnccl.so.2")
    _warn_of_another_library(phase, f"{current}/lib")
    if want["tests"] and _verify_links(phase, f"{current}/bin/all_reduce_perf") and want["verify_collective"]:
        _verify_collective(phase, f"{current}/bin/all_reduce_perf")


def difference(expected, found):
    """The first differing lines of two texts as (expected, found); "no file" or "no such line" where one is missing."""
    if expected is None or found is None:
        return ("no file" if expected is None else "a file"), ("no file" if found is None else "a file")
    ours, theirs = expected.splitlines(), found.splitlines()
    more = [line for line in ours if line not in theirs], [line for line in theirs if line not in ours]
    return more[0][0] if more[0] else "no such line", more[1][0] if more[1] else "no such line"


def library_version(code):
    """The version that ncclGetVersion encodes: 22602 -> "2.26.2", and 2804 -> "2.8.4" (nccl.h, NCCL_VERSION)."""
    major, rest = divmod(code, 1000) if code < 10000 else divmod(code, 10000)
    return "{}.{}.{}".format(major, *divmod(rest, 100))


def _verify_library(phase, library):
    """Compare the version that the library reports, in a separate process, since a broken one may crash it."""
    code = (
        "import ctypes, sys; answer = ctypes.c_int(); "
        "ctypes.CDLL(sys.argv[1]).ncclGetVersion(ctypes.byref(answer)); print(answer.value)"
    )
    outcome = phase.run([sys.executable, "-c", code, library], 30)
    answer = outcome.stdout.strip()
    found = library_version(int(answer)) if outcome.ok and answer.isdigit() else outcome.last_line
    if found != phase.want["version"]:
        phase.problem(f"ncclGetVersion of {library}", phase.want["version"], found, SETUP)
    phase.facts["library_version"] = found


def _warn_of_another_library(phase, folder):
    """Warn of another NCCL of the loader, used by programs without LD_LIBRARY_PATH and without a run path."""
    outcome = phase.run(["/sbin/ldconfig", "-p"], 20)
    paths = re.findall(r"^\s*libnccl\.so\.2 .*=> (\S+)$", outcome.stdout, re.MULTILINE)
    if paths and os.path.realpath(os.path.dirname(paths[0])) != os.path.realpath(folder):
        file = os.path.basename(os.path.realpath(paths[0]))
        phase.warn(f"programs that do not source env.sh get another NCCL: {paths[0]} ({file}) is first for the loader")


def _verify_links(phase, binary):
    """Whether all libraries of nccl-tests are found and its NCCL is this one; records a problem otherwise."""
    before = len(phase.problems)
    outcome = phase.run(["ldd", binary], 20, env={"LD_LIBRARY_PATH": ""})
    if not outcome.ok:
        phase.problem(binary, "a program whose libraries are found", outcome.last_line, SETUP)
    for library in re.findall(r"^\s*(\S+) => not found", outcome.stdout, re.MULTILINE):
        package = (
            " (Open MPI: openmpi-bin, or HPC-X where it was built with that)" if library.startswith("libmpi.") else ""
        )
        remedy = f"install {library} on this node{package}"
        phase.problem(f"{binary} needs {library}", "found by the loader", "not found", remedy)
    nccl = re.findall(r"^\s*libnccl\.so\.2 => (/\S+)", outcome.stdout, re.MULTILINE)
    ours = os.path.realpath(os.path.dirname(os.path.dirname(binary)))
    if nccl and not os.path.realpath(nccl[0]).startswith(f"{ours}/"):
        phase.problem(f"NCCL of {binary}", f"{ours}/lib", nccl[0], SETUP)
    return len(phase.problems) == before


def _verify_collective(phase, binary):
    """Run one all-reduce over the node's GPUs, unless they are busy: it would use a job's memory."""
    rows, reason = query(phase, ["index"])
    if not rows:
        phase.warn(f"all-reduce not run: no GPU ({reason or 'nvidia-smi lists none'})")
        return
    busy = phase.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], 20)
    if not busy.ok or re.search(r"\d", busy.stdout):
        phase.warn("all-reduce not run: " + ("the GPUs are in use" if busy.ok else busy.last_line))
        return
    outcome = phase.run([binary, "-b", "8M", "-e", "8M", "-g", len(rows)], phase.want["verify_timeout_s"])
    output = nccl_tests.parse(outcome.stdout)
    what, remedy = f"all-reduce over {counted(len(rows), 'GPU')}", f"run {binary} -g {len(rows)} with NCCL_DEBUG=INFO"
    if output.out_of_bounds:
        wrong = sum(each.wrong or 0 for each in output.measurements) or "some"
        phase.problem(what, "0 values out of bounds", wrong, "a GPU or link corrupts data: see the role cuda_check")
    elif not outcome.ok or not output.complete:
        last = "ended without a result" if outcome.ok else outcome.last_line
        phase.problem(what, "completes", output.problems[0] if output.problems else last, remedy)
    rates = [each.busbw_gb_per_s for each in output.measurements if each.in_place]
    phase.facts["all_reduce_busbw_gb_per_s"] = max(rates, default=None)


PHASES = {"validate": validate, "install": install, "configure": configure, "verify": verify}

if __name__ == "__main__":
    main(AnsibleModule, PHASES)
