"""Runs `esdtool` on one input after another, each in a process of its own, and watches what it does.

`Sandbox` starts this file as a process that has imported everything; that one forks a child for each command. In the
child an audit hook notes what a reader of files has no business with: processes, network, files other than the output,
and modules that only a file could have asked for.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Longest time for one input, of the child's processor: other work on the machine does not count."""
MEMORY = 2**30
"""Most memory for one input, over that of the process before."""
DECOY = "esdtool_fuzz_decoy"
"""A module name that mutated inputs carry: whoever imports it has followed a file."""

_PROCESS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"}
_PROCESS |= {"pty.spawn", "os.startfile", "os.kill", "os.killpg"}
_NETWORK = {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_NETWORK |= {"urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect"}
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown"}
_CHANGES |= {"os.truncate", "os.utime", "os.chflags", "shutil.rmtree", "shutil.move", "os.setxattr"}
_MODULES = {DECOY, "antigravity", "this", "turtle", "pip", "ensurepip", "pdb", "code", "webbrowser", "idlelib"}
_UNPICKLED = ("torch", "collections", "numpy", "_codecs")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one command did."""

    code: int
    """Exit code; negative for a signal."""
    stdout: str
    stderr: str
    seconds: float
    memory: int
    """Bytes over those before."""
    deeds: tuple[str, ...]
    """What the audit hook noted."""

    def faults(self) -> list[str]:
        """Say what is wrong with it; nothing if the input was handled."""
        found = list(self.deeds)
        if self.code not in range(4):
            found.append(f"exit {self.code}")
        if "Traceback" in self.stderr:
            found.append("traceback")
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        found += [f"unprintable: {line[:200]!r}" for line in [*self.stdout.splitlines(), *lines] if not _plain(line)]
        errors = [line for line in lines if line.startswith("esdtool: error:")]
        if self.code and len(errors) != 1:
            found.append(f"{len(errors)} lines of error")
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        if self.memory > MEMORY:
            found.append(f"{self.memory / 2**30:.1f} GiB")
        return found


def _plain(line: str) -> bool:
    return all(character.isprintable() or character == "\t" for character in line)


class Sandbox:
    """A process that runs commands on demand, each in a child of its own."""

    def __init__(self) -> None:
        # matplotlib keeps a list of fonts, as any program that draws with it does.
        self._fonts = tempfile.TemporaryDirectory(prefix="esdtool-fuzz-")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
            | {"MPLCONFIGDIR": self._fonts.name},
        )

    def run(self, folder: Path, *words: str, warm: bool = False) -> Outcome:
        """Run `esdtool WORDS` in a folder, of which only `out`, `cache` and `tmp` may change.

        Args:
            folder: the working directory.
            words: arguments; `--python CODE` runs code instead.
            warm: afterwards import what the command has imported, so that it is no part of the next ones' time.
        """
        for name in ("out", "cache", "tmp"):
            (folder / name).mkdir(exist_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "words": words, "warm": warm}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the sandbox has died"
        found = json.loads(answer)
        return Outcome(**(found | {"deeds": tuple(found["deeds"])}))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._fonts.cleanup()


def _serve() -> None:
    """Answer each request on stdin with the outcome of its command."""
    importlib.import_module("esdtool.__main__")
    importlib.import_module("matplotlib.font_manager")  # it asks the system for its fonts, once
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        outcome = _command(request["words"], folder)
        if request["warm"]:
            for module in (folder / "tmp" / "modules").read_text().split():
                with suppress(Exception):  # some exist only where they are made
                    importlib.import_module(module)
            gc.collect()
            gc.freeze()
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


def _command(words: list[str], folder: Path) -> dict[str, Any]:
    files = [folder / "tmp" / name for name in ("stdout", "stderr", "deeds")]
    descriptors = [os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for file in files]
    before = _resident()
    child = os.fork()
    if child == 0:
        _child(words, folder, descriptors)
    started, killed = time.monotonic(), False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        # It waits for something, or is in code that does not listen to RLIMIT_CPU.
        if time.monotonic() - started > 12 * SECONDS and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    texts = []
    for file, descriptor in zip(files, descriptors, strict=True):
        os.close(descriptor)
        texts.append(file.read_text(encoding="utf-8", errors="backslashreplace"))
    deeds = [f"hung for {12 * SECONDS:.0f} s"] if killed else []
    return {
        "code": os.waitstatus_to_exitcode(status),
        "stdout": texts[0],
        "stderr": texts[1],
        "seconds": usage.ru_utime + usage.ru_stime,
        "memory": max(0, usage.ru_maxrss * 1024 - before),
        "deeds": deeds + sorted(set(texts[2].splitlines())),
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _child(words: list[str], folder: Path, descriptors: list[int]) -> None:
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 8 * MEMORY,) * 2)  # for the sake of the machine
        resource.setrlimit(resource.RLIMIT_CPU, (int(3 * SECONDS),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ["ESDTOOL_CACHE_DIR"] = str(folder / "cache")
        tempfile.tempdir = str(folder / "tmp")
        places = [*(folder / name for name in ("out", "cache", "tmp")), Path(os.environ["MPLCONFIGDIR"])]
        _watch([str(place.resolve()) for place in places], descriptors[2])
        if words[0] == "--python":
            exec(words[1], {})
        else:
            sys.argv = ["esdtool", *words]
            importlib.import_module("esdtool.__main__").main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        (folder / "tmp" / "modules").write_text("\n".join(sys.modules))
        os._exit(code)


def _watch(writable: Sequence[str], descriptor: int) -> None:
    """Note what is not allowed from now on."""
    inside: list[str] = []

    def allowed(path: Any) -> bool:
        if isinstance(path, int):
            return True
        where = os.path.realpath(os.fsdecode(path))
        return where == "/dev/null" or any(where == place or where.startswith(place + "/") for place in writable)

    def judge(event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _PROCESS:
            return f"process: {event} {arguments[:1]!r}"
        if event in _NETWORK:
            return f"network: {event} {arguments[1:2]!r}"
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (
                mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
            return f"writes {path!r}" if writes and path is not None and not allowed(path) else None
        if event in _CHANGES:
            paths = [argument for argument in arguments[:2] if isinstance(argument, str | bytes | os.PathLike)]
            return f"{event} {arguments[:2]!r}" if not all(map(allowed, paths)) else None
        if event == "import" and str(arguments[0]).partition(".")[0] in _MODULES:
            return f"imports {arguments[0]}"
        if event == "pickle.find_class" and not str(arguments[0]).startswith(_UNPICKLED):
            return f"unpickles {arguments[0]}.{arguments[1]}"
        return None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if inside:
            return
        inside.append(event)
        try:
            found = judge(event, arguments)
            if found is not None:
                os.write(descriptor, (" ".join(found.split())[:300] + "\n").encode(errors="backslashreplace"))
        finally:
            inside.pop()

    sys.addaudithook(hook)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    # This folder is no place to import from: it would hide modules of the same names.
    sys.path = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]
    _serve()
