# What cluster nodes run in: docker build -f docker/train.Dockerfile -t tessera-train:0.1.0 .
# BASE may be any image of Debian or Ubuntu with python3 of version 3.11 or newer, such as one with EFA's NCCL plug-in.
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN python3 -m venv /uv \
    && /uv/bin/pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && python3 -m venv --without-pip /opt/tessera/.venv \
    && /uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/tessera/.venv/bin/python \
        --constraints requirements.lock --requirements pyproject.toml
COPY service service
COPY jobs jobs
COPY cluster cluster
COPY datasets_prep datasets_prep
RUN /uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/tessera/.venv/bin/python \
        --no-deps --build-constraints requirements.lock .

FROM ${BASE}
# torch.compile needs a compiler, KubeRay's probes wget, Ray's launcher rsync and, from the head to workers, ssh; Debian
# keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 tessera
COPY --from=build /opt/tessera /opt/tessera
# HOME is where Ray's launcher mounts files, which takes it for /root otherwise.
ENV HOME=/home/tessera \
    PATH=/opt/tessera/.venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/tessera
CMD ["tessera", "--help"]
