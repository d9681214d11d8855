# MLflow that keeps its runs in Postgres: docker build -f docker/tracking.Dockerfile -t tessera-tracking:0.1.0 .
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

FROM ${BASE} AS build
ARG PSYCOPG=2.9.13
WORKDIR /build
COPY requirements.lock ./
RUN python3 -m venv /uv \
    && /uv/bin/pip install --no-cache-dir "$(grep '^uv==' requirements.lock)" \
    && python3 -m venv --without-pip /opt/mlflow \
    && /uv/bin/uv pip install --no-cache --compile-bytecode --python /opt/mlflow/bin/python \
        --constraints requirements.lock mlflow boto3 "psycopg2-binary==${PSYCOPG}"

FROM ${BASE}
RUN useradd --create-home --uid 1000 mlflow
COPY --from=build /opt/mlflow /opt/mlflow
ENV PATH=/opt/mlflow/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
USER 1000
WORKDIR /home/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--host=0.0.0.0", "--port=5000"]
