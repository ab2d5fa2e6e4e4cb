"""Stand-ins for docker, nuctl, kubectl, curl and df, in one process, so that Python starts once.

A stand-in is the script `STAND_IN` in `bin` of a test's folder. It tells this process its own id and waits for its exit
status; this process takes arguments, environment and open files from /proc. It forks for calls that run a program or
wait. `world`, beside `bin`, has images, functions and a record of every call.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import traceback
from pathlib import Path

import nuclio_sdk  # noqa: F401  this and the next two: for the programs that deploy.sh runs in the image
import numpy  # noqa: F401
import yaml
from PIL import ImageDraw  # noqa: F401

HELPER = "gcr.io/iguazio/alpine:3.17"  # of the container that nuctl keeps its records in
INTERRUPTIONS = "SIGKILL", "SIGINT", "hang"
# -p: bash does not trace it when the environment has it trace deploy.sh.
STAND_IN = """#!/bin/bash -p
exec 4<&0 5>&1 6>&2 8<>/dev/tcp/127.0.0.1/{port}
echo $$ >&8
read -r status <&8
[[ $status != curl ]] || exec {curl} "$@" 4<&- 5>&- 6>&- 8>&-
exit "$status"
"""


def answer_calls() -> None:
    """Answer every stand-in that calls, until stdin ends; the port is the first line of stdout."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(server.getsockname()[1], flush=True)
    end = sys.stdin
    forks: set[int] = set()
    while end not in select.select([server, end], [], [])[0]:
        connection, _ = server.accept()
        forks -= {done for done in forks if os.waitpid(done, os.WNOHANG)[0]}
        fork = None
        try:
            call = Call(connection)
            fork = os.fork() if call.needs_a_fork() else None
            if fork:
                forks.add(fork)
                call.close()
            else:
                connection.sendall(f"{call.status()}\n".encode())
        except OSError:
            pass  # the stand-in was killed
        finally:
            connection.close()
            if fork == 0:
                os._exit(0)


