"""Start a run of Ansible and kill it, with all of its processes here, as soon as it waits for a build on a node.

kill_controller.py ansible-playbook ARGUMENTS...
"""

import os
import signal
import subprocess
import sys

run = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True, start_new_session=True)
said = []
for line in run.stdout:
    said.append(line)
    if "ASYNC POLL" in line:
        os.killpg(run.pid, signal.SIGKILL)
        sys.exit(0)
sys.exit("no build was started:\n" + "".join(said))
