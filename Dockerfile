# Wheels only, by hash from the lock file: no compiler, the same versions on amd64 and arm64.
ARG PYTHON=python:3.13.14-slim-trixie

FROM ${PYTHON} AS build
# Kernels that run on every processor of the platform. What is said here is said again where they are looked for.
ENV NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=/opt/tss/kernels
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python -m venv --without-pip /opt/tss
# What changes seldom comes first: a change in tss alone rebuilds from `COPY tss` on, in seconds.
COPY requirements.lock ./
RUN pip --python /opt/tss/bin/python install --require-hashes --only-binary :all: -r requirements.lock
# What builds tss itself stays behind in this stage; its versions are the locked ones too.
COPY requirements-dev.lock ./
RUN grep -oE '^[^ #]+==[^ ;]+' requirements-dev.lock >/tmp/pins.txt \
 && pip install --only-binary :all: --constraint /tmp/pins.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY tss ./tss
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && pip --python /opt/tss/bin/python install --no-deps --no-index /dist/*.whl \
 && /opt/tss/bin/python -P -m tss.compiler

FROM ${PYTHON}
LABEL org.opencontainers.image.title="tss" \
      org.opencontainers.image.description="Tail-sampling selector: spans from Kafka in, the traces worth keeping out as an Iceberg table" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Bytecode came with the installation, and the root may be read-only.
ENV PATH="/opt/tss/bin:${PATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# And so did the kernels: with the processor that is named here, no worker compiles.
ENV NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=/opt/tss/kernels
# Only for storage.storage_type=local, whose path is relative: mount a volume here. A new one takes over this owner.
RUN install -d -o 10001 -g 10001 /var/lib/tss
WORKDIR /var/lib/tss
COPY --from=build /opt/tss /opt/tss
# A number, so that Kubernetes can see for itself that it is not root.
USER 10001:10001
EXPOSE 8080 9090
# Liveness, which asks for no other part: a restart heals this process, never Kafka.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('TSS__OBSERVABILITY__HEALTH_PORT', '8080') + '/health/live', timeout=4)"]
ENTRYPOINT ["tss"]
CMD ["run"]
