FROM python:3.11-slim AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dispatcher dispatcher
COPY workers workers
RUN /opt/venv/bin/pip install ".[flower,postgresql]"


FROM python:3.11-slim

# /app holds what belongs to a deployment: its Celery settings and the package that DISPATCHER_CONFIG names.
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1
RUN useradd --system --uid 10001 --home-dir /app --no-create-home dispatcher
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY celeryconfig.py ./
COPY examples examples
USER 10001

# Every service of docker-compose.yml has its own command and its own health check.
HEALTHCHECK NONE
CMD ["dispatcher", "--help"]
