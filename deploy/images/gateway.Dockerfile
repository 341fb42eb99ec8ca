# The gateway, and the migration of its database: no torch, no Ray, no shell. From the repository's root:
#
#     buildah build --format docker -f deploy/images/gateway.Dockerfile -t graft-gateway .
#
# Runs `python3 -m graft.gateway.main`; for the migration, `python3 -m graft.store.main migrate`. Writes to GRAFT_HOME
# alone, so that the rest may be mounted read-only. docs/images.md has arguments, sizes and bills of materials.

# Both are Debian 12 with Python 3.11; compiled files of packages fit each. Give a digest to pin:
# --build-arg BASE_IMAGE=gcr.io/distroless/python3-debian12@sha256:…
ARG BUILD_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG BASE_IMAGE=gcr.io/distroless/python3-debian12:nonroot
# checkov:skip=CKV_DOCKER_7: the tag is in the arguments above, which it does not resolve

# hadolint ignore=DL3006 # the tag is in the argument above
FROM ${BUILD_IMAGE} AS build
WORKDIR /src
# Bytecode that is told apart by its source's digest and not by times, which images do not keep; the same on every build.
ENV SOURCE_DATE_EPOCH=1767225600
# hadolint ignore=DL3008 # Debian's archive keeps one version of a package; nothing of this stage but files is kept
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/locks/build.txt deploy/locks/gateway.txt deploy/locks/
# A private index, its certificate or credentials come as `--secret id=pip,src=pip.conf`, which no layer keeps.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes -r deploy/locks/build.txt \
    && /build/bin/pip install --no-cache-dir --require-hashes --no-deps --target /opt/graft -r deploy/locks/gateway.txt
COPY pyproject.toml README.md ./
COPY deploy/setup/stubs.py deploy/setup/
COPY protos protos
COPY services services
RUN /build/bin/python deploy/setup/stubs.py \
    && /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir /wheels . \
    && /build/bin/pip install --no-cache-dir --no-deps --no-index --target /opt/graft /wheels/*.whl \
    # What nothing here imports: tests and headers of packages, Arrow's RPC server, copies of its libraries under the
    # names that compilers look for, and symbols for debuggers: 70 MB. Libraries that a wheel brings in `*.libs` were
    # patched after they were linked, which strip does not always survive.
    && find /opt/graft -type d -name tests -prune -exec rm -r {} + \
    && rm -r /opt/graft/bin /opt/graft/pyarrow/include \
    && find /opt/graft/pyarrow -maxdepth 1 \
        \( -name '*_flight*' -o -name 'libarrow_*.so' -o -name 'libarrow_*.so.*.*.*' \) -delete \
    && find /opt/graft -type f -name '*.so*' ! -path '*.libs/*' -exec strip --strip-unneeded {} + \
    && mkdir -p /state

# hadolint ignore=DL3006 # the tag is in the argument above
FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="graft-gateway" \
      org.opencontainers.image.description="Graft's gRPC and OpenAI-compatible HTTP edge" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/graft /opt/graft
COPY --from=build --chown=65532:65532 /state /var/lib/graft
ENV PYTHONPATH=/opt/graft \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/graft \
    GRAFT_HOME=/var/lib/graft
WORKDIR /var/lib/graft
# A number: Kubernetes' runAsNonRoot cannot tell what a name stands for.
USER 65532:65532
EXPOSE 8080 50051
# Alive; /readyz says whether store and engine answer as well. Behind TLS or on another port, give one of your own.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
# Distroless has an entry point, its Python; here the command alone says what runs.
ENTRYPOINT []
CMD ["python3", "-m", "graft.gateway.main"]
