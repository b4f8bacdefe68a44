"""Importing this closes the network: only connections to this machine are let through."""

import socket

_HERE = ("127.", "::1", "localhost")


def _here_only(connect):
    def guarded(self, address):
        remote = self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_HERE)
        if remote:
            raise ConnectionRefusedError(f"the tests run without network, but something connects to {address[0]}")
        return connect(self, address)

    return guarded


socket.socket.connect = _here_only(socket.socket.connect)
socket.socket.connect_ex = _here_only(socket.socket.connect_ex)
