"""Noticing that another rank has died, whatever this one is doing meanwhile.

Each rank holds a connection to the first one, which the operating system closes when the process at the other end dies,
and gives up by itself when the machine there is gone. A thread waits for that: the main thread may be hours deep in
LAPACK or in a collective.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from esdtool.errors import EsdtoolError
from esdtool.support.launch import Launch
from esdtool.support.words import visible

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_DONE: Final = b"d"
"""Said by a rank before it leaves in good order."""

_REPORTED: Final = b"x"
"""Said by the first rank before it ends because another one died: it has told the user."""

_GRACE = 1.0
"""Seconds between the loss of a rank and the report, in which Ctrl-C that reached all ranks ends this one quietly."""

_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
"""Seconds without a word, seconds between probes, and probes without an answer until a machine counts as gone."""


class LostRanksError(EsdtoolError):
    """Ranks that did not come, or left before the end."""

    def __init__(self, ranks: Iterable[int], what: str) -> None:
        """Name the ranks and say what they did."""
        listed = sorted(ranks)
        names = "rank " + str(listed[0]) if len(listed) == 1 else "ranks " + ", ".join(map(str, listed))
        super().__init__(f"{names} {what}")


class Watch:
    """The connections between the ranks of one job."""

    def __init__(self, launch: Launch, store: Store, *, patience: float, remedy: str) -> None:
        """Connect this rank.

        Args:
            launch: this process among the others.
            store: where the first rank says how to reach it.
            patience: seconds to wait for the others.
            remedy: what to do when one of them is lost, for the message.

        Raises:
            LostRanksError: if others do not come in time.
        """
        self._launch = launch
        self._remedy = remedy
        self._peers: dict[int, socket.socket] = {}
        self._left: set[int] = set()
        self._lock = threading.Lock()
        deadline = time.monotonic() + patience
        if launch.rank == 0:
            self._accept(store, deadline)
        else:
            self._connect(store, deadline)
        for peer in self._peers.values():
            _keep_alive(peer)
        threading.Thread(target=self._wait_for_losses, name="esdtool-watch", daemon=True).start()

    def leave(self) -> None:
        """Say that this rank is done, and that its end is no loss."""
        with self._lock:
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.sendall(_DONE)

    def _accept(self, store: Store, deadline: float) -> None:
        token = secrets.token_hex(16).encode()
        others = set(range(1, self._launch.size))
        with _listen() as server:
            store.set("watch", f"{server.getsockname()[1]} {token.decode()}")
            while others - self._peers.keys():
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    peer, _ = server.accept()
                    peer.settimeout(5.0)
                    said, _, rank = peer.makefile("rb").readline(100).strip().partition(b" ")
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue
                    raise LostRanksError(others - self._peers.keys(), _ABSENT) from None
                except OSError:
                    continue
                if secrets.compare_digest(said, token) and rank.isdigit() and int(rank) in others:
                    self._peers[int(rank)] = peer
                else:
                    peer.close()

    def _connect(self, store: Store, deadline: float) -> None:
        try:
            port, token = store.get("watch").decode().split()
            peer = socket.create_connection(
                (self._launch.address, int(port)), timeout=max(deadline - time.monotonic(), 1.0)
            )
            peer.sendall(f"{token} {self._launch.rank}\n".encode())
        except (RuntimeError, OSError) as error:
            raise LostRanksError([0], _ABSENT) from error
        self._peers[0] = peer

    def _wait_for_losses(self) -> None:
        """Run in a thread of its own until all others have left."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                peer.settimeout(None)
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _receive(self._peers[key.data])
                    if said.startswith(_DONE):
                        selector.unregister(self._peers[key.data])
                    elif said.startswith(_REPORTED):
                        os._exit(1)
                    else:
                        self._report(key.data)

    def _report(self, rank: int) -> NoReturn:
        """End this process, and the others through it: what they wait for will not come."""
        time.sleep(_GRACE)
        with self._lock:
            for other, peer in self._peers.items():
                if other != rank:
                    with suppress(OSError):
                        peer.sendall(_REPORTED)
        message = f"rank {rank} ended before its work was done; {self._remedy}"
        print(f"esdtool: error: {visible(message)}", file=sys.stderr, flush=True)
        os._exit(1)


_ABSENT = "did not come: start all ranks with torchrun, or unset WORLD_SIZE to run in one process"


def _listen() -> socket.socket:
    """Open a port that any machine can reach, as those of gloo are."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(peer: socket.socket) -> None:
    """Let the operating system find out when the machine at the other end is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive(peer: socket.socket) -> bytes:
    """Return what the other end said; nothing if it is gone."""
    try:
        return peer.recv(16)
    except OSError:
        return b""
