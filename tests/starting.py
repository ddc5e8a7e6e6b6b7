"""Scripts in processes of their own, as a user starts them, without the seconds that importing torch takes.

    done = start("train_cifar.py", "--epochs", 1)      # done.status, done.out, done.err
    python -m tests.starting MODULE ...                # the process behind it, which forks one for each script

That process has imported libraries, and of the project only the given modules (none, unless a test asks for them). A
child runs its script as python would: it imports the project, and ends as the interpreter does.
"""

import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIBRARIES = """
    torch torch._dynamo torch.distributed.run torch.utils.tensorboard torchvision.transforms.v2 scipy.stats
    matplotlib.figure
"""
PATIENCE = 300  # seconds that a script may be silent


class Done(NamedTuple):
    """A script that has ended. status: less than 0 for a signal; of several processes, the largest."""

    status: int
    out: str
    err: str


class Server:
    """The process that forks others. modules: of the project, which it imports beforehand."""

    def __init__(self, *modules: str):
        command = [sys.executable, "-m", "tests.starting", *modules]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def start(
        self, *command, cwd: Path = ROOT, environment: dict | None = None, processes: int = 1, fault: dict | None = None
    ) -> Done:
        """Run a script, a file or -m and a module, to its end.

        environment: variables beside those of this process. fault: see tests/faults.py.
        processes: how many, as if started by torchrun; of the output of all, lines come in any order.
        """
        with TemporaryDirectory() as folder:
            request = {"command": list(map(str, command)), "cwd": str(cwd), "fault": fault, "folder": folder}
            request |= {"environment": {**os.environ, **(environment or {})}, "processes": processes}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            return Done(status, *(Path(folder, name).read_text() for name in ("out", "err")))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@cache
def server() -> Server:
    """The one that the tests of this process share. It ends with this process, whose end closes its input."""
    return Server()


def start(*command, **options) -> Done:
    """Run a script to its end in a child of the process that the tests share; options as of Server.start."""
    return server().start(*command, **options)


# ------------------------------------------------------------------------------------------------ in that process


def serve() -> dict | None:
    """Fork children for each request and answer it; the request, in a child, and None at the end of the input."""
    for line in sys.stdin:
        request, children = json.loads(line), []
        pipes = {name: os.pipe() for name in ("out", "err")}  # not files, which a limit of file sizes would be for too
        port = free_port() if request["processes"] > 1 else 0
        for rank in range(request["processes"]):
            if (pid := os.fork()) == 0:
                for number, (reading, writing) in enumerate(pipes.values(), 1):
                    os.dup2(writing, number)
                    os.close(reading)
                    os.close(writing)
                return request | {"variables": torchrun_variables(rank, request["processes"], port) if port else {}}
            children.append(pid)
        for _, writing in pipes.values():
            os.close(writing)
        keep_output({name: reading for name, (reading, _) in pipes.items()}, Path(request["folder"]), children)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(max(statuses, key=abs)), flush=True)
    return None


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Those by which torchrun tells a process which one it is."""
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in {**values, "MASTER_ADDR": "127.0.0.1"}.items()}


def keep_output(pipes: dict[str, int], folder: Path, children: list[int]) -> None:
    """Write what comes through the pipes to files of their names, to its end. Children that fall silent are killed."""
    output = dict.fromkeys(pipes, b"")
    with selectors.DefaultSelector() as selector:
        for name, reading in pipes.items():
            selector.register(reading, selectors.EVENT_READ, name)
        while selector.get_map():
            ready = selector.select(PATIENCE)
            for pid in [] if ready else children:
                os.kill(pid, signal.SIGKILL)
            for key, _ in ready:
                output[key.data] += (part := os.read(key.fd, 2**16))
                if not part:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    for name, content in output.items():
        (folder / name).write_bytes(content)


def run(request: dict) -> None:
    """Be the script, in a forked child."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["environment"] | request["variables"])
    os.chdir(request["cwd"])
    for number in (signal.SIGINT, signal.SIGTERM):  # whatever this process was started with
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    command = request["command"]
    as_module = command[0] == "-m"
    sys.orig_argv, sys.argv = ["python", *command], command[1:] if as_module else command
    own = request["cwd"] if as_module else str(Path(command[0]).resolve().parent)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [own, *filter(None, others), *(path for path in sys.path if path not in ("", str(ROOT)))]
    if request["fault"]:
        importlib.import_module("tests.faults").prepare(request["fault"])
    if as_module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for name in (*LIBRARIES.split(), *sys.argv[1:]):
        importlib.import_module(name)
    if (request := serve()) is not None:
        run(request)
