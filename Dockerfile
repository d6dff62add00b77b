# mergekit-ray on Debian's own Python, for podman, Docker and Kubernetes: docs/container.md.
#
#   docker/build.sh                  torch for the CPU
#   docker/build.sh --torch cuda     torch with the CUDA libraries
#
# Everything is installed under /usr/local, not in a virtual environment: the login shells that KubeRay may start Ray with
# find it on PATH, and Ray builds the environments of jobs that need more packages on top of it instead of copying it.

ARG BASE=docker.io/library/debian:bookworm-slim

# ------------------------------------------------------------------------------------------- common to all stages

FROM ${BASE} AS python
# Pinned to the upstream versions: beyond these Debian only changes packages for security, and we want those updates.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates=20* \
        python-is-python3=3.11.* \
        python3=3.11.* \
        tini=0.19.* \
        wget=1.21.* \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/debconf/*-old \
    # No setuid files.
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 10001 merge \
    && useradd --no-log-init --uid 10001 --gid 10001 --create-home --shell /bin/bash merge

# ------------------------------------------------------------------------------------------------------- installation

FROM python AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv=3.11.* \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip
# pip has an environment of its own and installs for the system's Python, into trees that become layers. torch changes least.
ENV PATH=/opt/pip/bin:$PATH \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore

FROM build AS torch
ARG TORCH=cpu
# Where to get torch, instead of PyTorch's index (cpu) or PyPI (cuda).
ARG TORCH_INDEX=
COPY docker/requirements-${TORCH}.txt /requirements.txt
# Optional secrets: a pip.conf (a mirror, its credentials) and the certificate authority it names.
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    case "${TORCH}" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=https://pypi.org/simple ;; \
        *) echo "TORCH=${TORCH}: one of cpu, cuda" >&2; exit 2 ;; \
    esac \
    && pip --python /usr/bin/python3 install --root /torch --no-deps --require-hashes \
        --index-url "${TORCH_INDEX:-${index}}" --requirement /requirements.txt

FROM build AS dependencies
COPY docker/requirements.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    pip --python /usr/bin/python3 install --root /dependencies --no-deps --require-hashes \
        --requirement /requirements.txt

FROM build AS package
COPY docker/requirements-build.txt /requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf,required=false \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt,required=false \
    pip install --no-deps --require-hashes --requirement /requirements.txt
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY mergekit_ray mergekit_ray
# Install by name, as from an index: pip would record a path as the package's origin, and this stage's paths are gone later.
RUN pip wheel --no-cache-dir --no-deps --no-index --no-build-isolation --wheel-dir /built . \
    && echo mergekit-ray > /requirements.txt \
    && pip --python /usr/bin/python3 install --no-cache-dir --root /package --no-deps --no-index --find-links /built \
        --requirement /requirements.txt

# ----------------------------------------------------------------------------------------------------------- the image

FROM python
COPY --from=torch /torch /
COPY --from=dependencies /dependencies /
COPY --from=package /package /

# NUMBA_CACHE_DIR: merge loops are compiled at first use, for the processor at hand. The package's folder, numba's default
#   place for them, is not writable; /tmp is, even if everything else is read-only.
# NVIDIA_DRIVER_CAPABILITIES: what the container toolkit adds when the container gets a GPU.
ENV LANG=C.UTF-8 \
    NUMBA_CACHE_DIR=/tmp/numba \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

# Writable by any user; some file systems mounted here take over this mode.
RUN install --directory --mode=1777 /data
WORKDIR /data
# By number: Kubernetes cannot check runAsNonRoot for a name.
USER 10001:10001
ENTRYPOINT ["tini", "--"]
CMD ["merge", "--help"]

ARG BASE
ARG CREATED=
ARG REVISION=
ARG TORCH=cpu
ARG VERSION=
LABEL org.opencontainers.image.title="mergekit-ray" \
    org.opencontainers.image.description="Merges LLM checkpoints of any size, on one machine or a Ray cluster" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE}" \
    org.opencontainers.image.created="${CREATED}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.version="${VERSION}" \
    mergekit-ray.torch="${TORCH}"
