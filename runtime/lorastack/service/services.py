"""The gRPC services of a server: their names, their protobuf files, and how they are registered."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lorastack.service.adapters.servicer import AdapterService
from lorastack.service.calls.generation import GenerationService
from lorastack.service.edge.health import Health
from lorastack.v1 import adapters_pb2, generation_pb2
from lorastack.v1.adapters_pb2_grpc import add_AdapterServiceServicer_to_server as add_adapters
from lorastack.v1.generation_pb2_grpc import (
    add_GenerationServiceServicer_to_server as add_generation,
)

OUR_FILES = (generation_pb2.DESCRIPTOR, adapters_pb2.DESCRIPTOR)
FILES = (*OUR_FILES, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
SERVICES = tuple(
    service.full_name for file in OUR_FILES for service in file.services_by_name.values()
)
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


def add_services(
    server: grpc.aio.Server,
    generation: GenerationService,
    adapters: AdapterService,
    health: Health,
) -> None:
    """Registers our services, health and reflection with a server that has not started."""
    add_generation(generation, server)  # type: ignore[no-untyped-call]
    add_adapters(adapters, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
