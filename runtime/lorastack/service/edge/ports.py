"""Where a server listens: its ports are bound before the model loads, and kept until it serves."""

from __future__ import annotations

import errno
import logging
import socket
from ipaddress import ip_address
from typing import Any

import grpc

from lorastack.config import ServiceConfig
from lorastack.errors import InvalidArgumentError

logger = logging.getLogger(__name__)


class Ports:
    """The ports of a configuration, bound but not listened on: whoever connects is refused."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises InvalidArgumentError for a port that is taken or a host that is not ours."""
        self._sockets: list[socket.socket] = []
        try:
            port = self._reserve(config.host, config.port, "--port")
            if config.metrics_port:
                self._reserve(config.host, config.metrics_port, "--metrics-port")
            if config.http is not None and config.http.port:
                self._reserve(config.host, config.http.port, "--http-port")
        except BaseException:
            self.close()
            raise
        self._address = _address(config.host, port)

    def listen(self, server: grpc.aio.Server) -> str:
        """Lets the server listen on the port, and gives up all of ours. Returns its address.

        Raises InvalidArgumentError if another process was faster.
        """
        hosts = {str(bound.getsockname()[0]).partition("%")[0] for bound in self._sockets}
        if not all(ip_address(host).is_loopback for host in hosts):
            logger.warning(
                "%s can be reached from other machines: there is no authentication and no TLS, so "
                "whoever does may use, replace and delete everything (docs/security.md)",
                self._address,
            )
        for bound in self._sockets:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # gRPC's has it too
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError:
            port = 0
        finally:
            self.close()
        if port == 0:
            raise InvalidArgumentError(
                f"cannot listen on {self._address}: another process does; choose another --port"
            )
        return self._address

    def close(self) -> None:
        """Gives the ports back. May be called again."""
        for bound in self._sockets:
            bound.close()
        self._sockets.clear()

    def _reserve(self, host: str, port: int, flag: str) -> int:
        """Binds every address of the host, as gRPC will. Returns the port: for 0, a free one."""
        problem: OSError | ValueError | None = None
        num_before = len(self._sockets)
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:  # ValueError: it cannot be a host's name
            addresses, problem = [], error
        for family, _, _, _, address in addresses:
            try:
                self._sockets.append(_bind(family, (address[0], port, *address[2:])))
            except OSError as error:
                problem = error
                if error.errno == errno.EADDRINUSE:
                    break
            else:
                port = self._sockets[-1].getsockname()[1]
        number = getattr(problem, "errno", None)
        if number == errno.EADDRINUSE:
            why = f"another process has it; choose another {flag}"
        elif number == errno.EACCES:
            why = f"this user may not; choose a {flag} from 1024 on"
        elif len(self._sockets) == num_before:
            why = "not an address of this machine; choose another --host"
        else:  # an address of another family that is switched off here
            return port
        raise InvalidArgumentError(f"cannot listen on {_address(host, port)}: {why}") from problem


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    """A socket that is bound, as exclusively as can be. Raises OSError."""
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            bound.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # Connections of an earlier server may be ending; one that listens is in the way still.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
