"""Processes for tests: a script in a fresh interpreter, and a test file run as a script, once for all of its tests.

A test sends the latter the name of a scenario, each runs it in a process group of its own and sends the result back; one that
hangs is killed, and its stack is the test's message.
"""

import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

WAIT = 60  # seconds for one scenario; a collective alone gives up after a third of it
SCENARIOS = {}


def in_subprocess(script, **environment):
    """Standard output of a script in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def main():
    """Of a worker: runs scenarios named on stdin; answers on the stdout that nothing else writes to."""
    rank, size = map(int, sys.argv[1:])
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, store, arguments = json.loads(line)
        try:
            limit = timedelta(seconds=WAIT / 3)
            dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=size, timeout=limit)
            result = SCENARIOS[name](**arguments)
            dist.barrier()
            answer = {"result": result}
        except Exception:
            answer = {"error": traceback.format_exc()}
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        torch.save(answer, f"{store}/{rank}")
        print("done", file=answers, flush=True)


class Workers:
    def __init__(self, file, size=2):
        self.file, self.size, self.started = file, size, []

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.size):
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
            command = [sys.executable, self.file, str(rank), str(self.size)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
            self.started.append((process, log))

    def stop(self):
        for process, log in self.started:
            process.kill()
            process.communicate()
            log.close()
        self.started = []

    def __call__(self, name, **arguments):
        """The results of all ranks."""
        if not self.started:
            self.start()
        with tempfile.TemporaryDirectory() as store:
            for process, _ in self.started:
                process.stdin.write(json.dumps([name, store, arguments]) + "\n")
                process.stdin.flush()
            late = [rank for rank, done in enumerate(self.wait()) if not done]
            if late:
                stacks = "\n".join(self.stack(rank) for rank in late)
                self.stop()
                pytest.fail(f"{name}: rank {late} did not answer within {WAIT} s\n{stacks}")
            answers = [torch.load(f"{store}/{rank}", weights_only=False) for rank in range(self.size)]
        for rank, answer in enumerate(answers):
            if "error" in answer:
                pytest.fail(f"{name}: rank {rank}\n{answer['error']}")
        return [answer["result"] for answer in answers]

    def wait(self):
        answered, end = [False] * self.size, time.monotonic() + WAIT
        with selectors.DefaultSelector() as selector:
            for rank, (process, _) in enumerate(self.started):
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while not all(answered) and selector.get_map() and time.monotonic() < end:
                for key, _ in selector.select(end - time.monotonic()):
                    answered[key.data] = key.fileobj.readline() == "done\n"
                    selector.unregister(key.fileobj)
        return answered

    def stack(self, rank):
        process, log = self.started[rank]
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        log.seek(0)
        return f"rank {rank}:\n{log.read()[-4000:]}"
