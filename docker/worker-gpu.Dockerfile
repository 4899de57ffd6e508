# A worker on an NVIDIA GPU. NEVER BUILT OR RUN SO FAR: no engine and no GPU were at hand.
#
# Paddle 3.x for GPUs is not on PyPI; it comes from Paddle's own package index, in a folder for
# each CUDA version. Its wheels bring the CUDA libraries along as packages, so the host needs the
# NVIDIA driver and container toolkit alone. Name the index when you build:
#     docker build -f docker/worker-gpu.Dockerfile --build-arg PADDLE_INDEX=<address of cu126> .
# What comes from that index is pinned by version and not by hash: it is not in our locks.
# Paddle's container images (for example paddlepaddle/paddle:3.0.0-gpu-cuda12.6-cudnn9.5-trt10.5)
# are the other documented way; their Python must be 3.11 or 3.12 to serve as a base here.
FROM python:3.11-slim-bookworm AS build
ARG PADDLE_INDEX
ARG PADDLE_GPU_VERSION=3.3.1
COPY requirements/worker.txt /build/worker.txt
# The lock without the CPU build of paddle: its entry runs up to the next line that starts a name.
RUN test -n "$PADDLE_INDEX" || { echo "pass --build-arg PADDLE_INDEX=<address>" >&2; exit 1; } \
    && awk '/^[a-z]/ { keep = !/^paddlepaddle==/ } keep || /^#/' /build/worker.txt > /build/lock.txt \
    && python -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir --require-hashes --no-deps -r /build/lock.txt \
    && sed -n 's/^\([a-z][^ ]*==[^ ]*\) .*/\1/p' /build/lock.txt > /build/versions.txt \
    && /venv/bin/python -m pip install --no-cache-dir --extra-index-url "$PADDLE_INDEX" \
        --constraint /build/versions.txt "paddlepaddle-gpu==$PADDLE_GPU_VERSION"

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
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    WIDTHWISE_DATA_DIR=/data \
    WIDTHWISE_LOG_FORMAT=json
WORKDIR /app
USER 10001:10001
VOLUME /data
# The reconciler's last pass: see worker/scheduler.py. One that measures first takes a minute.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=2 \
    CMD ["sh", "-c", "test -n \"$(find /data/alive -mmin -3)\""]
STOPSIGNAL SIGTERM
CMD ["python", "-m", "worker"]
