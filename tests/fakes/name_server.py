"""A DNS server for tests."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_A = 1
_HEADER_BYTES = 12


@dataclass
class NameServer:
    """It answers, on a UDP `port` of the loopback, that every name has `addresses`."""

    port: int
    addresses: list[str] = field(default_factory=list)

    def answer(self, query: bytes) -> bytes:
        """RFC 1035, section 4.1, for a query of one question."""
        question = query[_HEADER_BYTES : query.index(b"\0", _HEADER_BYTES) + 5]
        (kind,) = struct.unpack(">H", question[-4:-2])
        found = self.addresses if kind == _A else []
        # Each record names the question's name by its place, and may be kept for a second.
        records = [struct.pack(">HHHIH", 0xC00C, _A, 1, 1, 4) + socket.inet_aton(address) for address in found]
        return query[:2] + struct.pack(">5H", 0x8180, 1, len(records), 0, 0) + question + b"".join(records)


@contextmanager
def name_server() -> Iterator[NameServer]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        names = NameServer(bound.getsockname()[1])

        def serve() -> None:
            while query := (received := bound.recvfrom(4096))[0]:
                bound.sendto(names.answer(query), received[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield names
        finally:
            # An empty datagram ends it.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", ("127.0.0.1", names.port))
            thread.join()
