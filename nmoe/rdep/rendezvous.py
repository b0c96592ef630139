"""How the ranks of a node find each other: a Unix-domain socket between every two, and each other's memory.

The store of the launch (torchrun's, or rank 0's own) tells a rank where its peers listen. A listening
socket has an abstract name that the kernel chooses: there is no file to leave behind. Both ends see by
SO_PEERCRED that the other belongs to the same user, and by a greeting that it belongs to the same run and
the same sizes. The descriptor of each rank's memory travels with its greeting.
"""

import json
import os
import secrets
import socket
import struct
from datetime import timedelta

import attrs
import torch

from nmoe.errors import RunError, fail

GREETING_BYTES = 4096


@attrs.frozen
class Peer:
    """A connected socket to another rank, and the descriptor of its memory; the receiver closes both."""

    end: socket.socket
    memory: int


def launch_store(timeout_s: float) -> torch.distributed.Store:
    """The store of the launch: torchrun's, or at MASTER_ADDR and MASTER_PORT with rank 0 as its server.

    RunError N0805 if the ranks do not come together there within timeout_s.
    """
    try:
        store, _, _ = next(iter(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
    except RuntimeError as error:
        raise fail(
            "N0805",
            f"the ranks of the launch have not come together: {str(error).splitlines()[0]}",
            place="MASTER_ADDR and MASTER_PORT",
            help="start all ranks together, as torchrun does",
        ) from error
    return store


def meet(
    store: torch.distributed.Store, *, rank: int, ranks: range, memory: int, sizes: str, timeout_s: float
) -> dict[int, Peer]:
    """Every other rank of the node.

    store: shared by these ranks alone, for one meeting. ranks: theirs, in the launch. memory: the descriptor of this
    rank's. sizes: must be equal on all.
    RunError N0805 if somebody does not come within timeout_s, cannot be reached, or is of another plan.
    """
    store = torch.distributed.PrefixStore("rdep", store)
    peers: dict[int, Peer] = {}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with listener:
            listener.settimeout(timeout_s)
            listener.bind("")
            listener.listen(len(ranks))
            store.set_timeout(timedelta(seconds=timeout_s))
            if rank == ranks[0]:
                store.set("run", secrets.token_hex(16))
            store.set(f"address/{rank}", listener.getsockname())
            run = _get(store, "run", ranks[0], timeout_s).decode()
            mine = json.dumps({"run": run, "rank": rank, "sizes": sizes}).encode()
            for peer in range(ranks[0], rank):
                end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                end.settimeout(timeout_s)
                try:
                    end.connect(_get(store, f"address/{peer}", peer, timeout_s))
                    socket.send_fds(end, [mine], [memory])
                    _, peers[peer] = _greeted(end, run, sizes, expected=peer)
                except BaseException:
                    end.close()
                    raise
            while len(peers) < len(ranks) - 1:
                end, _ = listener.accept()
                end.settimeout(timeout_s)
                try:
                    name, peer_end = _greeted(end, run, sizes, expected=None)
                    socket.send_fds(end, [mine], [memory])
                except BaseException:
                    end.close()
                    raise
                peers[name] = peer_end
    except BaseException as error:
        for known in peers.values():
            known.end.close()
            os.close(known.memory)
        if isinstance(error, OSError):
            missing = ", ".join(str(peer) for peer in ranks if peer != rank and peer not in peers)
            why = f" within {timeout_s:g} s" if isinstance(error, TimeoutError) else f": {error}"
            raise fail(
                "N0805",
                f"rank {rank} cannot meet rank {missing}{why}",
                place="rendezvous of the ranks of a node",
                help=f"look at what rank {missing} wrote; a node's ranks share one machine and one network namespace",
            ) from error
        raise
    return peers


def _get(store: torch.distributed.Store, key: str, peer: int, timeout_s: float) -> bytes:
    try:
        found: bytes = store.get(key)
    except RuntimeError as error:
        late, first = "timeout" in str(error).lower(), str(error).splitlines()[0]
        raise fail(
            "N0805",
            f"rank {peer} has not come" + (f" within {timeout_s:g} s" if late else f": {first}"),
            place="rendezvous of the ranks of a node",
            help=f"look at what rank {peer} wrote",
        ) from error
    return found


def _greeted(end: socket.socket, run: str, sizes: str, *, expected: int | None) -> tuple[int, Peer]:
    """The rank and the memory of whoever is at the other end."""
    _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    message, files, _, _ = socket.recv_fds(end, GREETING_BYTES, 1)
    try:
        found = json.loads(message) if message else {}
    except ValueError:
        found = {}
    if user != os.getuid() or found.get("run") != run or len(files) != 1 or expected not in (None, found["rank"]):
        problem = "somebody else is at the other end"
    elif found["sizes"] != sizes:
        problem = f"rank {found['rank']} has other sizes: {found['sizes']}, and here {sizes}"
    else:
        return found["rank"], Peer(end, files[0])
    for file in files:
        os.close(file)
    raise RunError(
        fail(
            "N0805",
            problem,
            place="rendezvous of the ranks of a node",
            help="all ranks must run the same plan, started together",
        ).diagnostics
    )
