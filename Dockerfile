# lorastack on a CPU, or on an NVIDIA GPU:
#   docker build --target cpu -t lorastack:cpu .
#   docker build --target cuda -t lorastack:cuda .
# or `make images`, which builds both and tries what is in them.
# A model, default Medusa heads that the server pulls at its first start, and a volume that keeps
# both:
#   docker run --gpus all -p 50051:50051 -v "$PWD/data":/data lorastack:cuda \
#     --model mistralai/Mistral-7B-Instruct-v0.2 \
#     --medusa predibase/Mistral-7B-Instruct-v0.2-medusa --pull-org predibase
# Without --gpus all, on lorastack:cpu, the same; there --quantize int8 halves what the model takes.
# A folder that is mounted at /data must be writable for user 10001. Models behind a login want
# -e HF_TOKEN.

FROM python:3.11-slim-bookworm AS base
RUN useradd --system --uid 10001 --create-home lorastack \
    && mkdir /data \
    && chown lorastack:lorastack /data
ENV PATH=/opt/lorastack/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORASTACK_HOST=0.0.0.0 \
    LORASTACK_STORE=/data/store \
    LORASTACK_CACHE=/data/cache \
    HF_HOME=/data/hub
VOLUME /data
EXPOSE 50051
# The first start downloads models and adapters.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import grpc; from grpc_health.v1 import health_pb2 as h, health_pb2_grpc as g; c = grpc.insecure_channel('127.0.0.1:50051'); s = g.HealthStub(c).Check(h.HealthCheckRequest(), timeout=4).status; raise SystemExit(s != h.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["lorastack", "serve"]

# The native kernels are compiled here; the slim image has no compiler.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN apt-get update \
    && apt-get install --no-install-recommends -y g++=4:12.* \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/lorastack
COPY constraints.txt pyproject.toml hatch_build.py README.md LICENSE ./
COPY runtime runtime

# PyTorch's own index has wheels without the GPU libraries, which take several GB; a mirror of it
# can be named. Its version is newer than the same one of the package index ("+cpu"), so pip takes it.
FROM build AS build-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/lorastack/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt .

# The wheel of the package index brings the CUDA libraries; the driver is the host's.
FROM build AS build-cuda
RUN /opt/lorastack/bin/pip install --no-cache-dir -c constraints.txt .

# Triton compiles a launcher for each kernel where it runs: with a C compiler and the headers of
# Python, which this image has. What it made is kept with the rest of the data.
FROM base AS cuda
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc=4:12.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/data/cache/triton
COPY --from=build-cuda /opt/lorastack /opt/lorastack
USER 10001

# The last stage is what `docker build` makes without --target.
FROM base AS cpu
COPY --from=build-cpu /opt/lorastack /opt/lorastack
USER 10001
