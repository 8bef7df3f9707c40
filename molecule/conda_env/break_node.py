"""Breaks a node for the scenario: damage-wheel, kill-installation, or tells of what is half-made."""

import glob
import os
import signal
import subprocess
import sys
import time

PREFIX = "/opt/shakedown/env"


def forget():
    """Make the role install again."""
    os.unlink(f"{PREFIX}/.shakedown.json")


def damage_wheel():
    (wheel,) = glob.glob("/opt/shakedown/wheels/lock-*/click-*.whl")
    before = os.stat(wheel)
    with open(wheel, "r+b") as file:
        file.seek(before.st_size // 2)
        file.write(b"damaged")
    os.utime(wheel, ns=(before.st_atime_ns, before.st_mtime_ns))
    forget()


def kill_installation():
    """As a power cut would: neither pip nor the module gets to tidy up."""
    forget()
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{process}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
                if words[1:4] == [b"-m", b"pip", b"install"]:
                    with open(f"/proc/{process}/stat") as file:
                        module = int(file.read().rpartition(")")[2].split()[1])
                    os.kill(module, signal.SIGKILL)
                    os.kill(int(process), signal.SIGKILL)
                    return
            except (FileNotFoundError, ProcessLookupError):
                pass
        time.sleep(0.005)


def half_made():
    unfinished = [path for path in glob.glob(f"{PREFIX}-*") if not os.path.exists(f"{path}/.shakedown.json")]
    unused = [path for path in unfinished if os.path.realpath(PREFIX) != path]
    subprocess.run([f"{PREFIX}/bin/python", "-c", "import click, runner"], check=True)  # what was in use still is
    print(f"{len(unused)} half-made, not in use")


{"damage-wheel": damage_wheel, "kill-installation": kill_installation, "half-made": half_made}[sys.argv[1]]()