class Call:
    """One call of a tool.

    Attributes:
        pid: process of its stand-in.
        words: name of the tool and its arguments.
        world: folder.
        fault: what the test wants of such a call, None for what the tool does.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pid = int(connection.recv(20))
        self.files = [open(f"/proc/{self.pid}/fd/{number}", mode) for number, mode in ((4, "r"), (5, "a"), (6, "a"))]
        _, _, script, *arguments = self.of_process("cmdline")
        self.words = [Path(script).name, *arguments]
        self.world = Path(script).parent.parent / "world"
        faults = json.loads((self.world / "faults").read_text())
        self.fault = next((fault for start, fault in faults.items() if re.match(start, " ".join(self.words))), None)

    def of_process(self, name: str) -> list[str]:
        return [os.fsdecode(word) for word in Path(f"/proc/{self.pid}/{name}").read_bytes()[:-1].split(b"\0")]

    def needs_a_fork(self) -> bool:
        """Whether the call runs a program or waits."""
        return self.words[:2] in (["docker", "run"], ["kubectl", "port-forward"]) or self.fault in INTERRUPTIONS

    def status(self) -> int | str:
        """Do what the tool does; returns the exit status, or "curl" where the real one is to be called."""
        sys.stdin, sys.stdout, sys.stderr = self.files
        try:
            tool, command, *_ = self.words
            self.fail_as_told()
            return getattr(self, f"{tool}_{command.strip('-').replace('-', '_')}")() or 0
        except SystemExit as end:
            if not isinstance(end.code, str):
                return int(end.code or 0)
            print(end.code, file=sys.stderr)
        except Exception:
            traceback.print_exc()
        finally:
            self.close()
        return 1

    def close(self) -> None:
        """Close its files: who reads what the stand-in writes waits for the end of it."""
        for file in self.files:
            file.close()

    def fail_as_told(self) -> None:
        """Fail, kill or print as the test wants it for such a call: SystemExit."""
        with open(self.world / "calls", "a") as record:
            record.write(json.dumps(self.words) + "\n")
        if self.fault is None:
            return
        if self.fault == "fail":
            sys.exit(f"{' '.join(self.words)}: failed")
        if self.fault in INTERRUPTIONS:  # once: of the whole run, as at a power cut or a Ctrl-C
            if self.words[1] == "deploy":
                path = self.path_of("functions", self.words[2])
                new = {"port": 0, "weights": "", "environ": {}, "arguments": []}
                function = json.loads(path.read_text()) if path.exists() else new
                path.write_text(json.dumps(function | {"state": "building"}))
            (self.world / "faults").write_text("{}")
            if self.fault != "hang":
                os.killpg(os.getpgid(self.pid), getattr(signal, self.fault))
            self.wait_for_its_end(30)
        print(self.fault)
        sys.exit()

    def wait_for_its_end(self, most_s: float) -> None:
        self.connection.settimeout(most_s)
        self.connection.recv(1)
        os._exit(0)

    def value(self, option: str) -> str:
        return self.words[self.words.index(option) + 1]

    def environ(self) -> dict[str, str]:
        """What the options --env give."""
        return dict(self.words[i + 1].split("=", 1) for i, word in enumerate(self.words) if word == "--env")

    def path_of(self, kind: str, name: str) -> Path:
        return self.world / kind / name.replace("/", "_")

    def docker_info(self) -> None:
        print({"{{.ServerVersion}}": "28.0", "{{json .Runtimes}}": '{"nvidia": 1}'}.get(self.words[-1], self.world))

    def docker_inspect(self) -> None:
        print(HELPER if self.words[-1] == "nuclio-local-storage-reader" else "quay.io/nuclio/dashboard:1.14.1-amd64")

    def docker_build(self) -> None:
        manifest = Path(self.words[-1]) / "manifest.json"
        if "--file" in self.words:
            source = Path(self.value("--file")).read_text().split()[1]
            assert self.path_of("images", source).exists(), f"no image {source}"
        else:
            manifest = Path(self.words[-1]) / "weights" / "manifest.json"
        self.path_of("images", self.value("--tag")).write_text(json.loads(manifest.read_text())["version"])

    def docker_image(self) -> bool:
        return not self.path_of("images", self.words[3]).exists()

    def docker_rmi(self) -> None:
        missing = [tag for tag in self.words[2:] if not self.path_of("images", tag).exists()]
        for tag in set(self.words[2:]) - set(missing):
            self.path_of("images", tag).unlink()
        sys.exit(f"no image {missing}" if missing else 0)

    def docker_tag(self) -> None:
        self.path_of("images", self.words[3]).write_text(self.path_of("images", self.words[2]).read_text())

    def docker_save(self) -> None:
        tags = [tag for tag in self.words[4:] if tag != HELPER]
        images = {tag: self.path_of("images", tag).read_text() for tag in tags}
        Path(self.value("--output")).write_text(json.dumps(images | {"padding": "0" * 100_000}))

    def docker_load(self) -> None:
        for tag, version in json.load(sys.stdin).items():
            if tag != "padding":
                self.path_of("images", tag).write_text(version)

    def docker_run(self) -> None:
        """`python -c PROGRAM` in the image: main.py is the world's."""
        python = self.words.index("python")
        assert self.words[python:-1] == ["python", "-c"]
        inherited = dict(word.split("=", 1) for word in self.of_process("environ"))
        os.environ.clear()
        os.environ.update({name: value for name, value in inherited.items() if not name.startswith("ADVCAM_")})
        os.environ.update(self.environ() | {"WEIGHTS": self.path_of("images", self.words[python - 1]).read_text()})
        os.chdir(self.world)
        sys.path[0] = ""
        exec(self.words[-1], {"__name__": "__main__"})

    def docker_port(self) -> None:
        function = self.path_of("functions", self.words[2].removeprefix("nuclio-nuclio-"))
        if not function.exists():
            sys.exit("no such container")
        port = json.loads(function.read_text())["port"]
        print(f"0.0.0.0:{port}\n[::]:{port}")

    def docker_exec(self) -> None:
        name = self.value("--env").removeprefix("NUCLIO_FUNCTION_NAME=")
        assert self.words[4:] == ["nuclio-nuclio-" + name, "python", "-m", "defectcam", "doctor"]
        sys.exit("wrong        token")

    def docker_logs(self) -> None:
        print("the function's log")

    def docker_push(self) -> None:
        (self.world / "pushed").open("a").write(self.words[2] + "\n")

    def nuctl_version(self) -> None:
        print('Client version:\n"Label: 1.14.1, Git commit: 0123abc, OS: linux, Arch: amd64, Go version: go1.23"')

    def nuctl_get(self) -> None:
        print((self.world / "project").read_text() if (self.world / "project").exists() else "No projects found")

    def nuctl_create(self) -> None:
        (self.world / "project").write_text(self.words[3])

    def nuctl_deploy(self) -> None:
        config = yaml.load(Path(self.value("--file")).read_text(), yaml.CSafeLoader)
        assert config["metadata"]["name"] == self.words[2]
        assert "build" not in config["spec"], "nuctl would build again"
        path = self.path_of("functions", self.words[2])
        before = json.loads(path.read_text()) if path.exists() else None
        ports = json.loads((self.world / "ports").read_text())
        taken = [json.loads(other.read_text())["port"] for other in path.parent.iterdir() if other != path]
        function = {
            "port": before and before["port"] or min(set(ports) - set(taken)),
            "before": before,
            "image": self.value("--run-image"),
            "weights": self.path_of("images", self.value("--run-image")).read_text(),
            "environ": self.environ(),
            "config": config,
            "arguments": self.words[1:],
        }
        path.write_text(json.dumps(function))

    def nuctl_delete(self) -> None:
        function = self.path_of("functions", self.words[3])
        if function.exists() and "state" in json.loads(function.read_text()) and "--force" not in self.words:
            sys.exit("Function is building and cannot be deleted")
        function.unlink(missing_ok=True)

    def kubectl_get(self) -> None:
        answers = {"deployments": "quay.io/nuclio/dashboard:1.14.1-amd64", "nodes": "1"}
        print(answers.get(self.words[2], ""))

    def kubectl_exec(self) -> None:
        name = self.words[-5].removeprefix("NUCLIO_FUNCTION_NAME=")
        assert self.words[2:7] == ["--namespace", "nuclio", "deployment/nuclio-" + name, "--", "env"]
        sys.exit("wrong        token")

    def kubectl_port_forward(self) -> None:
        assert not Path(f"/proc/{self.pid}/fd/9").exists(), "an orphan would hold the lock"
        function = self.path_of("functions", self.words[4].removeprefix("service/nuclio-"))
        print(f"Forwarding from 127.0.0.1:{json.loads(function.read_text())['port']} -> 8080", flush=True)
        self.wait_for_its_end(600)

    def curl_noproxy(self) -> str:
        return "curl"

    def df_Pk(self) -> None:
        print("Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/sda1 900000000 1 90000000 1% /")


if __name__ == "__main__":
    answer_calls()
