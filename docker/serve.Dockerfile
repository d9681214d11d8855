# A registered encoder behind HTTP: docker build -f docker/serve.Dockerfile -t tessera-serve:0.1.0 .
# docker run --init -e MLFLOW_TRACKING_URI -p 8080:8080 tessera-serve:0.1.0 models:/demo/1
# MLflow's own server answers /ping, /version and /invocations (uint8 images (B, H, W, 3) to features (B, D)).
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /build
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN python3 -m venv /uv \
    && /uv/bin/pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && python3 -m venv --without-pip /opt/tessera/.venv \
    && /uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/tessera/.venv/bin/python \
        --constraints requirements.lock boto3 mlflow numpy pydantic safetensors torch
COPY service service
COPY jobs jobs
COPY cluster cluster
COPY datasets_prep datasets_prep
RUN /uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/tessera/.venv/bin/python \
        --no-deps --build-constraints requirements.lock .

FROM ${BASE}
RUN useradd --create-home --uid 1000 tessera
COPY --from=build /opt/tessera /opt/tessera
ENV PATH=/opt/tessera/.venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/tessera
EXPOSE 8080
ENTRYPOINT ["mlflow", "models", "serve", "--env-manager=local", "--host=0.0.0.0", "--port=8080", "--model-uri"]
CMD ["models:/demo/1"]
