"""`jaxserve health`: a probe for scripts and containers."""

from __future__ import annotations

import sys
from typing import Any, cast

from jaxserve.cli.arguments import add_dataclass_flags, command_parser, given
from jaxserve.server.config import ConnectionConfig


def main(argv: list[str]) -> int:
    """Prints the server's state; 0 if it is serving, else 1."""
    parser = command_parser(
        "health", "Ask a server whether it is ready: prints SERVING and exits with 0, or 1."
    )
    parser.add_argument(
        "--server", metavar="HOST:PORT", default="127.0.0.1:50051", help="default: %(default)s"
    )
    parser.add_argument(
        "--service", metavar="NAME", default="", help="a service's full name; default: the server as a whole"
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=float, default=5.0, help="default: %(default)s")
    add_dataclass_flags(parser, ConnectionConfig, "connection options")
    arguments = parser.parse_args(argv)
    connection = ConnectionConfig(**given(arguments, ConnectionConfig))
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from jaxserve.server.errors import from_rpc_error
    from jaxserve.server.security import call_metadata, open_channel

    with open_channel(grpc, arguments.server, connection) as channel:
        stub = cast(Any, health_pb2_grpc.HealthStub(channel))
        try:
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=arguments.service),
                timeout=arguments.timeout,
                metadata=call_metadata(connection),
            )
        except grpc.RpcError as error:
            print(from_rpc_error(error, arguments.server), file=sys.stderr)
            return 1
    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(state)
    return 0 if state == "SERVING" else 1
