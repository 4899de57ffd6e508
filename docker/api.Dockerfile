# The API: no paddle. Build from the repository's root: docker build -f docker/api.Dockerfile .
# Written against the documentation and checked by tests for form; never built in an engine so far.
FROM python:3.11-slim-bookworm AS build
COPY requirements/api.txt /build/api.txt
RUN python -m venv /venv \
    && /venv/bin/python -m pip install --no-cache-dir --require-hashes --no-deps -r /build/api.txt

FROM python:3.11-slim-bookworm
RUN groupadd --system --gid 10001 widthwise \
    && useradd --system --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin widthwise \
    && install -d -o widthwise -g widthwise /data
COPY --from=build /venv /venv
COPY LICENSE /app/
COPY compression /app/compression
COPY jobs /app/jobs
COPY api /app/api
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    WIDTHWISE_DATA_DIR=/data \
    WIDTHWISE_HOST=0.0.0.0 \
    WIDTHWISE_LOG_FORMAT=json
WORKDIR /app
USER 10001:10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["python", "-m", "api"]
