# A worker on the CPU. Build from the repository's root: docker build -f docker/worker.Dockerfile .
# Written against the documentation and checked by tests for form; never built in an engine so far.
FROM python:3.11-slim-bookworm AS build
COPY requirements/worker.txt /build/worker.txt
RUN python -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir --require-hashes --no-deps -r /build/worker.txt

FROM python:3.11-slim-bookworm
# paddle's wheel expects the system's OpenMP runtime, in the version that the base image's Debian has.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 widthwise \
    && useradd --system --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin widthwise \
    && install -d -o widthwise -g widthwise /data
COPY --from=build /venv /venv
COPY LICENSE /app/
COPY compression /app/compression
COPY jobs /app/jobs
COPY worker /app/worker
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_INDEX=1 \
    WIDTHWISE_DATA_DIR=/data \
    WIDTHWISE_LOG_FORMAT=json
WORKDIR /app
USER 10001:10001
VOLUME /data
# The reconciler's last pass: see worker/scheduler.py. One that measures first takes a minute.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=2 \
    CMD ["sh", "-c", "test -n \"$(find /data/alive -mmin -3)\""]
# SIGTERM lets the worker stop its job's process and hand the job back.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "worker"]
