# lorastack on a CPU.
#   docker build -t lorastack .
#   docker run -p 50051:50051 -v lorastack:/data lorastack
FROM python:3.11-slim-bookworm AS build
# On x86-64 the default torch wheel brings several GB of CUDA libraries: name PyTorch's CPU index with
# --build-arg PIP_EXTRA_INDEX_URL=... to leave them out.
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /src
# The native kernels are compiled here; the slim image has no compiler.
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++=4:12.* \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt pyproject.toml hatch_build.py README.md LICENSE ./
COPY runtime runtime
RUN python -m venv /opt/lorastack \
    && /opt/lorastack/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --create-home lorastack \
    && mkdir /data \
    && chown lorastack:lorastack /data
COPY --from=build /opt/lorastack /opt/lorastack
ENV PATH=/opt/lorastack/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORASTACK_HOST=0.0.0.0 \
    LORASTACK_STORE=/data/store \
    LORASTACK_CACHE=/data/cache
USER 10001
VOLUME /data
EXPOSE 50051
# The first start downloads and converts the default model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import grpc; from grpc_health.v1 import health_pb2 as h, health_pb2_grpc as g; c = grpc.insecure_channel('127.0.0.1:50051'); s = g.HealthStub(c).Check(h.HealthCheckRequest(), timeout=4).status; raise SystemExit(s != h.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["lorastack", "serve"]
